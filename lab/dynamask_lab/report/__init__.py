"""`docs/results`, drawn from the raw lines."""
