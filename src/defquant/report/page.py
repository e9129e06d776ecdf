"""A folder of runs -> one HTML page that opens offline: no script, no font, nothing to fetch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from defquant.files import write_bytes
from defquant.report import figures, tables
from defquant.report.evidence import evidence, training
from defquant.report.names import (
    Family,
    Series,
    attack_order,
    distinct,
    eps_text,
    percent,
    series_of,
    signed,
)
from defquant.report.reading import reading
from defquant.report.sources import Strip, check_types, read_runs
from defquant.report.tables import Row
from defquant.results import Cell, Measurement, aggregate, read_folder

__all__ = ["build_report"]

STRIP_ROWS = 8
STRIP_COLUMNS = 8
STRIP_BYTES = 350_000


@dataclass(frozen=True)
class Panel:
    """A small multiple with its heading."""

    name: str
    svg: Markup


@dataclass(frozen=True)
class Group:
    """One network architecture on one data set: its table and figures."""

    name: str
    families: list[tuple[Family, list[Row]]]
    columns: list[int | None]
    legend: list[tuple[str, Markup]]
    curves: list[Panel]
    bits_legend: list[tuple[str, Markup]]
    bits: list[Panel]
    details: list[tuple[Cell, str]]

    @property
    def black_box(self) -> bool:
        return any(panel.name.endswith("(B)") for panel in self.curves)


@dataclass(frozen=True)
class StripTable:
    """The pictures of one attack: networks side by side, one test image per row."""

    where: str
    columns: list[Strip]
    images: list[str]
    left_out: int

    def holders(self, image: str) -> list[Strip]:
        return [strip for strip in self.columns if image in strip.examples]


def build_report(folder: Path | str, out: Path | str, title: str | None = None) -> Path:
    """Write the report on every run below `folder` to `out` and return `out`.

    The page holds the summary (the paper's Table 1), accuracy over eps and over bits, example
    pictures, training curves and the settings; it is one file without anything to load.
    Raises `UserError` when the folder holds no results.
    """
    folder, out = Path(folder), Path(out)
    measurements = read_folder(folder)
    check_types(measurements)
    return write_bytes(out, _render(folder, measurements, title).encode())


def _render(folder: Path, measurements: Sequence[Measurement], title: str | None) -> str:
    here = Path(__file__).parent
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    environment.lstrip_blocks = True
    environment.filters |= {"percent": percent, "signed": signed, "eps": eps_text}
    environment.globals["uncertainty"] = tables.uncertainty
    template = environment.from_string((here / "page.html").read_text(encoding="utf-8"))
    style = Markup((here / "page.css").read_text(encoding="utf-8"))
    return template.render(_context(folder, measurements, title), style=style)


def _context(
    folder: Path, measurements: Sequence[Measurement], title: str | None
) -> dict[str, Any]:
    runs, strips, notes = read_runs(folder)
    kept = tables.chosen(measurements)
    rows, cells = tables.summary(kept), aggregate(kept)
    classes = figures.palette(
        {series_of(cell) for cell in cells} | {strip.series for strip in strips}
    )
    names = distinct((row.data, row.model) for row in rows)
    return {
        "title": title or _title(names),
        "lede": reading(rows),
        "footnotes": tables.footnotes(rows),
        "facts": _facts(kept),
        "light": Markup(figures.colours(classes, dark=False)),
        "dark": Markup(figures.colours(classes, dark=True)),
        "groups": [_group(name, rows, cells, classes) for name in names],
        "strips": _strips(strips),
        "classes": classes,
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
    images = max(m.total for m in measurements)
    return [
        count(len({m.run for m in measurements}), "run"),
        count(len({m.seed for m in measurements}), "seed"),
        count(len(attacks), "attack"),
        count(images, "test image"),
    ]


def _group(
    name: tuple[str, str],
    all_rows: Sequence[Row],
    all_cells: Sequence[Cell],
    classes: Mapping[Series, str],
) -> Group:
    rows = [row for row in all_rows if (row.data, row.model) == name]
    cells = [cell for cell in all_cells if (cell.data, cell.model) == name]
    own = {s: css for s, css in classes.items() if any(series_of(cell) == s for cell in cells)}
    every = distinct(series.family for series in classes)
    families = distinct(row.family for row in rows)
    attacks = sorted({c.attack for c in cells if c.attack != "clean"}, key=attack_order)
    shapes = {f: (figures.family_class(f, every), figures.family_shape(f, every)) for f in families}
    return Group(
        name=f"{name[1]} on {name[0]}",
        families=[(family, [r for r in rows if r.family == family]) for family in families],
        columns=tables.columns(rows),
        legend=[(str(s), figures.swatch(css, s.bits)) for s, css in own.items()],
        curves=[Panel(attack, figures.eps_panel(cells, attack, own)) for attack in attacks],
        bits_legend=[(str(f), figures.swatch(*shapes[f])) for f in families],
        bits=_bits(rows, every),
        details=_details(cells, own),
    )


def _bits(rows: Sequence[Row], families: Sequence[Family]) -> list[Panel]:
    if len(tables.columns(rows)) < 2:
        return []
    clean = [row for row in rows if row.attack == "clean"]
    attacks = distinct(row.images for row in rows if row.attack != "clean")
    groups = [(name, [row for row in rows if row.images == name]) for name in attacks]
    return [Panel(name, figures.bits_panel(same, clean, families)) for name, same in groups]


def _details(cells: Sequence[Cell], classes: Mapping[Series, str]) -> list[tuple[Cell, str]]:
    places = {series: place for place, series in enumerate(classes)}
    ordered = sorted(cells, key=lambda c: (attack_order(c.attack), c.eps, places[series_of(c)]))
    return [(cell, str(series_of(cell))) for cell in ordered]


def _strips(strips: Sequence[Strip]) -> list[StripTable]:
    """Per architecture and data set the attack that most networks share, first seeds only."""
    groups: dict[tuple[str, str, str, float], dict[Series, Strip]] = {}
    for strip in sorted(strips, key=lambda item: item.seed):
        name = (strip.data, strip.model, strip.attack, strip.eps)
        groups.setdefault(name, {}).setdefault(strip.series, strip)
    largest: dict[tuple[str, str], tuple[str, str, str, float]] = {}
    for name in sorted(groups, key=lambda item: -len(groups[item])):
        largest.setdefault(name[:2], name)
    return [_strip(name, list(groups[name].values()), len(largest)) for name in largest.values()]


def _strip(name: tuple[str, str, str, float], strips: list[Strip], share: int) -> StripTable:
    """Full precision and 4 bits first, as the paper's Figure 7, where not all columns fit."""
    data, model, attack, eps = name
    columns = sorted(strips, key=lambda s: (s.series.bits not in (None, 4), s.series.order))
    columns = sorted(columns[:STRIP_COLUMNS], key=lambda s: s.series.order)
    counts: dict[str, int] = {}
    for image in (image for strip in columns for image in strip.examples):
        counts[image] = counts.get(image, 0) + 1
    images, size = [], 0
    for image in sorted(counts, key=lambda item: -counts[item])[:STRIP_ROWS]:
        shown = [strip.examples[image] for strip in columns if image in strip.examples]
        size += len(shown[0].clean_png) + sum(len(example.adversarial_png) for example in shown)
        if size > STRIP_BYTES / share:
            break
        images.append(image)
    where = f"{attack} at {eps_text(eps)}, {model} on {data}"
    return StripTable(where, columns, images, len(strips) - len(columns))
