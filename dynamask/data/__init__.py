"""Text in, packed training blocks out: sources -> tokenizer -> memory-mapped shards -> blocks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dynamask.lazy import lazy_names

if TYPE_CHECKING:
    from dynamask.data.dataset import PackedDataset
    from dynamask.data.shards import Corpus, prepare
    from dynamask.data.sources import Document, documents
    from dynamask.data.tokenizer import encode_text, load_tokenizer, train_tokenizer

_HOME = {
    "Corpus": "dynamask.data.shards",
    "Document": "dynamask.data.sources",
    "PackedDataset": "dynamask.data.dataset",
    "documents": "dynamask.data.sources",
    "encode_text": "dynamask.data.tokenizer",
    "load_tokenizer": "dynamask.data.tokenizer",
    "prepare": "dynamask.data.shards",
    "train_tokenizer": "dynamask.data.tokenizer",
}
"""Public name -> the module that defines it, imported on first use: a look for sources needs no tokenizer."""

__all__ = [
    "Corpus",
    "Document",
    "PackedDataset",
    "documents",
    "encode_text",
    "load_tokenizer",
    "prepare",
    "train_tokenizer",
]

__getattr__, __dir__ = lazy_names(__name__, _HOME)
