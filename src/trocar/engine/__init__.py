"""Engines: one protocol, one device-side executor. Accepted programs in, arrays out."""
