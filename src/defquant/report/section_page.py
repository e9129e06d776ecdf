"""Sections as the page shows them: text, figure, tables, pictures. Templates only lay them out."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from defquant.paper.section import Entry, Section
from defquant.report import values
from defquant.report.multiples_svg import Multiples, multiples
from defquant.report.strips import StripTable, of_pictures
from defquant.report.values import Fact, Grid

__all__ = ["Chapter", "TableView", "chapters"]


LONG = 16  # letters of a cell that stay on one line


@dataclass(frozen=True)
class Place:
    """An entry of a table: words, or a number in its parts; `rows` where it spans several."""

    text: str
    css: str = ""
    more: str = ""
    paper: str = ""
    title: str = ""
    rows: int = 1


@dataclass(frozen=True)
class TableView:
    """A table ready to be laid out; the first `words` columns name the rows.

    `sides` are the columns' classes: numbers stand on the right, long words are broken.
    """

    head: tuple[str, ...]
    words: int
    sides: list[str]
    rows: list[list[Place]]
    caption: str
    about: list[str]


@dataclass(frozen=True)
class Evidence:
    """Every number of a table or panel, with what it rests on."""

    title: str
    rows: list[tuple[str, ...]]


@dataclass(frozen=True)
class Chapter:
    """A section of the page."""

    anchor: str
    title: str
    text: Sequence[str]
    missing: str
    figures: list[Multiples]
    tables: list[TableView]
    evidence: list[Evidence]
    strips: list[StripTable]
    notes: list[str]
    commands: list[str]


def chapters(sections: Sequence[Section]) -> list[Chapter]:
    """One for each section, with anchors of their own."""
    found: list[Chapter] = []
    for section in sections:
        found.append(_chapter(section, [chapter.anchor for chapter in found]))
    return found


def _chapter(section: Section, taken: Sequence[str]) -> Chapter:
    strips, notes = of_pictures(section.pictures)
    grids = [grid for grid in values.grids(section) if grid.facts]
    return Chapter(
        anchor=_anchor(section.name, taken),
        title=section.title,
        text=section.text,
        missing=values.missing_text(section),
        figures=multiples(section.panels),
        tables=[_view(values.of_table(table)) for table in section.tables],
        evidence=[_evidence(grid, section.title) for grid in grids],
        strips=strips,
        notes=notes,
        commands=values.commands(section),
    )


def _anchor(name: str, taken: Sequence[str]) -> str:
    plain = "paper-" + re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    return f"{plain}-{len(taken)}" if plain in taken else plain


def _view(grid: Grid) -> TableView:
    sample = values.sample(grid)
    about = [f"{sample[0].upper()}{sample[1:]}."] if sample else []
    about += values.notes(grid)
    rows = [_row(grid, index) for index in range(len(grid.rows))]
    sides = [_side(grid, column) for column in range(len(grid.head))]
    return TableView(grid.head, values.label_columns(grid), sides, rows, grid.caption, about)


def _side(grid: Grid, column: int) -> str:
    entries = [row[column] for row in grid.rows]
    texts = [entry for entry in entries if isinstance(entry, str)]
    if column < values.label_columns(grid):
        return ""
    return "prose-cell" if len(texts) == len(entries) and max(map(len, texts)) > LONG else "number"


def _row(grid: Grid, index: int) -> list[Place]:
    """A name that stands in several rows in a sequence is said once, where more names follow."""
    row = grid.rows[index]
    won = values.places(grid, index)
    shown = [_place(entry, at, grid.percent) for entry, at in zip(row, won, strict=True)]
    repeated = any(a[0] == b[0] for a, b in pairwise(grid.rows))
    if values.label_columns(grid) < 2 or not repeated:
        return shown
    if index and grid.rows[index - 1][0] == row[0]:
        return shown[1:]
    return [replace(shown[0], css="family", rows=_run(grid, index)), *shown[1:]]


def _run(grid: Grid, index: int) -> int:
    """How many rows from `index` on begin with the same name."""
    names = [row[0] for row in grid.rows[index:]]
    return next((i for i, name in enumerate(names) if name != names[0]), len(names))


def _place(entry: Entry, place: int, percent: bool) -> Place:
    if entry is None:
        return Place(values.NOTHING, "none")
    if isinstance(entry, str):
        return Place(entry)
    interval = values.interval_text(entry, percent)
    return Place(
        text=values.mean_text(entry, percent),
        css="none" if entry.mean is None else f"place{place}" if place else "",
        more=values.uncertainty_text(entry, percent),
        paper=values.paper_text(entry, percent),
        title=f"95% interval {interval}" if interval else "",
    )


def _evidence(grid: Grid, title: str) -> Evidence:
    rows = [_fact(fact, grid.percent) for fact in grid.facts]
    return Evidence(grid.caption.split(". ")[0].rstrip(".") or title, rows)


def _fact(fact: Fact, percent: bool) -> tuple[str, ...]:
    texts = values.evidence_texts(fact.number, percent)
    return (fact.row, fact.column, *(text or values.NOTHING for text in texts))
