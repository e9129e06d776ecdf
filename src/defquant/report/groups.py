"""One network architecture on one data set: its table, its figures, all its numbers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from defquant.report import figures, tables
from defquant.report.names import (
    BLACK,
    UNAWARE,
    Family,
    Series,
    attack_order,
    distinct,
    series_of,
    whole_text,
)
from defquant.report.tables import Row
from defquant.results import Cell

__all__ = ["MANY", "Curves", "Group", "Panel", "group_of"]

MANY = 12  # networks whose lines one figure can hold
LINES = 8  # of one figure where there are more


@dataclass(frozen=True)
class Panel:
    """A small multiple with its heading."""

    name: str
    svg: Markup


@dataclass(frozen=True)
class Curves:
    """Accuracy over eps of some networks, a panel per attack."""

    name: str
    legend: list[tuple[str, Markup]]
    panels: list[Panel]


@dataclass(frozen=True)
class Group:
    """One network architecture on one data set: its table and figures."""

    name: str
    families: list[tuple[Family, list[Row]]]
    columns: list[int | None]
    curves: list[Curves]
    bits_legend: list[tuple[str, Markup]]
    bits: list[Panel]
    bits_left_out: int
    details: list[tuple[Cell, str]]

    @property
    def whole(self) -> Markup:
        """Head of the column without bits."""
        own = [family for family, rows in self.families if any(None in row.cells for row in rows)]
        return Markup(whole_text(own).replace(" ", "<br>", 1))

    @property
    def black_box(self) -> bool:
        return self._has(BLACK)

    @property
    def unaware(self) -> bool:
        return self._has(UNAWARE)

    def _has(self, kind: str) -> bool:
        return any(panel.name.endswith(kind) for curves in self.curves for panel in curves.panels)


def group_of(
    name: tuple[str, str],
    all_rows: Sequence[Row],
    all_cells: Sequence[Cell],
    classes: Mapping[Series, str],
) -> Group:
    """The group called `name`, (data, model), among all rows and cells."""
    rows = [row for row in all_rows if (row.data, row.model) == name]
    cells = [cell for cell in all_cells if (cell.data, cell.model) == name]
    own = {s: css for s, css in classes.items() if any(series_of(cell) == s for cell in cells)}
    every = distinct(series.family for series in classes)
    families = distinct(row.family for row in rows)
    lines = _lines(rows, families)
    shapes = {f: (figures.family_class(f, every), figures.family_shape(f, every)) for f in lines}
    return Group(
        name=f"{name[1]} on {name[0]}",
        families=[(family, [r for r in rows if r.family == family]) for family in families],
        columns=tables.columns(rows),
        curves=[curves for part in _parts(own) if (curves := _curves(cells, part)).panels],
        bits_legend=[(str(f), figures.swatch(*shapes[f])) for f in lines],
        bits=_bits([row for row in rows if row.family in lines], every),
        bits_left_out=len(families) - len(lines),
        details=_details(cells, own),
    )


def _parts(classes: Mapping[Series, str]) -> list[dict[Series, str]]:
    """The lines of one figure each: all, or families of one technique, as many as it can hold."""
    if len(classes) <= MANY:
        return [dict(classes)]
    parts: list[dict[Series, str]] = [{}]
    for family in distinct(series.family for series in classes):
        own = {series: css for series, css in classes.items() if series.family == family}
        other = any(series.family.added != family.added for series in parts[-1])
        if parts[-1] and (other or len(parts[-1]) + len(own) > LINES):
            parts.append({})
        parts[-1] |= own
    return parts


def _curves(every: Sequence[Cell], classes: Mapping[Series, str]) -> Curves:
    cells = [cell for cell in every if series_of(cell) in classes]
    attacks = sorted({c.attack for c in cells if c.attack != "clean"}, key=attack_order)
    return Curves(
        name=", ".join(distinct(str(series.family) for series in classes)),
        legend=[(str(s), figures.swatch(css, s.bits)) for s, css in classes.items()],
        panels=[Panel(name, figures.eps_panel(cells, name, classes)) for name in attacks],
    )


def _lines(rows: Sequence[Row], families: Sequence[Family]) -> list[Family]:
    """The families of the figures over bits; of many, those with three or more bit widths."""
    widths = {f: max(len(row.cells) for row in rows if row.family == f) for f in families}
    wide = [family for family in families if widths[family] > 2]
    return wide if wide and len(families) > LINES else list(families)


def _bits(rows: Sequence[Row], families: Sequence[Family]) -> list[Panel]:
    if len(tables.columns(rows)) < 2:
        return []
    clean = [row for row in rows if row.attack == "clean"]
    attacks = distinct(row.images for row in rows if row.attack != "clean")
    groups = [(name, [row for row in rows if row.images == name]) for name in attacks]
    return [Panel(name, figures.bits_panel(same, clean, families)) for name, same in groups]


def _details(cells: Sequence[Cell], classes: Mapping[Series, str]) -> list[tuple[Cell, str]]:
    places = {series: place for place, series in enumerate(classes)}
    ordered = sorted(cells, key=lambda c: (attack_order(c.attack), c.eps, places[series_of(c)]))
    return [(cell, str(series_of(cell))) for cell in ordered]
