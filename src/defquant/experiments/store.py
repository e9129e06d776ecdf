"""Results of experiments: one JSON line per cell, kept under the cell's key. No torch."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from defquant.errors import UserError
from defquant.experiments.cells import Cell
from defquant.files import append_line, read_lines
from defquant.results import Measurement, append, read_jsonl
from defquant.typed import from_mapping

__all__ = ["Results", "begin", "keep", "keep_values", "read"]

SCORES, VALUES = "results.jsonl", "probes.jsonl"


@dataclass(frozen=True)
class _Value:
    """A line of the values: what a cell found."""

    cell: str
    values: Any


@dataclass(frozen=True)
class Results:
    """What was measured, by the cells' keys: scores, and the values of the other kinds."""

    scores: Mapping[str, Measurement] = field(default_factory=dict)
    values: Mapping[str, Any] = field(default_factory=dict)

    def __contains__(self, cell: Cell) -> bool:
        return cell.key in (self.scores if cell.kind == "accuracy" else self.values)

    def score(self, cell: Cell) -> Measurement | None:
        return self.scores.get(cell.key)

    def value(self, cell: Cell) -> Any | None:
        """What a cell of another kind than `accuracy` found; see `experiments.work`."""
        return self.values.get(cell.key)

    def missing(self, cells: Iterable[Cell]) -> list[Cell]:
        return [cell for cell in dict.fromkeys(cells) if cell not in self]


def begin(out: Path) -> None:
    """Make the folder and its files: a file made later shows up late on a network disk.

    Raises `UserError` where they cannot be written.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name in (SCORES, VALUES):
            with (out / name).open("a"):
                pass
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror or error}") from None


def read(out: Path) -> Results:
    """All results of the folder; the latest of each cell. Raises `UserError` for broken lines."""
    scores, values = out / SCORES, out / VALUES
    measured = read_jsonl(scores) if scores.exists() else []
    found = _read_values(values) if values.exists() else {}
    return Results({m.cell: m for m in measured if m.cell}, found)


def keep(out: Path, cell: Cell, measurement: Measurement) -> None:
    """Append the score of `cell`."""
    append(out / SCORES, replace(measurement, run=cell.network.name, cell=cell.key))


def keep_values(out: Path, cell: Cell, values: Any, evidence: Mapping[str, Any]) -> None:
    """Append what a cell of another kind found, with what was asked."""
    asked = {"kind": cell.kind, "run": cell.network.name, "attack": cell.attack, "eps": cell.eps}
    line = {"cell": cell.key, **asked, "network": asdict(cell.network), "values": values}
    append_line(out / VALUES, line | {"evidence": dict(evidence)})


def _read_values(path: Path) -> dict[str, Any]:
    found = {}
    for where, record in read_lines(path):
        value = from_mapping(_Value, record, where)
        found[value.cell] = value.values
    return found
