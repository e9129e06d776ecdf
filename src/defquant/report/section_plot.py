"""A section's figure as a file for a paper: PNG, SVG or PDF, by matplotlib."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from defquant.errors import UserError
from defquant.paper.section import Line, Panel, Section
from defquant.report.multiples import (
    Styles,
    Tick,
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
from defquant.report.plot import check_name, save
from defquant.report.values import axis

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["section_figure"]

# Okabe and Ito's colours, told apart by every kind of colour vision; warm for vanilla, cool for DQ
_COLOURS = {
    "vanilla": "#D55E00", "dq": "#0072B2", "float": "#666666", "k0": "#009E73", "k1": "#CC79A7",
    "k2": "#E69F00", "k3": "#56B4E9", "k4": "#000000", "k5": "#8C6D1F",
}  # fmt: skip
_MARKS = "o^DvsPh"
_WIDTH = 6.4  # inches: 640 pixels of 1/100 inch
_LETTERS = {1: 90, 2: 42, 3: 28}  # below an x axis, by the columns of panels
_TICKS = 9  # labels of an x axis that fit


def section_figure(section: Section, path: Path) -> Path:
    """Draw the panels of `section`, ours solid with bars, the paper's dashed; returns `path`.

    Bars: the wider of the 95 % interval and ± the spread over seeds. The same section makes the
    same file. Raises `UserError` where `path` does not end in .png, .svg or .pdf, or no panel has
    a point.
    """
    check_name(path)
    panels = drawn(section.panels)
    if not panels:
        raise UserError(f"{section.name} has nothing to draw: measure it first")
    return save(_draw(panels), path)


def _draw(panels: Sequence[Panel]) -> "Figure":
    """One legend below, or one in each panel where panels have no line in common."""
    from matplotlib.figure import Figure

    columns, groups = _columns(panels), related(panels)
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(_WIDTH, max(2.35 * rows + 0.3, 3.2)), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for place, panel in zip(axes, panels, strict=False):
        found = styles(next(group for group in groups if panel in group))
        _panel(place, panel, scale_ticks(panel, panels), found, _LETTERS[columns])
        if len(groups) > 1:
            _legend(place, [panel], found, loc="best", fontsize=7)
    for unused in axes[len(panels) :]:
        unused.remove()
    if len(groups) == 1:
        keys = _keys([name for name, _ in legend(panels)])
        _legend(figure, panels, styles(panels), loc="outside lower center", ncols=keys, fontsize=8)
    return figure


def _legend(place: "Axes | Figure", panels: Sequence[Panel], found: Styles, **options: Any) -> None:
    entries = legend(panels)
    handles = [_handle(line, found) for _, line in entries]
    place.legend(handles, [name for name, _ in entries], frameon=False, **options)


def _columns(panels: Sequence[Panel]) -> int:
    wide = any(len(axis(panel.lines)) > _TICKS for panel in panels)
    return min(len(panels), 2 if wide or len(panels) in (2, 4) else 3)


def _keys(names: Sequence[str]) -> int:
    """Columns of the legend: its entries are about 5.5 points a letter and 40 for the line."""
    return min(len(names), max(1, int(_WIDTH * 72 / (40 + 4.6 * max(map(len, names))))))


def _panel(axes: "Axes", panel: Panel, ticks: Sequence[Tick], found: Styles, letters: int) -> None:
    for line in sorted(panel.lines, key=lambda line: not line.paper):  # ours above the paper's
        for piece in points(panel, line):
            at, numbers = [i for i, _ in piece], [number for _, number in piece]
            values = [height(line, number) or 0.0 for number in numbers]
            axes.plot(at, values, **_look(line, found))
            if not line.paper:
                bars = [bar(line, number) for number in numbers]
                colour = _COLOURS[style(line, found).colour]
                axes.vlines(at, *zip(*bars, strict=True), color=colour, linewidth=1, alpha=0.7)
    places = axis(panel.lines)
    step = math.ceil(len(places) / _TICKS)
    shown = range((len(places) - 1) % step, len(places), step)  # the last one closes the axis
    slant = 40 if max(len(places[i]) for i in shown) * len(shown) > letters else 0
    axes.set_xticks(
        list(shown), [places[i] for i in shown], rotation=slant, ha="right" if slant else "center"
    )
    axes.set_yticks([at for at, _ in ticks], [text for _, text in ticks])
    axes.set_ylim(ticks[0][0], ticks[-1][0])
    axes.set_xlim(-0.3, len(places) - 0.7)
    axes.set_title(panel.title, fontsize=9)
    axes.set_xlabel(panel.x, fontsize=8)
    axes.set_ylabel(f"{panel.y} (%)" if panel.percent else panel.y, fontsize=8)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.2)
    axes.spines[["top", "right"]].set_visible(False)


def _look(line: Line, found: Styles) -> dict[str, Any]:
    own = style(line, found)
    look = {"color": _COLOURS[own.colour], "marker": _MARKS[own.shape % len(_MARKS)]}
    if line.paper:
        faint = {"linestyle": (0, (4, 2.5)), "linewidth": 1.1, "alpha": 0.55, "markersize": 3}
        return look | faint | {"markerfacecolor": "white"}
    return look | {"linewidth": 1.6, "markersize": 3.8, "clip_on": False}


def _handle(line: Line | None, found: Styles) -> Any:
    from matplotlib.lines import Line2D

    if line is None:
        return Line2D([], [], color="#888888", linestyle=(0, (4, 2.5)), linewidth=1.1)
    return Line2D([], [], **{k: v for k, v in _look(line, found).items() if k != "clip_on"})
