"""No number and no verdict of the stored results changes: `golden/results.tsv` has them all.

`python tests/test_golden.py` writes that file again, for a change that is meant to change numbers.
"""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from defquant.paper.claims import verdicts
from defquant.paper.figures import EXPERIMENTS, cells_of, render
from defquant.paper.grid import SCALES, read
from defquant.paper.section import Number, Section
from defquant.records import read_folder, told_apart
from defquant.report.cards import read_cards
from defquant.report.measured import chosen, summary
from defquant.report.names import over_seeds

ROOT = Path(__file__).parents[1] / "results"
GOLDEN = Path(__file__).parent / "golden" / "results.tsv"
SHOWN = {"small": ("small", None), "svhn-smoke": ("smoke", "svhn")}  # preset, svhn_root
Line = tuple[str, str]
"""A place and what stands there."""


def text(*values: object) -> str:
    """Floats to six digits, nothing as `-`."""
    shown = ("-" if v is None else f"{v:.6g}" if isinstance(v, float) else str(v) for v in values)
    return " ".join(shown)


def shown(n: Number) -> str:
    ends = n.mean, n.spread, n.seeds, n.images, n.low, n.high, n.paper, n.gap
    return text(*ends) + " points" * n.points + " masked" * n.masked


def of_section(section: Section) -> Iterator[Line]:
    """Every entry by table, row and column, every point by panel, line and place."""
    yield "missing", str(section.missing)
    for index, table in enumerate(section.tables):
        for row in table.rows:
            labels = [entry for entry, at in zip(row, table.head, strict=True) if at in LABELS]
            for head, entry in zip(table.head, row, strict=True):
                if head not in LABELS and entry is not None:
                    value = shown(entry) if isinstance(entry, Number) else entry
                    yield f"table {index}, {', '.join(map(str, labels))}, {head}", value
    for panel in section.panels:
        for line in panel.lines:
            for at, n in line.points:
                yield f"panel {panel.title}, {line.label}, {at}", text(n.mean, n.paper)


LABELS = {
    "Network", "Images", "Training technique", "Quantisation", "ε", "β", "Attack", "ε · 255",
    "Layer",
}  # fmt: skip


def of_paper(folder: str) -> Iterator[Line]:
    preset, svhn_root = SHOWN[folder]
    scale, results = SCALES[preset].placed(None, svhn_root, "cpu"), read(ROOT / folder)
    for name in EXPERIMENTS if folder == "small" else ("table2",):
        for place, value in of_section(render(name, scale, results)):
            yield f"{name}: {place}", value
    for verdict in verdicts(scale, results):
        for r in verdict.readings:
            yield f"{verdict.name}: {r.attack}", text(r.verdict, r.effect, r.low, r.high)


def of_summary(folder: str) -> Iterator[Line]:
    """What `defquant report` shows of the folder."""
    measurements = chosen(read_folder(ROOT / folder))
    for c in over_seeds(told_apart(measurements)):
        n, total = c.n, sum(m.total for m in c.found)
        place = f"{c.data}, {c.model}, {c.series}: {c.attack} {255 * c.eps:.3g}"
        numbers = text(n.mean, n.spread, n.seeds, total, n.low, n.high)
        yield place, numbers + " masked" * n.masked
    for row in summary(measurements):
        yield f"{row.data}, {row.model}, {row.family}: {row.images}", text(row.gain, row.best)


def of_deployed(folder: str) -> Iterator[Line]:
    found, broken = read_cards(ROOT / folder)
    assert found and not broken
    for model in found:
        for place, value in leaves(asdict(model)):
            yield f"{model.place}: {place}", text(value)


def leaves(item: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    pairs = item.items() if isinstance(item, dict) else enumerate(item)
    for name, value in pairs:
        if isinstance(value, dict | list | tuple):
            yield from leaves(value, f"{place}{name} ")
        else:
            yield f"{place}{name}", value


def of_keys() -> Iterator[Line]:
    """The keys under which results are stored, one digest for each table and preset."""
    for preset, scale in SCALES.items():
        for name in EXPERIMENTS:
            keys = sorted(c.key for c in cells_of([name], scale.placed(None, "svhn", "cpu")))
            digest = hashlib.sha256(" ".join(keys).encode()).hexdigest()[:16]
            yield f"{preset}, {name}", f"{len(keys)} {digest}"


DUMPS: dict[str, Callable[[], Iterator[Line]]] = {
    **{f"paper {folder}": partial(of_paper, folder) for folder in SHOWN},
    **{f"report {folder}": partial(of_summary, folder) for folder in (*SHOWN, "cifar10-first")},
    "report deploy": partial(of_deployed, "deploy"),
    "keys": of_keys,
}


@pytest.mark.parametrize("part", DUMPS)
def test_numbers_and_verdicts_are_as_before(part: str) -> None:
    stored = (line.split("\t") for line in GOLDEN.read_text(encoding="utf-8").splitlines())
    before = {place: value for where, place, value in stored if where == part}
    lines = list(DUMPS[part]())
    now = dict(lines)
    assert len(now) == len(lines), "two entries in one place"
    pairs = {place: (before.get(place), now.get(place)) for place in before | now}
    assert before and not {place: pair for place, pair in pairs.items() if pair[0] != pair[1]}


if __name__ == "__main__":
    every = ("\t".join((part, *line)) + "\n" for part, dump in DUMPS.items() for line in dump())
    GOLDEN.write_text("".join(every), encoding="utf-8")
