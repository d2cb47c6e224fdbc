"""What an experiment contributes to the report: tables, pictures, and what they say about the paper's claims."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dynamask.errors import InvalidInputError
from dynamask_lab.sweeps.verdicts import VERDICTS

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
        caption: how to read the picture and the table, markdown; stands below the picture.
    """

    name: str
    title: str
    keys: Sequence[str]
    text: str = ""
    table: Sequence[Row] = ()
    picture: Path | None = None
    alt: str = ""
    caption: str = ""


@dataclass(frozen=True)
class Finding:
    """A claim against what was measured; the verdict is computed, never typed in.

    Attributes:
        claim: its name in `dynamask_lab.report.claims.CLAIMS`.
        subject: which form or part of the library the figure is about, such as "dma, paper".
        measured: the figure and its 95% interval, in words; positive differences are in the form's favour.
        verdict: one of `dynamask_lab.sweeps.verdicts.VERDICTS`.
        keys: the raw rows behind it, as in `Exhibit`.
        role: "plain" (the paper's form), "best" (the form named beforehand) or "control"; "" for other parts.
        setting: window over context, size, seeds and share of dense attention's pairs, where the figure has them.
        interest: the smallest difference of interest, in words.
        difference: the figure in short, with interval and unit: to dense attention where that was a rival.
        note: what stands beside the verdict wherever it is shown, such as whose spread its interval has; "" for none.
            A finding with a note is a row of its own among the goals, and decides no other row.
    """

    claim: str
    subject: str
    measured: str
    verdict: str
    keys: Sequence[str]
    role: str = ""
    setting: Row = field(default_factory=dict)
    interest: str = ""
    difference: str = ""
    note: str = ""

    def __post_init__(self) -> None:
        if self.verdict not in VERDICTS:
            raise InvalidInputError(f"a verdict is one of {', '.join(VERDICTS)}; got {self.verdict!r}")


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
