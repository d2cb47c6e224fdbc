"""Retrieval tasks after RULER's definitions (arXiv 2404.06654): find what stands far back in a text."""

from dynamask.evaluation.retrieval.haystack import Haystack
from dynamask.evaluation.retrieval.mixture import mixture
from dynamask.evaluation.retrieval.scores import RetrievalScore, evaluate_retrieval, read_scores, write_scores
from dynamask.evaluation.retrieval.tasks import TASKS, RetrievalExample, least_length, make_example

__all__ = [
    "TASKS",
    "Haystack",
    "RetrievalExample",
    "RetrievalScore",
    "evaluate_retrieval",
    "least_length",
    "make_example",
    "mixture",
    "read_scores",
    "write_scores",
]
