"""Timings against peers, each correct first: `cpu.py` and `gpu.py`, with one results format."""
