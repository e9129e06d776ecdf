"""Normalised distances D between clean and attacked activations: how Figure 3 shows them."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from defquant.experiments.cells import Cell
from defquant.experiments.section import Entry, Line, Number, Panel, Table
from defquant.experiments.store import Results
from defquant.experiments.words import listed

__all__ = [
    "First", "Layers", "against_width", "first_panel", "first_table", "first_words", "growth",
    "layers_panel", "layers_table", "lower_at", "read_first", "read_layers",
]  # fmt: skip

First = Sequence[tuple[str, Any]]
"""Figure 3a: eps in 255ths, and what the cell found or None."""

Layers = Mapping[str, Sequence[Any]]
"""Figure 3b: the records of the layers, by the network's name; none where nothing was found."""


def read_first(results: Results, cells: Iterable[Cell]) -> First:
    return [(f"{255 * cell.eps:.3g}", _keyed(results.value(cell), cell.key)) for cell in cells]


def read_layers(results: Results, cells: Mapping[str, Cell]) -> Layers:
    return {name: _keyed(results.value(cell), cell.key) or () for name, cell in cells.items()}


def _keyed(found: Any, key: str) -> Any:
    """The same, each record with the key of its cell."""
    if isinstance(found, list):
        return [_keyed(part, key) for part in found]
    if isinstance(found, dict):
        return {"cell": key} | {name: _keyed(part, key) for name, part in found.items()}
    return found


def distance(found: Any, batch: bool = False) -> Number:
    """D over the examples, with their standard deviation; of the `batch` as one vector."""
    if found is None:
        return Number(None)
    count, cells = found["examples"] - found["left_out"], (found["cell"],)
    if batch:
        return Number(found["whole"], images=count, seeds=1, cells=cells)
    return Number(found["mean"], spread=found["spread"], images=count, seeds=1, cells=cells)


def _both(found: Any, batch: bool = False) -> tuple[Number, Number]:
    """As it is, and rounded."""
    if found is None:
        return Number(None), Number(None)
    return distance(found["plain"], batch), distance(found["quantized"], batch)


def first_panel(first: First) -> Panel:
    pairs = [(eps, _both(found)) for eps, found in first]
    plain = tuple((eps, numbers[0]) for eps, numbers in pairs)
    rounded = tuple((eps, numbers[1]) for eps, numbers in pairs)
    lines = (
        Line("as it is", plain, "full precision"),
        Line("rounded to 3 bits", rounded, "3 bits"),
    )
    return Panel("(a) first activation, Wide ResNet", "ε · 255", "D", lines, percent=False)


def first_table(first: First) -> Table:
    heads = ("ε · 255", "As it is", "3 bits", "As it is, batch", "3 bits, batch")
    rows = tuple((eps, *_both(found), *_both(found, batch=True)) for eps, found in first)
    caption = (
        "(a) D = ‖A − A_adv‖ / ‖A‖ after the first block: mean and standard deviation over the "
        "images, and of the batch as one vector, for the paper does not say which it is."
    )
    return Table(heads, rows, caption, percent=False)


def first_words(first: First) -> str:
    """At which eps rounding lowers D and at which it raises it; empty for nothing found."""
    pairs = {eps: tuple(n.mean for n in _both(found)) for eps, found in first}
    gaps = {e: b - a for e, (a, b) in pairs.items() if a is not None and b is not None}
    lower = listed(eps for eps, gap in gaps.items() if gap < 0)
    higher = listed(eps for eps, gap in gaps.items() if gap > 0)
    words = f"Ours (a): of ε = {listed(gaps)}, rounding to 3 bits lowers D at {lower}"
    return f"{words} and raises it at {higher}." if gaps else ""


def layers_panel(title: str, every: Layers) -> Panel:
    """A line for each network over the layers' index."""
    depth = max(map(len, every.values()), default=0)
    lines = tuple(
        Line(name, tuple((str(i), _at(records, i)) for i in range(depth)), kind=name)
        for name, records in every.items()
    )
    return Panel(title, "layer", "D", lines, percent=False)


def layers_table(title: str, every: Layers) -> Table:
    """A row for each layer, a column for each network."""
    longest = max(every.values(), key=len, default=())
    rows: list[tuple[Entry, ...]] = [
        (f"{i} {record['layer']}", *(_at(records, i) for records in every.values()))
        for i, record in enumerate(longest)
    ]
    caption = f"{title}: D at each layer's input, FGSM at 8/255."
    return Table(("Layer", *every), tuple(rows), caption, percent=False)


def _at(records: Sequence[Any], index: int) -> Number:
    return distance(records[index]["distance"]) if index < len(records) else Number(None)


def growth(every: Layers) -> str:
    """D at the image and at the last layer of each network; empty for nothing found."""
    ends = {name: (_at(r, 0).mean, _at(r, len(r) - 1).mean) for name, r in every.items() if r}
    known = [
        f"{name} from {first:.3f} to {last:.3f}"
        for name, (first, last) in ends.items()
        if first is not None and last is not None
    ]
    return f"From the image to the last layer D goes: {'; '.join(known)}." if known else ""


def against_width(every: Layers) -> str:
    """How often the network with one bit fewer has the larger D, over all layers.

    `every` runs from many bits to few.
    """
    pairs = [
        (_at(more, i).mean, _at(fewer, i).mean)
        for more, fewer in pairwise(every.values())
        for i in range(min(len(more), len(fewer)))
    ]
    rises = [few > many for many, few in pairs if many is not None and few is not None]
    if not rises:
        return ""
    return (
        f"Of {len(rises)} steps to the next smaller bit width at one layer, {sum(rises)} raise D."
    )


def lower_at(every: Layers, first: str, second: str) -> str:
    """At how many layers the network `first` has the smaller D; empty where one is missing."""
    ours, other = every[first], every[second]
    pairs = [(_at(ours, i).mean, _at(other, i).mean) for i in range(min(len(ours), len(other)))]
    lower = [a < b for a, b in pairs if a is not None and b is not None]
    return f"{first} has the smaller D at {sum(lower)} of {len(lower)} layers." if lower else ""
