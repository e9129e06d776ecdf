"""The result in words, from the numbers alone: who keeps how much, and whether it is settled."""

from collections.abc import Sequence
from statistics import fmean

from defquant.report.names import eps_text, is_validation, is_white_box, percent, series_of
from defquant.report.tables import Row
from defquant.results import Cell

__all__ = ["reading"]


def reading(rows: Sequence[Row]) -> str:
    """One or two sentences on the hardest white-box attack of the largest group of `rows`.

    They compare vanilla and DQ at the shared bit width nearest to 4, neutrally: a lead counts
    as settled only where the ranges over seeds and the 95% intervals are both disjoint.
    """
    on_test = [row for row in rows if not is_validation(row.data)]
    rows = _hardest(_largest(on_test or rows))
    where = _where(rows[0])
    vanilla = next((row for row in rows if row.family.method == "vanilla"), None)
    rivals = [row for row in rows if row.family.method == "DQ"]
    shared = {b for b in (vanilla.cells if vanilla else ()) if any(b in r.cells for r in rivals)}
    quantised = shared - {None}
    if vanilla is None or not shared:
        return _list(where, rows)
    bits = min(quantised, key=lambda b: abs((b or 0) - 4)) if quantised else None
    rivals = [row for row in rivals if bits in row.cells]
    dq = max(rivals, key=lambda row: row.cells[bits].mean).cells[bits]
    cells = [vanilla.cells[bits], dq]
    if bits is not None and None in vanilla.cells:
        cells.insert(1, vanilla.cells[None])
    best_of = f", the best of {len(rivals)} values of β," if len(rivals) > 1 else ""
    masked = [str(series_of(cell)) for cell in cells if cell.masked]
    doubt = f" {' and '.join(masked)}: masked, see the note †." if masked else ""
    return f"{where}, {_keeps(cells, best_of)} {_verdict(dq, vanilla.cells[bits])}{doubt}"


def _largest(rows: Sequence[Row]) -> list[Row]:
    def size(group: tuple[str, str]) -> int:
        return sum(len(row.cells) for row in rows if (row.data, row.model) == group)

    name = max(dict.fromkeys((row.data, row.model) for row in rows), key=size)
    return [row for row in rows if (row.data, row.model) == name]


def _hardest(rows: Sequence[Row]) -> list[Row]:
    attacked = [row for row in rows if row.attack != "clean"]
    white = [row for row in attacked if is_white_box(row.attack)]
    pool = white or attacked or list(rows)

    def rank(name: tuple[str, float]) -> tuple[int, float]:
        same = [row for row in pool if (row.attack, row.eps) == name]
        means = [cell.mean for row in same for cell in row.cells.values()]
        return (-len(means), fmean(means))  # an attack run on a few networks compares nothing

    name = min(dict.fromkeys((row.attack, row.eps) for row in pool), key=rank)
    return [row for row in pool if (row.attack, row.eps) == name]


def _where(row: Row) -> str:
    if row.attack == "clean":
        return f"On clean images of {row.data}"
    return f"Under {row.attack} at {eps_text(row.eps)} on {row.data}"


def _keeps(cells: Sequence[Cell], best_of: str = "") -> str:
    parts = [f"{series_of(cell)} {percent(cell.mean)}" for cell in cells]
    parts[0] = f"{series_of(cells[0])} keeps {percent(cells[0].mean)}"
    if best_of:
        parts[-1] = f"{series_of(cells[-1])}{best_of} {percent(cells[-1].mean)}"
    joined = " and ".join([", ".join(parts[:-1])] * (len(parts) > 1) + parts[-1:])
    return f"{joined} ({_seeds(cells)})."


def _list(where: str, rows: Sequence[Row]) -> str:
    cells = [cell for row in rows for _, cell in sorted(row.cells.items(), key=_by_bits)]
    more = f" {len(cells) - 4} more networks stand in the table." if len(cells) > 4 else ""
    return f"{where}, {_keeps(cells[:4])}{more}"


def _by_bits(item: tuple[int | None, Cell]) -> int:
    return item[0] or 0


def _seeds(cells: Sequence[Cell]) -> str:
    counts = sorted({len(cell.seeds) for cell in cells})
    if counts == [1]:
        return "one seed each" if len(cells) > 1 else "one seed"
    return f"{counts[0]} seeds" if len(counts) == 1 else f"{counts[0]} to {counts[-1]} seeds"


def _verdict(dq: Cell, vanilla: Cell) -> str:
    points = round(100 * (dq.mean - vanilla.mean), 1)
    side = "ahead of" if points > 0 else "behind"
    lead = (
        f"DQ is {abs(points):.1f} points {side} vanilla" if points else "DQ is level with vanilla"
    )
    intervals = {"95% intervals": (dq.pooled.interval, vanilla.pooled.interval)}
    if min(len(dq.accuracies), len(vanilla.accuracies)) > 1:
        ranges = [(min(c.accuracies), max(c.accuracies)) for c in (dq, vanilla)]
        intervals = {"ranges over seeds": (ranges[0], ranges[1])} | intervals
    met = [name for name, (a, b) in intervals.items() if a[0] <= b[1] and b[0] <= a[1]]
    if met:
        return f"{lead}; their {' and '.join(met)} overlap, so these runs do not settle the order."
    return f"{lead}; their {' and '.join(intervals)} do not overlap."
