"""Every figure, in Vega-Lite: live on the page, and as PNG, SVG or PDF. No torch.

Rows of plain columns in, one grammar: a panel per attack or place, a line per network, colours by
kind and marks by network, so that nothing hangs on colour alone.
"""

import functools
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from defquant.errors import UserError
from defquant.files import write_bytes
from defquant.paper.section import Answer, Line, Number, Panel, Reading, Section, Verdict
from defquant.report.measured import chosen, eps_panels
from defquant.report.model import (
    EPS,
    axis,
    bar,
    height,
    interval_text,
    said,
    value_text,
)
from defquant.report.names import distinct
from defquant.results import Measurement, aggregate

__all__ = [
    "Spec", "chart", "check_name", "claims_chart", "figures", "plot_curves", "plot_matrix", "save",
    "script", "section_figure", "svg",
]  # fmt: skip

Spec = dict[str, Any]
"""A Vega-Lite chart with its rows."""

# Okabe and Ito's colours, told apart by every kind of colour vision; warm for vanilla, cool for DQ
NAMED = {"vanilla": "#D55E00", "dq": "#0072B2", "float": "#777777"}
WORDS = {"vq": "vanilla", "defensive": "dq", "fp": "float", "full": "float"}
OTHERS = ("#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6D1F", "#7A5FC0")
SHAPES = ("circle", "triangle-up", "diamond", "triangle-down", "square", "cross", "triangle-right")
NUMERIC = (EPS, "epoch")  # x axes of numbers
VERSION = (
    "6.1"  # of Vega-Lite: the one of the least Altair and vl-convert that pyproject.toml allows
)
WIDTH, HEIGHT, COLUMNS = 270, 170, 3  # of a panel in pixels; panels in a row
TICKS, LETTERS = 9, 30  # names of an x axis that fit a panel, and letters that fit side by side
QUIET = {"aria": False}
CONFIG: Spec = {
    "font": "Liberation Sans, Arial, sans-serif",
    "background": "transparent",
    "mark": QUIET,
    "view": {"stroke": None},
    "axis": {
        **QUIET, "labelColor": "currentColor", "titleColor": "currentColor", "domain": False,
        "titleFontWeight": "normal", "tickColor": "#888888", "gridColor": "#888888",
        "gridOpacity": 0.25, "labelFontSize": 11, "titleFontSize": 12,
    },
    "header": {
        "labelColor": "currentColor", "labelFontSize": 12, "labelFontWeight": 600, "title": None,
    },
    "legend": {
        **QUIET, "labelColor": "currentColor", "labelFontSize": 12, "labelLimit": 330,
        "titleColor": "currentColor", "title": None, "orient": "bottom", "columns": COLUMNS,
        "symbolStrokeWidth": 2, "symbolSize": 70, "symbolOpacity": 1,
    },
    "title": {**QUIET, "color": "currentColor"},
    "facet": {"spacing": 18},
    "concat": {"spacing": 24},
}  # fmt: skip


def figures(panels: Sequence[Panel]) -> list[list[Panel]]:
    """The panels that have a point, in figures of one legend: one x axis, kinds of lines shared."""
    groups: list[tuple[set[str], list[Panel]]] = []
    for panel in filter(_drawn, panels):
        names = {f"{panel.x} {panel.percent} {_kind(line)}" for line in panel.lines}
        near = [group for group in groups if group[0] & names]
        merged = (names.union(*(n for n, _ in near)), [*(p for _, own in near for p in own), panel])
        groups = [group for group in groups if group not in near] + [merged]
    return [own for _, own in groups]


def _drawn(panel: Panel) -> bool:
    return any(height(line, n) is not None for line in panel.lines for _, n in line.points)


def chart(panels: Sequence[Panel], columns: int = COLUMNS) -> Spec:
    """The panels as one figure; on the page a click on its legend picks, a pointer says all.

    Ours solid with bars or bands: the wider of the 95 % interval and ± the spread over seeds; the
    paper's dashed. A line does not bridge what is missing.
    """
    import altair as alt

    pairs = [(panel, line) for panel in panels for line in panel.lines]
    numeric = panels[0].x in NUMERIC and all(_is_number(at) for _, o in pairs for at, _ in o.points)
    rows = [_row(panel, line, numeric) for panel, line in pairs if line.points]
    places = [] if numeric else axis([line for panel in panels for line in panel.lines])
    titles, units = distinct(p.title for p in panels), distinct(map(_unit, panels))
    tips = TIPS | {"at": panels[0].x}
    picked = alt.selection_point(name="picked", fields=["line"], bind="legend")
    zoom = alt.selection_interval(
        name="zoom", bind="scales", encodings=["x", "y"] if numeric else ["y"],
        zoom="wheel![event.shiftKey]",
    )  # fmt: skip
    colours, shapes, legend = _scales(panels)
    own = alt.Chart().encode(
        x=_x(panels[0].x, places, numeric),
        y=alt.Y("y:Q", title=units[0] if len(units) == 1 else None, scale=_reach(panels, rows)),
        color=alt.Color("line:N", scale=colours, legend=legend),
        detail="paper:N",
    )
    faint = alt.condition(picked, alt.value(1.0), alt.value(0.1))
    dashed = alt.Scale(domain=[False, True], range=[[1, 0], [4, 3]])
    says = alt.Legend(labelExpr="datum.value ? 'the paper' : 'ours'", symbolType="stroke")
    papers = any(row["paper"] for row in rows)
    lines = own.mark_line(strokeWidth=1.8).encode(
        opacity=faint,
        strokeDash=alt.StrokeDash("paper:N", legend=says if papers else None, scale=dashed),
    )
    marks = own.mark_point(filled=True, size=36).encode(
        opacity=faint,
        shape=alt.Shape("line:N", scale=shapes, legend=legend),
        tooltip=[alt.Tooltip(f"{name}:N", title=title) for name, title in tips.items()],
    )
    ours = own.transform_filter("!datum.paper").encode(y="low:Q", y2="high:Q")
    band = alt.condition(picked, alt.value(0.16), alt.value(0.02))
    bars = ours.mark_area().encode(opacity=band) if numeric else ours.mark_rule()
    bars = bars if numeric else bars.encode(opacity=faint)
    layers = alt.layer(bars, lines, marks.add_params(picked, zoom))
    whole = layers.properties(width=WIDTH, height=HEIGHT).facet(
        alt.Facet("panel:N", sort=titles, title=None),
        columns=min(columns, len(titles)),
        data=alt.NamedData("rows"),
    )
    if len(units) > 1:
        whole = whole.resolve_scale(y="independent")
    about = f"{panels[0].y} over {panels[0].x}: {', '.join(titles)}"
    spec = _finish(whole.properties(description=about), rows)
    return spec | {"transform": [{"flatten": ["at", *POINT]}]}  # Altair puts it behind the facet


def _finish(whole: Any, rows: Sequence[Mapping[str, Any]]) -> Spec:
    spec: Spec = whole.configure(**CONFIG).to_dict()
    del spec["$schema"]  # an address, and the only one
    return spec | {"datasets": {"rows": list(rows)}}


def _x(name: str, places: Sequence[str], numeric: bool) -> Any:
    import altair as alt

    if numeric:
        return alt.X(
            "at:Q", title=name, axis=alt.Axis(grid=False, tickCount=6), scale=alt.Scale(nice=False)
        )
    every = max(1, -(-len(places) // TICKS))
    shown = [place for i, place in enumerate(reversed(places)) if i % every == 0]
    slant = -40 if max(map(len, places)) * len(shown) > LETTERS else 0
    axis_ = alt.Axis(grid=False, labelAngle=slant, values=shown)
    return alt.X("at:O", sort=list(places), title=name, axis=axis_, scale=alt.Scale(type="point"))


def _reach(panels: Sequence[Panel], rows: Sequence[Mapping[str, Any]]) -> Any:
    """Accuracies stand on [0, 100] where one is above a half; any axis holds 0."""
    import altair as alt

    ends = [v for row in rows for end in ("low", "high", "y") for v in row[end] if v is not None]
    whole = (
        all(p.percent for p in panels)
        and min(ends, default=0.0) >= 0
        and max(ends, default=0.0) > 50
    )
    return alt.Scale(domain=[0, 100]) if whole else alt.Scale(zero=True, nice=True)


def _scales(panels: Sequence[Panel]) -> tuple[Any, Any, Any]:
    """Colours and marks of the lines by name, and their legend: a paper's line has ours' colour."""
    import altair as alt

    lines = sorted((line for panel in panels for line in panel.lines), key=lambda o: o.paper)
    kinds = {_name(line): _kind(line) for line in reversed(lines)}
    names = distinct(map(_name, lines))
    found = _colours(distinct(kinds[name] for name in names))
    alike = {name: [n for n in names if kinds[n] == kinds[name]] for name in names}
    shades = [_shade(found[kinds[n]], alike[n].index(n), len(alike[n])) for n in names]
    marks = [SHAPES[i % len(SHAPES)] for i in range(len(names))]
    legend = alt.Legend(values=distinct(_name(line) for line in lines))
    return alt.Scale(domain=names, range=shades), alt.Scale(domain=names, range=marks), legend


def _colours(kinds: Sequence[str]) -> dict[str, str]:
    """A colour per kind: its own by its first word, else one of the others in turn."""
    found: dict[str, str] = {}
    for kind in kinds:
        word = (kind.lower().split() or [""])[0]
        own = NAMED.get(WORDS.get(word, word), "")
        free = [colour for colour in OTHERS if colour not in found.values()] or OTHERS
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
    at = [float(place) if numeric else place for place, _ in line.points]
    ends = [_points(panel, line, number) for _, number in line.points]
    columns = dict(zip(POINT, map(list, zip(*ends, strict=True)), strict=True)) if ends else {}
    return {"panel": panel.title, "line": _name(line), "paper": line.paper, "at": at} | columns


POINT = ("y", "low", "high", "said", "interval", "rests")


def _points(panel: Panel, line: Line, number: Number) -> tuple[float | str | None, ...]:
    """Where a point and its bar are drawn, and what the pointer says of it."""
    value, factor = height(line, number), 100.0 if panel.percent else 1.0
    none = value is None or line.paper
    low, high = (None, None) if none else bar(number)
    if low is not None and high is not None and panel.percent and not number.points:
        low, high = max(low, 0.0), min(high, 1.0)
    ends = [None if v is None else float(f"{factor * v:.5g}") for v in (value, low, high)]
    text = value_text(value, number, panel.percent) if line.paper else said(number, panel.percent)
    counts = f"{number.seeds} × {number.images:,}" if number.images else str(number.seeds or "")
    return (*ends, text, interval_text(number, panel.percent), "" if line.paper else counts)


TIPS = {
    "line": "network", "panel": "under", "said": "value", "interval": "95% interval",
    "rests": "seeds × images",
}  # fmt: skip


def _name(line: Line) -> str:
    """Its name in the legend; a paper's line has that of ours which it stands beside."""
    return line.label.removesuffix(" (paper)") if line.paper else line.label


def _kind(line: Line) -> str:
    return line.kind or _name(line)


def _unit(panel: Panel) -> str:
    return f"{panel.y} (%)" if panel.percent and "%" not in panel.y else panel.y


def _is_number(text: str) -> bool:
    return re.fullmatch(r"[0-9]+(\.[0-9]+)?(e-[0-9]+)?", text) is not None


# --- other figures ------------------------------------------------------------------------


def claims_chart(verdicts: Sequence[Verdict]) -> Spec:
    """The effect of every reading with its interval, a line of the chart per claim."""
    import altair as alt

    rows = [
        {
            "claim": verdict.name, "under": r.attack, "verdict": r.verdict, "of": verdict.claim,
            **{name: None if v is None else round(100 * v, 2) for name, v in _ends(r).items()},
        }
        for verdict in verdicts
        for r in verdict.readings
    ]  # fmt: skip
    picked = alt.selection_point(name="picked", fields=["verdict"], bind="legend")
    colours = alt.Scale(domain=list(ANSWERS), range=list(ANSWERS.values()))
    x = alt.X("effect:Q", title="effect (points): positive supports the claim")
    own = alt.Chart(alt.NamedData("rows")).encode(
        y=alt.Y("claim:N", sort=[v.name for v in verdicts], title=None),
        color=alt.Color("verdict:N", scale=colours),
        opacity=alt.condition(picked, alt.value(0.8), alt.value(0.08)),
    )
    names = {"claim": "claim", "of": "says", "under": "under", "verdict": "verdict"}
    numbers = {"effect": "effect", "low": "from", "high": "to"}
    tips = [alt.Tooltip(f"{n}:N", title=t) for n, t in (names | numbers).items()]
    bars = own.mark_rule(strokeWidth=1.2).encode(x=x, x2="high:Q").encode(x=alt.X("low:Q"))
    dots = own.mark_point(filled=True, size=44).encode(x=x, tooltip=tips).add_params(picked)
    size = {"width": 2 * WIDTH + 120, "height": alt.Step(15)}
    whole = alt.layer(bars, dots).properties(description="The paper's claims: effects", **size)
    return _finish(whole, rows)


ANSWERS: dict[Answer, str] = {
    "holds": "#009E73", "does not hold": "#D55E00", "not decided": "#888888",
}  # fmt: skip


def _ends(reading: Reading) -> dict[str, float | None]:
    return {"effect": reading.effect, "low": reading.low, "high": reading.high}


def plot_curves(measurements: Sequence[Measurement], out: Path) -> Path:
    """Accuracy over eps, a panel per attack, a line per network.

    Raises `UserError` where `out` does not end in .png, .svg or .pdf, or nothing was attacked.
    """
    check_name(out)
    cells = aggregate(chosen(measurements))
    several = len({(cell.data, cell.model) for cell in cells}) > 1
    panels = eps_panels(cells, several)
    if not panels:
        raise UserError("there are no attacks to plot: run `defquant attack` first")
    return save([chart(own, columns=len(panels)) for own in figures(panels)], out)


def section_figure(section: Section, out: Path) -> Path:
    """Draw the panels of `section`; returns `out`.

    Raises `UserError` where `out` does not end in .png, .svg or .pdf, or no panel has a point.
    """
    check_name(out)
    found = figures(section.panels)
    if not found:
        raise UserError(f"{section.name} has nothing to draw: measure it first")
    return save([chart(own) for own in found], out)


def plot_matrix(record: Mapping[str, Any], out: Path) -> Path:
    """What `diagnose.runs.transfer_runs` returns, as a heat map with numbers in percent."""
    import altair as alt

    names = [network["name"] for network in record["networks"]]
    rows = [
        {
            "made": names[i // len(names)], "shown": names[i % len(names)],
            "rate": None if cell["rate"] is None else 100 * cell["rate"],
            "text": "-" if cell["rate"] is None else f"{100 * cell['rate']:.0f}",
        }
        for i, cell in enumerate(record["cells"])
    ]  # fmt: skip
    own = alt.Chart(alt.NamedData("rows")).encode(
        x=alt.X(
            "shown:N", sort=names, title="shown to", axis=alt.Axis(labelAngle=-45, labelLimit=0)
        ),
        y=alt.Y("made:N", sort=names, title="made on", axis=alt.Axis(labelLimit=0)),
    )
    scale = alt.Scale(scheme="cividis", domain=[0, 100])
    legend = alt.Legend(title="fooled (%)", orient="right", columns=1)
    heat = own.mark_rect().encode(color=alt.Color("rate:Q", scale=scale, legend=legend))
    dark = alt.condition("datum.rate > 55", alt.value("black"), alt.value("white"))
    texts = own.mark_text().encode(text="text:N", color=dark)
    about = [record["attack"], f"{record['images']} images of {record['data']}"]
    title = alt.TitleParams(about, fontSize=11, fontWeight="normal")
    size = {"width": alt.Step(40), "height": alt.Step(40)}
    return save([_finish(alt.layer(heat, texts).properties(title=title, **size), rows)], out)


# --- files --------------------------------------------------------------------------------


def check_name(out: Path) -> str:
    """The format that the file's name asks for. Raises `UserError` for others than the three."""
    kind = out.suffix.removeprefix(".").lower()
    if kind not in ("png", "svg", "pdf"):
        raise UserError(f"a figure's name ends in .png, .svg or .pdf; found {out.name!r}")
    return kind


def save(specs: Sequence[Spec], out: Path) -> Path:
    """Write the charts, one below the other, to `out`, whole.

    The same make the same bytes, but for the order of a PDF's dictionaries.
    """
    import vl_convert

    kind = check_name(out)
    drawn = _svg(_below(specs) | {"background": "white"})
    content = drawn.encode()
    if kind == "pdf":
        content = vl_convert.svg_to_pdf(drawn)
    elif kind == "png":
        content = vl_convert.svg_to_png(drawn, scale=2)
    return write_bytes(out, content)


def _below(specs: Sequence[Spec]) -> Spec:
    if len(specs) == 1:
        return dict(specs[0])
    parts, rows = [], {}
    for i, spec in enumerate(specs):
        text = json.dumps({k: v for k, v in spec.items() if k not in ("datasets", "config")})
        for name in ("rows", "picked", "zoom"):
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
def script() -> str:
    """Vega, Vega-Lite and vega-embed with Vega's interpreter of expressions, from vl-convert."""
    import vl_convert

    found: str = vl_convert.javascript_bundle(
        "window.draw = vegaEmbed; window.dispatchEvent(new Event('vega'));", vl_version=VERSION
    )
    return found
