"""A section of the report: what an experiment found, as plain data that any page can show."""

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from defquant.experiments.cells import Cell
from defquant.experiments.store import Results
from defquant.results import MASKED, Score, blind

__all__ = [
    "Answer", "Entry", "Line", "Number", "Panel", "Reading", "Section", "Table", "Verdict",
    "difference", "number",
]  # fmt: skip


@dataclass(frozen=True)
class Number:
    """A quantity of ours and the paper's beside it; accuracies and rates lie in [0, 1].

    Attributes:
        mean: over the seeds; None where nothing was measured.
        spread: standard deviation over the seeds (n - 1); 0 for one.
        seeds: how many.
        images: test images of one seed.
        low, high: Wilson's 95 % interval of all seeds' images together.
        paper: the paper's; None where it has none.
        vanishing: largest share of images on which the attack was blind.
        points: it is a difference of accuracies, shown with its sign.
        cells: keys of the cells that it comes from; `reproduce --cell KEY` makes one alone.
    """

    mean: float | None
    spread: float = 0.0
    seeds: int = 0
    images: int = 0
    low: float | None = None
    high: float | None = None
    paper: float | None = None
    vanishing: float = 0.0
    points: bool = False
    cells: tuple[str, ...] = ()

    @property
    def masked(self) -> bool:
        """Whether the attack was blind on over 1 % of the images, so that it overstates."""
        return self.vanishing > MASKED and self.mean is not None and not self.points

    @property
    def gap(self) -> float | None:
        """Ours minus the paper's."""
        return None if self.mean is None or self.paper is None else self.mean - self.paper


Entry = str | Number | None
"""What stands in a table's place: words, a number, or nothing."""


@dataclass(frozen=True)
class Table:
    """Rows below `head`, as many entries each; `caption` says what the numbers are.

    `percent`, as in a `Panel`: they are accuracies or rates; else plain numbers such as distances.
    """

    head: tuple[str, ...]
    rows: tuple[tuple[Entry, ...], ...]
    caption: str = ""
    percent: bool = True


@dataclass(frozen=True)
class Line:
    """A line of a figure: (place on the x axis, number). `paper` where the paper's numbers are
    drawn, read from its tables; `kind` names the colour: equal kinds, equal colours.
    """

    label: str
    points: tuple[tuple[str, Number], ...]
    kind: str = ""
    paper: bool = False


@dataclass(frozen=True)
class Panel:
    """One small multiple. The places of its lines' points make up the x axis, in order."""

    title: str
    x: str
    y: str
    lines: tuple[Line, ...]
    percent: bool = True


@dataclass(frozen=True)
class Section:
    """A table or figure of the paper, made again.

    Attributes:
        name: on the command line.
        title: for people.
        text: paragraphs: what was done, what is to be seen, what differs from the paper.
        tables, panels: the numbers.
        pictures: of Figure 7: one record of `defquant.measure.examples` per network, by its name.
        missing: cells without a result yet.
        command: makes the section.
    """

    name: str
    title: str
    text: tuple[str, ...]
    tables: tuple[Table, ...] = ()
    panels: tuple[Panel, ...] = ()
    pictures: tuple[tuple[str, Any], ...] = ()
    missing: int = 0
    command: str = ""


Answer = Literal["holds", "does not hold", "not decided"]


@dataclass(frozen=True)
class Reading:
    """One attack's answer to a claim.

    Attributes:
        attack: `FGSM 8/255`, `PGD-50x10 2/255`, `clean`.
        effect: a difference of accuracies in the direction claimed: positive supports the claim;
            None where something is missing.
        low, high: its 95 % interval over seeds and test images.
        verdict: whether the claim holds under this attack.
        detail: what was compared, `best of bits 1..5 minus full precision, 2 seeds`.
    """

    attack: str
    effect: float | None
    low: float | None
    high: float | None
    verdict: Answer
    detail: str


@dataclass(frozen=True)
class Verdict:
    """A claim of the paper and what the measurements say of it.

    Attributes:
        name: `C3`.
        where: `abstract`, `section 5.1, Table 1`.
        claim: in the paper's words, short.
        paper: the paper's own numbers, `-9.1 points`.
        readings: the paper's attack first, then the strong one.
        note: where the paper contradicts itself; empty for nothing to say.
        command: makes the measurements.
    """

    name: str
    where: str
    claim: str
    paper: str
    readings: tuple[Reading, ...]
    note: str
    command: str


def number(results: Results, cells: Iterable[Cell], paper: float | None = None) -> Number:
    """The accuracy of cells that differ in their seed alone; missing ones are left out."""
    found = [m for m in map(results.score, cells) if m is not None]
    if not found:
        return Number(None, paper=paper)
    accuracies = [m.score.accuracy for m in found]
    low, high = Score(sum(m.correct for m in found), sum(m.total for m in found)).interval
    return Number(
        mean=statistics.fmean(accuracies),
        spread=statistics.stdev(accuracies) if len(found) > 1 else 0.0,
        seeds=len(found),
        images=max(m.total for m in found),
        low=low,
        high=high,
        paper=paper,
        cells=tuple(m.cell for m in found if m.cell),
        vanishing=max(blind(m.attack, m.vanishing) for m in found),
    )


def difference(a: Number, b: Number, paper: float | None = None) -> Number:
    """a - b, without an interval; the seeds are those of the one with fewer."""
    gap = None if a.mean is None or b.mean is None else a.mean - b.mean
    return Number(
        gap, seeds=min(a.seeds, b.seeds), paper=paper, points=True, cells=a.cells + b.cells
    )


def best(numbers: Sequence[Number]) -> Number:
    """The highest mean."""
    return max(numbers, key=lambda n: -1.0 if n.mean is None else n.mean)
