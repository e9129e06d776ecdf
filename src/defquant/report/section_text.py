"""A section for the terminal."""

from collections.abc import Sequence
from typing import Literal

from rich.console import Console, Group, RenderableType
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from defquant.errors import visible
from defquant.paper.section import Entry, Section
from defquant.report import values
from defquant.report.sources import Prediction
from defquant.report.strips import StripTable, of_pictures
from defquant.report.values import NOTHING, Grid

__all__ = ["print_section", "text"]

STYLES = ("", "bold", "underline")
LAYOUTS = ((" ", " (paper {})"), (" ", "\n(paper {})"), (" ", "\n({})"), ("\n", "\n({})"))
"""What stands before ± and around the paper's number, from the widest to the narrowest."""


def print_section(section: Section, console: Console) -> None:
    """Heading, paragraphs, tables and command; the numbers of figures where it has no table."""
    console.print(text(section, console), crop=False)


def text(section: Section, console: Console) -> RenderableType:
    """What `print_section` prints, for this console's width."""
    parts: list[RenderableType] = [Text(visible(section.title), style="bold")]
    parts += [Text(visible(paragraph)) for paragraph in section.text]
    if missing := values.missing_text(section):
        parts.append(Text(missing, style="italic"))
    shown = map(values.of_table, section.tables) if section.tables else values.grids(section)
    for grid in shown:
        parts += _grid(grid, console)
    tables, notes = of_pictures(section.pictures)
    parts += [_strip(table) for table in tables] + [Text(visible(note)) for note in notes]
    if section.command:
        parts.append(Text(f"$ {visible(section.command)}", style="dim"))
    spaced = [piece for part in parts for piece in (part, Text())]
    return Group(*spaced)


def _grid(grid: Grid, console: Console) -> list[RenderableType]:
    """Entries in the widest layout that fits, else in the narrowest, then not cut off."""
    tables = [_table(grid, layout) for layout in LAYOUTS]
    fitting = [table for table in tables if _width(table, console) <= console.width]
    table = fitting[0] if fitting else tables[-1]
    table.width = _width(table, console)
    sample = values.sample(grid)
    caption = [visible(grid.caption), f"{sample[0].upper()}{sample[1:]}." if sample else ""]
    caption += values.notes(grid)
    words = " ".join(filter(None, caption))
    return [Text(words, style="dim italic"), table] if words else [table]


def _width(table: Table, console: Console) -> int:
    return Measurement.get(console, console.options.update(max_width=10_000), table).maximum


def _table(grid: Grid, layout: tuple[str, str]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 1))
    words = values.label_columns(grid)
    for index, head in enumerate(grid.head):
        side: Literal["left", "right"] = "left" if index < words else "right"
        table.add_column(Text(visible(head)), justify=side, no_wrap=True)
    former: Sequence[Entry] = ()
    for index, row in enumerate(grid.rows):
        won = values.places(grid, index)
        shown = [_entry(e, grid.percent, at, layout) for e, at in zip(row, won, strict=True)]
        if words > 1 and former and row[0] == former[0]:
            shown[0] = Text()
        table.add_row(*shown)
        former = row
    return table


def _entry(entry: Entry, percent: bool, place: int, layout: tuple[str, str]) -> Text:
    if entry is None or isinstance(entry, str):
        return Text(NOTHING if entry is None else visible(entry))
    shown = Text(values.mean_text(entry, percent), style=STYLES[place])
    if more := values.uncertainty_text(entry, percent):
        shown = Text.assemble(shown, layout[0] + more)
    paper = values.paper_text(entry, percent)
    return Text.assemble(shown, (layout[1].format(paper), "dim")) if paper else shown


def _strip(table: StripTable) -> Table:
    """What the networks say of the attacked pictures."""
    shown = Table(box=None, pad_edge=False, header_style="bold", title=Text(visible(table.where)))
    for head in ("Image", "Truth", *(column.name for column in table.columns)):
        shown.add_column(Text(visible(head)))
    for image in table.images:
        label = table.holders(image)[0].strip.examples[image].label
        row = [Text(visible(image)), Text(visible(label))]
        for column in table.columns:
            found = column.strip.examples.get(image)
            guess = found.adversarial if found else None
            row.append(
                Text(f"{'✓' if guess.right else '✗'} {visible(guess.name)}" if guess else NOTHING)
            )
        shown.add_row(*row)
    return shown


def _guess(found: Prediction) -> Text:
    return Text(f"{'✓' if found.right else '✗'} {visible(found.name)}")
