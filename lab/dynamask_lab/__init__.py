"""Experiments with dynamask: sweeps, studies, benchmarks, masks and the report. Not part of the product."""
