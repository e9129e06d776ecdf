"""A question and its answer: a table or figure is a list of them, shown by one pivot. No torch."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from defquant.paper.grid import Cell, Network, Results, Trial
from defquant.paper.section import Entry, Line, Number, Panel, Table, bits_text, eps_text, number

__all__ = ["Ask", "Found", "Shown", "ask_all", "by_bits", "panel", "pivot", "select"]


@dataclass(frozen=True)
class Ask:
    """One number: its place by labels, the networks (one a seed), their trial, the paper's."""

    at: Mapping[str, Any]
    networks: tuple[Network, ...] = ()
    trial: Trial = field(default_factory=Trial)
    paper: float | None = None

    @property
    def cells(self) -> tuple[Cell, ...]:
        return tuple(self.trial.cell(network) for network in self.networks)

    def label(self, key: str) -> str:
        """The label `key` in words; `trial`, `attack` and `eps` are those of the trial, `width` is
        short for `bits`.
        """
        bits = self.at.get("bits")
        match key:
            case "trial":
                return self.trial.name
            case "attack":
                return self.trial.column
            case "eps":
                return eps_text(self.at.get("eps", self.trial.eps))
            case "bits":
                return "Full prec." if bits is None else bits_text(bits)
            case "width":
                return "full" if bits is None else str(bits)
        return str(self.at[key])


Found = Sequence[tuple[Ask, Number]]
Shown = tuple[Sequence[Table], Sequence[Panel]]


def ask_all(asks: Iterable[Ask], results: Results) -> list[tuple[Ask, Any]]:
    """Each question with its number, of the seeds that are there; with what its cell found where
    that is no accuracy.
    """
    found: list[tuple[Ask, Any]] = []
    for ask in asks:
        if ask.trial.kind == "accuracy":
            there = [m for m in map(results.score, ask.cells) if m is not None]
            found.append((ask, number(there, ask.paper)))
        else:
            found.append((ask, results.value(ask.cells[0])))
    return found


def select(found: Iterable[tuple[Ask, Any]], **at: Any) -> list[tuple[Ask, Any]]:
    """Those with these labels; `kind` and `trial` are the trial's, too."""
    own = [({**a.at, "trial": a.trial, "kind": a.trial.kind}, a, n) for a, n in found]
    return [(a, n) for labels, a, n in own if all(labels.get(k) == v for k, v in at.items())]


def by_bits(found: Found) -> Found:
    """Few bits first, full precision last."""
    return sorted(found, key=lambda pair: pair[0].at["bits"] or 99)


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
    """A line for each label `line` and the paper's beside it, where it has two numbers or more."""
    drawn = []
    for (label,), own in _grouped(found, line).items():
        points = tuple((ask.label(place), answer) for ask, answer in own)
        printed = tuple((at, Number(n.paper)) for at, n in points if n.paper is not None)
        kind = own[0][0].label(colour)
        drawn.append(Line(label, points, kind))
        drawn += [Line(f"{label} (paper)", printed, kind, paper=True)] * (len(printed) > 1)
    return Panel(title, x, "accuracy", tuple(drawn))


def _grouped(found: Found, *labels: str) -> dict[tuple[str, ...], list[tuple[Ask, Number]]]:
    groups: dict[tuple[str, ...], list[tuple[Ask, Number]]] = {}
    for ask, answer in found:
        groups.setdefault(tuple(map(ask.label, labels)), []).append((ask, answer))
    return groups
