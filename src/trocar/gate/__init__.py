"""The only way out: keys, budgets and the log of every bit that was charged. Knows no torch and no HTTP."""
