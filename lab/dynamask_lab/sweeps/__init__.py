"""The runner of sweeps: schedule, workers, results, provenance."""
