"""Feature squeezing in Tables 2 and 3: attackers that do not know of it, and the detector."""

from typing import Any

from defquant.experiments.compose import Trial
from defquant.experiments.defended_cells import BLACK_BOX, Defended, detector_cells, table_rows
from defquant.experiments.scales import Scale
from defquant.experiments.section import Entry, Number, Table, number
from defquant.experiments.store import Results
from defquant.experiments.words import attack_text, eps_text
from defquant.results import Score

__all__ = ["detector_table", "unaware_table"]


def unaware_table(scale: Scale, results: Results, table: int) -> Table:
    """The squeezed rows under attacks that go through the squeezing, and that do not see it."""
    squeezed = [row for row in table_rows(scale, table) if row.network.model.squeeze]
    names = [attack_text(attack) for attack in BLACK_BOX]
    heads = [head for name in names for head in (name, f"{name} (unaware)")]
    rows = [_unaware(results, row, scale, eps) for row in squeezed for eps in scale.eps]
    caption = (
        "Feature squeezing: accuracy under attacks through it, and under attacks on the network "
        "behind it that do not know of it. The paper does not say which of the two it has."
    )
    return Table(("Training technique", "ε", *heads), tuple(rows), caption)


def _unaware(results: Results, row: Defended, scale: Scale, eps: float) -> tuple[Entry, ...]:
    pairs = [Trial(scale, a, eps, unaware=unaware) for a in BLACK_BOX for unaware in (False, True)]
    numbers = [number(results, [trial.cell(row.network)]) for trial in pairs]
    return (row.name, eps_text(eps), *numbers)


def detector_table(scale: Scale, results: Results, table: int) -> Table:
    """What squeezing detects of the images that fool the undefended network."""
    rows: list[tuple[Entry, ...]] = []
    for cell in detector_cells(scale, table):
        found = results.value(cell) or {}
        named = (found.get("detected"), found.get("false_positives"))
        numbers = [entry for counts in named for entry in (rate(counts, cell.key), counted(counts))]
        rows.append((f"{attack_text(cell.attack)} {eps_text(cell.eps)}", *numbers))
    caption = (
        "Feature squeezing as a detector before the network “Normal”: its threshold flags at most "
        "5% of clean training images. The attack does not know of it. The paper has no numbers."
    )
    heads = ("Attack", "Detected", "of the fooling images", "False positives", "of clean images")
    return Table(heads, tuple(rows), caption)


def rate(counts: Any, cell: str = "") -> Number:
    """[k, n] as a share with its interval; empty for None, where no image fools the network."""
    if not counts:
        return Number(None)
    score = Score(*counts)
    low, high = score.interval
    return Number(score.accuracy, seeds=1, images=score.total, low=low, high=high, cells=(cell,))


def counted(counts: Any) -> str | None:
    return f"{counts[0]:,} of {counts[1]:,}" if counts else None
