"""Sections, claims and summaries as Markdown, as GitHub shows it, and for the terminal."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import escape
from rich import table as rich_table
from rich.console import Console, Group, RenderableType
from rich.measure import Measurement as Width
from rich.text import Text

from defquant.errors import visible
from defquant.paper.section import Answer, Number, Reading, Section, Table, Verdict
from defquant.report.measured import summary, summary_table
from defquant.report.model import (
    NOTHING,
    WORDS,
    Chapter,
    Place,
    Plain,
    View,
    listing,
    of_section,
    view,
)
from defquant.report.names import markdown
from defquant.report.sources import StripTable
from defquant.results import Measurement

__all__ = [
    "claims", "claims_markdown", "markdown_table", "print_claims", "print_section",
    "section_markdown", "tally", "text_matrix", "text_table",
]  # fmt: skip

ICONS: dict[Answer, str] = {"holds": "✓", "does not hold": "✗", "not decided": "?"}
EMPTY = Reading(NOTHING, None, None, None, "not decided", NOTHING)
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
    return _written("section", chapter=chapter, figure=figure if section.panels else "")


def claims_markdown(verdicts: Sequence[Verdict]) -> str:
    """How many claims hold, a table with a row per reading, then notes and commands."""
    return _written("claims", chapter=claims(verdicts), counted=_counted(verdicts))


def markdown_table(measurements: Iterable[Measurement]) -> str:
    """The summary as a GitHub table: best of a row bold, second underlined."""
    return _written("summary", table=summary_table(summary(measurements)))


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
        drawn = _terminal(view(_guesses(strip)), LAYOUTS[0])
        parts.append(Group(Text(visible(strip.where)), drawn))
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
    """Rows are the networks attacked, columns, by number, those shown the images.

    A cell is the share of images fooled, of those that both networks have right, with its
    interval; `-` where there are none. `record` is what `defquant.diagnose.runs.transfer_runs`
    returns.
    """
    names = [f"[{i}] {network['name']}" for i, network in enumerate(record["networks"], 1)]
    texts = [
        "-" if c["rate"] is None else f"{c['rate']:.1%} [{c['low']:.1%}, {c['high']:.1%}]"
        for c in record["cells"]
    ]
    width, count = max(map(len, names)) + 1, len(names)
    lines = [("", [name.split(" ")[0] for name in names])]
    lines += [(name, texts[i * count : (i + 1) * count]) for i, name in enumerate(names)]
    about = f"{record['attack']}, {record['images']} images of {record['data']}"
    rows = [f"{name:{width}}" + "".join(f"{text:>25}" for text in own) for name, own in lines]
    return [f"rows: made on; columns: shown to; {about}", *rows]


def _counted(verdicts: Sequence[Verdict]) -> str:
    """`Of 32 claims under the paper's own attack: 8 ✓ holds, ...`, then of all readings."""
    found = tally(verdicts)
    claimed = ", ".join(f"{len(names)} {icon} {answer}" for icon, answer, names, _ in found)
    read = ", ".join(f"{count} {icon} {answer}" for icon, answer, _, count in found)
    return (
        f"Of {len(verdicts)} claims under the paper's own attack: {claimed}. "
        f"Of {sum(count for *_, count in found)} readings under all attacks: {read}."
    )


# --- claims -------------------------------------------------------------------------------


def claims(verdicts: Sequence[Verdict]) -> Chapter:
    """A row per reading; what is said of each claim, and its command, folded."""
    rows: list[Plain] = [
        {
            "Claim": f"{v.name} {v.claim} The paper: {v.paper or NOTHING}",
            "Under": r.attack,
            "Verdict": "" if r is EMPTY else f"{ICONS[r.verdict]} {r.verdict}",
            "Effect, points": Number(r.effect, low=r.low, high=r.high, points=True),
            "What was compared": r.detail,
        }
        for v in verdicts
        for r in v.readings or (EMPTY,)
    ]
    notes = [(v.name, v.where, v.note, v.command) for v in verdicts]
    kept = tuple(note for note in notes if any(note[1:]))
    beside = Table(("Claim", "Where", "Note", "Command"), kept, "Notes and commands")
    return Chapter(
        "claims", "The paper's claims", tables=[listing(rows, WORDS["claims"])], verdicts=verdicts,
        folded=[(beside.caption, [beside])] * bool(kept),
    )  # fmt: skip


def tally(verdicts: Sequence[Verdict]) -> list[tuple[str, str, list[str], int]]:
    """Icon, answer, the claims that have it under the paper's own attack, how many readings."""
    firsts = {v.name: v.readings[0].verdict if v.readings else "not decided" for v in verdicts}
    readings = [reading.verdict for verdict in verdicts for reading in verdict.readings]
    return [
        (icon, answer, [name for name, own in firsts.items() if own == answer],
         readings.count(answer))
        for answer, icon in ICONS.items()
    ]  # fmt: skip


# --- Markdown -----------------------------------------------------------------------------


def _written(kind: str, **parts: Any) -> str:
    """What the macro `kind` of page.md makes of `parts`."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters.update(md=markdown, html=lambda text: escape(visible(text)), url=quote)
    environment.filters.update(paragraph=_paragraph, visible=visible)
    environment.globals.update(view=view, guesses=_guesses)
    written: str = getattr(environment.get_template("page.md").module, kind)(**parts)
    return written.strip("\n") + "\n"


def _paragraph(text: str) -> str:
    """Words, and no list or heading, whatever they begin with."""
    shown = markdown(text.strip())
    first = shown.split(" ")[0]
    if first[:-1].isdigit() and first[-1:] in (".", ")"):
        return f"{first[:-1]}\\{first[-1]}{shown[len(first) :]}"
    return "\\" + shown if first[:1] in ("-", "+", "#") else shown


def _guesses(table: StripTable) -> Table:
    kinds = ("clean", "attacked")
    heads = [f"{name}, {kind}" for name, *_ in table.columns for kind in kinds]
    rows = []
    for image in table.images:
        found = [o.answers(image) if image in o.by_id else {} for *_, o in table.columns]
        said = [" ".join(own.get(kind, [NOTHING])).strip() for own in found for kind in kinds]
        rows.append((image, table.first(image)[1], *said))
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
