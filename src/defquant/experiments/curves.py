"""Rows of numbers over activation bits: as a table's row, a figure's line, and in words."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from defquant.experiments.cells import Network
from defquant.experiments.compose import Trial, paper_line
from defquant.experiments.section import (
    Line,
    Number,
    Panel,
    Table,
    best,
    difference,
    number,
)
from defquant.experiments.store import Results
from defquant.experiments.words import against, bits_text, blind, percent, place

__all__ = ["Row", "bits_panel", "bits_row", "bits_table", "blind_rows", "quantize_gain"]


@dataclass(frozen=True)
class Row:
    """Networks of one `name` under one trial; `numbers` in order of `bits`."""

    name: str
    trial: Trial
    bits: tuple[int | None, ...]
    numbers: tuple[Number, ...]

    def at(self, bits: int | None) -> Number:
        """The number at so many bits; an empty one where the scale has no such networks."""
        return dict(zip(self.bits, self.numbers, strict=True)).get(bits, Number(None))

    @property
    def quantised(self) -> list[Number]:
        return [self.at(bits) for bits in self.bits if bits is not None]

    @property
    def gaps(self) -> dict[int, float]:
        """By bits, how far they lie above full precision, where both were measured."""
        full = self.at(None).mean
        if full is None:
            return {}
        found = {bits: self.at(bits).mean for bits in self.bits if bits is not None}
        return {bits: mean - full for bits, mean in found.items() if mean is not None}

    @property
    def gain(self) -> Number:
        """Quantize Gain: the best of the bit widths minus full precision."""
        return quantize_gain(self.quantised, self.at(None))

    @property
    def best(self) -> Number:
        """The best of the row, full precision among it; empty while one is missing."""
        whole = all(n.mean is not None for n in self.numbers)
        return replace(best(self.numbers), paper=None) if whole else Number(None)

    def words(self) -> str:
        """Where the bit widths lie against full precision; empty where that is not known."""
        full, gaps = self.at(None).mean, list(self.gaps.values())
        if full is None or not gaps:
            return ""
        some = "" if len(gaps) == len(self.quantised) else f"; {len(gaps)} bit widths"
        return f"{self.trial.name} ({percent(full)}{some}) {against(gaps)}"


def quantize_gain(quantised: Sequence[Number], full: Number) -> Number:
    """The best of `quantised` minus `full`, of accuracies; empty while one is missing."""
    whole = all(n.mean is not None for n in (*quantised, full))
    return difference(best(quantised), full) if whole else Number(None, points=True)


def bits_row(
    results: Results,
    name: str,
    trial: Trial,
    seeds: Iterable[Sequence[Network]],
    papers: Callable[[int | None], float | None],
) -> Row:
    """`seeds` holds the networks in order of `scale.bits`, once for each seed."""
    bits = trial.scale.bits
    widths = zip(bits, zip(*seeds, strict=True), strict=True)
    numbers = (number(results, map(trial.cell, nets), papers(b)) for b, nets in widths)
    return Row(name, trial, bits, tuple(numbers))


def bits_panel(title: str, rows: Sequence[Row]) -> Panel:
    """One line for each row, few bits first, and the paper's beside it."""
    lines = [Line(row.name, _points(row), kind=row.name) for row in rows]
    both = [one for line in lines for one in (line, *paper_line(line))]
    return Panel(title, "activation bits", "accuracy", tuple(both))


def _points(row: Row) -> tuple[tuple[str, Number], ...]:
    order = sorted(row.bits, key=lambda bits: 99 if bits is None else bits)
    return tuple((place(bits), row.at(bits)) for bits in order)


def bits_table(
    rows: Sequence[Row],
    caption: str,
    ends: Sequence[tuple[str, Callable[[Row], Number | None]]] = (),
) -> Table:
    """A row each, with its name, its images and what `ends` make of it in further columns."""
    bits = rows[0].bits if rows else ()
    heads = ["Full prec." if b is None else bits_text(b) for b in bits]
    body = [(r.name, r.trial.name, *r.numbers, *(end(r) for _, end in ends)) for r in rows]
    return Table(("Network", "Images", *heads, *(head for head, _ in ends)), tuple(body), caption)


def blind_rows(rows: Iterable[Row]) -> str:
    """Which networks of `rows` have vanishing gradients; empty where none has."""
    return blind((f"{r.name}, {bits_text(b)}", r.at(b)) for r in rows for b in r.bits)
