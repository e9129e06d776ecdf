"""Inline SVG by hand: axes, lines with marks, bands, whiskers. Colours are CSS classes.

A group's class sets `--c` for light and dark; marks differ too, so that nothing hangs on colour
alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

__all__ = [
    "BOTTOM", "LEFT", "RIGHT", "SHAPES", "TOP", "Point", "Scale", "apart", "area", "axes", "group",
    "join", "line", "polyline", "svg", "swatch", "whiskers",
]  # fmt: skip

WIDTH, HEIGHT = 320, 220
LEFT, RIGHT, TOP, BOTTOM = 36, 308, 10, 182
SHAPES = (
    "M-3.4 0a3.4 3.4 0 1 0 6.8 0a3.4 3.4 0 1 0 -6.8 0z",
    "M0 -4.2L4 3.2H-4z",
    "M0 -4.4L4 0L0 4.4L-4 0z",
    "M0 4.2L4 -3.2H-4z",
    "M-3.1 -3.1H3.1V3.1H-3.1z",
    "M-1.3 -4H1.3V-1.3H4V1.3H1.3V4H-1.3V1.3H-4V-1.3H-1.3z",
    "M-3.8 -2L0 -4.2L3.8 -2V2L0 4.2L-3.8 2z",
)
"""Circle, triangle, diamond, triangle upside down, square, cross, hexagon."""


@dataclass(frozen=True)
class Point:
    """A value with its band."""

    x: float
    y: float
    low: float
    high: float


@dataclass(frozen=True)
class Scale:
    """Linear map of [low, high] onto [start, stop]; the middle where low equals high."""

    low: float
    high: float
    start: float
    stop: float

    def __call__(self, value: float) -> float:
        if self.high == self.low:
            return (self.start + self.stop) / 2
        share = (value - self.low) / (self.high - self.low)
        return self.start + share * (self.stop - self.start)


def axes(
    x_ticks: Sequence[tuple[float, str]], label: str, y_ticks: Sequence[tuple[float, str]]
) -> Markup:
    """Horizontal grid lines, ticks below, their texts, and the x axis' label."""
    parts = []
    for at, text in y_ticks:
        parts.append(Markup('<path class="grid" d="M{} {:.1f}H{}"/>').format(LEFT, at, RIGHT))
        parts.append(_text(LEFT - 6, at + 3.5, text, "end"))
    for at, text in x_ticks:
        parts.append(Markup('<path class="tick" d="M{:.1f} {}v4"/>').format(at, BOTTOM))
        parts.append(_text(at, BOTTOM + 16, text, "middle"))
    parts.append(_text((LEFT + RIGHT) / 2, BOTTOM + 33, label, "middle"))
    return join(parts)


def apart(ticks: Sequence[tuple[float, str]], gap: float) -> list[tuple[float, str]]:
    """The tick labels that fit, the last one first, since it closes the axis."""
    kept: list[tuple[float, str]] = []
    for tick in reversed(ticks):
        if not kept or kept[-1][0] - tick[0] >= gap:
            kept.append(tick)
    return kept[::-1]


def area(points: Sequence[Point], x: Scale, y: Scale) -> Markup:
    """The band around a line."""
    edge = [(x(p.x), y(p.high)) for p in points]
    edge += [(x(p.x), y(p.low)) for p in reversed(points)]
    return Markup('<path class="area" d="{}z"/>').format(_path(edge)) if edge else Markup()


def line(
    points: Sequence[Point], x: Scale, y: Scale, shape: int, tips: Sequence[str], kind: str = ""
) -> Markup:
    """A line with a mark at each point, which shows its tip to the mouse."""
    at = [(x(p.x), y(p.y)) for p in points]
    marks = [mark(*place, shape, tip, kind) for place, tip in zip(at, tips, strict=True)]
    return polyline(at, f"line {kind}".strip()) + join(marks)


def whiskers(points: Sequence[Point], x: Scale, y: Scale) -> Markup:
    """A vertical bar over each point's band."""
    bar = Markup('<path class="whisker" d="M{:.1f} {:.1f}V{:.1f}"/>')
    return join([bar.format(x(p.x), y(p.low), y(p.high)) for p in points])


def mark(x: float, y: float, shape: int, tip: str, kind: str = "") -> Markup:
    """A small shape of `SHAPES`."""
    title = Markup("<title>{}</title>").format(tip) if tip else Markup()
    css = f"mark {kind}".strip()
    return Markup('<path class="{}" transform="translate({:.1f} {:.1f})" d="{}">{}</path>').format(
        css, x, y, SHAPES[shape % len(SHAPES)], title
    )


def swatch(css: str, shape: int, kind: str = "") -> Markup:
    """The line and mark of a legend entry."""
    drawn = Markup('<path class="line {}" d="M1 6H27"/>').format(kind)
    return Markup(
        '<svg class="swatch {}" viewBox="0 0 28 12" aria-hidden="true">{}{}</svg>'
    ).format(css, drawn, mark(14, 6, shape, "", kind))


def polyline(at: Sequence[tuple[float, float]], css: str) -> Markup:
    """A line through the places `at`."""
    return Markup('<path class="{}" d="{}"/>').format(css, _path(at)) if at else Markup()


def group(css: str, content: Markup) -> Markup:
    """`content` in one colour."""
    return Markup('<g class="{}">{}</g>').format(css, content)


def svg(label: str, parts: Sequence[Markup]) -> Markup:
    """A panel; `label` says what it shows to those who do not see it."""
    return Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
        WIDTH, HEIGHT, label, join(parts)
    )


def join(parts: Sequence[Markup]) -> Markup:
    """All parts, one after the other."""
    return Markup("").join(parts)


def _path(at: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in at)


def _text(x: float, y: float, text: str, anchor: str) -> Markup:
    return Markup('<text x="{:.1f}" y="{:.1f}" text-anchor="{}">{}</text>').format(
        x, y, anchor, text
    )
