"""Commands: `python -m experiments.rotation`, `classification`, `prepare`."""
