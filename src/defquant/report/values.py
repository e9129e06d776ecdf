"""How a `Number` of a section is written, and a section's tables and panels as grids of them."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace

from defquant.paper.section import Entry, Line, Number, Panel, Section, Table
from defquant.report.names import signed
from defquant.report.tables import BLIND

__all__ = [
    "EVIDENCE", "NOTHING", "Fact", "Grid", "axis", "commands", "evidence_texts", "gap_text",
    "grids",
    "has_paper", "has_spread", "interval_text", "label_columns", "line_name",
    "mean_text", "missing_text", "notes", "of_panel", "of_table", "paper_text", "places",
    "sample", "uncertainty_text", "value_text",
]  # fmt: skip

NOTHING = "–"
EVIDENCE = ("Mean", "±", "95% interval", "Seeds", "Images", "Paper", "Gap", "Cells")
PRECISION = re.compile(r"(full|fp|float)\b.*|[1-8]([ -]?bits?)?", re.IGNORECASE)


@dataclass(frozen=True)
class Fact:
    """A number with the names of its row and column."""

    row: str
    column: str
    number: Number


@dataclass(frozen=True)
class Grid:
    """A table, or the numbers of a panel, ready to be shown; `percent` as in `Panel`."""

    head: tuple[str, ...]
    rows: tuple[tuple[Entry, ...], ...]
    caption: str
    percent: bool = True

    @property
    def facts(self) -> list[Fact]:
        """Every number, row by row; a row without a name of its own has the one above."""
        found, names = [], [""] * label_columns(self)
        for row in self.rows:
            for i, own in enumerate(row[: len(names)]):
                names[i] = str(own) or names[i]
            name = ", ".join(name for name in names if name)
            for head, entry in zip(self.head, row, strict=True):
                found += [Fact(name, head, entry)] if isinstance(entry, Number) else []
        return found

    @property
    def numbers(self) -> list[Number]:
        return [entry for row in self.rows for entry in row if isinstance(entry, Number)]


def of_table(table: Table) -> Grid:
    return Grid(table.head, table.rows, table.caption, table.percent)


def of_panel(panel: Panel) -> Grid:
    """A row per line, a column per place of the x axis."""
    places = axis(panel.lines)
    rows = []
    for line in panel.lines:
        found = {place: _own(line, number) for place, number in line.points}
        rows.append((line_name(line), *(found.get(place) for place in places)))
    caption = f"{panel.title}: {panel.y}" if panel.title else panel.y
    return Grid((panel.x, *places), tuple(rows), caption, panel.percent)


def grids(section: Section) -> list[Grid]:
    """Every table, and every panel with a number that stands in no table."""
    tables = [of_table(table) for table in section.tables]
    known = {value for grid in tables for n in grid.numbers for value in (n.mean, n.paper)}
    panels = [of_panel(panel) for panel in section.panels]
    return tables + [grid for grid in panels if {n.mean for n in grid.numbers} - known]


def line_name(line: Line) -> str:
    return f"{line.label} (paper)" if line.paper and "paper" not in line.label else line.label


def axis(lines: Iterable[Line]) -> list[str]:
    """The places of all lines in an order that is each line's own, as far as they agree."""
    merged: list[str] = []
    for line in lines:
        names = [place for place, _ in line.points]
        for i, place in enumerate(names):
            if place not in merged:
                following = (merged.index(later) for later in names[i:] if later in merged)
                after = [merged.index(names[i - 1]) + 1] if i else list(following)
                merged.insert(min(after, default=len(merged)), place)
    return merged


def _own(line: Line, number: Number) -> Number:
    """A paper's line may hold its values as `mean` or as `paper`."""
    only = line.paper and number.mean is None
    return replace(number, mean=number.paper, paper=None) if only else number


def label_columns(grid: Grid) -> int:
    """How many columns on the left hold nothing but words: the names of the rows."""
    wordy = [all(isinstance(row[i], str) for row in grid.rows) for i in range(len(grid.head))]
    return wordy.index(False) if False in wordy else min(1, len(wordy))


def places(grid: Grid, index: int) -> list[int]:
    """Of a row: 1 for the best number as it is printed, 2 for the second, 0 for all else.

    Numbers under the names of precisions compete with each other ("Full precision", "1" to "8",
    "4 bits"), as in the paper's Table 1. A lone number wins nothing, nor does a masked one.
    """
    row = grid.rows[index]
    rivals = {
        i: round(100 * entry.mean, 1)
        for i, (entry, name) in enumerate(zip(row, grid.head, strict=True))
        if isinstance(entry, Number) and entry.mean is not None and PRECISION.fullmatch(name)
        if grid.percent and not (entry.points or entry.masked)
    }
    order = sorted(set(rivals.values()), reverse=True)[: 2 if len(rivals) > 2 else 1]
    if len(rivals) < 2:
        return [0] * len(row)
    return [order.index(rivals[i]) + 1 if rivals.get(i) in order else 0 for i in range(len(row))]


def mean_text(number: Number, percent: bool = True) -> str:
    """`63.3`, `+1.4` of a difference, `0.0713` where it is no share, `–` for nothing."""
    return value_text(number.mean, number, percent)


def paper_text(number: Number, percent: bool = True) -> str:
    """The paper's value; empty where it has none."""
    return "" if number.paper is None else value_text(number.paper, number, percent)


def gap_text(number: Number, percent: bool = True) -> str:
    """Ours minus the paper's, signed; empty where either is missing."""
    if number.gap is None:
        return ""
    return signed(number.gap) if percent else f"{number.gap:+#.3g}".replace("-", "−")


def uncertainty_text(number: Number, percent: bool = True) -> str:
    """`±1.2` over seeds, the interval `62–64` of a single one, `†` where it is masked."""
    mark = "†" if number.masked else ""
    if number.mean is None:
        return ""
    if has_spread(number):
        return f"±{_plain(number.spread, percent)}{mark}"
    if number.low is None or number.high is None:
        return mark
    if number.points:
        return f"{signed(number.low)} to {signed(number.high)}{mark}"
    ends = [
        f"{100 * end:.0f}" if percent else _plain(end, False) for end in (number.low, number.high)
    ]
    return "–".join(ends) + mark


def interval_text(number: Number, percent: bool = True) -> str:
    """`62.4 to 64.2`; empty where there is none."""
    ends = (number.low, number.high)
    return " to ".join(value_text(end, number, percent) for end in ends) if None not in ends else ""


def evidence_texts(number: Number, percent: bool = True) -> list[str]:
    """Mean, ± over seeds, interval, seeds, images, the paper's, the gap, cells; empty for none."""
    spread = _plain(number.spread, percent)
    return [
        mean_text(number, percent) + "†" * number.masked,
        spread if has_spread(number) else "",
        interval_text(number, percent),
        f"{number.seeds}" if number.seeds else "",
        f"{number.images:,}" if number.images else "",
        paper_text(number, percent),
        gap_text(number, percent),
        " ".join(dict.fromkeys(number.cells)),
    ]


def has_spread(number: Number) -> bool:
    """Whether it comes with a standard deviation; one of a difference is rarely known."""
    several = number.seeds > 1 and not number.points
    return number.mean is not None and (several or number.spread > 0)


def has_paper(grid: Grid) -> bool:
    return any(number.paper is not None for number in grid.numbers)


def notes(grid: Grid) -> list[str]:
    """What the marks of a table mean, as far as it has them."""
    paper = ["In parentheses the paper's."] * has_paper(grid)
    found = []
    if any(n.seeds > 1 and has_spread(n) for n in grid.numbers):
        found.append("± is the standard deviation over training seeds")
    if any(n.low is not None and not has_spread(n) for n in grid.numbers):
        found.append("ranges are the 95% interval of a single seed")
    text = "; ".join(found)
    sentences = [f"{text[0].upper()}{text[1:]}."] if text else []
    won = any(2 in places(grid, index) for index in range(len(grid.rows)))
    best = ["Bold is the best bit width of a row, underlined the second."] * won
    masked = any(number.masked for number in grid.numbers)
    return paper + sentences + best + [BLIND.format("marked numbers")] * masked


def sample(grid: Grid) -> str:
    """`2 seeds, 1,000 to 10,000 images each`."""
    there = [n for n in grid.numbers if n.mean is not None]
    seeds, images = {n.seeds for n in there} - {0}, {n.images for n in there} - {0}
    parts = [
        _range(counts, noun) for counts, noun in ((seeds, "seed"), (images, "image")) if counts
    ]
    return ", ".join(parts) + (" each" if len(parts) > 1 else "")


def missing_text(section: Section) -> str:
    """How many measurements are still to be made; empty when all are there."""
    if not section.missing:
        return ""
    what = "1 measurement is" if section.missing == 1 else f"{section.missing:,} measurements are"
    return f"{what} still missing: their places show {NOTHING} or stay empty."


def commands(section: Section) -> list[str]:
    """What makes the section, and any one of its cells alone; none where it has no command."""
    one = f"{section.command} --cell KEY --out again  # one number: KEY is among its cells"
    return [section.command, one] if section.command else []


def _range(counts: set[int], noun: str) -> str:
    low, high = min(counts), max(counts)
    many = f"{low:,} to {high:,}" if low < high else f"{low:,}"
    return f"{many} {noun}{'' if high == 1 else 's'}"


def value_text(value: float | None, number: Number, percent: bool) -> str:
    """`value` in the manner of `number`."""
    if value is None:
        return NOTHING
    return signed(value) if number.points and percent else _plain(value, percent)


def _plain(value: float, percent: bool) -> str:
    text = f"{100 * value:.1f}" if percent else f"{value:#.3g}".rstrip(".")
    return text.replace("-", "−")
