"""HTTP: bytes in, `Released` out. It decodes, names the caller, and calls one use case; it decides nothing."""
