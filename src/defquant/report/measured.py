"""Measurements, trainings and settings as the tables and panels that a report shows. No torch."""

import json
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from statistics import fmean
from typing import Any

from defquant.errors import UserError
from defquant.paper.section import Entry, Number, Panel, Table, eps_number, eps_text
from defquant.records import Measurement, told_apart
from defquant.report.answer import Place, kind_of, ladder, of_places
from defquant.report.model import EPS, NOTHING, WORDS, Chapter, Plain, listing, panels
from defquant.report.names import (
    Cell,
    Family,
    Series,
    attack_at,
    attack_order,
    distinct,
    grouped,
    is_validation,
    over_seeds,
    whole_text,
)
from defquant.report.plot import chart, figures, save
from defquant.report.sources import Run, flatten

__all__ = [
    "Row", "chosen", "groups", "plot_curves", "plot_ladder", "settings", "summary",
    "summary_table", "table_eps", "training",
]  # fmt: skip

LINES = 8  # of one figure where there are many networks
EPOCHS, RADII = 60, 120  # that are drawn of more
NOT_SHOWN = ("config", "model", "data", "train", "training", "command")  # of the evidence
Point = tuple[str, str, str, str, Number]
"""Panel, line, its kind, place on the x axis, and the number there."""


@dataclass(frozen=True)
class Row:
    """One line of Table 1: a family of networks under one attack, over the bit widths.

    `gain` is the best quantised accuracy minus full precision's (none for clean images, or
    where either is missing), `best` the highest accuracy, full precision included.
    """

    data: str
    model: str
    family: Family
    attack: str
    eps: float
    cells: Mapping[int | None, Cell]

    @property
    def gain(self) -> float | None:
        quantised = [cell.mean for bits, cell in self.cells.items() if bits is not None]
        if self.attack == "clean" or not quantised or None not in self.cells:
            return None
        return max(quantised) - self.cells[None].mean

    @property
    def best(self) -> float:
        return max(cell.mean for cell in self.cells.values())

    @property
    def images(self) -> str:
        return attack_at(self.attack, self.eps)


def chosen(measurements: Iterable[Measurement]) -> list[Measurement]:
    """One measurement per network, attack and eps: the most examples, then the lowest accuracy;
    in an order of names, whatever the order of the lines.

    Otherwise a run that was measured twice, or copied, would pass for two seeds. See `told_apart`.
    """
    best: dict[tuple[object, ...], Measurement] = {}
    for m in told_apart(measurements):
        network = (m.network[0] or m.run, m.method, m.model, m.bits, m.beta, m.seed)
        old = best.setdefault((*network, m.data, m.attack, m.eps), m)
        if (m.total, -m.correct) > (old.total, -old.correct):
            best[*network, m.data, m.attack, m.eps] = m
    return sorted(best.values(), key=_named)


def _named(m: Measurement) -> tuple[Any, ...]:
    series = Series(m.method, m.bits, m.beta)
    return (
        m.data,
        m.model,
        series.order,
        str(series),
        attack_order(m.attack),
        m.eps,
        m.seed,
        m.run,
    )


def summary(measurements: Iterable[Measurement]) -> list[Row]:
    """Table 1: per data set, network and family the clean row, then one row per attack.

    All attacks are shown at one eps (`table_eps`), or the nearest one at which they were run.
    Validation images come last.
    """
    return _rows(over_seeds(chosen(measurements)))


def _rows(found: Sequence[Cell]) -> list[Row]:
    radii = {data: table_eps(own) for data, own in grouped(found, lambda c: c.data).items()}
    places = distinct((c.data, c.model) for c in found)
    rows = []
    groups = grouped(found, lambda c: (c.data, c.model, c.series.family, c.attack))
    for (data, model, family, attack), own in groups.items():
        far = {c.eps: (abs(c.eps - radii[data]), -c.eps) for c in own}
        nearest = min(far, key=lambda eps: far[eps])
        cells = {c.series.bits: c for c in reversed(own) if c.eps == nearest}
        rows.append(Row(data, model, family, attack, nearest, cells))

    def order(row: Row) -> tuple[Any, ...]:
        at = places.index((row.data, row.model))
        return (is_validation(row.data), at, row.family.order, attack_order(row.attack))

    return sorted(rows, key=order)


def table_eps(cells: Sequence[Cell]) -> float:
    """The telling radius: where the strongest attack comes nearest to halving clean accuracy.

    Of float, or of all networks where none is float; among the radii of every attack, where there
    are such. A smaller radius breaks nothing, at a larger one nothing stands; either way all
    networks look alike.
    """
    floats = [cell for cell in cells if cell.series.method.startswith("float")] or list(cells)
    half = fmean([cell.mean for cell in floats if cell.attack == "clean"] or [1.0]) / 2
    attacked = [cell for cell in floats if cell.attack != "clean"]
    strongest = {
        eps: min(fmean(c.mean for c in same) for same in grouped(own, lambda c: c.attack).values())
        for eps, own in grouped(attacked, lambda c: c.eps).items()
    }
    every = grouped((c for c in cells if c.attack != "clean"), lambda c: c.attack)
    found = [{cell.eps for cell in own} for own in every.values()]
    shared = set.intersection(*found) or set.union(*found) if found else set()
    return min(sorted(shared), key=lambda eps: abs(strongest.get(eps, 0.0) - half), default=0.0)


# --- measurements -------------------------------------------------------------------------


def summary_table(rows: Sequence[Row]) -> Table:
    """The rows as the paper's Table 1."""
    bits = sorted({b for row in rows for b in row.cells}, key=lambda b: b or 0)
    whole = whole_text(row.family for row in rows if None in row.cells)
    heads = {b: whole if b is None else f"{b} bit{'s' * (b > 1)}" for b in bits}
    several = len({(row.data, row.model) for row in rows}) > 1
    shown: list[Plain] = [
        {
            **({"Data": row.data, "Network": row.model} if several else {}),
            "Method": str(row.family), "Images": row.images,
            **{h: row.cells[b].n if b in row.cells else None for b, h in heads.items()},
            "Quantize gain": None if row.gain is None else Number(row.gain, points=True),
            "Best": Number(row.best),
        }
        for row in rows
    ]  # fmt: skip
    return listing(shown, WORDS["summary"])


def groups(places: Sequence[Place], found: Sequence[Cell], drawn: bool) -> list[Chapter]:
    """The summary of each architecture and data set; where `drawn`, its accuracy over eps, too."""
    rows = grouped(_rows(found), lambda row: (row.data, row.model))
    return [
        Chapter(
            f"group-{i}", place.name, tables=[summary_table(rows[place.data, place.model])],
            panels=_eps_panels(place.cells) if drawn else (),
        )
        for i, place in enumerate(places, 1)
    ]  # fmt: skip


def _eps_panels(cells: Sequence[Cell], several: bool = False) -> list[Panel]:
    """Accuracy over eps, a panel per attack; every line starts at the clean accuracy.

    Of many networks each technique, and each few families of it, has panels of its own.
    """
    own = grouped(cells, lambda c: c.series)
    parts = _parts(sorted(own, key=lambda series: series.order))
    return [p for part in parts for p in panels(_over_eps({s: own[s] for s in part}, several), EPS)]


def _over_eps(networks: Mapping[Series, Sequence[Cell]], several: bool) -> Iterator[Point]:
    attacks = {cell.attack for own in networks.values() for cell in own} - {"clean"}
    for attack in sorted(attacks, key=attack_order):
        for series, own in networks.items():
            for (data, model), cells in grouped(own, lambda c: (c.data, c.model)).items():
                shown = [c for c in cells if c.attack in ("clean", attack)]
                shown = sorted(shown, key=lambda c: c.eps)[:: len(shown) // RADII + 1]
                label = f"{series}, {model} on {data}" if several else str(series)
                if any(c.attack == attack for c in cells):
                    for c in shown:
                        yield attack, label, kind_of(series), eps_number(c.eps), c.n


def _parts(names: Sequence[Series]) -> list[list[Series]]:
    """The lines of one figure each: all, or families of one technique, as many as it can hold."""
    parts: list[list[Series]] = [[]]
    for family, members in groupby(names, key=lambda series: series.family):
        own = list(members)
        other = any(series.family.added != family.added for series in parts[-1])
        if len(names) > 12 and parts[-1] and (other or len(parts[-1]) + len(own) > LINES):
            parts.append([])
        parts[-1] += own
    return parts


def plot_curves(measurements: Sequence[Measurement], out: Path) -> Path:
    """Accuracy over eps, a panel per attack, a line per network.

    Raises `UserError` where `out` does not end in .png, .svg or .pdf, or nothing was attacked.
    """
    found = over_seeds(chosen(measurements))
    drawn = _eps_panels(found, several=len({(cell.data, cell.model) for cell in found}) > 1)
    if not drawn:
        raise UserError("there are no attacks to plot: run `defquant attack` first")
    return save([chart(own, columns=len(drawn)) for own in figures(drawn)], out)


def plot_ladder(measurements: Sequence[Measurement], out: Path) -> Path:
    """Each network's accuracy from the weakest attack to the strongest, a panel per precision.

    Raises `UserError` where `out` does not end in .png, .svg or .pdf, or there are no two attacks
    to climb down.
    """
    places = of_places(over_seeds(chosen(measurements)), table_eps)
    drawn = ladder(places[0]) if places else None
    if drawn is None:
        raise UserError("a ladder needs two attacks that follow gradients: run `defquant attack`")
    return save([drawn], out)


# --- trainings and settings ----------------------------------------------------------------


def training(runs: Sequence[Run], measurements: Sequence[Measurement]) -> list[Chapter]:
    """A row and a line per network, over its seeds; a run without results under its own name."""
    networks = _networks([run for run in runs if run.epochs], measurements)
    rows: dict[tuple[str, str], dict[str, Entry]] = {
        (name, kind): {
            "Network": name, "Runs": str(len(own)), "Epochs": str(max(run.epochs for run in own))
        }
        for (name, kind), own in networks.items()
    }  # fmt: skip
    drawn: list[Panel] = []
    for field, (title, form) in WORDS["traces"].items():
        points: list[Point] = []
        for network, own in networks.items():
            curves = [run.curves[field] for run in own if field in run.curves]
            if curves and (field != "penalty" or any(map(any, curves))):  # 0 throughout is none
                rows[network][title] = form.format(fmean(curve[-1] for curve in curves))
                points += [(title, *network, at, number) for at, number in _trace(curves)]
        drawn += [replace(p, percent="%" in form) for p in panels(points, "epoch", title)]
    for network, own in networks.items():
        times = [sum(run.curves["seconds"]) for run in own if "seconds" in run.curves]
        rows[network]["Time a run"] = duration(fmean(times)) if times else NOTHING
    table = listing(list(rows.values()), WORDS["trained"])
    whole = Chapter("training", "Training", panels=drawn, tables=[table])
    return [whole] * bool(rows)


def _networks(
    runs: Sequence[Run], measurements: Sequence[Measurement]
) -> dict[tuple[str, str], list[Run]]:
    """Runs by the name of their network and its kind; in order, those without results last."""
    on_test_last = sorted(measurements, key=lambda m: not is_validation(m.data))
    known = {
        m.run: (Series(m.method, m.bits, m.beta), f", {m.model} on {m.data}") for m in on_test_last
    }
    several = len({where for _, where in known.values()}) > 1
    measured = [run for run in runs if run.name in known]
    found: dict[tuple[str, str], list[Run]] = {}
    for run in sorted(measured, key=lambda run: known[run.name][0].order):
        series, where = known[run.name]
        found.setdefault((f"{series}{where * several}", kind_of(series)), []).append(run)
    return found | {(run.name, run.name): [run] for run in runs if run.name not in known}


def _trace(curves: Sequence[Sequence[float]]) -> Iterator[tuple[str, Number]]:
    """The mean over runs, epoch by epoch; of many epochs some."""
    longest = max(map(len, curves))
    for i in range(0, longest, longest // EPOCHS + 1):
        values = [curve[i] for curve in curves if i < len(curve)]
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        yield str(i + 1), Number(fmean(values), spread, len(values))


def duration(seconds: float) -> str:
    """`45 s`, `12 min`, `3.2 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def settings(measurements: Sequence[Measurement], runs: Sequence[Run]) -> Chapter:
    """Data, versions and machine, commands, attacks whole, settings of the runs; empty ones out."""
    told = {id(m.evidence): m.evidence for m in measurements}
    evidences = {json.dumps(e, sort_keys=True, default=str): e for e in told.values()}.values()
    attacked = {(m.attack, m.eps, m.settings) for m in measurements if m.attack != "clean"}
    attacks: list[Plain] = [
        {"Attack": name, "ε": eps_text(eps), "Settings": whole}
        for name, eps, whole in sorted(attacked, key=lambda a: (attack_order(a[0]), *a[1:]))
    ]
    kept = [{k: v for k, v in e.items() if k not in NOT_SHOWN} for e in evidences]
    machines = _values([flatten(evidence) for evidence in kept])
    if measurements:
        machines["measuring took"] = [duration(sum(m.seconds for m in measurements))]
    configured = [run for run in runs if run.config]
    values = _values([run.config for run in configured])
    shared = {
        name: own for name, own in values.items()
        if len(own) == 1 and all(name in run.config for run in configured)
    }  # fmt: skip
    differing = [{"Run": run.name, **run.config} for run in configured]
    differing = [{k: v for k, v in run.items() if k not in shared} for run in differing]
    tables: dict[str, Sequence[Plain]] = {
        WORDS["data"]: _data(measurements),
        "Versions and machine": _settings(machines),
        "Attacks": attacks,
        "Settings that differ": differing if len(values) > len(shared) else [],
        "Settings that all runs share": _settings(shared),
    }
    commands = [evidence.get("command") for evidence in evidences]
    made = distinct(" ".join(map(str, c)) if isinstance(c, list) else str(c) for c in commands if c)
    folded = [(name, [listing(rows, name)]) for name, rows in tables.items() if rows]
    return Chapter("settings", "Settings", folded=folded, commands=made)


def _data(measurements: Sequence[Measurement]) -> list[Plain]:
    rows: list[Plain] = []
    for (name, print_), same in grouped(measurements, lambda m: (m.data, m.fingerprint)).items():
        totals = sorted({m.total for m in same})
        numbers = {
            "Training seeds": {m.seed for m in same}, "Attack seeds": {m.attack_seed for m in same}
        }  # fmt: skip
        rows.append({
            "Data": name, "Fingerprint": print_,
            "Images": " to ".join(f"{n:,}" for n in distinct([totals[0], totals[-1]])),
            **{k: ", ".join(map(str, sorted(own))) for k, own in numbers.items()},
        })  # fmt: skip
    return rows


def _values(settings: Iterable[Mapping[str, str]]) -> dict[str, list[str]]:
    """Every value of each setting, once."""
    found = grouped((item for own in settings for item in own.items()), lambda item: item[0])
    return {name: distinct(value for _, value in items) for name, items in found.items()}


def _settings(values: Mapping[str, Sequence[str]]) -> list[Plain]:
    more = {name: f" and {len(own) - 4} more" * (len(own) > 4) for name, own in values.items()}
    return [{"Setting": k, "Value": " · ".join(own[:4]) + more[k]} for k, own in values.items()]
