"""A question and its answer: a table or figure is a list of them, shown by one pivot. No torch."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from defquant.paper.grid import Cell, Network, Results, Scale, Trial
from defquant.paper.section import Entry, Line, Number, Panel, Table, bits_text, eps_text, number
from defquant.typed import written

__all__ = ["NUMBERS", "Ask", "Found", "Shown", "ask_all", "panel", "pivot", "printed", "select"]

Row = Mapping[str, float]


NUMBERS: Mapping[str, Mapping[str, Row]] = {
    table: {
        str(name): {
            column: float(value) / 100
            for column, value in zip(rows["columns"].split(), str(line).split(), strict=False)
        }
        for name, line in rows.items()
        if name != "columns"
    }
    for table, rows in written(__file__, "numbers.yaml").items()
}
"""The paper's own, by table, row and column."""


def printed(scale: Scale, table: str, row: str) -> Row:
    """The paper's numbers in that row, none where the images are not the paper's."""
    return NUMBERS[table].get(row, {}) if scale.on(table).papers else {}


@dataclass(frozen=True)
class Ask:
    """One number: its place by labels, the networks (one a seed), their trial, and the `column` of
    the paper's own row where its number stands.
    """

    at: Mapping[str, Any]
    networks: tuple[Network, ...] = ()
    trial: Trial = field(default_factory=Trial)
    row: Row = field(default_factory=dict)
    column: str = ""

    @property
    def paper(self) -> float | None:
        return self.row.get(self.column)

    @property
    def cells(self) -> tuple[Cell, ...]:
        return tuple(self.trial.cell(network) for network in self.networks)

    def label(self, key: str) -> str:
        """The label `key` in words; `trial`, `attack` and `eps` are those of the trial, `width` is
        short for `bits`.
        """
        match key:
            case "trial":
                return self.trial.name
            case "attack":
                return self.trial.column
            case "eps":
                return eps_text(self.at.get("eps", self.trial.eps))
            case "bits":
                return bits_text(self.at["bits"]) if self.at["bits"] else "Full prec."
            case "width":
                return str(self.at["bits"] or "full")
        return str(self.at[key])


Found = Sequence[tuple[Ask, Any]]
"""Questions with their answers: a `Number`, or what the cell found where that is no accuracy."""

Shown = tuple[Sequence[Table], Sequence[Panel]]


def ask_all(asks: Iterable[Ask], results: Results) -> Found:
    """Each question with its number, of the seeds that are there, or its cell's values."""
    every = [(ask, [f for f in map(results.of, ask.cells) if f is not None]) for ask in asks]
    return [
        (ask, number(there, ask.paper))
        if ask.trial.kind == "accuracy"
        else (ask, there[0] if there else None)
        for ask, there in every
    ]


def select(found: Found, **at: Any) -> Found:
    """Those with these labels; `kind` and `trial` are the trial's, too."""
    own = [({**a.at, "trial": a.trial, "kind": a.trial.kind}, a, n) for a, n in found]
    return [(a, n) for labels, a, n in own if all(labels.get(k) == v for k, v in at.items())]


def pivot(
    found: Found,
    rows: Mapping[str, str],
    column: str,
    ends: Mapping[str, Callable[[Found], Entry]] | None = None,
) -> Table:
    """A row for each of the labels `rows`, named by their heads, a column for each label `column`;
    `ends` are made of each row.
    """
    ends = ends or {}
    heads = list(dict.fromkeys(ask.label(column) for ask, _ in found))
    lines = []
    for names, row in _grouped(found, *rows.values()).items():
        by_head = {ask.label(column): answer for ask, answer in row}
        lines.append((*names, *map(by_head.get, heads), *(end(row) for end in ends.values())))
    return Table((*rows, *heads, *ends), tuple(lines))


def panel(title: str, x: str, found: Found, line: str, place: str, colour: str) -> Panel:
    """A line for each label `line` and the paper's beside it, where it has two numbers or more;
    few bits first, full precision last.
    """
    drawn = []
    ordered = (
        sorted(found, key=lambda pair: pair[0].at["bits"] or 99) if place == "width" else found
    )
    for (label,), own in _grouped(ordered, line).items():
        points = tuple((ask.label(place), answer) for ask, answer in own)
        theirs = tuple((at, Number(n.paper)) for at, n in points if n.paper is not None)
        kind = own[0][0].label(colour)
        drawn.append(Line(label, points, kind))
        drawn += [Line(f"{label} (paper)", theirs, kind, paper=True)] * (len(theirs) > 1)
    return Panel(title, x, "accuracy", tuple(drawn))


def _grouped(found: Found, *labels: str) -> dict[tuple[str, ...], list[tuple[Ask, Any]]]:
    groups: dict[tuple[str, ...], list[tuple[Ask, Any]]] = {}
    for ask, answer in found:
        groups.setdefault(tuple(map(ask.label, labels)), []).append((ask, answer))
    return groups
