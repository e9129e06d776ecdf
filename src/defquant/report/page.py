"""A folder of runs -> one HTML page that opens offline, and is whole without its script."""

import base64
import gzip
import hashlib
import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from defquant.files import write_bytes
from defquant.paper.section import Section, Verdict
from defquant.report import measured, model, plot
from defquant.report.claims import ICONS, claims, tally
from defquant.report.model import View, evidence, view
from defquant.report.names import distinct, is_validation, series_of
from defquant.report.plot import Spec
from defquant.report.sources import (
    Deployed,
    Run,
    StripTable,
    of_pictures,
    of_runs,
    read_deployed,
    read_runs,
)
from defquant.results import Measurement, aggregate, read_folder

__all__ = ["build_report"]

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Chart:
    """A figure: what Vega-Lite draws, and a picture of it for a browser without script."""

    spec: Spec
    about: str
    still: bool = True

    @property
    def picture(self) -> Markup:
        return Markup(plot.svg(self.spec)) if self.still else Markup()

    @property
    def data(self) -> Markup:
        """JSON that no text in it can end."""
        text = json.dumps(self.spec, ensure_ascii=False, separators=(",", ":"))
        return Markup(re.sub("[<>&]", lambda found: f"\\u{ord(found[0]):04x}", text))


@dataclass(frozen=True)
class Chapter:
    """A section of the page; `folded` tables open at a click."""

    anchor: str
    title: str
    text: Sequence[str] = ()
    charts: Sequence[Chart] = ()
    tables: Sequence[View] = ()
    folded: Sequence[tuple[str, Sequence[View]]] = ()
    strips: Sequence[StripTable] = ()
    notes: Sequence[str] = ()
    commands: Sequence[str] = ()
    tally: Sequence[tuple[str, str, Sequence[str], int]] = ()


@dataclass
class _Page:
    title: str = ""
    facts: list[str] = field(default_factory=list)
    chapters: list[Chapter] = field(default_factory=list)
    folded: list[Chapter] = field(default_factory=list)
    last: list[Chapter] = field(default_factory=list)


def build_report(
    folder: Path | str,
    out: Path | str,
    title: str | None = None,
    sections: Sequence[Section] = (),
    verdicts: Sequence[Verdict] = (),
) -> Path:
    """Write the report on every run below `folder` to `out` and return `out`.

    The page begins with the `verdicts` on the paper's claims and the `sections`, where there are
    any. Then it holds, per architecture and data set, the summary (the paper's Table 1) and
    accuracy over eps and over bits, example pictures, trainings, the models that were exported
    and the settings. It is one file without anything to load; its charts answer to the pointer.
    Raises `UserError` when the folder holds no results and no exported models, and there are no
    sections or verdicts.
    """
    folder, out = Path(folder), Path(out)
    cards, broken = read_deployed(folder)
    paper = [*_claims(verdicts), *_paper(sections)]
    measurements = read_folder(folder) if not (paper or cards) or _has_results(folder) else []
    runs, pictures, notes = read_runs(folder, measurements)
    shown = _measured(measurements, folded=bool(paper))
    trained = _training(runs, measurements)
    strips = of_runs(pictures)
    examples = [Chapter("examples", "Examples", strips=strips)] if strips else []
    rest = _rest(measurements, runs, [*notes, *broken])
    shipped = _deployed(cards)
    whole = _Page(
        title=title or _title(measurements, bool(paper)),
        facts=_facts(measurements),
        chapters=[*paper, *([] if paper else shown), *shipped, *examples],
        folded=[*(shown if paper else []), *trained],
        last=rest,
    )
    return write_bytes(out, _render(whole).encode())


def _has_results(folder: Path) -> bool:
    return any(path.stat().st_size for path in folder.rglob("results.jsonl"))


def _render(page: _Page) -> str:
    environment = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.lstrip_blocks = True
    style, boot = ((HERE / f"page.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
    every = [*page.chapters, *page.folded, *page.last]
    vega = plot.script() if any(chapter.charts for chapter in every) else ""
    packed = base64.b64encode(gzip.compress(vega.encode(), 9, mtime=0)).decode()
    hashes = " ".join(f"'sha256-{_hash(text)}'" for text in (vega, boot) if vega)
    return environment.get_template("page.html").render(
        page=page, style=Markup(style), boot=Markup(boot), vega=packed if vega else "",
        scripts=hashes or "'none'",
    )  # fmt: skip


def _hash(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


# --- chapters -----------------------------------------------------------------------------


def _paper(sections: Sequence[Section]) -> list[Chapter]:
    found: list[Chapter] = []
    for section in sections:
        name = "paper-" + re.sub(r"[^a-z0-9]+", "-", section.name.lower()).strip("-")
        taken = [chapter.anchor for chapter in found]
        found.append(_chapter(section, f"{name}-{len(taken)}" if name in taken else name))
    return found


def _chapter(section: Section, anchor: str) -> Chapter:
    strips, notes = of_pictures(section.pictures)
    panels = model.panel_tables(section)
    proofs = [evidence(table) for table in (*section.tables, *panels)]
    folded = [
        ("The numbers of the figure", [view(table) for table in panels]),
        ("Evidence: intervals, seeds, images, cells", [view(t) for t in proofs if t.rows]),
    ]
    missing = model.missing_text(section)
    return Chapter(
        anchor=anchor,
        title=section.title,
        text=[*section.text, *([missing] if missing else [])],
        charts=_charts(section),
        tables=[view(table) for table in section.tables],
        folded=[(title, tables) for title, tables in folded if tables],
        strips=strips,
        notes=notes,
        commands=model.commands(section),
    )


def _charts(section: Section, *, still: bool = True) -> list[Chart]:
    found = []
    for panels in plot.figures(section.panels):
        about = "Bars and bands: the wider of the 95% interval over test images and ± the standard "
        about += "deviation over seeds." if panels[0].percent else "deviation."
        papers = any(line.paper for panel in panels for line in panel.lines)
        about += " Dashed: the paper's numbers, from its tables." * papers
        found.append(Chart(plot.chart(panels), about, still))
    return found


def _claims(verdicts: Sequence[Verdict]) -> list[Chapter]:
    if not verdicts:
        return []
    section, beside = claims(verdicts)
    folded = [("Notes and commands", [view(beside)])] if beside.rows else []
    about = "A point per reading, with its 95% interval; a line per claim."
    drawn = any(reading.effect is not None for v in verdicts for reading in v.readings)
    return [
        Chapter(
            anchor=section.name,
            title=section.title,
            charts=[Chart(plot.claims_chart(verdicts), about)] if drawn else [],
            tables=[view(table) for table in section.tables],
            folded=folded,
            tally=[(ICONS[a], a, names, count) for a, (names, count) in tally(verdicts).items()],
        )
    ]


def _measured(measurements: Sequence[Measurement], *, folded: bool) -> list[Chapter]:
    return [
        Chapter(
            anchor=group.section.name,
            title=group.section.title,
            charts=_charts(group.section, still=not (folded or i)),
            tables=[view(table) for table in group.section.tables],
            folded=[("Every number", [view(group.listing)])],
        )
        for i, group in enumerate(measured.groups(measurements))  # of the largest with pictures
    ]


def _training(runs: Sequence[Run], measurements: Sequence[Measurement]) -> list[Chapter]:
    section = measured.training(runs, measured.chosen(measurements))
    if section is None:
        return []
    tables = [view(table) for table in section.tables]
    return [Chapter("training", section.title, charts=_charts(section, still=False), tables=tables)]


def _deployed(cards: Sequence[Deployed]) -> list[Chapter]:
    found = [_chapter(section, section.name) for section in measured.deployed(cards)]
    if found:
        every = [view(table) for table in measured.every_card(cards)]
        commands = distinct(card.command for card in cards)
        folded = [("Every number: parity, scores, latency, versions", every)]
        found.append(Chapter("cards", "Deployed: cards", folded=folded, commands=commands))
    return found


def _rest(
    measurements: Sequence[Measurement], runs: Sequence[Run], notes: Sequence[str]
) -> list[Chapter]:
    """What could not be read, and the settings of everything."""
    kept = measured.chosen(measurements)
    notes = [f"Unreadable. {note}" for note in notes] + _same_seeds(kept)
    if len(measurements) > len(kept):
        more = len(measurements) - len(kept)
        notes.append(f"Repeated measurements of the same run, attack and ε left out: {more}")
    folded = [(t.caption, [view(t)]) for t in measured.settings(measurements, runs)]
    made = measured.commands(measurements)
    return [Chapter("settings", "Settings", folded=folded, notes=notes, commands=made)]


def _same_seeds(kept: Sequence[Measurement]) -> list[str]:
    """Networks of which a cell averages two runs of one seed: they differ in something else."""
    cells = aggregate(kept)
    names = distinct(str(series_of(c)) for c in cells if len(set(c.seeds)) < len(c.seeds))
    return [f"{name}: several runs of one seed are averaged, though they differ" for name in names]


def _title(measurements: Sequence[Measurement], paper: bool) -> str:
    if paper:
        return "Defensive Quantization, measured again"
    if not measurements:
        return "Deployed integer models"
    sizes = Counter((m.data, m.model) for m in measurements)
    names = [name for name, _ in sizes.most_common()]
    names = [name for name in names if not is_validation(name[0])] or names
    models, data = distinct(model for _, model in names), distinct(data for data, _ in names)
    return f"Accuracy under attack: {', '.join(models)} on {', '.join(data)}"


def _facts(measurements: Sequence[Measurement]) -> list[str]:
    if not measurements:
        return []
    on_test = [m for m in measurements if not is_validation(m.data)]
    counts = {
        "runs": len({m.run for m in measurements}),
        "seeds": len({m.seed for m in measurements}),
        "attacks": len({m.attack for m in measurements} - {"clean"}),
        "test images": max(m.total for m in on_test or measurements),
    }
    return [f"{name}: {count:,}" for name, count in counts.items()]
