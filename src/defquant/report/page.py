"""A folder of runs -> one HTML page that opens offline, and is whole without its script."""

import base64
import gzip
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from defquant.files import write_bytes
from defquant.paper.section import Section, Verdict
from defquant.report import cards, measured, model, plot
from defquant.report.model import WORDS, Chapter
from defquant.report.names import distinct, is_validation, series_of
from defquant.report.show import claims, tally
from defquant.report.sources import of_runs, read_runs
from defquant.results import Cell, Measurement, over_seeds, read_folder

__all__ = ["build_report", "judged_page"]

HERE = Path(__file__).parent


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
    paper = [claims(verdicts)] * bool(verdicts) + _paper(sections)
    if measurements is None:
        there = not (paper or exported) or _has_results(folder)
        measurements = read_folder(folder) if there else []
    runs, pictures, notes = read_runs(folder, measurements)
    kept = measured.chosen(measurements)
    found = over_seeds(kept)
    shown, strips = measured.groups(found), of_runs(pictures)
    if paper:  # which is what a reader without script sees, too
        shown = [replace(chapter, still=False) for chapter in shown]
    last = replace(
        measured.settings(measurements, runs),
        notes=_notes([*notes, *broken], found, len(measurements) - len(kept)),
    )
    page = _render(
        title=title or _title(measurements, bool(paper)),
        facts=_facts(measurements),
        chapters=[
            *paper, *([] if paper else shown), *cards.chapters(exported),
            *[Chapter("examples", "Examples", strips=strips)] * bool(strips),
        ],
        folded=[*(shown if paper else []), *measured.training(runs, kept)],
        last=[last],
    )  # fmt: skip
    return write_bytes(out, page.encode())


def _has_results(folder: Path) -> bool:
    return any(path.stat().st_size for path in folder.rglob("results.jsonl"))


def judged_page(record: Mapping[str, Any]) -> str:
    """The card of `defquant judge` for one record of it: a page of its own, without script."""
    style = (HERE / "page.css").read_text(encoding="utf-8")
    return _environment().get_template("judged.html").render(r=record, style=style)


def _environment() -> Environment:
    return Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip


def _render(title: str, facts: Sequence[str], **parts: Sequence[Chapter]) -> str:
    style, boot = ((HERE / f"page.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
    charts = {c.anchor: list(_charts(c)) for part in parts.values() for c in part}
    vega = plot.script() if any(charts.values()) else b""
    hashes = [_hash(text) for text in (gzip.decompress(vega), boot.encode()) if vega]
    return _environment().get_template("page.html").render(
        title=title, facts=facts, **parts, charts=charts, view=model.view, tally=tally,
        marks=model.MARKS, svg=plot.svg, json=_json, style=style, boot=boot,
        vega=base64.b64encode(vega).decode(), scripts=" ".join(hashes) or "'none'",
    )  # fmt: skip


def _hash(text: bytes) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text).digest()).decode()}'"


def _json(spec: plot.Spec) -> str:
    """JSON that no text in it can end."""
    text = json.dumps(spec, ensure_ascii=False, separators=(",", ":"))
    return re.sub("[<>&]", lambda found: f"\\u{ord(found[0]):04x}", text)


def _charts(chapter: Chapter) -> Iterator[tuple[plot.Spec, str]]:
    """What Vega-Lite draws, and what is said below."""
    for panels in plot.figures(chapter.panels):
        about = WORDS["bars" if panels[0].percent else "deviation"]
        papers = any(line.paper for panel in panels for line in panel.lines)
        yield plot.chart(panels), about + WORDS["dashed"] * papers
    if any(reading.effect is not None for v in chapter.verdicts for reading in v.readings):
        yield plot.claims_chart(chapter.verdicts), WORDS["effects"]


def _paper(sections: Sequence[Section]) -> list[Chapter]:
    found: list[Chapter] = []
    for section in sections:
        name = "paper-" + re.sub(r"[^a-z0-9]+", "-", section.name.lower()).strip("-")
        taken = name in [chapter.anchor for chapter in found]
        anchor = f"{name}-{len(found)}" if taken else name
        found.append(replace(model.of_section(section), anchor=anchor))
    return found


def _notes(unread: Sequence[str], found: Sequence[Cell], repeated: int) -> list[str]:
    """What could not be read, and cells that average two runs of one seed: they differ in
    something else.
    """
    names = distinct(str(series_of(c)) for c in found if len(set(c.seeds)) < len(c.seeds))
    notes = [f"Unreadable. {note}" for note in unread]
    notes += [
        f"{name}: several runs of one seed are averaged, though they differ" for name in names
    ]
    more = f"Repeated measurements of the same run, attack and ε left out: {repeated}"
    return notes + [more] * bool(repeated)


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
