"""Retrieval by length and depth."""
