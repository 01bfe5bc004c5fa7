"""The process with the weights and the rows: no network, no ledger, no words of its own to anybody but its log."""
