"""Every op beside what a user would write otherwise: `pytest benchmarks`, then `python -m benchmarks.report`."""
