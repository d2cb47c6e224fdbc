"""Retrieval tasks after RULER's definitions (arXiv 2404.06654): find what stands far back in a text."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dynamask.evaluation.retrieval.haystack import Haystack
from dynamask.evaluation.retrieval.mixture import mixture
from dynamask.evaluation.retrieval.tasks import TASKS, RetrievalExample, check_task, least_length, make_example
from dynamask.lazy import lazy_names

if TYPE_CHECKING:
    from dynamask.evaluation.retrieval.scores import RetrievalScore, evaluate_retrieval, read_scores, write_scores

_SCORES = ("RetrievalScore", "evaluate_retrieval", "read_scores", "write_scores")

__all__ = [
    "TASKS",
    "Haystack",
    "RetrievalExample",
    "RetrievalScore",
    "check_task",
    "evaluate_retrieval",
    "least_length",
    "make_example",
    "mixture",
    "read_scores",
    "write_scores",
]

__getattr__, __dir__ = lazy_names(__name__, dict.fromkeys(_SCORES, "dynamask.evaluation.retrieval.scores"))
