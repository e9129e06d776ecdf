"""The accuracy-over-eps curves as a file for a paper: PNG, SVG or PDF, by matplotlib."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from defquant.errors import UserError
from defquant.files import write_bytes
from defquant.report.names import Series, attack_order, distinct, series_of
from defquant.report.tables import band, chosen
from defquant.results import Cell, Measurement, aggregate

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["check_name", "plot_curves", "save"]

# Okabe and Ito's colours, told apart by every kind of colour vision
_COLOURS = ("#D55E00", "#E69F00", "#0072B2", "#56B4E9", "#009E73", "#CC79A7")


def plot_curves(measurements: Sequence[Measurement], out: Path) -> Path:
    """Accuracy over eps, a panel per attack, a line per network; bands as in the report.

    Bands: lowest to highest seed, or the 95 % interval of a single one. Raises `UserError` where
    `out` does not end in .png, .svg or .pdf, or nothing was attacked.
    """
    from matplotlib.figure import Figure

    check_name(out)
    cells = aggregate(chosen(measurements))
    attacks = sorted(distinct(c.attack for c in cells if c.attack != "clean"), key=attack_order)
    if not attacks:
        raise UserError("there are no attacks to plot: run `defquant attack` first")
    figure = Figure(figsize=(1 + 2.7 * len(attacks), 3.1), layout="constrained")
    axes = figure.subplots(1, len(attacks), sharey=True, squeeze=False)[0]
    for axis, attack in zip(axes, attacks, strict=True):
        _panel(axis, cells, attack)
    axes[0].set_ylabel("accuracy (%)")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", frameon=False)
    return save(figure, out)


def _label(network: Series) -> str:
    """Its name; matplotlib leaves names that begin with _ out of the legend."""
    name = str(network)
    return f" {name}" if name.startswith("_") else name


def check_name(out: Path) -> str:
    """The format that the file's name asks for. Raises `UserError` for others than the three."""
    kind = out.suffix.removeprefix(".").lower()
    if kind not in ("png", "svg", "pdf"):
        raise UserError(f"a figure's name ends in .png, .svg or .pdf; found {out.name!r}")
    return kind


def save(figure: "Figure", out: Path) -> Path:
    """Write `figure` to `out`, whole; the same figure makes the same bytes."""
    from matplotlib import rc_context
    from matplotlib.text import Text

    kind = check_name(out)
    for text in figure.findobj(Text):  # a name with $ is no formula
        text.set_parse_math(False)
    stamp = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(kind)
    buffer = io.BytesIO()
    with rc_context({"svg.hashsalt": "defquant", "text.parse_math": False}):
        figure.savefig(buffer, format=kind, dpi=160, metadata=stamp)
    return write_bytes(out, buffer.getvalue())


def _panel(axis: "Axes", cells: Sequence[Cell], attack: str) -> None:
    networks = sorted(distinct(series_of(cell) for cell in cells), key=lambda s: s.order)
    quantised = [s for s in networks if s.method != "float"]
    for network in networks:
        mine = [c for c in cells if series_of(c) == network and c.attack in ("clean", attack)]
        mine = sorted(mine, key=lambda c: c.eps)
        bands = [band(c) for c in mine]
        index = quantised.index(network) if network in quantised else None
        colour = "#666666" if index is None else _COLOURS[index % len(_COLOURS)]
        pixels = [c.eps * 255 for c in mine]
        axis.plot(
            pixels, [100 * c.mean for c in mine], color=colour, label=_label(network), marker="o",
            markersize=3, linestyle="--" if network.bits is None else "-",
        )  # fmt: skip
        axis.fill_between(
            pixels, [100 * low for low, _ in bands], [100 * high for _, high in bands],
            color=colour, alpha=0.15, linewidth=0,
        )  # fmt: skip
    axis.set_title(attack, fontsize=10)
    axis.set_xlabel("ε (1/255)")
    axis.set_xticks(sorted({c.eps * 255 for c in cells if c.attack == attack} | {0}))
    axis.xaxis.set_major_formatter("{x:.4g}")
    axis.set_ylim(0, 100)
    axis.grid(alpha=0.2)
    axis.spines[["top", "right"]].set_visible(False)
