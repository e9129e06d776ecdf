"""Sections, claims and summaries as Markdown, as GitHub shows it, and for the terminal."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal
from urllib.parse import quote

from markupsafe import escape
from rich import table as rich_table
from rich.console import Console, Group, RenderableType
from rich.measure import Measurement as Width
from rich.text import Text

from defquant.errors import visible
from defquant.paper.section import Section, Table, Verdict
from defquant.report.claims import claims, tally
from defquant.report.measured import summary, summary_table
from defquant.report.model import NOTHING, Place, View, of_section, view
from defquant.report.names import markdown
from defquant.report.sources import StripTable
from defquant.results import Measurement

__all__ = [
    "claims_markdown", "markdown_table", "print_claims", "print_section", "section_markdown",
    "text_matrix", "text_table",
]  # fmt: skip

MARKDOWN = ("{}", "**{}**", "<ins>{}</ins>")
STYLES = ("", "bold", "underline")
ANSWERS = {"right": "green", "wrong": "red", "open": "yellow"}
LAYOUTS = ((" ", " (paper {})"), (" ", "\n(paper {})"), (" ", "\n({})"), ("\n", "\n({})"))
"""What stands before ± and around the paper's number, from the widest to the narrowest."""


def section_markdown(section: Section, figure: str = "") -> str:
    """Heading, paragraphs, tables, and the command; `figure` is the address of a picture of it.

    A table has means with ± over seeds (or the interval of a single one) and the paper's in
    parentheses; intervals, seeds, images, the gap to the paper and cells stand folded below.
    Pictures are on the page alone; here is what the networks say of them.
    """
    chapter = of_section(section)
    blocks = [f"## {markdown(chapter.title)}", *map(_paragraph, chapter.text)]
    if figure and section.panels:
        blocks.append(f"![{markdown(section.title)}]({quote(figure)})")
    blocks += [block for table in chapter.tables for block in _table(table)]
    for title, table in ((name, table) for name, tables in chapter.folded for table in tables):
        name = f"{title}: {table.caption.split('. ')[0].rstrip('.')}" if table.caption else title
        shown = f"<details><summary>{escape(visible(name))}</summary>"
        blocks.append(f"{shown}\n\n{_pipes(view(table))}\n\n</details>")
    for strip in chapter.strips:
        said = f"{strip.where}: ✓ right, ✗ wrong, and the confidence."
        blocks += [_pipes(view(_guesses(strip))), f"<sub>{markdown(said)}</sub>"]
    blocks += [f"*{markdown(note)}*" for note in chapter.notes]
    if chapter.commands:
        blocks.append(_code("\n$ ".join(chapter.commands)))
    return "\n\n".join(blocks) + "\n"


def claims_markdown(verdicts: Sequence[Verdict]) -> str:
    """How many claims hold, a table with a row per reading, then notes and commands."""
    chapter = claims(verdicts)
    notes = [_pipes(view(table)) for _, tables in chapter.folded for table in tables]
    return "\n\n".join([_counted(verdicts), *_table(chapter.tables[0]), *notes]) + "\n"


def markdown_table(measurements: Iterable[Measurement]) -> str:
    """The summary as a GitHub table: best of a row bold, second underlined."""
    shown = view(summary_table(summary(measurements)))
    notes = [f"<sub>{markdown(' '.join(shown.notes))}</sub>"] if shown.notes else []
    return "\n\n".join([_pipes(shown), *notes]) + "\n"


def text_table(measurements: Iterable[Measurement]) -> RenderableType:
    """The summary for a terminal."""
    shown = view(summary_table(summary(measurements)))
    return Group(_terminal(shown, LAYOUTS[0]), Text("\n".join(shown.notes), style="italic"))


def print_section(section: Section, console: Console) -> None:
    """Heading, paragraphs, tables and command; the numbers of figures where it has no table."""
    chapter = of_section(section)
    parts: list[RenderableType] = [Text(visible(chapter.title), style="bold")]
    parts += [Text(visible(paragraph)) for paragraph in chapter.text]
    for table in chapter.tables or [t for _, tables in chapter.folded[:1] for t in tables]:
        parts += _fitted(view(table), console)
    for strip in chapter.strips:
        parts += [Text(visible(strip.where)), _terminal(view(_guesses(strip)), LAYOUTS[0])]
    parts += [Text(visible(note)) for note in chapter.notes]
    parts += [Text(f"$ {visible(command)}", style="dim") for command in chapter.commands[:1]]
    console.print(Group(*(piece for part in parts for piece in (part, Text()))), crop=False)


def print_claims(verdicts: Sequence[Verdict], console: Console) -> None:
    """Each claim with its readings, one a line, and its note; the counts at the end."""
    for verdict in verdicts:
        console.print(Text(visible(f"{verdict.name}  {verdict.claim}"), style="bold"))
        about = f"{verdict.where}. Paper: {verdict.paper or NOTHING}. {verdict.note}".rstrip()
        console.print(Text(visible(about), style="dim"))
        (table,) = claims([verdict]).tables
        short = Table(table.head[1:-1], tuple(row[1:-1] for row in table.rows))
        console.print(_terminal(view(short), LAYOUTS[0]), crop=False)
        console.print()
    console.print(Text(_counted(verdicts)))


def text_matrix(record: Mapping[str, Any]) -> list[str]:
    """Rows are the networks attacked, columns those shown the images; each cell with its interval.

    A cell is the share of images fooled, of those that both networks have right; `-` where there
    are none. Columns are numbered, as names are long. `record` is what
    `defquant.diagnose.runs.transfer_runs` returns.
    """
    names = [network["name"] for network in record["networks"]]
    width = max(len(name) for name in names) + 5
    head = " " * width + "".join(f"{f'[{i}]':>25}" for i in range(1, len(names) + 1))
    about = f"{record['attack']}, {record['images']} images of {record['data']}"
    rows = [f"rows: made on; columns: shown to; {about}", head]
    for i, name in enumerate(names):
        cells = record["cells"][i * len(names) : (i + 1) * len(names)]
        rows.append(f"{f'[{i + 1}] {name}':{width}}" + "".join(f"{_rate(c):>25}" for c in cells))
    return rows


def _rate(cell: Mapping[str, Any]) -> str:
    if cell["rate"] is None:
        return "-"
    return f"{cell['rate']:.1%} [{cell['low']:.1%}, {cell['high']:.1%}]"


def _counted(verdicts: Sequence[Verdict]) -> str:
    """`Of 32 claims under the paper's own attack: 8 ✓ holds, ...`, then of all readings."""
    found = tally(verdicts)
    claimed = ", ".join(f"{len(names)} {icon} {answer}" for icon, answer, names, _ in found)
    read = ", ".join(f"{count} {icon} {answer}" for icon, answer, _, count in found)
    return (
        f"Of {len(verdicts)} claims under the paper's own attack: {claimed}. "
        f"Of {sum(count for *_, count in found)} readings under all attacks: {read}."
    )


# --- Markdown -----------------------------------------------------------------------------


def _table(table: Table) -> list[str]:
    shown = view(table)
    return [_pipes(shown)] + [f"<sub>{markdown(shown.about)}</sub>"] * bool(shown.about)


def _pipes(shown: View) -> str:
    """A GitHub table; all but the columns of words on the right."""
    head = [markdown(name) or " " for name in shown.head]
    rule = ["---"] * shown.words + ["---:"] * (len(shown.head) - shown.words)
    rows = [[_cell(place) for place in row] for row in shown.rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, rule, *rows))


def _cell(place: Place) -> str:
    parts = [MARKDOWN[place.rank].format(markdown(place.text)), markdown(place.more)]
    return " ".join(filter(None, [*parts, f"({place.paper})" if place.paper else ""]))


def _code(command: str) -> str:
    """A command in a fence that it cannot close."""
    text = "\n".join(map(visible, command.splitlines()))
    fence = "````" if "```" in text else "```"
    return f"{fence}console\n$ {text}\n{fence}"


def _paragraph(text: str) -> str:
    """Words, and no list or heading, whatever they begin with."""
    shown = markdown(text.strip())
    first = shown.split(" ")[0]
    if first[:-1].isdigit() and first[-1:] in (".", ")"):
        return f"{first[:-1]}\\{first[-1]}{shown[len(first) :]}"
    return "\\" + shown if first[:1] in ("-", "+", "#") else shown


def _guesses(table: StripTable) -> Table:
    kinds = ("clean", "attacked")
    rows = []
    for image in table.images:
        answers = [strip.answers(image) for *_, strip in table.columns]
        said = [
            " ".join(found[k]).strip() if found else NOTHING for found in answers for k in kinds
        ]
        rows.append((image, table.first(image)[1], *said))
    heads = [f"{name}, {kind}" for name, *_ in table.columns for kind in kinds]
    return Table(("Image", "Truth", *heads), tuple(rows))


# --- terminal -----------------------------------------------------------------------------


def _fitted(shown: View, console: Console) -> list[RenderableType]:
    """Entries in the widest layout that fits, else in the narrowest, then not cut off."""
    tables = [_terminal(shown, layout) for layout in LAYOUTS]
    fitting = [table for table in tables if _width(table, console) <= console.width]
    table = fitting[0] if fitting else tables[-1]
    table.width = _width(table, console)
    words: list[RenderableType] = [Text(visible(shown.about), style="dim italic")]
    return [*(words if shown.about else []), table]


def _width(table: rich_table.Table, console: Console) -> int:
    return Width.get(console, console.options.update(max_width=10_000), table).maximum


def _terminal(shown: View, layout: tuple[str, str]) -> rich_table.Table:
    table = rich_table.Table(box=None, pad_edge=False, header_style="bold", padding=(0, 1))
    for index, head in enumerate(shown.head):
        side: Literal["left", "right"] = "left" if index < shown.words else "right"
        table.add_column(Text(visible(head)), justify=side, no_wrap=True)
    for row, run in zip(shown.rows, shown.runs, strict=True):
        places = [_text(place, layout) for place in row]
        table.add_row(*([Text(), *places[1:]] if run == 0 else places))
    return table


def _text(place: Place, layout: tuple[str, str]) -> Text:
    shown = Text(visible(place.text), style=ANSWERS.get(place.mark, STYLES[place.rank]))
    if place.more:
        shown = Text.assemble(shown, layout[0] + place.more)
    paper = (layout[1].format(place.paper), "dim")
    return Text.assemble(shown, paper) if place.paper else shown
