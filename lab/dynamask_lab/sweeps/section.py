"""What an experiment contributes to the report: tables, pictures, and what they say about the paper's claims."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

Row = Mapping[str, str]
"""Column -> cell of a table."""


@dataclass(frozen=True)
class Exhibit:
    """A table, a picture, or both, of the same figures.

    Attributes:
        name: short, unique within its section; file names and links are made of it.
        title: what it shows, as a heading.
        keys: which raw rows it is made of: `Record.key` of an experiment, paths such as "attention[3]" of a file.
        text: how to read it, markdown.
        table: its rows; the columns are those of any row, in order of appearance.
        picture: the picture's file, in the folder the section was given.
        alt: what the picture shows, for those who cannot see it.
    """

    name: str
    title: str
    keys: Sequence[str]
    text: str = ""
    table: Sequence[Row] = ()
    picture: Path | None = None
    alt: str = ""


@dataclass(frozen=True)
class Finding:
    """A claim against what was measured; the verdict is computed, never typed in.

    Attributes:
        claim: its name in `dynamask_lab.report.claims.CLAIMS`.
        subject: which form or part of the library the figure is about, such as "dma, paper's form".
        measured: the figure, in words.
        held: whether it bears the claim out; None where the figures do not suffice.
        keys: the raw rows behind it, as in `Exhibit`.
    """

    claim: str
    subject: str
    measured: str
    held: bool | None
    keys: Sequence[str]


@dataclass(frozen=True)
class Section:
    """What the finished runs of one sweep look like in the report.

    Attributes:
        text: what was done, markdown.
        exhibits: in order.
        findings: at most one per claim and subject.
    """

    text: str
    exhibits: Sequence[Exhibit] = ()
    findings: Sequence[Finding] = field(default_factory=tuple)


def judged_forms(*kinds: Sequence[str], loss: Callable[[str], float]) -> list[str]:
    """Names of dma's forms that a claim is held against, of the many that a table has: the paper's, the library's, and
    of each kind the one of least loss."""
    found = [name for name in ("dma, paper", "dma") if any(name in kind for kind in kinds)]
    best = [min(kind, key=loss) for kind in kinds if kind]
    return list(dict.fromkeys([*found, *best]))


def gains_hold(gains: Sequence[float]) -> bool | None:
    """Whether pairs of runs bear out a gain: every one of at least two. None: a single pair, whose gain may be luck."""
    if min(gains) <= 0:
        return False
    return True if len(gains) > 1 else None
