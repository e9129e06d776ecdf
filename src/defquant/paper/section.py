"""What the report shows: numbers, tables, panels and verdicts, as plain data. No torch."""

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from defquant.records import MASKED, Measurement, Score, blind, wilson

__all__ = [
    "Answer", "Entry", "Line", "Number", "Panel", "Reading", "Section", "Table", "Verdict",
    "attack_text", "bits_text", "difference", "eps_number", "eps_text", "listed", "method_text",
    "model_text", "number", "rate", "signed",
]  # fmt: skip


@dataclass(frozen=True)
class Number:
    """A quantity of ours and the paper's beside it; accuracies and rates lie in [0, 1]."""

    mean: float | None  # over the seeds; None where nothing was measured
    spread: float = 0.0  # standard deviation over the seeds (n - 1); 0 for one
    seeds: int = 0
    images: int = 0  # of one seed; the fewest
    low: float | None = None  # Wilson's 95 % interval of the mean on one seed's images
    high: float | None = None
    paper: float | None = None  # the paper's own
    vanishing: float = 0.0  # largest share of images on which the attack was blind
    points: bool = False  # a difference of accuracies, shown with its sign
    cells: tuple[str, ...] = ()  # keys of those that it comes from, for `reproduce --cell KEY`

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

    @property
    def drawn(self) -> bool:
        """Whether there is a point."""
        return any(n.mean is not None for line in self.lines for _, n in line.points)


@dataclass(frozen=True)
class Section:
    """A table or figure of the paper, made again."""

    name: str  # on the command line
    title: str
    text: tuple[str, ...]  # paragraphs: what was done, and what the paper says
    tables: tuple[Table, ...] = ()
    panels: tuple[Panel, ...] = ()
    pictures: tuple[tuple[str, Any], ...] = ()  # by network, records of `measure.examples`
    missing: int = 0  # cells without a result yet
    command: str = ""  # makes the section


Answer = Literal["holds", "does not hold", "not decided"]


@dataclass(frozen=True)
class Reading:
    """One attack's answer to a claim: an effect with its 95 % interval over seeds and test images,
    a difference of accuracies of which a positive one supports the claim; None where something is
    missing.
    """

    attack: str  # `FGSM 8/255`, `PGD-50x10 2/255`, `clean`
    effect: float | None
    low: float | None
    high: float | None
    verdict: Answer
    detail: str  # what was compared: `best of bits 1..5 minus full precision, 2 seeds`


@dataclass(frozen=True)
class Verdict:
    """A claim of the paper and what the measurements say of it."""

    name: str  # `C3`
    where: str  # `abstract`, `section 5.1, Table 1`
    claim: str  # in the paper's words, short
    paper: str  # its own numbers, `-9.1 points`
    readings: tuple[Reading, ...]  # the paper's attack first, then the strong one
    note: str  # where the paper contradicts itself
    command: str  # makes the measurements


# --- numbers ------------------------------------------------------------------------------


def number(found: Sequence[Measurement], paper: float | None = None) -> Number:
    """The accuracy of measurements that differ in their seed alone.

    More seeds see the same images: the interval, which covers their choice, is as of one.
    """
    if not found:
        return Number(None, paper=paper)
    accuracies = [m.score.accuracy for m in found]
    mean, images = statistics.fmean(accuracies), min(m.total for m in found)
    low, high = wilson(mean, images)
    return Number(
        mean=mean,
        spread=statistics.stdev(accuracies) if len(found) > 1 else 0.0,
        seeds=len(found),
        images=images,
        low=low,
        high=high,
        paper=paper,
        cells=tuple(m.cell for m in found if m.cell),
        vanishing=max(blind(m.attack, m.vanishing) for m in found),
    )


def rate(counts: Sequence[int] | None, cell: str = "") -> Number:
    """[k, n] as a share with its interval; empty for None."""
    if not counts:
        return Number(None)
    score = Score(*counts)
    low, high = score.interval
    return Number(score.accuracy, seeds=1, images=score.total, low=low, high=high, cells=(cell,))


def difference(a: Number, b: Number, paper: float | None = None) -> Number:
    """a - b, without an interval; the seeds are those of the one with fewer."""
    gap = None if a.mean is None or b.mean is None else a.mean - b.mean
    cells = a.cells + b.cells
    return Number(gap, seeds=min(a.seeds, b.seeds), paper=paper, points=True, cells=cells)


# --- words --------------------------------------------------------------------------------


def signed(fraction: float) -> str:
    """Points: `+1.4`, `−9.1`."""
    text = f"{100 * fraction:+.1f}"
    return "0.0" if text in ("+0.0", "-0.0") else text.replace("-", "−")


def listed(words: Iterable[object]) -> str:
    """`a`, `a and b`, `a, b and c`; `none` for nothing."""
    *most, last = [str(word) for word in words] or ["none"]
    return f"{', '.join(most)} and {last}" if most else last


def eps_text(eps: float) -> str:
    """`8/255` for 0.03137."""
    return f"{eps_number(eps)}/255"


def eps_number(eps: float) -> str:
    """`8` for 8/255, `0.5` for 0.5/255; a stored radius may be rounded in its fourth digit."""
    scaled = 255 * eps
    return f"{round(scaled)}" if abs(scaled - round(scaled)) < 0.02 else f"{scaled:.3g}"


def attack_text(attack: str) -> str:
    """As the report has it: `FGSM`, `R+FGSM`, `PGD-50x10`, `Adaptive`."""
    shown = {"fgsm": "FGSM", "rfgsm": "R+FGSM"}.get(attack, attack.replace("pgd", "PGD"))
    return shown[:1].upper() + shown[1:]


def bits_text(bits: int | None) -> str:
    """`4 bits`, `1 bit`, `full precision`."""
    return "full precision" if bits is None else f"{bits} bit{'s' * (bits > 1)}"


def method_text(beta: float) -> str:
    """`vanilla`, or `DQ (β = 0.1)`."""
    return f"DQ (β = {beta:g})" if beta else "vanilla"


def model_text(model: str) -> str:
    """`WRN-10-1`; `VGG-16 at 0.25 of its width` for `vgg-16x0.25`."""
    name, _, width = model.partition("x")
    shown = name.upper().replace("RESNET", "ResNet")
    return f"{shown} at {width} of its width" if width else shown
