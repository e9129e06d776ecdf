"""The measured runs drawn: accuracy over eps, accuracy over bits, sparklines.

Series `i` of a page has the class `s{i}`; marks differ by bits.
"""

from collections.abc import Iterable, Mapping, Sequence

from markupsafe import Markup

from defquant.report import drawing
from defquant.report.drawing import BOTTOM, LEFT, RIGHT, TOP, Point, Scale
from defquant.report.names import Family, Series, distinct, eps_number, percent, series_of
from defquant.report.tables import Row, band, columns
from defquant.results import Cell

__all__ = ["Point", "Scale", "bits_panel", "eps_panel", "palette", "sparkline", "swatch"]

DQ_HUES = (255, 165, 330, 215, 295)
VANILLA_HUES = (50, 25, 85)
ACCURACY = Scale(0, 1, BOTTOM, TOP)
PERCENT_TICKS = [(ACCURACY(step / 100), str(step)) for step in range(0, 101, 20)]


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
    ticks = drawing.apart([(x(eps), eps_number(eps)) for eps in radii], 21)
    parts = [drawing.axes(ticks, "ε · 255", PERCENT_TICKS)]
    for item, points in lines.items():
        parts.append(drawing.group(classes[item], drawing.area(points, x, ACCURACY)))
    for item, points in lines.items():
        parts.append(drawing.group(classes[item], _line(points, x, item.bits)))
    return drawing.svg(f"Accuracy over eps under {attack}, {len(lines)} networks", parts)


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
    parts = [drawing.axes(ticks, "activation bits", PERCENT_TICKS)]
    for rows, kind in ((clean, "dashed"), (attacked, "")):
        for row in rows:
            points = [_point(i, row.cells[b]) for i, b in enumerate(ordered) if b in row.cells]
            shape = family_shape(row.family, families)
            drawn = drawing.whiskers(points, x, ACCURACY) + _line(points, x, shape, kind)
            parts.append(drawing.group(family_class(row.family, families), drawn))
    return drawing.svg(f"Accuracy over bits, clean and under {attacked[0].images}", parts)


def sparkline(lines: Sequence[Sequence[float]], name: str, high: float, css: str) -> Markup:
    """Small curves over the epochs, one per run, on [0, high]."""
    parts = []
    for values in lines:
        shown = values[:: len(values) // 60 + 1]
        x, y = Scale(0, len(shown) - 1, 2, 108), Scale(0, high or 1, 26, 3)
        points = [Point(i, value, 0, 0) for i, value in enumerate(shown)]
        parts.append(drawing.polyline([(x(p.x), y(p.y)) for p in points], "thin"))
    base = Markup('<path class="grid" d="M2 26H108"/>')
    return Markup(
        '<svg class="spark {}" viewBox="0 0 110 29" role="img" aria-label="{}">{}{}</svg>'
    ).format(css, name, base, drawing.join(parts))


def swatch(css: str, bits: int | None, kind: str = "") -> Markup:
    """The line and mark of a legend entry."""
    return drawing.swatch(css, _shape(bits), kind)


def _shape(bits: int | None) -> int:
    """Full precision has the first mark, 1 to 5 bits the next, all others the last."""
    return min(bits or 0, len(drawing.SHAPES) - 1)


def _line(points: Sequence[Point], x: Scale, bits: int | None, kind: str = "") -> Markup:
    tips = [f"{percent(p.y)} ({percent(p.low)} to {percent(p.high)})" for p in points]
    return drawing.line(points, x, ACCURACY, _shape(bits), tips, kind)
