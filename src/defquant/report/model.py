"""How numbers and tables are written: once, for the page, for Markdown and for the terminal.

A `Table` of `Number`s becomes a `View` of texts. Its evidence, what each number rests on, is a
table of its own, which repeats no mean that stands in the first.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from defquant.paper.section import Entry, Line, Number, Panel, Section, Table, signed

__all__ = [
    "EPS", "MARKS", "NOTHING", "Place", "View", "axis", "bar", "commands", "evidence", "height",
    "interval_text", "line_name", "missing_text", "of_panel", "panel_tables", "places", "rests_on",
    "said", "uncertainty_text", "value_text", "view",
]  # fmt: skip

EPS = "ε · 255"  # an x axis of numbers
NOTHING = "–"
MARKS = {"✓": "right", "✗": "wrong", "?": "open"}
"""What an answer begins with, and its class on the page."""
PRECISION = re.compile(r"(full|fp|float)\b.*|[1-8]([ -]?bits?)?", re.IGNORECASE)
PAPER = "In parentheses the paper's."
SPREAD = "± is the standard deviation over training seeds."
SINGLE = "Ranges are the 95% interval of a single seed."
BEST = "Bold is the best bit width of a row, underlined the second."
BLIND = (
    "† The loss gradient is exactly zero on more than 1% of the images that are classified "
    "rightly. Gradient attacks are blind there: this accuracy is masked, not robust."
)


@dataclass(frozen=True)
class Place:
    """An entry as it is shown: the value, what stands beside it, the paper's; 1 best, 2 second."""

    text: str
    more: str = ""
    paper: str = ""
    rank: int = 0

    @property
    def mark(self) -> str:
        """The class of an answer, `✗ below`; empty for all else."""
        return MARKS.get(self.text.split(" ")[0], "")


@dataclass(frozen=True)
class View:
    """A table of texts; the first `words` columns name its rows, `notes` explain its marks."""

    head: tuple[str, ...]
    words: int
    rows: tuple[tuple[Place, ...], ...]
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
        return " ".join(_sentence(text) for text in (self.caption, *self.notes) if text)


def view(table: Table) -> View:
    """`table` as it is shown."""
    rows = tuple(
        tuple(_place(e, r, table.percent) for e, r in zip(row, places(table, i), strict=True))
        for i, row in enumerate(table.rows)
    )
    return View(table.head, label_columns(table), rows, table.caption, tuple(_notes(table)))


def evidence(table: Table) -> Table:
    """A row for each number of `table` that says what it rests on; without rows for none."""
    known = ("95% interval", "Seeds", "Images", "Gap to the paper", "Cells")
    facts = [
        (row, column, *_evidence(number, table.percent)) for row, column, number in _facts(table)
    ]
    kept = tuple(tuple(t or NOTHING for t in fact) for fact in facts if any(fact[2:]))
    title = table.caption.split(". ")[0].rstrip(".")
    return Table(("Row", "Column", *known), kept, title)


def panel_tables(section: Section) -> list[Table]:
    """The numbers of each panel that has one which stands in no table of the section."""
    numbers = [n for table in section.tables for n in _numbers(table)]
    known = {value for n in numbers for value in (n.mean, n.paper)}
    found = map(of_panel, section.panels)
    return [table for table in found if {n.mean for n in _numbers(table)} - known]


def of_panel(panel: Panel) -> Table:
    """A row per line, a column per place of the x axis."""
    at = axis(panel.lines)
    rows = []
    for line in panel.lines:
        found = {place: _own(line, number) for place, number in line.points}
        rows.append((line_name(line), *(found.get(place) for place in at)))
    caption = f"{panel.title}: {panel.y}" if panel.title else panel.y
    return Table((panel.x, *at), tuple(rows), caption, panel.percent)


def line_name(line: Line) -> str:
    """Its label; a paper's line says so."""
    return f"{line.label} (paper)" if line.paper and "paper" not in line.label else line.label


def height(line: Line, number: Number) -> float | None:
    """Where a number is drawn; a paper's line may hold its value as `mean` or as `paper`."""
    return number.paper if line.paper and number.mean is None else number.mean


def bar(number: Number) -> tuple[float, float]:
    """The wider of the 95 % interval and ± the spread over seeds."""
    middle = number.mean or 0.0
    lows = [middle - number.spread, *([] if number.low is None else [number.low])]
    highs = [middle + number.spread, *([] if number.high is None else [number.high])]
    return min(lows), max(highs)


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


def label_columns(table: Table) -> int:
    """How many columns on the left hold nothing but words: the names of the rows."""
    wordy = [all(isinstance(row[i], str) for row in table.rows) for i in range(len(table.head))]
    return wordy.index(False) if False in wordy else min(1, len(wordy))


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


# --- words --------------------------------------------------------------------------------


def value_text(value: float | None, number: Number, percent: bool = True) -> str:
    """`63.3`, `+1.4` of a difference, `0.0713` where it is no share, `–` for nothing."""
    if value is None:
        return NOTHING
    return signed(value) if number.points and percent else _plain(value, percent)


def uncertainty_text(number: Number, percent: bool = True) -> str:
    """`±1.2` over seeds, the interval `62–64` of a single one, `†` where it is masked."""
    mark = "†" if number.masked else ""
    if number.mean is None:
        return ""
    if _has_spread(number):
        return f"±{_plain(number.spread, percent)}{mark}"
    if number.low is None or number.high is None:
        return mark
    if number.points:
        return f"[{signed(number.low)}, {signed(number.high)}]{mark}"
    ends = (number.low, number.high)
    return "–".join(f"{100 * e:.0f}" if percent else _plain(e, False) for e in ends) + mark


def interval_text(number: Number, percent: bool = True) -> str:
    """`62.4 to 64.2`; empty where there is none."""
    ends = (number.low, number.high)
    return " to ".join(value_text(end, number, percent) for end in ends) if None not in ends else ""


def said(number: Number, percent: bool = True) -> str:
    """Value and uncertainty: `63.3 ±1.2`."""
    more = uncertainty_text(number, percent)
    return f"{value_text(number.mean, number, percent)} {more}".rstrip()


def rests_on(numbers: Sequence[Number]) -> str:
    """`2 seeds, 1,000 to 10,000 images each`."""
    there = [n for n in numbers if n.mean is not None]
    seeds, images = {n.seeds for n in there} - {0}, {n.images for n in there} - {0}
    parts = [_range(c, noun) for c, noun in ((seeds, "seed"), (images, "image")) if c]
    return ", ".join(parts) + (" each" if len(parts) > 1 else "")


def missing_text(section: Section) -> str:
    """How many measurements are still to be made; empty when all are there."""
    return f"Measurements still missing: {section.missing:,}." if section.missing else ""


def commands(section: Section) -> list[str]:
    """What makes the section, and any one of its cells alone; none where it has no command."""
    one = f"{section.command} --cell KEY --out again  # one number: KEY is among its cells"
    return [section.command, one] if section.command else []


def _place(entry: Entry, rank: int, percent: bool) -> Place:
    if not isinstance(entry, Number):
        return Place(NOTHING if entry is None else entry)
    paper = "" if entry.paper is None else value_text(entry.paper, entry, percent)
    text = value_text(entry.mean, entry, percent)
    return Place(text, uncertainty_text(entry, percent), paper, rank)


def _notes(table: Table) -> list[str]:
    numbers = _numbers(table)
    rests = rests_on(numbers)
    marks = {
        f"{rests[:1].upper()}{rests[1:]}.": bool(rests),
        PAPER: any(n.paper is not None for n in numbers),
        SPREAD: any(n.seeds > 1 and _has_spread(n) for n in numbers),
        SINGLE: any(n.low is not None and not _has_spread(n) and not n.points for n in numbers),
        BEST: any(2 in places(table, index) for index in range(len(table.rows))),
        BLIND: any(n.masked for n in numbers),
    }
    return [text for text, there in marks.items() if there]


def _evidence(number: Number, percent: bool) -> tuple[str, ...]:
    gap = "" if number.gap is None else signed(number.gap)
    gap = f"{number.gap:+#.3g}".replace("-", "−") if gap and not percent else gap
    return (
        interval_text(number, percent),
        f"{number.seeds}" if number.seeds else "",
        f"{number.images:,}" if number.images else "",
        gap,
        " ".join(dict.fromkeys(number.cells)),
    )


def _facts(table: Table) -> list[tuple[str, str, Number]]:
    """Every number row by row, with its row's and column's names; an unnamed row has the last."""
    found, names = [], [""] * label_columns(table)
    for row in table.rows:
        for i, own in enumerate(row[: len(names)]):
            names[i] = str(own) or names[i]
        name = ", ".join(filter(None, names))
        pairs = zip(table.head, row, strict=True)
        found += [(name, head, entry) for head, entry in pairs if isinstance(entry, Number)]
    return found


def _numbers(table: Table) -> list[Number]:
    return [entry for row in table.rows for entry in row if isinstance(entry, Number)]


def _own(line: Line, number: Number) -> Number:
    """A paper's line may hold its values as `mean` or as `paper`."""
    only = line.paper and number.mean is None
    return replace(number, mean=number.paper, paper=None) if only else number


def _has_spread(number: Number) -> bool:
    """Whether it comes with a standard deviation; one of a difference is rarely known."""
    several = number.seeds > 1 and not number.points
    return number.mean is not None and (several or number.spread > 0)


def _range(counts: set[int], noun: str) -> str:
    low, high = min(counts), max(counts)
    many = f"{low:,} to {high:,}" if low < high else f"{low:,}"
    return f"{many} {noun}{'' if high == 1 else 's'}"


def _sentence(text: str) -> str:
    return text if text.rstrip().endswith((".", "!", "?")) else f"{text.rstrip()}."


def _plain(value: float, percent: bool) -> str:
    text = f"{100 * value:.1f}" if percent else f"{value:#.3g}".rstrip(".")
    return text.replace("-", "−")
