"""The process that speaks HTTP: no keys, no books, no weights. It passes on what the gate made."""
