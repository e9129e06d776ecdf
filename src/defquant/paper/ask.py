"""A question and its answer: a table or figure is a list of them, shown by one pivot. No torch."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from defquant.paper.grid import Cell, Network, Results, Trial
from defquant.paper.section import Entry, Line, Number, Panel, Table, bits_text, number

__all__ = [
    "Ask", "Found", "Label", "Shown", "ask_all", "bits_head", "bits_place", "by_bits", "named",
    "panel", "pivot", "select", "tried",
]  # fmt: skip


@dataclass(frozen=True)
class Ask:
    """One number: its place by labels, the networks (one a seed), their trial, the paper's."""

    at: Mapping[str, Any]
    networks: tuple[Network, ...]
    trial: Trial
    paper: float | None = None

    @property
    def cells(self) -> tuple[Cell, ...]:
        return tuple(self.trial.cell(network) for network in self.networks)


Found = Sequence[tuple[Ask, Number]]
Shown = tuple[Sequence[Table], Sequence[Panel]]
Label = Callable[[Ask], str]


def ask_all(asks: Iterable[Ask], results: Results) -> Found:
    """Each question with its answer; seeds that are missing are left out."""
    found = []
    for ask in asks:
        there = [m for m in map(results.score, ask.cells) if m is not None]
        found.append((ask, number(there, ask.paper)))
    return found


def select(found: Iterable[tuple[Ask, Number]], **at: Any) -> list[tuple[Ask, Number]]:
    """Those with these labels; `trial` is one, too."""
    return [
        (a, n) for a, n in found if all({**a.at, "trial": a.trial}[k] == v for k, v in at.items())
    ]


def pivot(
    found: Found,
    rows: Mapping[str, Label],
    column: Label,
    ends: Mapping[str, Callable[[Found], Entry]] | None = None,
) -> Table:
    """A row for each of the labels `rows`, a column for each label `column`; `ends` are made of
    each row.
    """
    heads = list(dict.fromkeys(column(ask) for ask, _ in found))
    body: dict[tuple[str, ...], list[tuple[Ask, Number]]] = {}
    for ask, answer in found:
        body.setdefault(tuple(label(ask) for label in rows.values()), []).append((ask, answer))
    lines = []
    for names, row in body.items():
        by_head = {column(ask): answer for ask, answer in row}
        made = [end(row) for end in (ends or {}).values()]
        lines.append((*names, *(by_head.get(head) for head in heads), *made))
    return Table((*rows, *heads, *(ends or {})), tuple(lines))


def panel(title: str, x: str, found: Found, line: Label, place: Label, kind: Label) -> Panel:
    """A line for each label `line` and the paper's beside it, where it has two numbers or more."""
    lines: dict[str, list[tuple[Ask, Number]]] = {}
    for ask, answer in found:
        lines.setdefault(line(ask), []).append((ask, answer))
    drawn = []
    for label, own in lines.items():
        points = tuple((place(ask), answer) for ask, answer in own)
        printed = tuple((at, Number(n.paper)) for at, n in points if n.paper is not None)
        colour = kind(own[0][0])
        drawn.append(Line(label, points, colour))
        drawn += [Line(f"{label} (paper)", printed, colour, paper=True)] * (len(printed) > 1)
    return Panel(title, x, "accuracy", tuple(drawn))


# --- labels -------------------------------------------------------------------------------


def named(ask: Ask) -> str:
    return str(ask.at["name"])


def tried(ask: Ask) -> str:
    return ask.trial.name


def bits_head(ask: Ask) -> str:
    return "Full prec." if ask.at["bits"] is None else bits_text(ask.at["bits"])


def bits_place(ask: Ask) -> str:
    return "full" if ask.at["bits"] is None else str(ask.at["bits"])


def by_bits(found: Found) -> Found:
    """Few bits first, full precision last."""
    return sorted(found, key=lambda pair: pair[0].at["bits"] or 99)
