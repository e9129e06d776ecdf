"""The panels of a section in the page's own SVG."""

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from defquant.paper.section import Line, Number, Panel
from defquant.report import drawing
from defquant.report.drawing import BOTTOM, LEFT, RIGHT, TOP, Point, Scale
from defquant.report.multiples import (
    Styles,
    bar,
    drawn,
    height,
    legend,
    points,
    related,
    scale_ticks,
    style,
    styles,
)
from defquant.report.values import axis, line_name, uncertainty_text, value_text

__all__ = ["Drawn", "Multiples", "colours", "multiples"]

HUES = {
    "vanilla": 50, "dq": 255, "float": None, "k0": 165, "k1": 330, "k2": 95, "k3": 215, "k4": 25,
    "k5": 295,
}  # fmt: skip
LETTER = 6.2  # width of a letter of a tick's text


@dataclass(frozen=True)
class Drawn:
    """A small multiple with its headings."""

    title: str
    y: str
    svg: Markup


@dataclass(frozen=True)
class Multiples:
    """Legend and panels; `paper` where the paper's numbers are drawn, `percent` for shares."""

    legend: list[tuple[str, Markup]]
    panels: list[Drawn]
    paper: bool
    percent: bool


def multiples(panels: Sequence[Panel]) -> list[Multiples]:
    """The figures of a section: one, or one for each group of panels without a line in common."""
    shown = drawn(panels)
    return [_figure(group, shown) for group in related(shown)]


def _figure(group: Sequence[Panel], every: Sequence[Panel]) -> Multiples:
    found = styles(group)
    entries = [(name, _swatch(line, found)) for name, line in legend(group)]
    own = [Drawn(p.title, _unit(p), _panel(p, scale_ticks(p, every), found)) for p in group]
    paper = any(line.paper for panel in group for line in panel.lines)
    return Multiples(entries, own, paper, all(panel.percent for panel in group))


def colours(*, dark: bool) -> str:
    """CSS rules of the styles' names."""
    light, rules = (0.74 if dark else 0.55), []
    for name, hue in HUES.items():
        chroma = 0.0 if hue is None else 0.14
        rules.append(f".c-{name}{{--c:oklch({light} {chroma} {hue or 0})}}")
    return "".join(rules)


def _unit(panel: Panel) -> str:
    return f"{panel.y} (%)" if panel.percent and panel.y and "%" not in panel.y else panel.y


def _swatch(line: Line | None, found: Styles) -> Markup:
    if line is None:
        return drawing.swatch("", 0, "paper")
    own = style(line, found)
    return drawing.swatch(f"c-{own.colour}", own.shape, _css(line))


def _css(line: Line) -> str:
    return "paper" if line.paper else ""


def _panel(panel: Panel, ticks: Sequence[tuple[float, str]], found: Styles) -> Markup:
    places = axis(panel.lines)
    x = Scale(0, max(1, len(places) - 1), LEFT + 16, RIGHT - 10)
    y = Scale(ticks[0][0], ticks[-1][0], BOTTOM, TOP)
    width = LETTER * max(len(place) for place in places) + 6
    labels = drawing.apart([(x(i), place) for i, place in enumerate(places)], width)
    parts = [drawing.axes(labels, panel.x, [(y(at), text) for at, text in ticks])]
    for line in sorted(panel.lines, key=lambda line: not line.paper):  # ours above the paper's
        content = _line(panel, line, x, y, style(line, found).shape)
        parts.append(drawing.group(f"c-{style(line, found).colour}", content))
    name = f"{panel.title}: {panel.y} over {panel.x}, {len(panel.lines)} lines"
    return drawing.svg(name, parts)


def _line(panel: Panel, line: Line, x: Scale, y: Scale, shape: int) -> Markup:
    parts = []
    for piece in points(panel, line):
        at = [Point(i, height(line, n) or 0.0, *bar(line, n)) for i, n in piece]
        tips = [_tip(panel, line, number) for _, number in piece]
        bars = [] if line.paper else [point for point in at if point.high > point.low]
        parts.append(drawing.whiskers(bars, x, y))
        parts.append(drawing.line(at, x, y, shape, tips, _css(line)))
    return drawing.join(parts)


def _tip(panel: Panel, line: Line, number: Number) -> str:
    value = value_text(height(line, number), number, panel.percent)
    more = "" if line.paper else uncertainty_text(number, panel.percent)
    return f"{line_name(line)}: {value} {more}".strip()
