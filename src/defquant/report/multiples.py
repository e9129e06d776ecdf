"""Small multiples of a section, as far as the page's SVG and matplotlib share them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from defquant.paper.section import Line, Number, Panel
from defquant.report.names import distinct
from defquant.report.values import axis, line_name

__all__ = [
    "Style",
    "Styles",
    "Tick",
    "bar",
    "height",
    "legend",
    "points",
    "scale_ticks",
    "style",
    "styles",
]

NAMED = {
    "vanilla": "vanilla", "vq": "vanilla", "dq": "dq", "defensive": "dq",
    "float": "float", "fp": "float", "full": "float",
}  # fmt: skip
OTHERS = tuple(f"k{i}" for i in range(6))

Styles = dict[tuple[str, str], "Style"]
Tick = tuple[float, str]


@dataclass(frozen=True)
class Style:
    """A line's colour by its name (`vanilla`, `dq`, `float`, `k0` to `k5`) and its mark."""

    colour: str
    shape: int


def styles(panels: Sequence[Panel]) -> Styles:
    """The style of each line, by kind and label: a colour per kind, a mark per label of a kind."""
    names = distinct(_name(line) for panel in panels for line in _ours_first(panel))
    kinds = distinct(kind for kind, _ in names)
    colours = _colours(kinds)
    found = {}
    for kind, label in names:
        same = [other for other_kind, other in names if other_kind == kind]
        found[kind, label] = Style(colours[kind], kinds.index(kind) + same.index(label))
    return found


def drawn(panels: Sequence[Panel]) -> list[Panel]:
    """The panels that have a point."""
    return [panel for panel in panels if any(points(panel, line) for line in panel.lines)]


def related(panels: Sequence[Panel]) -> list[list[Panel]]:
    """Panels that share kinds of lines stand under one legend."""
    groups: list[tuple[set[str], list[Panel]]] = []
    for panel in panels:
        kinds = {_name(line)[0] for line in panel.lines}
        near = [group for group in groups if group[0] & kinds]
        merged = (kinds.union(*(k for k, _ in near)), [*(p for _, own in near for p in own), panel])
        groups = [group for group in groups if group not in near] + [merged]
    return [own for _, own in groups]


def style(line: Line, found: Styles) -> Style:
    """The style of `line` among those of its section."""
    return found[_name(line)]


def legend(panels: Sequence[Panel]) -> list[tuple[str, Line | None]]:
    """Each line once. Where every paper's line stands for one of ours, `None` stands for all."""
    lines = [line for panel in panels for line in _ours_first(panel)]
    ours = {_name(line) for line in lines if not line.paper}
    papers = [line for line in lines if line.paper]
    known = bool(papers) and all(_name(line) in ours for line in papers)
    entries: dict[tuple[str, str, bool], tuple[str, Line | None]] = {}
    for line in lines:
        if not (line.paper and known):
            entries.setdefault((*_name(line), line.paper), (line_name(line), line))
    return [*entries.values(), *([("the paper's", None)] * known)]


def points(panel: Panel, line: Line) -> list[list[tuple[int, Number]]]:
    """Places on the x axis and numbers, in pieces: a line does not bridge what is missing."""
    places, found = axis(panel.lines), dict(line.points)
    pieces: list[list[tuple[int, Number]]] = [[]]
    for index, place in enumerate(places):
        number = found.get(place)
        if number is not None and height(line, number) is not None:
            pieces[-1].append((index, number))
        elif place in found:
            pieces.append([])
    return [piece for piece in pieces if piece]


def height(line: Line, number: Number) -> float | None:
    """Where a number is drawn; a paper's line may hold its value as `mean` or as `paper`."""
    return number.paper if line.paper and number.mean is None else number.mean


def bar(line: Line, number: Number) -> tuple[float, float]:
    """The wider of the 95 % interval and ± the spread over seeds."""
    middle = height(line, number) or 0.0
    lows = [middle - number.spread, *([] if number.low is None else [number.low])]
    highs = [middle + number.spread, *([] if number.high is None else [number.high])]
    return min(lows), max(highs)


def scale_ticks(panel: Panel, panels: Sequence[Panel]) -> list[Tick]:
    """Round numbers that span the y axis; panels of one y axis share it. The axis holds 0."""
    alike = [other for other in panels if (other.y, other.percent) == (panel.y, panel.percent)]
    ends = [end for other in alike for end in _ends(other)]
    low, high = min([0.0, *ends]), max([0.0, *ends])
    if panel.percent:
        whole = high > 0.5 or high == low
        return [(at / 100, text) for at, text in _round(100 * low, 100.0 if whole else 100 * high)]
    return _round(low, high if high > low else 1.0)


def _ends(panel: Panel) -> list[float]:
    shown = [(line, n) for line in panel.lines for piece in points(panel, line) for _, n in piece]
    return [end for line, number in shown for end in bar(line, number)]


def _round(low: float, high: float) -> list[Tick]:
    """Multiples of 1, 2 or 5 times a power of ten that span [low, high], at most eight."""
    power = 10.0 ** math.floor(math.log10((high - low) / 5))
    step = next(s * power for s in (1, 2, 5, 10) if (high - low) / (s * power) <= 6.001)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [(i * step, f"{i * step:.6g}".replace("-", "−")) for i in range(first, last + 1)]


def _colours(kinds: Sequence[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for kind in kinds:
        word = NAMED.get((kind.lower().split() or [""])[0], "")
        free = [name for name in OTHERS if name not in found.values()]
        fresh = free[0] if free else OTHERS[len(found) % len(OTHERS)]
        found[kind] = word if word and word not in found.values() else fresh
    return found


def _name(line: Line) -> tuple[str, str]:
    """Kind and label; a paper's line has those of ours that it stands beside."""
    label = line.label.removesuffix(" (paper)") if line.paper else line.label
    return line.kind or label, label


def _ours_first(panel: Panel) -> list[Line]:
    return sorted(panel.lines, key=lambda line: line.paper)
