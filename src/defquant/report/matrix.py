"""The transfer matrix: as aligned rows for a terminal, and as a heat map. No torch."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from defquant.report.plot import save

__all__ = ["plot_matrix", "text_matrix"]


def text_matrix(record: Mapping[str, Any]) -> list[str]:
    """Rows are the networks attacked, columns those shown the images; each cell with its interval.

    A cell is the share of images fooled, of those that both networks have right; `-` where there
    are none. Columns are numbered, as names are long. `record` is what
    `defquant.diagnose.runs.transfer_runs` returns.
    """
    names = [network["name"] for network in record["networks"]]
    width = max(len(name) for name in names) + 5
    head = " " * width + "".join(f"{f'[{i}]':>25}" for i in range(1, len(names) + 1))
    about = f"{record['attack']}, {record['images']} images of {record['data']}"
    rows = [f"rows: made on; columns: shown to; {about}", head]
    for i, name in enumerate(names):
        cells = record["cells"][i * len(names) : (i + 1) * len(names)]
        rows.append(f"{f'[{i + 1}] {name}':{width}}" + "".join(f"{_cell(c):>25}" for c in cells))
    return rows


def plot_matrix(record: Mapping[str, Any], out: Path) -> Path:
    """The matrix as a heat map with its numbers in percent, whole, as PNG, SVG or PDF."""
    from matplotlib.figure import Figure

    names = [network["name"] for network in record["networks"]]
    n = len(names)
    rates = [[record["cells"][i * n + j]["rate"] for j in range(n)] for i in range(n)]
    side, label = 2 + 0.55 * n, 0.085 * max(len(name) for name in names)  # inches
    figure = Figure(figsize=(side + label, side + 0.7 * label), layout="constrained")
    axis = figure.subplots()
    shown = [[float("nan") if rate is None else 100 * rate for rate in row] for row in rates]
    image = axis.imshow(shown, cmap="cividis", vmin=0, vmax=100)
    for i, row in enumerate(rates):
        for j, rate in enumerate(row):
            text = "-" if rate is None else f"{100 * rate:.0f}"
            colour = "black" if rate is None or rate > 0.55 else "white"
            axis.text(j, i, text, ha="center", va="center", color=colour, fontsize=9)
    axis.set_xticks(range(n), names, rotation=45, ha="right", rotation_mode="anchor")
    axis.set_yticks(range(n), names)
    axis.set_xlabel("shown to")
    axis.set_ylabel("made on")
    figure.suptitle(
        f"{record['attack']}\n{record['images']} images of {record['data']}", fontsize=9
    )
    figure.colorbar(image, shrink=0.8, label="fooled (%)")
    return save(figure, out)


def _cell(cell: Mapping[str, Any]) -> str:
    if cell["rate"] is None:
        return "-"
    return f"{cell['rate']:.1%} [{cell['low']:.1%}, {cell['high']:.1%}]"
