"""What a report is made of, and how its numbers are written: once, for page, Markdown, terminal.

A report is `Chapter`s of `Table`s and `Panel`s of `Number`s, both made of rows of plain columns
(`listing`, `panels`). A `View` is a table as texts; what a number rests on is told by the pointer.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any

from defquant.paper.section import Entry, Line, Number, Panel, Section, Table, Verdict, signed
from defquant.report.sources import StripTable, of_pictures
from defquant.typed import written

__all__ = [
    "EPS", "MARKS", "NOTHING", "WORDS", "Chapter", "Plain", "Row", "Shown", "View", "axis", "bar",
    "height", "interval_text", "listing", "of_section", "panels", "places",
    "told_of", "uncertainty_text", "value_text", "view",
]  # fmt: skip

EPS = "ε · 255"  # an x axis of numbers
NOTHING = "–"
MARKS = {"✓": "right", "✗": "wrong", "?": "open"}
"""What an answer begins with, and its class on the page."""
PRECISION = re.compile(r"(full|fp|float)\b.*|[1-8]([ -]?bits?)?", re.IGNORECASE)
BLIND = (
    "† The loss gradient is exactly zero on more than 1% of the images that are classified "
    "rightly. Gradient attacks are blind there: this accuracy is masked, not robust."
)
WORDS: Mapping[str, Any] = written(__file__, "words.yaml")


@dataclass(frozen=True)
class Chapter:
    """A section as it is shown; `folded` tables open at a click."""

    anchor: str
    title: str
    text: Sequence[str] = ()
    tables: Sequence[Table] = ()
    panels: Sequence[Panel] = ()
    folded: Sequence[tuple[str, Sequence[Table]]] = ()
    strips: Sequence[StripTable] = ()
    notes: Sequence[str] = ()
    commands: Sequence[str] = ()
    verdicts: Sequence[Verdict] = ()  # drawn and counted


@dataclass(frozen=True)
class Row:
    """One network under one attack, whether of runs, exported models or a judgement: a line of the
    leaderboard, a mark of a chart. `gap` is `n` less the reference's.

    `kind` is that of its colour; `telling` rows are seen first; `about` is what it rests on.
    """

    place: str
    network: str
    kind: str
    method: str
    bits: int | None
    attack: str
    eps: float
    n: Number
    gap: Number | None = None
    telling: bool = False
    about: Mapping[str, str] = field(default_factory=dict)


def of_section(section: Section) -> Chapter:
    """A section of an experiment, with the numbers of its figures folded."""
    strips, notes = of_pictures(section.pictures)
    drawn = _panel_tables(section)
    folded = [("Numbers of the figure", drawn)] * bool(drawn)
    missing = f"Measurements still missing: {section.missing:,}."
    one = f"{section.command} --cell KEY --out again  # one number: KEY is among its cells"
    return Chapter(
        section.name, section.title, (*section.text, *[missing] * bool(section.missing)),
        section.tables, section.panels, folded,
        strips, notes, [section.command, one] if section.command else [],
    )  # fmt: skip


# --- tables and panels ----------------------------------------------------------------------

Plain = Mapping[str, Entry]
"""A row: entries by column."""


def listing(rows: Sequence[Plain], caption: str = "") -> Table:
    """A table of rows by column; what a row lacks is a dash."""
    head = dict.fromkeys(column for row in rows for column in row)
    found = tuple(tuple(row.get(column) or NOTHING for column in head) for row in rows)
    return Table(tuple(head), found, caption)


def panels(
    points: Iterable[tuple[str, str, str, str, Number]], x: str, y: str = "accuracy"
) -> list[Panel]:
    """Of rows (panel, line, kind of line, place on the x axis, number), in order."""
    found: dict[str, dict[tuple[str, str], list[tuple[str, Number]]]] = {}
    for title, label, kind, at, number in points:
        found.setdefault(title, {}).setdefault((label, kind), []).append((at, number))
    return [
        Panel(title, x, y, tuple(Line(label, tuple(o), kind) for (label, kind), o in own.items()))
        for title, own in found.items()
    ]


@dataclass(frozen=True)
class Shown:
    """An entry as it is shown: the value, what stands beside it, the paper's; 1 best, 2 second; and
    what the pointer is told.
    """

    text: str
    more: str = ""
    paper: str = ""
    rank: int = 0
    told: str = ""

    @property
    def mark(self) -> str:
        """The class of an answer, `✗ below`; empty for all else."""
        return MARKS.get(self.text.split(" ")[0], "")


@dataclass(frozen=True)
class View:
    """A table of texts; the first `words` columns name its rows, `notes` explain its marks."""

    head: tuple[str, ...]
    words: int
    rows: tuple[tuple[Shown, ...], ...]
    caption: str
    notes: tuple[str, ...]

    @property
    def runs(self) -> list[int]:
        """Of each row, how many begin with its first name: 0 where the row above says it.

        All are 1 where no further column names the rows.
        """
        if self.words < 2:
            return [1] * len(self.rows)
        sizes = [len(list(same)) for _, same in groupby(self.rows, lambda row: row[0])]
        return [n if i == 0 else 0 for n in sizes for i in range(n)]

    @property
    def about(self) -> str:
        """Caption and notes as sentences."""
        texts = [text.rstrip() for text in (self.caption, *self.notes) if text]
        return " ".join(t if t.endswith((".", "!", "?")) else f"{t}." for t in texts)


def view(table: Table) -> View:
    """`table` as it is shown."""

    def place(entry: Entry, rank: int) -> Shown:
        if not isinstance(entry, Number):
            return Shown(NOTHING if entry is None else entry)
        paper = "" if entry.paper is None else value_text(entry.paper, entry, table.percent)
        text = value_text(entry.mean, entry, table.percent)
        gap, cells = _gap(entry, table.percent), " ".join(dict.fromkeys(entry.cells)).strip()
        about = {"": told_of(entry, table.percent) if entry.seeds else "", "gap": gap, "of": cells}
        told = "; ".join(f"{name} {own}".strip() for name, own in about.items() if own)
        return Shown(text, uncertainty_text(entry, table.percent), paper, rank, told)

    ranks = [places(table, index) for index in range(len(table.rows))]
    rows = tuple(tuple(map(place, row, own)) for row, own in zip(table.rows, ranks, strict=True))
    notes = _notes(_numbers(table), best=any(2 in own for own in ranks))
    return View(table.head, _label_columns(table), rows, table.caption, tuple(notes))


def _panel_tables(section: Section) -> list[Table]:
    """The numbers of each panel that has one which stands in no table of the section."""
    numbers = [n for table in section.tables for n in _numbers(table)]
    known = {value for n in numbers for value in (n.mean, n.paper)}
    found = map(_of_panel, section.panels)
    return [table for table in found if {n.mean for n in _numbers(table)} - known]


def _of_panel(panel: Panel) -> Table:
    """A row per line, a column per place of the x axis."""
    at = axis(panel.lines)
    rows = []
    for line in panel.lines:
        own = " (paper)" if line.paper and "paper" not in line.label else ""
        found = {p: replace(n, mean=height(line, n), paper=None if line.paper else n.paper)
                 for p, n in line.points}  # fmt: skip
        rows.append((line.label + own, *map(found.get, at)))
    caption = f"{panel.title}: {panel.y}" if panel.title else panel.y
    return Table((panel.x, *at), tuple(rows), caption, panel.percent)


def height(line: Line, number: Number) -> float | None:
    """Where a number is drawn; a paper's line may hold its value as `mean` or as `paper`."""
    return number.paper if line.paper and number.mean is None else number.mean


def bar(number: Number) -> tuple[float, float]:
    """The wider of the 95 % interval and ± the spread over seeds."""
    middle, spread = number.mean or 0.0, number.spread
    low, high = (middle if end is None else end for end in (number.low, number.high))
    return min(middle - spread, low), max(middle + spread, high)


def axis(lines: Iterable[Line]) -> list[str]:
    """The places of all lines in an order that is each line's own, as far as they agree."""
    merged: list[str] = []
    for names in dict.fromkeys(tuple(place for place, _ in line.points) for line in lines):
        for i, place in enumerate(names):
            if place not in merged:
                following = (merged.index(later) for later in names[i:] if later in merged)
                after = [merged.index(names[i - 1]) + 1] if i else list(following)
                merged.insert(min(after, default=len(merged)), place)
    return merged


def places(table: Table, index: int) -> list[int]:
    """Of a row: 1 for the best number as it is printed, 2 for the second, 0 for all else.

    Numbers under the names of precisions compete with each other ("Full precision", "1" to "8",
    "4 bits"), as in the paper's Table 1. A lone number wins nothing, the lower of two is no
    second, and a masked one is out of the race.
    """
    row = table.rows[index]
    rivals = {
        i: round(100 * entry.mean, 1)
        for i, (entry, name) in enumerate(zip(row, table.head, strict=True))
        if isinstance(entry, Number) and entry.mean is not None and PRECISION.fullmatch(name)
        if table.percent and not (entry.points or entry.masked)
    }
    if len(rivals) < 2:
        return [0] * len(row)
    order = sorted(set(rivals.values()), reverse=True)[: 2 if len(rivals) > 2 else 1]
    return [order.index(rivals[i]) + 1 if rivals.get(i) in order else 0 for i in range(len(row))]


def _label_columns(table: Table) -> int:
    """How many columns on the left hold nothing but words, the names of the rows; where all do,
    those without a head, or the first.
    """
    wordy = [all(isinstance(row[i], str) for row in table.rows) for i in range(len(table.head))]
    return wordy.index(False) if False in wordy else max(table.head.count(""), min(1, len(wordy)))


def _numbers(table: Table) -> list[Number]:
    return [entry for row in table.rows for entry in row if isinstance(entry, Number)]


# --- words --------------------------------------------------------------------------------


def value_text(value: float | None, number: Number, percent: bool = True) -> str:
    """`63.3`, `+1.4` of a difference, `0.0713` where it is no share, `–` for nothing."""
    if value is None:
        return NOTHING
    return signed(value) if number.points and percent else _plain(value, percent)


def uncertainty_text(number: Number, percent: bool = True) -> str:
    """`±1.2` over seeds, the interval `62–64` of a single one, `†` where it is masked."""
    mark, low, high = "†" * number.masked, number.low, number.high
    if _has_spread(number):
        return f"±{_plain(number.spread, percent)}{mark}"
    if number.mean is None or low is None or high is None:
        return mark
    if number.points:
        return f"[{signed(low)}, {signed(high)}]{mark}"
    return "–".join(f"{100 * e:.0f}" if percent else _plain(e, False) for e in (low, high)) + mark


def interval_text(number: Number, percent: bool = True) -> str:
    """`62.4 to 64.2`; empty where there is none."""
    ends = (number.low, number.high)
    return " to ".join(value_text(end, number, percent) for end in ends) if None not in ends else ""


def told_of(n: Number, percent: bool = True) -> str:
    """`63.3 ±1.2, 95% interval 62.4 to 64.2, 2 seeds, 1,000 images each`."""
    ends, seeds = interval_text(n, percent), f"{n.seeds} seed{'s' * (n.seeds > 1)}"
    parts = [f"{value_text(n.mean, n, percent)} {uncertainty_text(n, percent) * (n.seeds > 1)}"]
    parts += [ends and f"95% interval {ends}", seeds * bool(n.seeds)]
    parts += [f"{n.images:,} images" + " each" * (n.seeds > 1)] * bool(n.images)
    return ", ".join(part.strip() for part in parts if part.strip())


def _notes(numbers: Sequence[Number], best: bool) -> list[str]:
    marks = {
        "paper": any(n.paper is not None for n in numbers),
        "spread": any(n.seeds > 1 and _has_spread(n) for n in numbers),
        "single": any(n.low is not None and not _has_spread(n) and not n.points for n in numbers),
        "best": best,
    }
    notes = [_rests_on([n for n in numbers if n.mean is not None])]
    notes += [WORDS["notes"][name] for name, there in marks.items() if there]
    return list(filter(None, notes)) + [BLIND] * any(n.masked for n in numbers)


def _rests_on(numbers: Sequence[Number]) -> str:
    """`2 seeds, 1,000 to 10,000 images each.`"""
    counts = {"seed": {n.seeds for n in numbers} - {0}, "image": {n.images for n in numbers} - {0}}
    parts = [
        f"{' to '.join(f'{n:,}' for n in sorted({min(c), max(c)}))} {noun}{'s' * (max(c) > 1)}"
        for noun, c in counts.items()
        if c
    ]
    return ", ".join(parts) + (" each." if len(parts) > 1 else "." * len(parts))


def _gap(number: Number, percent: bool) -> str:
    if number.gap is None:
        return ""
    return signed(number.gap) if percent else f"{number.gap:+#.3g}".replace("-", "−")


def _has_spread(number: Number) -> bool:
    """Whether it comes with a standard deviation; one of a difference is rarely known."""
    several = number.seeds > 1 and not number.points
    return number.mean is not None and (several or number.spread > 0)


def _plain(value: float, percent: bool) -> str:
    text = f"{100 * value:.1f}" if percent else f"{value:#.3g}".rstrip(".")
    return text.replace("-", "−")
