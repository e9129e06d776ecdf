"""A folder of runs -> one HTML page that opens offline: no script, no font, nothing to fetch."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from defquant.files import write_bytes
from defquant.paper.section import Section, Verdict
from defquant.report import claims as answers
from defquant.report import deployed_page, figures, multiples_svg, strips, tables
from defquant.report.deployed import read_deployed
from defquant.report.evidence import evidence, training
from defquant.report.groups import MANY, group_of
from defquant.report.names import distinct, eps_text, is_validation, percent, series_of, signed
from defquant.report.reading import reading
from defquant.report.section_page import chapters
from defquant.report.sources import read_runs
from defquant.report.values import EVIDENCE
from defquant.results import Cell, Measurement, aggregate, read_folder

__all__ = ["build_report"]


def build_report(
    folder: Path | str,
    out: Path | str,
    title: str | None = None,
    sections: Sequence[Section] = (),
    verdicts: Sequence[Verdict] = (),
) -> Path:
    """Write the report on every run below `folder` to `out` and return `out`.

    The page begins with the `verdicts` on the paper's claims and the `sections`, where there are
    any. Then it holds the summary (the paper's Table 1), accuracy over eps and over bits, example
    pictures, training curves, the models that were exported and the settings; it is one file
    without anything to load.
    Raises `UserError` when the folder holds no results and no exported models, and there are no
    sections or verdicts.
    """
    folder, out = Path(folder), Path(out)
    shipped, broken = read_deployed(folder)
    alone = not (sections or verdicts or shipped)
    measurements = read_folder(folder) if alone or _has_results(folder) else []
    context = _measured(folder, measurements) | _paper(sections, verdicts)
    context["notes"] += broken
    context["deployed"] = deployed_page.section(shipped) if shipped else None
    if shipped and not measurements:
        context["title"] = "Deployed integer models"
        context["lede"] = "What ships beside what was trained: accuracy under attack, and cost."
    if title or sections or verdicts:
        context["title"] = title or "Defensive Quantization, measured again"
    if sections or verdicts:
        context |= {"lede": _lede(sections, verdicts), "folded": True}
    return write_bytes(out, _render(context).encode())


def _has_results(folder: Path) -> bool:
    return any(path.stat().st_size for path in folder.rglob("results.jsonl"))


def _render(context: Mapping[str, Any]) -> str:
    here = Path(__file__).parent
    environment = Environment(
        loader=FileSystemLoader(here), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.lstrip_blocks = True
    environment.filters |= {"percent": percent, "signed": signed, "eps": eps_text}
    environment.globals["uncertainty"] = tables.uncertainty
    style = Markup((here / "page.css").read_text(encoding="utf-8"))
    return environment.get_template("page.html").render(context, style=style)


def _paper(sections: Sequence[Section], verdicts: Sequence[Verdict]) -> dict[str, Any]:
    return {
        "chapters": chapters(sections),
        "claims": answers.claims(verdicts),
        "claims_said": answers.all_counts(verdicts),
        "claims_answers": [(answers.ICONS[a], answers.CLASSES[a], a) for a in answers.ICONS],
        "claims_reach": answers.reach(verdicts),
        "claims_about": answers.ABOUT,
        "evidence_head": EVIDENCE,
        "kinds_light": Markup(multiples_svg.colours(dark=False)),
        "kinds_dark": Markup(multiples_svg.colours(dark=True)),
    }


def _lede(sections: Sequence[Section], verdicts: Sequence[Verdict]) -> str:
    several = f"{len(sections)} tables and figures" if len(sections) != 1 else "One table or figure"
    made = f"{several} of the paper, made again with networks trained here."
    return " ".join([made] * bool(sections) + [answers.counts(verdicts)] * bool(verdicts))


def _measured(folder: Path, measurements: Sequence[Measurement]) -> dict[str, Any]:
    runs, found, notes = read_runs(folder, measurements)
    kept = tables.chosen(measurements)
    rows, cells = tables.summary(kept), aggregate(kept)
    classes = figures.palette(
        {series_of(cell) for cell in cells} | {strip.series for strip in found}
    )
    sizes = Counter((cell.data, cell.model) for cell in cells)
    names = sorted(sizes, key=lambda name: (is_validation(name[0]), -sizes[name]))
    groups = [group_of(name, rows, cells, classes) for name in names]
    return {
        "title": _title([name for name in names if not is_validation(name[0])] or names),
        "lede": reading(rows) if rows else "",
        "reading": reading(rows) if rows else "",
        "folded": len(classes) > MANY,
        "footnotes": tables.footnotes(rows),
        "facts": _facts(kept),
        "light": Markup(figures.colours(classes, dark=False)),
        "dark": Markup(figures.colours(classes, dark=True)),
        "groups": groups,
        "strips": strips.of_runs(found, classes),
        "training": training(runs, kept, classes),
        "evidence": evidence(measurements, runs),
        "repeated": len(measurements) - len(kept),
        "notes": [*notes, *_same_seeds(cells)],
    }


def _same_seeds(cells: Sequence[Cell]) -> list[str]:
    """Networks of which a cell averages two runs of one seed: they differ in something else."""
    names = distinct(str(series_of(c)) for c in cells if len(set(c.seeds)) < len(c.seeds))
    return [f"{name}: several runs of one seed are averaged, though they differ" for name in names]


def _title(names: Sequence[tuple[str, str]]) -> str:
    models, data = distinct(model for _, model in names), distinct(data for data, _ in names)
    return f"Accuracy under attack: {', '.join(models)} on {', '.join(data)}"


def _facts(measurements: Sequence[Measurement]) -> list[str]:
    def count(number: int, noun: str) -> str:
        return f"{number:,} {noun}{'' if number == 1 else 's'}"

    attacks = {m.attack for m in measurements if m.attack != "clean"}
    if not measurements:
        return []
    on_test = [m for m in measurements if not is_validation(m.data)]
    images = max(m.total for m in on_test or measurements)
    return [
        count(len({m.run for m in measurements}), "run"),
        count(len({m.seed for m in measurements}), "seed"),
        count(len(attacks), "attack"),
        count(images, "test image"),
    ]
