"""Evaluation of trained models."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dynamask.lazy import lazy_names

if TYPE_CHECKING:
    from dynamask.evaluation.perplexity import PositionPerplexity, perplexity_by_position
    from dynamask.evaluation.retrieval import RetrievalScore, evaluate_retrieval

_HOME = {
    "PositionPerplexity": "dynamask.evaluation.perplexity",
    "RetrievalScore": "dynamask.evaluation.retrieval",
    "evaluate_retrieval": "dynamask.evaluation.retrieval",
    "perplexity_by_position": "dynamask.evaluation.perplexity",
}
"""Public name -> the module that defines it, imported on first use: the name of a task needs no torch."""

__all__ = ["PositionPerplexity", "RetrievalScore", "evaluate_retrieval", "perplexity_by_position"]

__getattr__, __dir__ = lazy_names(__name__, _HOME)
