"""The SDK: clients, traces, handles, jobs and results. It holds no weights and imports no torch."""
