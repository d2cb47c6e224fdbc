"""Turn existing models into models whose attention runs on dynamask."""

from dynamask.convert.upcycle import from_doge, upcycle

__all__ = ["from_doge", "upcycle"]
