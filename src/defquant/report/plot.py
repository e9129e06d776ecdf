"""Every figure, in Vega-Lite: live on the page, and as PNG, SVG or PDF. No torch.

Rows of plain columns in, one grammar: a panel per attack or place, a line per network, colours by
kind and marks by network, so that nothing hangs on colour alone.
"""

import functools
import gzip
import hashlib
import itertools
import json
import re
import zlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from defquant.errors import UserError
from defquant.files import cache_folder, read_bytes, write_bytes
from defquant.paper.section import Line, Number, Panel, Section, Verdict
from defquant.report.model import (
    EPS,
    axis,
    bar,
    height,
    interval_text,
    uncertainty_text,
    value_text,
)
from defquant.report.names import distinct

__all__ = [
    "Spec", "chart", "claims_chart", "figures", "plot_matrix", "save", "script",
    "section_figure", "svg",
]  # fmt: skip

Spec = dict[str, Any]
"""A Vega-Lite chart with its rows."""

NUMBER = re.compile(r"[0-9]+(\.[0-9]+)?(e-[0-9]+)?")
VERSION = "6.1"  # of Vega-Lite: one that the least vl-convert of pyproject.toml knows
COLUMNS = 3  # panels in a row
TICKS, LETTERS = 9, 30  # names of an x axis that fit a panel, and letters that fit side by side


@functools.cache
def _charts() -> Spec:
    found: Spec = yaml.safe_load(Path(__file__).with_name("charts.yaml").read_text("utf-8"))
    return found


def _filled(name: str, **values: Any) -> Spec:
    """The part `name` of charts.yaml, with `values` in the place of their names."""

    def fill(part: Any) -> Any:
        if isinstance(part, dict):
            return {key: fill(own) for key, own in part.items()}
        if isinstance(part, list):
            return [fill(own) for own in part]
        return values[part[1:]] if isinstance(part, str) and part[:1] == "$" else part

    return {key: fill(part) for key, part in _charts()[name].items()}


def _drawing(name: str, rows: Sequence[Mapping[str, Any]], **values: Any) -> Spec:
    around = {"config": _charts()["config"], "datasets": {"rows": rows}}
    return _filled(name, **values) | around


def figures(panels: Sequence[Panel]) -> list[list[Panel]]:
    """The panels that have a point, in figures of one legend: one x axis, kinds of lines shared."""
    groups: list[tuple[set[str], list[Panel]]] = []
    for panel in panels:
        if any(height(line, n) is not None for line in panel.lines for _, n in line.points):
            names = {f"{panel.x} {panel.percent} {_kind(line)}" for line in panel.lines}
            near = [group for group in groups if group[0] & names]
            merged = names.union(*(n for n, _ in near)), [*(p for _, o in near for p in o), panel]
            groups = [group for group in groups if group not in near] + [merged]
    return [own for _, own in groups]


def chart(panels: Sequence[Panel], columns: int = COLUMNS) -> Spec:
    """The panels as one figure: `panels` of charts.yaml. A line does not bridge what is missing."""
    first, lines = panels[0], [line for panel in panels for line in panel.lines]
    places = [at for line in lines for at, _ in line.points]
    numeric = first.x in (EPS, "epoch") and all(NUMBER.fullmatch(at) for at in places)
    rows = [_row(panel, o, numeric) for panel in panels for o in panel.lines if o.points]
    titles = distinct(panel.title for panel in panels)
    units = distinct(f"{p.y} (%)" if p.percent and "%" not in p.y else p.y for p in panels)
    names = [] if numeric else axis(lines)
    shown = names[:: -max(1, -(-len(names) // TICKS))]
    wide = max(map(len, names), default=0) * len(shown) > LETTERS
    scales = {"place": first.x, "places": names, "shown": shown, "slant": -40 * wide}
    return _drawing(
        "panels", rows, **_filled("numbers" if numeric else "words", **scales), **_legend(lines),
        titles=titles, about=f"{first.y} over {first.x}: {', '.join(titles)}", place=first.x,
        columns=min(columns, len(titles)), reach=_reach(panels, rows),
        unit=units[0] if len(units) == 1 else None,
        scales="independent" if len(units) > 1 else "shared",
        papers=_charts()["papers"] if any(line.paper for line in lines) else None,
    )  # fmt: skip


def _reach(panels: Sequence[Panel], rows: Sequence[Mapping[str, Any]]) -> Spec:
    """Accuracies stand on [0, 100] where one is above a half; any axis holds 0."""
    ends = [v for row in rows for end in ("low", "high", "y") for v in row[end] if v is not None]
    shares = all(p.percent for p in panels) and min(ends, default=0.0) >= 0
    whole = shares and max(ends, default=0.0) > 50
    return {"domain": [0, 100]} if whole else {"zero": True, "nice": True}


def _legend(lines: Sequence[Line]) -> Spec:
    """Colours of the lines by name: a paper's line has ours' colour."""
    ordered = sorted(lines, key=lambda line: line.paper)
    kinds = {_name(line): _kind(line) for line in reversed(ordered)}
    names = distinct(map(_name, ordered))
    found = _colours(distinct(kinds[name] for name in names))
    alike = {name: [n for n in names if kinds[n] == kinds[name]] for name in names}
    shades = [_shade(found[kinds[n]], alike[n].index(n), len(alike[n])) for n in names]
    return {"names": names, "colours": shades}


def _colours(kinds: Sequence[str]) -> dict[str, str]:
    """A colour per kind: its own by its first word, else one of the others in turn."""
    found: dict[str, str] = {}
    for kind in kinds:
        word = (kind.lower().split() or [""])[0]
        own, others = _charts()["colours"].get(word, ""), _charts()["others"]
        free = [colour for colour in others if colour not in found.values()] or others
        found[kind] = own if own and own not in found.values() else free[0]
    return found


def _shade(colour: str, index: int, count: int) -> str:
    """Of `count` lines of one kind the first is the darkest."""
    share = 0.0 if count == 1 else 0.75 * index / (count - 1) - 0.25
    parts = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    mixed = [p + (255 - p) * share if share > 0 else p * (1 + share) for p in parts]
    return "#" + "".join(f"{round(p):02x}" for p in mixed)


def _row(panel: Panel, line: Line, numeric: bool) -> dict[str, Any]:
    """A line, its points as columns, which Vega-Lite unfolds."""
    points = [_point(panel, line, float(at) if numeric else at, n) for at, n in line.points]
    columns = {name: [point[name] for point in points] for name in points[0]}
    return {"panel": panel.title, "line": _name(line), "paper": line.paper} | columns


def _point(panel: Panel, line: Line, at: float | str, n: Number) -> dict[str, float | str | None]:
    value, factor = height(line, n), 100.0 if panel.percent else 1.0
    low, high = (None, None) if value is None or line.paper else bar(n)
    if low is not None and high is not None and panel.percent and not n.points:
        low, high = max(low, 0.0), min(high, 1.0)
    ends = {"y": value, "low": low, "high": high}
    more = "" if line.paper else uncertainty_text(n, panel.percent)
    return {
        "at": at, **{k: None if v is None else float(f"{factor * v:.5g}") for k, v in ends.items()},
        "said": " ".join(filter(None, [value_text(value, n, panel.percent), more])),
        "interval": interval_text(n, panel.percent),
        "rests": "" if line.paper else f"{n.seeds or ''}" + f" × {n.images:,}" * bool(n.images),
    }  # fmt: skip


def _name(line: Line) -> str:
    """Its name in the legend; a paper's line has that of ours which it stands beside."""
    return line.label.removesuffix(" (paper)") if line.paper else line.label


def _kind(line: Line) -> str:
    return line.kind or _name(line)


def claims_chart(verdicts: Sequence[Verdict]) -> Spec:
    """The effect of every reading with its interval, a line of the chart per claim."""
    rows = [{"claim": v.name, "of": v.claim} | vars(r) for v in verdicts for r in v.readings]
    return _drawing("claims", rows, claims=[v.name for v in verdicts])


def section_figure(section: Section, out: Path) -> Path:
    """Draw the panels of `section`; returns `out`.

    Raises `UserError` where `out` does not end in .png, .svg or .pdf, or no panel has a point.
    """
    found = figures(section.panels)
    if not found:
        raise UserError(f"{section.name} has nothing to draw: measure it first")
    return save([chart(own) for own in found], out)


def plot_matrix(record: Mapping[str, Any], out: Path) -> Path:
    """What `diagnose.runs.transfer_runs` returns, as a heat map with numbers in percent."""
    names = [network["name"] for network in record["networks"]]
    pairs = zip(itertools.product(names, names), record["cells"], strict=True)
    rows = [{"made": a, "shown": b, "rate": cell["rate"]} for (a, b), cell in pairs]
    about = [record["attack"], f"{record['images']} images of {record['data']}"]
    return save([_drawing("matrix", rows, names=names, about=about)], out)


# --- files --------------------------------------------------------------------------------


def save(specs: Sequence[Spec], out: Path) -> Path:
    """Write the charts, one below the other, to `out`, whole; the same make the same bytes, but for
    the order of a PDF's dictionaries. Raises `UserError` for another name than .png, .svg or .pdf.
    """
    import vl_convert

    drawn = _svg(_below(specs) | {"background": "white"})
    match out.suffix.lower():
        case ".png":
            return write_bytes(out, vl_convert.svg_to_png(drawn, scale=2))
        case ".pdf":
            return write_bytes(out, vl_convert.svg_to_pdf(drawn))
        case ".svg":
            return write_bytes(out, drawn.encode())
    raise UserError(f"a figure's name ends in .png, .svg or .pdf; found {out.name!r}")


def _below(specs: Sequence[Spec]) -> Spec:
    if len(specs) == 1:
        return dict(specs[0])
    parts, rows = [], {}
    for i, spec in enumerate(specs):
        text = json.dumps({k: v for k, v in spec.items() if k not in ("datasets", "config")})
        for name in ("rows", "picked", "zoom", "marks"):
            text = text.replace(f'"{name}"', f'"{name}{i}"')
        parts.append(json.loads(text))
        rows[f"rows{i}"] = spec["datasets"]["rows"]
    alone = {"resolve": {"scale": {"color": "independent", "shape": "independent"}}}
    whole = {"config": specs[0]["config"], "datasets": rows}
    return whole | {"vconcat": parts} | alone


def svg(spec: Spec) -> str:
    """The chart without its script, for a page."""
    short = re.sub(r"<[^<>]*>", lambda found: UNSEEN.sub(r"\1", found[0]), _svg(spec))
    return re.sub(r'<path d="[^"]*"( display="none")?/>|<g></g>', "", short)


# what Vega writes for the sake of its script, what page.css says, decimals: most of a picture
UNSEEN = re.compile(
    r' (?:class|role|aria-\w+|pointer-events|font-family)="[^"]*"| opacity="1"|(\.\d)\d+'
)


def _svg(spec: Spec) -> str:
    """The names in it are those of no other chart, and always the same: Vega counts them up."""
    import vl_convert

    drawn: str = vl_convert.vegalite_to_svg(spec, vl_version=VERSION)
    tag = hashlib.sha256(json.dumps(spec).encode()).hexdigest()[:8]
    for i, name in enumerate(distinct(re.findall(r'id="(\w+)"', drawn))):
        drawn = drawn.replace(f'id="{name}"', f'id="c{tag}-{i}"')
        drawn = drawn.replace(f"url(#{name})", f"url(#c{tag}-{i})")
    return drawn


@functools.cache
def script() -> bytes:
    """Vega, Vega-Lite and vega-embed with Vega's interpreter of expressions, as gzip.

    From vl-convert, which takes seconds and 90 MB; so from the user's cache, where it is there.
    """
    path = cache_folder() / f"vega-{VERSION}-{version('vl-convert-python')}.js.gz"
    with suppress(OSError, EOFError, ValueError, zlib.error):  # cut or none: it is made again
        gzip.decompress(packed := read_bytes(path))
        return packed
    import vl_convert

    made = vl_convert.javascript_bundle(
        "window.draw = vegaEmbed; window.dispatchEvent(new Event('vega'));", vl_version=VERSION
    )
    packed = gzip.compress(made.encode(), 9, mtime=0)
    with suppress(UserError):  # a cache that cannot be written costs time, not the page
        write_bytes(path, packed)
    return packed
