"""Evaluation of trained models."""

from dynamask.evaluation.perplexity import PositionPerplexity, perplexity_by_position

__all__ = ["PositionPerplexity", "perplexity_by_position"]
