"""Evaluation of trained models."""

from dynamask.evaluation.perplexity import PositionPerplexity, perplexity_by_position
from dynamask.evaluation.retrieval import RetrievalScore, evaluate_retrieval

__all__ = ["PositionPerplexity", "RetrievalScore", "evaluate_retrieval", "perplexity_by_position"]
