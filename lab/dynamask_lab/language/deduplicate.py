"""Exact and near duplicates out of a stream of documents: MinHash over word shingles, banded (LSH).

One hash function and one value per bin (one-permutation hashing, NIPS 2012, with rotation densification,
arXiv 1406.4784) instead of one permutation per value: a document costs one pass over its shingles.
"""

from __future__ import annotations

import hashlib
import re
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np

from dynamask.data.sources import Document
from dynamask.errors import InvalidInputError

_WORD = re.compile(r"\w+")
_EMPTY = np.iinfo(np.uint64).max
_ODD = np.uint64(0x9E3779B97F4A7C15)


@dataclass
class Deduplicator:
    """Tells whether a document was seen before, word for word or nearly.

    Args:
        threshold: Jaccard similarity of the shingle sets from which two documents count as one, 0 to 1.
        shingle: words per shingle.
        bands, rows: of the signature. Two documents are compared when all rows of a band agree, which at similarity s
            happens with probability 1 - (1 - s**rows)**bands.

    Attributes:
        exact, near: documents turned away so far, by kind.

    Raises:
        InvalidInputError: a threshold outside (0, 1], or sizes below 1.
    """

    threshold: float = 0.7
    shingle: int = 5
    bands: int = 32
    rows: int = 4
    exact: int = 0
    near: int = 0
    _texts: set[bytes] = field(default_factory=set, repr=False)
    _bands: list[dict[bytes, int]] = field(default_factory=list, repr=False)
    _signatures: list[np.ndarray] = field(default_factory=list, repr=False)
    _words: dict[str, int] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if not 0 < self.threshold <= 1:
            raise InvalidInputError(f"threshold is a similarity above 0 and up to 1; got {self.threshold}")
        for name in ("shingle", "bands", "rows"):
            if getattr(self, name) < 1:
                raise InvalidInputError(f"{name} must be at least 1; got {getattr(self, name)}")
        self._bands = [{} for _ in range(self.bands)]

    def is_new(self, text: str) -> bool:
        """Whether nothing like the text was given before; if so it is remembered."""
        return self.admits(*self.look(text))

    def look(self, text: str) -> tuple[bytes, np.ndarray]:
        """What a text is compared by: a digest of its words, and its signature. Other processes may compute it."""
        words = _WORD.findall(text)
        digest = hashlib.blake2b(" ".join(words).encode("utf-8", "surrogatepass"), digest_size=16).digest()
        return digest, self.signature(words)

    def admits(self, digest: bytes, signature: np.ndarray) -> bool:
        """Whether nothing like the text of these (see `look`) was given before; if so it is remembered."""
        if digest in self._texts:
            self.exact += 1
            return False
        self._texts.add(digest)
        keys = [signature[i * self.rows : (i + 1) * self.rows].tobytes() for i in range(self.bands)]
        candidates = {table[key] for table, key in zip(self._bands, keys, strict=True) if key in table}
        if any(np.mean(signature == self._signatures[other]) >= self.threshold for other in candidates):
            self.near += 1
            return False
        self._signatures.append(signature)
        for table, key in zip(self._bands, keys, strict=True):
            table[key] = len(self._signatures) - 1  # the latest: files like it tend to come next
        return True

    def signature(self, words: list[str]) -> np.ndarray:
        """(bands · rows,) uint64; two signatures agree in a share of places near the sets' Jaccard similarity."""
        size = self.bands * self.rows
        hashes = np.fromiter((self._hash(word) for word in words), dtype=np.uint64, count=len(words))
        count = max(1, len(words) - self.shingle + 1)
        mixed = np.zeros(count, dtype=np.uint64)
        for place in range(min(self.shingle, len(words))):
            mixed = _mix(mixed * _ODD + hashes[place : place + count])
        signature = np.full(size, _EMPTY, dtype=np.uint64)
        np.minimum.at(signature, (mixed % np.uint64(size)).astype(np.intp), mixed)
        return _densified(signature)

    def _hash(self, word: str) -> int:
        found = self._words.get(word)
        if found is None:
            data = word.encode("utf-8", "surrogatepass")
            found = self._words[word] = (zlib.crc32(data) << 32) | zlib.adler32(data)
        return found


def deduplicated(documents: Iterable[Document], deduplicator: Deduplicator | None = None) -> Iterator[Document]:
    """The documents of which none like them came before, in their order."""
    seen = deduplicator or Deduplicator()
    return (document for document in documents if seen.is_new(document.text))


def _mix(values: np.ndarray) -> np.ndarray:
    """Scatters the bits of uint64 values (the finaliser of splitmix64)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _densified(signature: np.ndarray) -> np.ndarray:
    """Empty bins filled from the next full one, offset by the distance so that equal fillings mean equal sources."""
    full = np.flatnonzero(signature != _EMPTY)
    if full.size in (0, signature.size):
        return signature
    place = np.arange(signature.size)
    source = full[np.searchsorted(full, place) % full.size]
    distance = (source - place) % signature.size
    return signature[source] + distance.astype(np.uint64) * _ODD
