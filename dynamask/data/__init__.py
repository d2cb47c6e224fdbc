"""Text in, packed training blocks out: sources -> tokenizer -> memory-mapped shards -> blocks."""

from dynamask.data.dataset import PackedDataset
from dynamask.data.shards import Corpus, prepare
from dynamask.data.sources import Document, documents
from dynamask.data.tokenizer import encode_text, load_tokenizer, train_tokenizer

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
