"""The process that checks, charges and releases: the only one with the ledger, without weights and without HTTP."""
