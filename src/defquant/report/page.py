"""A report as one HTML page that opens offline, as Markdown for GitHub, and for the terminal."""

import base64
import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import escape
from rich import table as rich_table
from rich.console import Console, Group, RenderableType
from rich.measure import Measurement as Width
from rich.text import Text

from defquant.errors import visible
from defquant.files import write_bytes
from defquant.paper.section import Answer as Decided
from defquant.paper.section import Number, Reading, Section, Table, Verdict, eps_number
from defquant.records import Measurement, read_folder
from defquant.report import cards, judged, measured, model, plot
from defquant.report.answer import Answer, of_places, rows_of
from defquant.report.names import Cell, distinct, is_validation, markdown, over_seeds
from defquant.report.sources import StripTable, of_runs, read_runs

__all__ = [
    "build_report", "claims_markdown", "judged_page", "markdown_table", "print_claims",
    "print_section", "section_markdown", "tally", "template", "text_matrix", "text_table",
]  # fmt: skip

HERE = Path(__file__).parent
ICONS: dict[Decided, str] = {"holds": "✓", "does not hold": "✗", "not decided": "?"}
EMPTY = Reading(model.NOTHING, None, None, None, "not decided", model.NOTHING)
STYLES = ("", "bold", "underline")
ANSWERS = {"right": "green", "wrong": "red", "open": "yellow"}
LAYOUTS = ((" ", " (paper {})"), (" ", "\n(paper {})"), (" ", "\n({})"), ("\n", "\n({})"))
"""What stands before ± and around the paper's number, from the widest to the narrowest."""


def build_report(
    folder: Path | str,
    out: Path | str,
    title: str | None = None,
    sections: Sequence[Section] = (),
    verdicts: Sequence[Verdict] = (),
    measurements: Sequence[Measurement] | None = None,
) -> Path:
    """Write the report on every run below `folder` to `out` and return `out`.

    The page begins with the `verdicts` on the paper's claims and the `sections`, where there are
    any. Then it holds, per architecture and data set, the summary (the paper's Table 1) and
    accuracy over eps and over bits, example pictures, trainings, the models that were exported
    and the settings. It is one file without anything to load; its charts answer to the pointer.
    `measurements` are those of the folder, where they are read already.
    Raises `UserError` when the folder holds no results and no exported models, and there are no
    sections or verdicts.
    """
    folder, out = Path(folder), Path(out)
    exported, broken = cards.read_cards(folder)
    if measurements is None:
        there = any(path.stat().st_size for path in folder.rglob("results.jsonl"))
        bare = bool(sections or verdicts or exported)
        measurements = read_folder(folder) if there or not bare else []
    runs, pictures, notes = read_runs(folder, measurements)
    kept = measured.chosen(measurements)
    found = over_seeds(kept)
    places, strips = of_places(found, measured.table_eps), of_runs(pictures)
    notes = _notes([*notes, *broken], found, len(measurements) - len(kept))
    told = {run.name: run.diagnosis for run in runs if run.diagnosis}
    answer = places[0].answer(told, cards.ships(exported)) if places else None
    name, facts = _about(measurements, bool(sections or verdicts))
    paper = _of_paper(sections)
    page = _Page(
        title or name, facts,
        answer or (cards.answer(exported) if exported else None),
        [*rows_of(places), *cards.rows(exported)],
        {name: look for place in reversed(places) for name, look in place.looks.items()},
        strips or [s for chapter in paper for s in chapter.strips],
        [claims(verdicts)] * bool(verdicts),
        [
            *paper, *measured.groups(places, found, drawn=not paper), *cards.chapters(exported),
            *measured.training(runs, kept),
            replace(measured.settings(measurements, runs), notes=notes),
        ],
    )  # fmt: skip
    return write_bytes(out, page.html().encode())


def judged_page(record: Mapping[str, Any]) -> str:
    """The page of `defquant judge` for one record of it."""
    facts = {"images": record["images"], "radii": len(record["rows"])}
    title, answer = f"{record['model']['name']}, judged", judged.answer(record)
    folded = judged.chapters(record)
    return _Page(title, facts, answer, judged.rows(record), folded=folded).html()


def _of_paper(sections: Sequence[Section]) -> list[model.Chapter]:
    found: list[model.Chapter] = []
    for chapter in map(model.of_section, sections):
        name = "paper-" + re.sub(r"[^a-z0-9]+", "-", chapter.anchor.lower()).strip("-")
        taken = f"-{len(found)}" * (name in [other.anchor for other in found])
        found.append(replace(chapter, anchor=name + taken))
    return found


@dataclass(frozen=True)
class _Page:
    """What the one template shows, of whatever kind the results are."""

    title: str
    facts: Mapping[str, int]
    answer: Answer | None
    rows: Sequence[model.Row] = ()
    known: plot.Looks | None = None
    strips: Sequence[StripTable] = ()
    chapters: Sequence[model.Chapter] = ()
    folded: Sequence[model.Chapter] = ()

    def html(self) -> str:
        style, script = ((HERE / f"page.{kind}").read_text("utf-8") for kind in ("css", "js"))
        gaps = distinct(
            name.removeprefix("Less ") for row in self.rows for name in row.about
            if name.startswith("Less ")
        )  # fmt: skip
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        return template("page.html").render(
            vars(self), style=style, script=script, policy=f"'sha256-{digest}'", pictures={},
            charts={c.anchor: list(_charts(c)) for c in (*self.chapters, *self.folded)},
            looks=plot.looks([(r.network, r.kind) for r in self.rows]) | (self.known or {}),
            marks=model.MARKS, tally=tally, svg=plot.svg, net=plot.net, eps_number=eps_number,
            value=model.value_text, spread=model.uncertainty_text,
            reference=gaps[0] if len(gaps) == 1 else "reference",
            several=len({row.place for row in self.rows}) > 1,
        )  # fmt: skip


def template(name: str, place: Path = HERE) -> Template:
    environment = Environment(
        loader=FileSystemLoader(place), autoescape=name.endswith("html"), trim_blocks=True,
        lstrip_blocks=True, undefined=StrictUndefined,
    )  # fmt: skip
    environment.globals.update(view=model.view, guesses=_guesses)
    environment.filters.update(md=markdown, html=lambda text: escape(visible(text)), url=quote)
    environment.filters.update(paragraph=_paragraph, visible=visible)
    return environment.get_template(name)


def _charts(chapter: model.Chapter) -> Iterator[plot.Figure]:
    """What Vega-Lite draws, and what is said below."""
    for panels in plot.figures(chapter.panels):
        about = model.WORDS["bars" if panels[0].percent else "deviation"]
        papers = any(line.paper for panel in panels for line in panel.lines)
        yield plot.Figure("", about + model.WORDS["dashed"] * papers, plot.chart(panels))
    if any(reading.effect is not None for v in chapter.verdicts for reading in v.readings):
        yield plot.Figure("", model.WORDS["effects"], plot.claims_chart(chapter.verdicts))


def _about(measurements: Sequence[Measurement], paper: bool) -> tuple[str, dict[str, int]]:
    """A title, and what is counted; held-out images only where there are no others."""
    tested = [m for m in measurements if not is_validation(m.data)] or measurements
    facts = {
        "seeds": len({m.seed for m in measurements}),
        "attacks": len({m.attack for m in measurements} - {"clean"}),
        "test images": max((m.total for m in tested), default=0),
    }
    names = [name for name, _ in Counter((m.data, m.model) for m in tested).most_common()]
    models, data = distinct(network for _, network in names), distinct(data for data, _ in names)
    title = f"Accuracy under attack: {', '.join(models)} on {', '.join(data)}"
    title = title if measurements else "Deployed integer models"
    return "Defensive Quantization, measured again" if paper else title, facts


def _notes(unreadable: Sequence[str], cells: Sequence[Cell], repeated: int) -> list[str]:
    """What is not among the numbers."""
    alike = distinct(str(c.series) for c in cells if len(set(c.seeds)) < len(c.seeds))
    notes = [f"Unreadable. {note}" for note in unreadable]
    notes += [
        f"{name}: several runs of one seed are averaged, though they differ" for name in alike
    ]
    told = f"Repeated measurements of the same run, attack and ε left out: {repeated}"
    return [*notes, told] if repeated else notes


# --- claims -------------------------------------------------------------------------------


def claims(verdicts: Sequence[Verdict]) -> model.Chapter:
    """Counted and drawn; folded, a row per reading, what is said of each claim, its command."""
    rows: list[model.Plain] = [
        {
            "Claim": f"{v.name} {v.claim} The paper: {v.paper or model.NOTHING}",
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
    return model.Chapter(
        "claims", "The paper's claims", verdicts=verdicts, folded=[
            ("Every reading", [model.listing(rows, model.WORDS["claims"])]),
            *[(beside.caption, [beside])] * bool(kept),
        ],
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


# --- Markdown and terminal ------------------------------------------------------------------


def section_markdown(section: Section, figure: str = "") -> str:
    """Heading, paragraphs, tables, and the command; `figure` is the address of a picture of it.

    A table has means with ± over seeds (or the interval of a single one) and the paper's in
    parentheses. Pictures, and what each number rests on, are on the page; here is what the
    networks say of them.
    """
    chapter = model.of_section(section)
    return _written("section", chapter=chapter, figure=figure if section.panels else "")


def claims_markdown(verdicts: Sequence[Verdict]) -> str:
    """How many claims hold, a table with a row per reading, then notes and commands."""
    return _written("claims", chapter=claims(verdicts), counted=_counted(verdicts))


def markdown_table(measurements: Iterable[Measurement]) -> str:
    """The summary as a GitHub table: best of a row bold, second underlined."""
    return _written("summary", table=measured.summary_table(measured.summary(measurements)))


def text_table(measurements: Iterable[Measurement]) -> RenderableType:
    """The summary for a terminal."""
    shown = model.view(measured.summary_table(measured.summary(measurements)))
    return Group(_terminal(shown, LAYOUTS[0]), Text("\n".join(shown.notes), style="italic"))


def print_section(section: Section, console: Console) -> None:
    """Heading, paragraphs, tables and command; the numbers of figures where it has no table."""
    chapter = model.of_section(section)
    parts: list[RenderableType] = [Text(visible(chapter.title), style="bold")]
    parts += [Text(visible(paragraph)) for paragraph in chapter.text]
    for table in chapter.tables or [t for _, tables in chapter.folded[:1] for t in tables]:
        parts += _fitted(model.view(table), console)
    for strip in chapter.strips:
        drawn = _terminal(model.view(_guesses(strip)), LAYOUTS[0])
        parts.append(Group(Text(visible(strip.where)), drawn))
    parts += [Text(visible(note)) for note in chapter.notes]
    parts += [Text(f"$ {visible(command)}", style="dim") for command in chapter.commands[:1]]
    console.print(Group(*(piece for part in parts for piece in (part, Text()))), crop=False)


def print_claims(verdicts: Sequence[Verdict], console: Console) -> None:
    """Each claim with its readings, one a line, and its note; the counts at the end."""
    for verdict in verdicts:
        console.print(Text(visible(f"{verdict.name}  {verdict.claim}"), style="bold"))
        about = f"{verdict.where}. Paper: {verdict.paper or model.NOTHING}. {verdict.note}".rstrip()
        console.print(Text(visible(about), style="dim"))
        ((_, (table,)), *_) = claims([verdict]).folded
        short = Table(table.head[1:-1], tuple(row[1:-1] for row in table.rows))
        console.print(_terminal(model.view(short), LAYOUTS[0]), crop=False)
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


def _written(kind: str, **parts: Any) -> str:
    """What the macro `kind` of page.md makes of `parts`."""
    written: str = getattr(template("page.md").module, kind)(**parts)
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
        said = [" ".join(own.get(kind, [model.NOTHING])).strip() for own in found for kind in kinds]
        rows.append((image, table.first(image)[1], *said))
    return Table(("Image", "Truth", *heads), tuple(rows))


# --- terminal -----------------------------------------------------------------------------


def _fitted(shown: model.View, console: Console) -> list[RenderableType]:
    """Entries in the widest layout that fits, else in the narrowest, then not cut off."""
    tables = [_terminal(shown, layout) for layout in LAYOUTS]
    fitting = [table for table in tables if _width(table, console) <= console.width]
    table = fitting[0] if fitting else tables[-1]
    table.width = _width(table, console)
    words: list[RenderableType] = [Text(visible(shown.about), style="dim italic")]
    return [*(words if shown.about else []), table]


def _width(table: rich_table.Table, console: Console) -> int:
    return Width.get(console, console.options.update(max_width=10_000), table).maximum


def _terminal(shown: model.View, layout: tuple[str, str]) -> rich_table.Table:
    table = rich_table.Table(box=None, pad_edge=False, header_style="bold", padding=(0, 1))
    for index, head in enumerate(shown.head):
        side: Literal["left", "right"] = "left" if index < shown.words else "right"
        table.add_column(Text(visible(head)), justify=side, no_wrap=True)
    for row, run in zip(shown.rows, shown.runs, strict=True):
        places = [_text(place, layout) for place in row]
        table.add_row(*([Text(), *places[1:]] if run == 0 else places))
    return table


def _text(place: model.Shown, layout: tuple[str, str]) -> Text:
    shown = Text(visible(place.text), style=ANSWERS.get(place.mark, STYLES[place.rank]))
    if place.more:
        shown = Text.assemble(shown, layout[0] + place.more)
    paper = (layout[1].format(place.paper), "dim")
    return Text.assemble(shown, paper) if place.paper else shown
