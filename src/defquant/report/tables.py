"""Measurements -> the rows of the paper's Table 1, as HTML shows them, as Markdown, as text."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Literal

from rich.table import Table
from rich.text import Text

from defquant.errors import visible
from defquant.report.names import (
    Family,
    attack_order,
    distinct,
    eps_text,
    is_validation,
    markdown,
    series_of,
    signed,
    whole_text,
)
from defquant.results import Cell, Measurement, aggregate, told_apart

__all__ = [
    "BLIND", "Row", "band", "chosen", "columns", "footnotes", "markdown_table",
    "summary", "table_eps", "text_table", "uncertainty",
]  # fmt: skip


BLIND = (
    "† {}: the loss gradient is exactly zero on more than 1% of the images that are classified "
    "rightly. Gradient attacks are blind there: this accuracy is masked, not robust."
)


@dataclass(frozen=True)
class Row:
    """One line of Table 1: a family of networks under one attack, over the bit widths.

    `gain` is the best quantised accuracy minus full precision's (none for clean images, or
    where either is missing), `best` the highest accuracy, full precision included.
    """

    data: str
    model: str
    family: Family
    attack: str
    eps: float
    cells: Mapping[int | None, Cell]

    @property
    def gain(self) -> float | None:
        quantised = [cell.mean for bits, cell in self.cells.items() if bits is not None]
        if self.attack == "clean" or not quantised or None not in self.cells:
            return None
        return max(quantised) - self.cells[None].mean

    @property
    def best(self) -> float:
        return max(cell.mean for cell in self.cells.values())

    def place(self, bits: int | None) -> int:
        """1 for the highest accuracy as printed, 2 for the second, 0 for the rest.

        A lone value wins nothing, and the lower of two is no second.
        """
        printed = {b: round(100 * cell.mean, 1) for b, cell in self.cells.items()}
        order = sorted(set(printed.values()), reverse=True)
        place = order.index(printed[bits]) + 1
        return place if place < min(3, len(printed)) else 0

    @property
    def images(self) -> str:
        return self.attack if self.attack == "clean" else f"{self.attack} {eps_text(self.eps)}"


def chosen(measurements: Iterable[Measurement]) -> list[Measurement]:
    """One measurement per network, attack and eps: the most examples, then the lowest accuracy.

    Otherwise a run that was measured twice, or copied, would pass for two seeds. See `told_apart`.
    """
    best: dict[tuple[object, ...], Measurement] = {}
    for m in told_apart(measurements):
        name = (
            m.network[0] or m.run,
            m.method,
            m.model,
            m.bits,
            m.beta,
            m.seed,
            m.data,
            m.attack,
            m.eps,
        )
        if name not in best or (m.total, -m.correct) > (best[name].total, -best[name].correct):
            best[name] = m
    return list(best.values())


def summary(measurements: Iterable[Measurement]) -> list[Row]:
    """Table 1: per data set, network and family the clean row, then one row per attack.

    All attacks are shown at one eps (`table_eps`), or the nearest one at which they were run.
    Validation images come last.
    """
    cells = aggregate(chosen(measurements))
    rows = []
    groups = distinct((cell.data, cell.model) for cell in cells)
    for data, model in sorted(groups, key=lambda group: is_validation(group[0])):
        eps = table_eps([cell for cell in cells if cell.data == data])
        group = [cell for cell in cells if (cell.data, cell.model) == (data, model)]
        for family in sorted({series_of(cell).family for cell in group}, key=lambda f: f.order):
            own = [cell for cell in group if series_of(cell).family == family]
            rows += [_row(own, family, attack, eps) for attack in _attacks(own)]
    return rows


def table_eps(cells: Sequence[Cell]) -> float:
    """The telling radius: where the strongest attack comes nearest to halving clean accuracy.

    Of float, or of all networks where none is float; among the radii of every attack, where there
    are such. A smaller radius breaks nothing, at a larger one nothing stands; either way all
    networks look alike.
    """
    floats = [cell for cell in cells if cell.method.startswith("float")] or list(cells)
    half = fmean([cell.mean for cell in floats if cell.attack == "clean"] or [1.0]) / 2

    means: dict[float, dict[str, list[float]]] = {}
    for cell in floats:
        if cell.attack != "clean":
            means.setdefault(cell.eps, {}).setdefault(cell.attack, []).append(cell.mean)

    def distance(eps: float) -> float:
        return abs(min(map(fmean, means.get(eps, {}).values()), default=0.0) - half)

    radii: dict[str, set[float]] = {}
    for cell in cells:
        if cell.attack != "clean":
            radii.setdefault(cell.attack, set()).add(cell.eps)
    found = list(radii.values())
    shared = set.intersection(*found) or set.union(*found) if found else set()
    return min(sorted(shared), key=distance, default=0.0)


def _attacks(cells: Sequence[Cell]) -> list[str]:
    return sorted({cell.attack for cell in cells}, key=attack_order)


def _row(cells: Sequence[Cell], family: Family, attack: str, eps: float) -> Row:
    here = [cell for cell in cells if cell.attack == attack]
    nearest = min((cell.eps for cell in here), key=lambda value: (abs(value - eps), -value))
    found = {cell.bits: cell for cell in reversed(here) if cell.eps == nearest}
    return Row(here[0].data, here[0].model, family, attack, nearest, found)


def columns(rows: Iterable[Row]) -> list[int | None]:
    """The precisions that were measured: full precision first, then the bits, ascending."""
    found: set[int | None] = set()
    found.update(*(row.cells for row in rows))
    return sorted(found, key=lambda bits: bits or 0)


def band(cell: Cell) -> tuple[float, float]:
    """Lowest and highest accuracy over the seeds; Wilson's interval where there is but one."""
    if len(cell.accuracies) > 1:
        return min(cell.accuracies), max(cell.accuracies)
    return cell.pooled.interval


def uncertainty(cell: Cell) -> str:
    """`±1.1`, the standard deviation over seeds, or Wilson's interval `28–41` of one seed.

    With a dagger where the attack was blind.
    """
    mark = "†" if cell.masked else ""
    if len(cell.accuracies) > 1:
        return f"±{100 * cell.spread:.1f}{mark}"
    low, high = cell.pooled.interval
    return f"{100 * low:.0f}–{100 * high:.0f}{mark}"


def footnotes(rows: Iterable[Row]) -> list[str]:
    """What the marks in a table of `rows` mean."""
    blind = {series_of(c).short for row in rows for c in row.cells.values() if c.masked}
    return [BLIND.format(", ".join(sorted(blind)))] if blind else []


def markdown_table(measurements: Iterable[Measurement]) -> str:
    """The summary as a GitHub table: best of a row bold, second underlined."""
    rows = summary(measurements)
    shown = columns(rows)
    lines = ["| " + " | ".join(_heads(rows, shown)) + " |"]
    names = len(_names(rows[0], rows)) if rows else 2
    lines.append("|" + " --- |" * names + " ---: |" * (len(shown) + 2))
    styles = ("{}", "**{}**", "<ins>{}</ins>")
    for row in rows:
        values = [_plain(row, bits, styles) for bits in shown]
        cells = [*map(markdown, _names(row, rows)), *values, *_ends(row)]
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", *map(markdown, notes)] if (notes := footnotes(rows)) else []
    return "\n".join(lines) + "\n"


def text_table(measurements: Iterable[Measurement]) -> Table:
    """The summary for a terminal."""
    rows = summary(measurements)
    shown = columns(rows)
    table = Table(box=None, pad_edge=False, header_style="bold")
    heads = _heads(rows, shown)
    for index, head in enumerate(heads):
        justify: Literal["left", "right"]
        justify = "right" if index > heads.index("Images") else "left"
        table.add_column(head, justify=justify, no_wrap=True)
    former: list[str] = []
    for row in rows:
        *group, images = map(visible, _names(row, rows))
        names = [Text(name) for name in (group if group != former else [""] * len(group))]
        values = [Text(_plain(row, b, ("{}",) * 3), style=_style(row, b)) for b in shown]
        table.add_row(*names, Text(images), *values, *_ends(row))
        former = group
    table.caption = Text("\n".join(footnotes(rows)), style="italic") if footnotes(rows) else None
    table.caption_justify = "left"
    return table


def _heads(rows: Sequence[Row], shown: Sequence[int | None]) -> list[str]:
    several = len({(row.data, row.model) for row in rows}) > 1
    heads = [*(("Data", "Network") if several else ()), "Method", "Images"]
    whole = whole_text(row.family for row in rows if None in row.cells)
    whole = whole.replace("precision", "prec.")
    heads += [whole if bits is None else f"{bits} bit" for bits in shown]
    return [*heads, "Gain", "Best"]


def _names(row: Row, rows: Sequence[Row]) -> list[str]:
    several = len({(other.data, other.model) for other in rows}) > 1
    return [*((row.data, row.model) if several else ()), str(row.family), row.images]


def _plain(row: Row, bits: int | None, styles: Sequence[str]) -> str:
    if bits not in row.cells:
        return "–"
    cell = row.cells[bits]
    return f"{styles[row.place(bits)].format(f'{100 * cell.mean:.1f}')} {uncertainty(cell)}"


def _style(row: Row, bits: int | None) -> str:
    return ("", "bold", "underline")[row.place(bits)] if bits in row.cells else ""


def _ends(row: Row) -> tuple[str, str]:
    return ("–" if row.gain is None else signed(row.gain), f"{100 * row.best:.1f}")
