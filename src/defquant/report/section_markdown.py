"""A section as Markdown, for a README or docs: what GitHub shows."""

from collections.abc import Iterable, Sequence
from urllib.parse import quote

from markupsafe import escape

from defquant.errors import visible
from defquant.paper.section import Entry, Section
from defquant.report import values
from defquant.report.names import markdown
from defquant.report.sources import Prediction
from defquant.report.strips import StripTable, of_pictures
from defquant.report.values import NOTHING, Fact, Grid

__all__ = ["code_block", "folded", "pipe_table", "section_markdown"]

STYLES = ("{}", "**{}**", "<ins>{}</ins>")


def section_markdown(section: Section, figure: str = "") -> str:
    """Heading, paragraphs, tables, and the command; `figure` is the address of a picture of it.

    A table has means with ± over seeds (or the interval of a single one) and the paper's in
    parentheses; intervals, seeds, images and the gap to the paper stand in a folded table.
    """
    blocks = [f"## {markdown(section.title)}", *map(_paragraph, section.text)]
    if missing := values.missing_text(section):
        blocks.append(f"*{missing}*")
    if figure and section.panels:
        blocks.append(f"![{markdown(section.title)}]({quote(figure)})")
    for table in map(values.of_table, section.tables):
        blocks += [_grid(table), *_below(table)]
    blocks += _details(section)
    blocks += _pictures(section)
    if section.command:
        blocks.append(code_block("\n$ ".join(values.commands(section))))
    return "\n\n".join(blocks) + "\n"


def pipe_table(head: Sequence[str], rows: Iterable[Sequence[str]], words: int = 1) -> str:
    """A GitHub table of ready-made Markdown; all but the first `words` columns on the right."""
    rule = ["---"] * words + ["---:"] * (len(head) - words)
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, rule, *rows))


def code_block(command: str) -> str:
    """A command in a fence that it cannot close."""
    text = "\n".join(map(visible, command.splitlines()))
    fence = "````" if "```" in text else "```"
    return f"{fence}console\n$ {text}\n{fence}"


def _paragraph(text: str) -> str:
    """Words, and no list or heading, whatever they begin with."""
    shown = markdown(text.strip())
    first = shown.split(" ")[0]
    listed = first[:-1].isdigit() and first[-1:] in (".", ")")
    if listed:
        return f"{first[:-1]}\\{first[-1]}{shown[len(first) :]}"
    return "\\" + shown if first[:1] in ("-", "+", "#") else shown


def _grid(grid: Grid) -> str:
    words = values.label_columns(grid)
    rows = []
    for index, row in enumerate(grid.rows):
        won = values.places(grid, index)
        rows.append([_entry(e, grid.percent, at) for e, at in zip(row, won, strict=True)])
    return pipe_table([markdown(head) or " " for head in grid.head], rows, words)


def _entry(entry: Entry, percent: bool, place: int = 0) -> str:
    if entry is None:
        return NOTHING
    if isinstance(entry, str):
        return markdown(entry)
    paper = values.paper_text(entry, percent)
    parts = [STYLES[place].format(values.mean_text(entry, percent))]
    parts += [values.uncertainty_text(entry, percent), f"({paper})" if paper else ""]
    return " ".join(filter(None, parts))


def _below(grid: Grid) -> list[str]:
    """The caption: what the numbers are, on how much they rest, what the marks mean."""
    about = [grid.caption, f"{text[0].upper()}{text[1:]}." if (text := values.sample(grid)) else ""]
    about += values.notes(grid)
    words = " ".join(map(_sentence, filter(None, about)))
    return [f"<sub>{markdown(words)}</sub>"] if words else []


def _sentence(text: str) -> str:
    return text if text.rstrip().endswith((".", "!", "?")) else f"{text.rstrip()}."


def _details(section: Section) -> list[str]:
    """Every number with its evidence: a folded table for each table and each panel."""
    blocks = []
    for grid in values.grids(section):
        if facts := grid.facts:
            title = grid.caption.split(". ")[0].rstrip(".") or section.title
            rows = [_fact(fact, grid.percent) for fact in facts]
            table = pipe_table(("Row", "Column", *values.EVIDENCE), rows, words=2)
            blocks.append(folded(f"Intervals, seeds, images, cells: {title}", table))
    return blocks


def _fact(fact: Fact, percent: bool) -> list[str]:
    texts = values.evidence_texts(fact.number, percent)
    return [markdown(fact.row), markdown(fact.column), *(text or NOTHING for text in texts)]


def _pictures(section: Section) -> list[str]:
    """What the networks say of the pictures; the pictures themselves are on the page alone."""
    tables, notes = of_pictures(section.pictures)
    blocks = [block for table in tables for block in _strip(table)]
    return blocks + [f"*{markdown(note)}*" for note in notes]


def _strip(table: StripTable) -> list[str]:
    names = [markdown(c.name) for c in table.columns]
    head = ["Image", "Truth", *(f"{n}, {kind}" for n in names for kind in ("clean", "attacked"))]
    rows = []
    for image in table.images:
        holders = table.holders(image)
        label = holders[0].strip.examples[image].label
        row = [markdown(image), markdown(label)]
        for column in table.columns:
            found = column.strip.examples.get(image)
            row += [_guess(found.clean), _guess(found.adversarial)] if found else [NOTHING] * 2
        rows.append(row)
    about = f"{table.where}: ✓ right, ✗ wrong, and the confidence."
    return [pipe_table(head, rows, len(head)), f"<sub>{markdown(about)}</sub>"] if rows else []


def _guess(found: Prediction) -> str:
    sure = "" if found.confidence is None else f" {100 * found.confidence:.0f}%"
    return f"{'✓' if found.right else '✗'} {markdown(found.name)}{sure}"


def folded(title: str, content: str) -> str:
    """Markdown behind a title that opens it."""
    return f"<details><summary>{escape(visible(title))}</summary>\n\n{content}\n\n</details>"
