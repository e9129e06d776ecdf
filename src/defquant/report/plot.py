"""Every figure, a Vega-Lite chart drawn to SVG: on the page, and as PNG, SVG or PDF. No torch.

Rows of plain columns in, one grammar: a panel per attack or place, a line per network. What a
network looks like, `looks` decides for every page and figure: hue by method, shade and mark by
bits, so that nothing hangs on colour alone.
"""

import functools
import hashlib
import io
import itertools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from defquant.errors import UserError
from defquant.files import write_bytes
from defquant.paper.section import Line, Number, Panel, Section, Verdict, signed
from defquant.report.model import (
    EPS,
    Row,
    axis,
    bar,
    height,
    told_of,
    value_text,
)
from defquant.report.names import attack_at, distinct
from defquant.typed import written

__all__ = [
    "Figure", "Looks", "Spec", "chart", "claims_chart", "differences", "drawing", "figures",
    "legend", "looks", "net", "plot_matrix", "save", "section_figure", "svg", "trade",
]  # fmt: skip

Spec = dict[str, Any]
"""A Vega-Lite chart with its rows."""
Looks = dict[str, tuple[str, str]]
"""Colour and mark of networks, by name."""


@dataclass(frozen=True)
class Figure:
    """A chart with its axes on the data and, of accuracies, on 0 to 100."""

    title: str
    about: str
    spec: Spec
    whole: Spec | None = None


NUMBER = re.compile(r"[0-9]+(\.[0-9]+)?(e-[0-9]+)?")
VERSION = "6.1"  # of Vega-Lite: one that the least vl-convert of pyproject.toml knows
COLUMNS = 3  # panels in a row
TICKS = 9  # names of an x axis that fit a panel
BITS = re.compile(r"\b([1-8])[- ]bit")


@functools.cache
def _charts() -> Spec:
    found: Spec = written(__file__, "charts.yaml")
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


def drawing(name: str, rows: Sequence[Mapping[str, Any]], **values: Any) -> Spec:
    """The chart `name` of charts.yaml of these rows."""
    around = {"config": _charts()["config"], "datasets": {"rows": rows}}
    return _filled(name, **values) | around


def figures(panels: Sequence[Panel]) -> list[list[Panel]]:
    """The panels that have a point, in figures of one legend: one x axis, kinds of lines shared."""
    groups: list[tuple[set[str], list[Panel]]] = []
    for panel in panels:
        if any(height(line, n) is not None for line in panel.lines for _, n in line.points):
            names = {
                f"{panel.x} {panel.percent} {line.kind or _name(line)}" for line in panel.lines
            }
            near = [group for group in groups if group[0] & names]
            merged = names.union(*(n for n, _ in near)), [*(p for _, o in near for p in o), panel]
            groups = [group for group in groups if group not in near] + [merged]
    return [own for _, own in groups]


def chart(
    panels: Sequence[Panel],
    columns: int = COLUMNS,
    size: tuple[int, int] = (270, 170),
    whole: bool = False,
    known: Looks | None = None,
    keyed: Sequence[str] = (),
) -> Spec:
    """The panels as one figure: `panels` of charts.yaml. A line does not bridge what is missing.

    Axes hold the data; `whole`: accuracies stand on 0 to 100. `known`: the looks of a whole
    page; `keyed`: the lines that the legend names, all where there are none.
    """
    first, lines = panels[0], [line for panel in panels for line in panel.lines]
    places = [at for line in lines for at, _ in line.points]
    numeric = first.x in (EPS, "epoch") and all(NUMBER.fullmatch(at) for at in places)
    rows = [_row(panel, o, numeric) for panel in panels for o in panel.lines if o.points]
    titles = distinct(panel.title for panel in panels)
    units = distinct(f"{p.y} (%)" if p.percent and "%" not in p.y else p.y for p in panels)
    names = [] if numeric else axis(lines)
    shown = names[:: -max(1, -(-len(names) // TICKS))]
    wide = max(map(len, names), default=0) * len(shown) * 9 > size[0]
    scales = {
        "place": None if keyed else first.x,
        "places": names,
        "shown": shown,
        "slant": -40 * wide,
    }
    whole = whole and all(panel.percent for panel in panels)
    kinds = sorted(((_name(o), o.kind, o.paper) for o in lines), key=lambda own: own[2])
    style = legend([own[:2] for own in kinds], known)
    style |= {"keyed": [name for name in style["names"] if name in keyed or not keyed]}
    return drawing(
        "panels", rows, **_filled("numbers" if numeric else "words", **scales),
        **style,
        titles=titles, about=f"{first.y} over {first.x}: {', '.join(titles)}", place=first.x,
        columns=min(columns, len(titles)), width=size[0], height=size[1],
        reach={"domain": [0, 100]} if whole else {"zero": False, "nice": True},
        unit=units[0] if len(units) == 1 else None,
        scales="independent" if len(units) > 1 else "shared",
        papers=_charts()["papers"] if any(line.paper for line in lines) else None,
    )  # fmt: skip


def looks(networks: Iterable[tuple[str, str]]) -> Looks:
    """Colour and mark of each (name, kind), by name.

    Hue: float's, vanilla's, DQ's, by the first word of kind or name; of others, one for each kind
    in turn. Shade and mark: bits, which either names, the fewer the lighter. Where two would look
    the same, as DQ with two values of beta, the later is lighter.
    """
    style, found, others = _charts(), dict[str, tuple[str, str]](), dict[str, str]()
    for name, kind in dict(networks).items():
        word, bits = f"{kind or name} ".lower().split(" ")[0], BITS.search(f"{name} {kind}")
        free = style["others"][len(others) % len(style["others"])]
        hue = style["colours"].get(word) or others.setdefault(kind or name, free)
        width = int(bits[1]) if bits else 0
        share, mark = 0.45 * (8 - width) / 7 if width else 0.0, style["marks"][width]
        tries = ((_mixed(hue, min(share + 0.12 * more, 0.8)), mark) for more in range(7))
        found[name] = next((look for look in tries if look not in found.values()), (hue, mark))
    return found


def legend(networks: Iterable[tuple[str, str]], known: Looks | None = None) -> Spec:
    """The scales of colours and marks; as the whole page has them where it says so."""
    own = dict(networks)
    found = looks(own.items())
    found |= {name: look for name, look in (known or {}).items() if name in own}
    return {
        "names": list(found), "colours": [colour for colour, _ in found.values()],
        "shapes": [mark for _, mark in found.values()],
    }  # fmt: skip


def _mixed(colour: str, share: float) -> str:
    """With that share of white."""
    parts = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    return "#" + "".join(f"{round(p + (255 - p) * share):02x}" for p in parts)


def net(name: str) -> str:
    """The class of all marks and rows of a network."""
    return "n" + hashlib.sha256(name.encode()).hexdigest()[:5]


def _row(panel: Panel, line: Line, numeric: bool) -> dict[str, Any]:
    """A line, its points as columns, which Vega-Lite unfolds."""
    points = [_point(panel, line, float(at) if numeric else at, n) for at, n in line.points]
    columns = {name: [point[name] for point in points] for name in points[0]}
    name = _name(line)
    return {
        "panel": panel.title,
        "line": name,
        "paper": line.paper,
        "net": f"{net(name)}|",
    } | columns


def _point(panel: Panel, line: Line, at: float | str, n: Number) -> dict[str, float | str | None]:
    value, factor = height(line, n), 100.0 if panel.percent else 1.0
    low, high = (None, None) if value is None or line.paper else bar(n)
    if low is not None and high is not None and panel.percent and not n.points:
        low, high = max(low, 0.0), min(high, 1.0)
    ends = {"y": value, "low": low, "high": high}
    told = told_of(n, panel.percent) if not line.paper else value_text(value, n, panel.percent)
    where = f"{_name(line)}{', the paper' * line.paper}; {panel.title or panel.y}, {panel.x} {at}"
    return {
        "at": at, **{k: None if v is None else float(f"{factor * v:.5g}") for k, v in ends.items()},
        "told": f"{net(_name(line))}|{where}: {told}",
        "short": value_text(value, n, panel.percent),
    }  # fmt: skip


def _name(line: Line) -> str:
    """Its name in the legend; a paper's line has that of ours which it stands beside."""
    return line.label.removesuffix(" (paper)") if line.paper else line.label


def claims_chart(verdicts: Sequence[Verdict]) -> Spec:
    """The effect of every reading with its interval, a line of the chart per claim."""
    rows = [
        {
            "claim": v.name, "verdict": r.verdict, "effect": 100 * r.effect, "low": 100 * r.low,
            "high": 100 * r.high,
            "told": f"|{v.name} {v.claim} Under {r.attack}: {r.verdict}, {signed(r.effect)} points",
        }
        for v in verdicts
        for r in v.readings
        if r.effect is not None and r.low is not None and r.high is not None
    ]  # fmt: skip
    return drawing("claims", rows, claims=[v.name for v in verdicts])


def differences(rows: Sequence[Row], reference: str, known: Looks | None = None) -> Figure:
    """A mark per row that has a gap, with its interval; the most telling attack last."""
    low: dict[tuple[str, float], float] = {}
    for r in rows:
        low[r.attack, r.eps] = min(r.n.mean or 0.0, low.get((r.attack, r.eps), 1.0))
    drawn = [
        {
            "network": r.network, "attack": (name := attack_at(r.attack, r.eps)),
            "net": f"{net(r.network)}|", **_ends(r.gap, "effect", "low", "high"),
            "told": f"{net(r.network)}|{r.network} less {reference}, {name}: {told_of(r.gap)}; "
            f"{r.network}: {told_of(r.n)}",
        }
        for r in rows
        if r.gap
    ]  # fmt: skip
    spec = drawing(
        "differences", drawn, **legend([(r.network, r.kind) for r in rows], known),
        attacks=[attack_at(*at) for at in sorted(low, key=lambda at: (at[1], -low[at]))],
        unit=f"points of accuracy, less {reference}", about=f"Differences to {reference}",
    )  # fmt: skip
    about = f"Left of zero: more images are fooled than with {reference}. Bars: 95% intervals."
    return Figure(f"Difference to {reference}, attack by attack", about, spec)


def trade(
    shown: Sequence[tuple[str, str, Number, Number]], attack: str, known: Looks | None = None
) -> Figure:
    """A mark per (network, kind, clean accuracy, that under `attack`)."""
    rows = [
        {
            "network": s, "net": f"{net(s)}|", **_ends(a, "clean", "left", "right"),
            **_ends(b, "robust", "low", "high"),
            "told": f"{net(s)}|{s}; clean: {told_of(a)}; {attack}: {told_of(b)}",
        }
        for s, _, a, b in shown
    ]  # fmt: skip
    style = legend([own[:2] for own in shown], known)
    words = {"unit": f"under {attack} (%)", "about": f"Clean accuracy and that under {attack}"}
    ways = {"zero": False, "nice": True}, {"domain": [0, 100]}
    drawn = [drawing("trade", rows, **style, **words, reach=reach) for reach in ways]
    about = "Up and to the right is better. Bars: 95% intervals over the test images."
    return Figure(f"Clean against {attack}", about, *drawn)


def _ends(n: Number, *names: str) -> dict[str, float]:
    """Value, low and high under these names, in percent."""
    found = (n.mean, n.low, n.high)
    return {k: 100 * (v or 0.0) for k, v in zip(names, found, strict=True)}


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
    return save([drawing("matrix", rows, names=names, about=about)], out)


# --- files --------------------------------------------------------------------------------


def save(specs: Sequence[Spec], out: Path) -> Path:
    """Write the charts, one below the other, to `out`, whole; the same make the same bytes, but for
    the order of a PDF's dictionaries. Raises `UserError` for another name than .png, .svg or .pdf.
    """
    drawn = _svg(_below(specs) | {"background": "white"})
    match out.suffix.lower():
        case ".png":
            return write_bytes(out, _few_colours(_vega().svg_to_png(drawn, scale=2)))
        case ".pdf":
            return write_bytes(out, _vega().svg_to_pdf(drawn))
        case ".svg":
            return write_bytes(out, drawn.encode())
    raise UserError(f"a figure's name ends in .png, .svg or .pdf; found {out.name!r}")


def _few_colours(png: bytes) -> bytes:
    """The same picture in 128 colours: a seventh of the bytes."""
    from PIL import Image

    packed = io.BytesIO()
    drawn = Image.open(io.BytesIO(png)).convert("RGB")
    drawn.quantize(128, dither=Image.Dither.NONE).save(packed, "PNG", optimize=True)
    return packed.getvalue()


def _below(specs: Sequence[Spec]) -> Spec:
    if len(specs) == 1:
        return dict(specs[0])
    parts, rows = [], {}
    for i, spec in enumerate(specs):
        text = json.dumps({k: v for k, v in spec.items() if k not in ("datasets", "config")})
        parts.append(json.loads(text.replace('"rows"', f'"rows{i}"')))
        rows[f"rows{i}"] = spec["datasets"]["rows"]
    alone = {"resolve": {"scale": {"color": "independent", "shape": "independent"}}}
    whole = {"config": specs[0]["config"], "datasets": rows}
    return whole | {"vconcat": parts} | alone


def svg(spec: Spec) -> str:
    """The chart for a page: what `net` and `told` say of a mark is its class and its title."""
    short = re.sub(r"<[^<>]*>", lambda found: _clean(found[0]), _svg(spec))
    return re.sub(r'<path d="[^"]*"( display="none")?/>|<g></g>', "", short)


# what Vega writes for the sake of its script, what page.css says, decimals: most of a picture
UNSEEN = re.compile(
    r' (?:class|role|aria-\w+|pointer-events|font-family)="[^"]*"| opacity="1"|(\.\d)\d+'
)
TOLD = re.compile(r' aria-label="(n\w{5})?\|([^"]*)"')


def _clean(tag: str) -> str:
    told, short = TOLD.search(tag), UNSEEN.sub(r"\1", tag)
    if told is None:
        return short
    name, _, rest = short.removesuffix("/>").partition(" ")
    title = f"><title>{told[2]}</title></{name[1:]}>" if told[2] else "/>"
    return name + f' class="{told[1]}"' * bool(told[1]) + f" {rest}{title}"


def _vega() -> Any:
    try:
        import vl_convert
    except ImportError:
        raise UserError("charts need vl-convert-python, which is not installed here") from None
    return vl_convert


def _svg(spec: Spec) -> str:
    """The names in it are those of no other chart, and always the same: Vega counts them up."""
    drawn: str = _vega().vegalite_to_svg(spec, vl_version=VERSION)
    tag = hashlib.sha256(json.dumps(spec).encode()).hexdigest()[:8]
    for i, name in enumerate(distinct(re.findall(r'id="(\w+)"', drawn))):
        drawn = drawn.replace(f'id="{name}"', f'id="c{tag}-{i}"')
        drawn = drawn.replace(f"url(#{name})", f"url(#c{tag}-{i})")
    return drawn
