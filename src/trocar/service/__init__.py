"""Use cases: the only place where engine, store, analysis and gate meet."""
