"""Inline SVG by hand: accuracy over eps, accuracy over bits, sparklines. Colours are CSS classes.

Series `i` of a page has the class `s{i}`, which sets `--c` for light and dark; marks differ by
bits too, so that nothing hangs on colour alone.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from defquant.report.names import Family, Series, distinct, eps_number, percent, series_of
from defquant.report.tables import Row, band, columns
from defquant.results import Cell

__all__ = ["Point", "Scale", "bits_panel", "eps_panel", "palette", "sparkline", "swatch"]

WIDTH, HEIGHT = 320, 220
LEFT, RIGHT, TOP, BOTTOM = 36, 308, 10, 182
DQ_HUES = (255, 165, 330, 215, 295)
VANILLA_HUES = (50, 25, 85)
SHAPES = {
    None: "M-3.4 0a3.4 3.4 0 1 0 6.8 0a3.4 3.4 0 1 0 -6.8 0z",
    1: "M0 -4.2L4 3.2H-4z",
    2: "M0 -4.4L4 0L0 4.4L-4 0z",
    3: "M0 4.2L4 -3.2H-4z",
    4: "M-3.1 -3.1H3.1V3.1H-3.1z",
    5: "M-1.3 -4H1.3V-1.3H4V1.3H1.3V4H-1.3V1.3H-4V-1.3H-1.3z",
}
OTHER_SHAPE = "M-3.8 -2L0 -4.2L3.8 -2V2L0 4.2L-3.8 2z"


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


ACCURACY = Scale(0, 1, BOTTOM, TOP)


def palette(series: Iterable[Series]) -> dict[Series, str]:
    """Class name of each series in order. `colours` gives the CSS."""
    return {item: f"s{index}" for index, item in enumerate(sorted(series, key=lambda s: s.order))}


def colours(classes: Mapping[Series, str], *, dark: bool) -> str:
    """CSS rules: warm hues for vanilla, cool ones for DQ, grey for float; fewer bits are paler."""
    families = sorted(distinct(series.family for series in classes), key=lambda f: f.order)
    rules = []
    for family in families:
        same = [series for series in classes if series.family == family]
        hue = _hue(family, families)
        for index, series in enumerate(same):
            share = index / max(1, len(same) - 1)
            light = 0.88 - 0.26 * share if dark else 0.38 + 0.31 * share
            chroma = 0.0 if series.method == "float" else 0.13
            shade = hue + 24 * share * (-1 if family.is_dq else 1)
            rules.append(f".{classes[series]}{{--c:oklch({light:.2f} {chroma} {shade:.0f})}}")
        middle = 0.74 if dark else 0.55
        rules.append(f".{family_class(family, families)}{{--c:oklch({middle} 0.14 {hue})}}")
    return "".join(rules)


def family_class(family: Family, families: Sequence[Family]) -> str:
    """`f0`, `f1`, ...: the colour of a whole row of the summary."""
    return f"f{families.index(family)}"


def family_shape(family: Family, families: Sequence[Family]) -> int | None:
    """The bits whose mark stands for a whole family."""
    return (4, None, 1, 2, 3, 5)[families.index(family) % 6]


def _hue(family: Family, families: Sequence[Family]) -> int:
    hues = DQ_HUES if family.is_dq else VANILLA_HUES
    kind = [other for other in families if other.is_dq == family.is_dq]
    return hues[kind.index(family) % len(hues)]


def eps_panel(cells: Sequence[Cell], attack: str, classes: Mapping[Series, str]) -> Markup:
    """Accuracy over eps under one attack; every line starts at the clean accuracy."""
    lines = {
        series: _points([cell for cell in cells if series_of(cell) == series], attack)
        for series in classes
    }
    lines = {series: points for series, points in lines.items() if any(p.x > 0 for p in points)}
    radii = sorted({0.0} | {point.x for points in lines.values() for point in points})
    x = Scale(0, radii[-1], LEFT, RIGHT - 6)
    ticks = _apart([(x(eps), eps_number(eps)) for eps in radii], 21)
    parts = [_axes(ticks, "ε · 255")]
    parts += [_group(classes[item], _area(points, x)) for item, points in lines.items()]
    parts += [_group(classes[item], _line(points, x, item.bits)) for item, points in lines.items()]
    return _svg(f"Accuracy over eps under {attack}, {len(lines)} networks", parts)


def _points(cells: Iterable[Cell], attack: str) -> list[Point]:
    shown = [cell for cell in cells if cell.attack in ("clean", attack)]
    return sorted((_point(cell.eps, cell) for cell in shown), key=lambda point: point.x)


def _point(x: float, cell: Cell) -> Point:
    return Point(x, cell.mean, *band(cell))


def bits_panel(attacked: Sequence[Row], clean: Sequence[Row], families: Sequence[Family]) -> Markup:
    """Accuracy over bits under one attack, solid, and on clean images, dashed; FP at the right."""
    shown = columns([*attacked, *clean])
    ordered = [bits for bits in shown if bits is not None] + [None] * (None in shown)
    x = Scale(0, len(ordered) - 1, LEFT + 18, RIGHT - 14)
    ticks = [(x(i), "FP" if bits is None else str(bits)) for i, bits in enumerate(ordered)]
    parts = [_axes(ticks, "activation bits")]
    for rows, kind in ((clean, "dashed"), (attacked, "")):
        for row in rows:
            points = [_point(i, row.cells[b]) for i, b in enumerate(ordered) if b in row.cells]
            shape = family_shape(row.family, families)
            drawn = _whiskers(points, x) + _line(points, x, shape, kind)
            parts.append(_group(family_class(row.family, families), drawn))
    return _svg(f"Accuracy over bits, clean and under {attacked[0].images}", parts)


def sparkline(lines: Sequence[Sequence[float]], name: str, high: float, css: str) -> Markup:
    """Small curves over the epochs, one per run, on [0, high]."""
    parts = []
    for values in lines:
        shown = values[:: len(values) // 60 + 1]
        x, y = Scale(0, len(shown) - 1, 2, 108), Scale(0, high or 1, 26, 3)
        points = [Point(i, value, 0, 0) for i, value in enumerate(shown)]
        parts.append(_polyline([(x(p.x), y(p.y)) for p in points], "thin"))
    base = Markup('<path class="grid" d="M2 26H108"/>')
    return Markup(
        '<svg class="spark {}" viewBox="0 0 110 29" role="img" aria-label="{}">{}{}</svg>'
    ).format(css, name, base, _join(parts))


def swatch(css: str, bits: int | None, kind: str = "") -> Markup:
    """The line and mark of a legend entry."""
    line = Markup('<path class="line {}" d="M1 6H27"/>').format(kind)
    return Markup(
        '<svg class="swatch {}" viewBox="0 0 28 12" aria-hidden="true">{}{}</svg>'
    ).format(css, line, _mark(14, 6, bits, ""))


def _axes(ticks: Sequence[tuple[float, str]], label: str) -> Markup:
    parts = []
    for step in range(0, 101, 20):
        y = ACCURACY(step / 100)
        parts.append(Markup('<path class="grid" d="M{} {:.1f}H{}"/>').format(LEFT, y, RIGHT))
        parts.append(_text(LEFT - 6, y + 3.5, str(step), "end"))
    for at, text in ticks:
        parts.append(Markup('<path class="tick" d="M{:.1f} {}v4"/>').format(at, BOTTOM))
        parts.append(_text(at, BOTTOM + 16, text, "middle"))
    parts.append(_text((LEFT + RIGHT) / 2, HEIGHT - 6, label, "middle"))
    return _join(parts)


def _apart(ticks: Sequence[tuple[float, str]], gap: float) -> list[tuple[float, str]]:
    """The tick labels that fit, the last one first, since it closes the axis."""
    kept: list[tuple[float, str]] = []
    for tick in reversed(ticks):
        if not kept or kept[-1][0] - tick[0] >= gap:
            kept.append(tick)
    return kept[::-1]


def _area(points: Sequence[Point], x: Scale) -> Markup:
    edge = [(x(p.x), ACCURACY(p.high)) for p in points]
    edge += [(x(p.x), ACCURACY(p.low)) for p in reversed(points)]
    return Markup('<path class="area" d="{}z"/>').format(_path(edge)) if edge else Markup()


def _line(points: Sequence[Point], x: Scale, bits: int | None, kind: str = "") -> Markup:
    at = [(x(p.x), ACCURACY(p.y)) for p in points]
    tips = [f"{percent(p.y)} ({percent(p.low)} to {percent(p.high)})" for p in points]
    marks = [_mark(*place, bits, tip) for place, tip in zip(at, tips, strict=True)]
    return _polyline(at, f"line {kind}".strip()) + _join(marks)


def _whiskers(points: Sequence[Point], x: Scale) -> Markup:
    line = Markup('<path class="whisker" d="M{:.1f} {:.1f}V{:.1f}"/>')
    return _join([line.format(x(p.x), ACCURACY(p.low), ACCURACY(p.high)) for p in points])


def _mark(x: float, y: float, bits: int | None, tip: str) -> Markup:
    title = Markup("<title>{}</title>").format(tip) if tip else Markup()
    return Markup(
        '<path class="mark" transform="translate({:.1f} {:.1f})" d="{}">{}</path>'
    ).format(x, y, SHAPES.get(bits, OTHER_SHAPE), title)


def _polyline(at: Sequence[tuple[float, float]], css: str) -> Markup:
    return Markup('<path class="{}" d="{}"/>').format(css, _path(at)) if at else Markup()


def _path(at: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in at)


def _text(x: float, y: float, text: str, anchor: str) -> Markup:
    return Markup('<text x="{:.1f}" y="{:.1f}" text-anchor="{}">{}</text>').format(
        x, y, anchor, text
    )


def _group(css: str, content: Markup) -> Markup:
    return Markup('<g class="{}">{}</g>').format(css, content)


def _svg(label: str, parts: Sequence[Markup]) -> Markup:
    return Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
        WIDTH, HEIGHT, label, _join(parts)
    )


def _join(parts: Sequence[Markup]) -> Markup:
    return Markup("").join(parts)
