"""Serving dynamask models in other engines."""
