"""Measurements, trainings and settings as the tables and panels that a report shows. No torch."""

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from statistics import fmean

from defquant.paper.section import (
    Entry,
    Line,
    Number,
    Panel,
    Section,
    Table,
    eps_number,
    eps_text,
    rate,
)
from defquant.report.model import EPS, NOTHING
from defquant.report.names import (
    Family,
    Series,
    attack_order,
    distinct,
    is_validation,
    series_of,
    whole_text,
)
from defquant.report.sources import INTEGER, Deployed, Pair, Run, flatten
from defquant.results import Cell, Measurement, Score, aggregate, blind, told_apart

__all__ = [
    "Group",
    "Row",
    "chosen",
    "deployed",
    "eps_panels",
    "every_card",
    "groups",
    "settings",
    "summary",
    "summary_table",
    "table_eps",
    "training",
]  # fmt: skip

LINES = 8  # of one figure where there are many networks
EPOCHS, RADII = 60, 120  # that are drawn of more
SUMMARY = (
    "Accuracy in percent. Quantize gain: the best quantised accuracy minus full precision of the "
    "same method, in points (float is vanilla's full precision). The radius is the one at which "
    "the strongest attack comes nearest to halving the accuracy."
)
LISTING = "Every attack, radius and network: mean over seeds, interval of all seeds together."
TRAINED = (
    "The last epoch's mean over seeds. Accuracy is on test images where they were watched, else "
    "on training images. Adversarial training is watched on 256 of its own images, which is no "
    "score: accuracy under PGD-10 and, in brackets, FGSM. PGD falling while FGSM stays is "
    "catastrophic overfitting."
)
SETTINGS = ("config", "model", "data", "train", "training")  # shown from config.json instead


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
        return self.attack if self.attack == "clean" else f"{self.attack} {eps_text(self.eps)}"


def chosen(measurements: Iterable[Measurement]) -> list[Measurement]:
    """One measurement per network, attack and eps: the most examples, then the lowest accuracy.

    Otherwise a run that was measured twice, or copied, would pass for two seeds. See `told_apart`.
    """
    best: dict[tuple[object, ...], Measurement] = {}
    for m in told_apart(measurements):
        name = (
            m.network[0] or m.run,
            m.method,
            m.model,
            m.bits,
            m.beta,
            m.seed,
            m.data,
            m.attack,
            m.eps,
        )
        if name not in best or (m.total, -m.correct) > (best[name].total, -best[name].correct):
            best[name] = m
    return list(best.values())


def summary(measurements: Iterable[Measurement]) -> list[Row]:
    """Table 1: per data set, network and family the clean row, then one row per attack.

    All attacks are shown at one eps (`table_eps`), or the nearest one at which they were run.
    Validation images come last.
    """
    cells = aggregate(chosen(measurements))
    rows = []
    groups = distinct((cell.data, cell.model) for cell in cells)
    for data, model in sorted(groups, key=lambda group: is_validation(group[0])):
        eps = table_eps([cell for cell in cells if cell.data == data])
        group = [cell for cell in cells if (cell.data, cell.model) == (data, model)]
        for family in sorted({series_of(cell).family for cell in group}, key=lambda f: f.order):
            own = [cell for cell in group if series_of(cell).family == family]
            attacks = sorted({cell.attack for cell in own}, key=attack_order)
            rows += [_row(own, family, attack, eps) for attack in attacks]
    return rows


def table_eps(cells: Sequence[Cell]) -> float:
    """The telling radius: where the strongest attack comes nearest to halving clean accuracy.

    Of float, or of all networks where none is float; among the radii of every attack, where there
    are such. A smaller radius breaks nothing, at a larger one nothing stands; either way all
    networks look alike.
    """
    floats = [cell for cell in cells if cell.method.startswith("float")] or list(cells)
    half = fmean([cell.mean for cell in floats if cell.attack == "clean"] or [1.0]) / 2

    means: dict[float, dict[str, list[float]]] = {}
    for cell in floats:
        if cell.attack != "clean":
            means.setdefault(cell.eps, {}).setdefault(cell.attack, []).append(cell.mean)

    def distance(eps: float) -> float:
        return abs(min(map(fmean, means.get(eps, {}).values()), default=0.0) - half)

    radii: dict[str, set[float]] = {}
    for cell in cells:
        if cell.attack != "clean":
            radii.setdefault(cell.attack, set()).add(cell.eps)
    found = list(radii.values())
    shared = set.intersection(*found) or set.union(*found) if found else set()
    return min(sorted(shared), key=distance, default=0.0)


def _row(cells: Sequence[Cell], family: Family, attack: str, eps: float) -> Row:
    here = [cell for cell in cells if cell.attack == attack]
    nearest = min((cell.eps for cell in here), key=lambda value: (abs(value - eps), -value))
    found = {cell.bits: cell for cell in reversed(here) if cell.eps == nearest}
    return Row(here[0].data, here[0].model, family, attack, nearest, found)


# --- measurements -------------------------------------------------------------------------


def summary_table(rows: Sequence[Row], name: str = "") -> Table:
    """The rows as the paper's Table 1; `name` ends its caption."""
    several = len({(row.data, row.model) for row in rows}) > 1
    bits = sorted({b for row in rows for b in row.cells}, key=lambda b: b or 0)
    whole = whole_text(row.family for row in rows if None in row.cells)
    heads = [whole if b is None else f"{b} bit{'s' * (b > 1)}" for b in bits]
    names = ("Data", "Network") if several else ()
    head = (*names, "Method", "Images", *heads, "Quantize gain", "Best")
    shown = tuple(_summary_row(row, bits, several) for row in rows)
    return Table(head, shown, f"{name}. {SUMMARY}" if name else SUMMARY)


def _summary_row(row: Row, bits: Sequence[int | None], several: bool) -> tuple[Entry, ...]:
    names = (row.data, row.model) if several else ()
    cells = [_number(row.cells[b]) if b in row.cells else None for b in bits]
    gain = None if row.gain is None else Number(row.gain, points=True)
    return (*names, str(row.family), row.images, *cells, gain, Number(row.best))


def _number(cell: Cell) -> Number:
    low, high = cell.pooled.interval
    return Number(
        cell.mean, cell.spread, len(cell.seeds), cell.pooled.total // len(cell.seeds), low, high,
        vanishing=blind(cell.attack, cell.vanishing),
    )  # fmt: skip


@dataclass(frozen=True)
class Group:
    """One network architecture on one data set: what is shown of it, and every cell, folded."""

    section: Section
    listing: Table


def groups(measurements: Sequence[Measurement]) -> list[Group]:
    """The largest first, validation images last."""
    kept = chosen(measurements)
    rows, cells = summary(kept), aggregate(kept)
    places: dict[tuple[str, str], list[Cell]] = {}
    for cell in cells:
        places.setdefault((cell.data, cell.model), []).append(cell)
    ordered = sorted(places, key=lambda name: (is_validation(name[0]), -len(places[name])))
    return [
        _group(name, [row for row in rows if (row.data, row.model) == name], places[name], i)
        for i, name in enumerate(ordered, 1)
    ]


def _group(name: tuple[str, str], rows: Sequence[Row], cells: Sequence[Cell], index: int) -> Group:
    title = f"{name[1]} on {name[0]}"
    panels = [*eps_panels(cells), *_bits_panels(rows)]
    section = Section(f"group-{index}", title, (), (summary_table(rows),), tuple(panels))
    return Group(section, _listing(cells))


def eps_panels(cells: Sequence[Cell], several: bool = False) -> list[Panel]:
    """Accuracy over eps, a panel per attack; every line starts at the clean accuracy.

    Of many networks each technique, and each few families of it, has panels of its own.
    """
    own: dict[Series, list[Cell]] = {}
    for cell in cells:
        own.setdefault(series_of(cell), []).append(cell)
    names = sorted(own, key=lambda series: series.order)
    panels = []
    for part in _parts(names):
        attacks = {c.attack for name in part for c in own[name]} - {"clean"}
        for attack in sorted(attacks, key=attack_order):
            lines = [line for n in part for line in _lines(n, own[n], attack, several)]
            panels.append(Panel(attack, EPS, "accuracy", tuple(lines)))
    return panels


def _lines(name: Series, cells: Sequence[Cell], attack: str, several: bool) -> list[Line]:
    places = distinct((cell.data, cell.model) for cell in cells)
    lines = []
    for data, model in places:
        mine = [c for c in cells if (c.data, c.model) == (data, model)]
        shown = sorted((c for c in mine if c.attack in ("clean", attack)), key=lambda c: c.eps)
        drawn = shown[:: len(shown) // RADII + 1]
        points = tuple((eps_number(c.eps), _number(c)) for c in drawn)
        label = f"{name}, {model} on {data}" if several else str(name)
        if any(c.attack == attack for c in shown):
            lines.append(Line(label, points, _kind(name)))
    return lines


def _kind(name: Series) -> str:
    return name.method if name.method.startswith("float") else str(name.family)


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


def _bits_panels(rows: Sequence[Row]) -> list[Panel]:
    """Accuracy over bits, a panel for clean images and each attack; of families with several."""
    wide = [row for row in rows if len(row.cells) > 1]
    panels = []
    for images in distinct(row.images for row in wide):
        same = [row for row in wide if row.images == images]
        lines = [Line(str(row.family), _over_bits(row), str(row.family)) for row in same]
        panels.append(Panel(images, "activation bits", "accuracy", tuple(lines)))
    return panels


def _over_bits(row: Row) -> tuple[tuple[str, Number], ...]:
    ordered = sorted(row.cells, key=lambda bits: (bits is None, bits or 0))
    return tuple(("full" if b is None else str(b), _number(row.cells[b])) for b in ordered)


def _listing(cells: Sequence[Cell]) -> Table:
    ordered = sorted(cells, key=lambda c: (attack_order(c.attack), c.eps, series_of(c).order))
    head = ("Images", "ε", "Network", "Accuracy", "95% interval", "Right / images", "Seeds")
    return Table(head, tuple(map(_listed, ordered)), LISTING)


def _listed(cell: Cell) -> tuple[Entry, ...]:
    low, high = (f"{100 * end:.1f}" for end in cell.pooled.interval)
    eps = NOTHING if cell.attack == "clean" else eps_text(cell.eps)
    number = _number(cell)
    mean = replace(number, low=None, high=None, images=0)
    right = f"{cell.pooled.correct:,} / {cell.pooled.total:,}"
    seeds = ", ".join(map(str, cell.seeds))
    return (cell.attack, eps, str(series_of(cell)), mean, f"{low} to {high}", right, seeds)


# --- trainings ----------------------------------------------------------------------------


def training(runs: Sequence[Run], measurements: Sequence[Measurement]) -> Section | None:
    """A row and a line per network, over its seeds; a run without results under its own name."""
    on_test_last = sorted(measurements, key=lambda m: not is_validation(m.data))
    known = {m.run: (m.data, m.model, Series(m.method, m.bits, m.beta)) for m in on_test_last}
    several = len({item[:2] for item in known.values()}) > 1
    networks = sorted({item[2] for item in known.values()}, key=lambda series: series.order)
    found: dict[tuple[str, str, int], list[Run]] = {}
    for run in (run for run in runs if run.log):
        data, model, series = known.get(run.name, ("", "", None))
        name = f"{series}{f', {model} on {data}' if several else ''}" if series else run.name
        place = networks.index(series) if series else len(networks)
        found.setdefault((name, _kind(series) if series else name, place), []).append(run)
    ordered = [(*key[:2], found[key]) for key in sorted(found, key=lambda key: key[2])]
    if not ordered:
        return None
    watched = [f for f in TRACES if any(run.curve(f) for _, _, own in ordered for run in own)]
    panels = []
    for field in watched:
        lines = [Line(name, _trace(own, field), kind) for name, kind, own in ordered]
        drawn = tuple(line for line in lines if line.points)
        panels.append(Panel(TRACES[field], "epoch", TRACES[field], drawn, field not in LOSSES))
    head = ["Network", "Runs", "Epochs", "Loss", "Accuracy", "Penalty", "PGD (FGSM)", "Time a run"]
    rows = [[name, *_last(own)] for name, _, own in ordered]
    if "monitor_pgd" not in watched:
        for row in (head, *rows):
            del row[6]
    table = Table(tuple(head), tuple(map(tuple, rows)), TRAINED)
    return Section("training", "Training", (), (table,), tuple(panels))


TRACES = {
    "loss": "loss", "penalty": "penalty", "accuracy": "accuracy on training images",
    "test_accuracy": "accuracy on test images", "monitor_pgd": "PGD-10, watched",
    "monitor_fgsm": "FGSM, watched",
}  # fmt: skip
LOSSES = ("loss", "penalty")


def _trace(runs: Sequence[Run], field: str) -> tuple[tuple[str, Number], ...]:
    """The mean over runs, epoch by epoch; of many epochs some."""
    curves = [curve for run in runs if (curve := run.curve(field))]
    if not any(map(any, curves)):
        return ()
    longest = max(map(len, curves))
    points = []
    for i in range(0, longest, longest // EPOCHS + 1):
        values = [curve[i] for curve in curves if i < len(curve)]
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        points.append((str(i + 1), Number(fmean(values), spread, len(values))))
    return tuple(points)


def _last(runs: Sequence[Run]) -> list[str]:
    def last(field: str, form: str) -> str:
        ends = [curve[-1] for run in runs if (curve := run.curve(field))]
        return form.format(fmean(ends)) if ends else NOTHING

    test = "test_accuracy" if any(run.curve("test_accuracy") for run in runs) else "accuracy"
    times = [sum(run.curve("seconds")) for run in runs if run.curve("seconds")]
    penalty = (
        last("penalty", "{:.3g}") if any(any(run.curve("penalty")) for run in runs) else NOTHING
    )
    pgd, fgsm = last("monitor_pgd", "{:.1%}"), last("monitor_fgsm", "{:.1%}")
    return [
        str(len(runs)), str(max(len(run.log) for run in runs)), last("loss", "{:.3f}"),
        last(test, "{:.1%}"), penalty, NOTHING if pgd == NOTHING else f"{pgd} ({fgsm})",
        duration(fmean(times)) if times else NOTHING,
    ]  # fmt: skip


def duration(seconds: float) -> str:
    """`45 s`, `12 min`, `3.2 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


# --- settings -----------------------------------------------------------------------------


def settings(measurements: Sequence[Measurement], runs: Sequence[Run]) -> list[Table]:
    """Data, versions and machine, commands, attacks whole, settings of the runs; empty ones out."""
    tables = [
        _data(measurements),
        _environment(measurements),
        _every_attack(measurements),
        *_runs(runs),
    ]
    return [table for table in tables if table.rows]


def _data(measurements: Sequence[Measurement]) -> Table:
    rows = []
    for name, fingerprint in distinct((m.data, m.fingerprint) for m in measurements):
        same = [m for m in measurements if (m.data, m.fingerprint) == (name, fingerprint)]
        totals = sorted({m.total for m in same})
        images = f"{totals[0]:,}" + (f" to {totals[-1]:,}" if len(totals) > 1 else "")
        seeds = ", ".join(str(seed) for seed in sorted({m.seed for m in same}))
        draws = ", ".join(str(seed) for seed in sorted({m.attack_seed for m in same}))
        rows.append((name, fingerprint, images, seeds, draws))
    head = ("Data", "Fingerprint", "Images", "Training seeds", "Attack seeds")
    return Table(head, tuple(rows), "Test images; those of two fingerprints must not be compared")


def _every_attack(measurements: Iterable[Measurement]) -> Table:
    found = distinct((m.attack, m.eps, m.settings) for m in measurements if m.attack != "clean")
    ordered = sorted(found, key=lambda item: (attack_order(item[0]), item[1]))
    rows = tuple((attack, eps_text(eps), whole) for attack, eps, whole in ordered)
    return Table(("Attack", "ε", "Settings"), rows, "Attacks")


def _environment(measurements: Sequence[Measurement]) -> Table:
    found: dict[str, list[str]] = {}
    for evidence in _evidences(measurements):
        kept = {k: v for k, v in evidence.items() if k not in (*SETTINGS, "command")}
        for name, value in flatten(kept).items():
            found.setdefault(name, []).append(value)
    rows = [(name, _some(distinct(values))) for name, values in found.items()]
    if measurements:
        rows.append(("measuring took", duration(sum(m.seconds for m in measurements))))
    return Table(("Setting", "Value"), tuple(rows), "Versions and machine")


def commands(measurements: Iterable[Measurement]) -> list[str]:
    """What made the measurements."""
    found = [evidence.get("command") for evidence in _evidences(measurements)]
    return distinct(" ".join(map(str, c)) if isinstance(c, list) else str(c) for c in found if c)


def _some(values: Sequence[str]) -> str:
    more = f" and {len(values) - 4} more" if len(values) > 4 else ""
    return " · ".join(values[:4]) + more


def _evidences(measurements: Iterable[Measurement]) -> list[dict[str, object]]:
    kept: dict[str, dict[str, object]] = {}
    for m in measurements:
        if isinstance(m.evidence, dict):
            kept.setdefault(json.dumps(m.evidence, sort_keys=True, default=str), m.evidence)
    return list(kept.values())


def _runs(runs: Sequence[Run]) -> list[Table]:
    """Fields that differ with each run's values, and the fields that all runs share."""
    configured = [run for run in runs if run.config]
    names = distinct(name for run in configured for name in run.config)
    values = {name: {run.config.get(name, NOTHING) for run in configured} for name in names}
    differing = [name for name in names if len(values[name]) > 1]
    rows = [(run.name, *(run.config.get(f, NOTHING) for f in differing)) for run in configured]
    shared = [(name, values[name].pop()) for name in names if name not in differing]
    return [
        Table(("Run", *differing), tuple(rows) if differing else (), "Settings that differ"),
        Table(("Setting", "Value"), tuple(shared), "Settings that all runs share"),
    ]


# --- exported models ----------------------------------------------------------------------


def deployed(models: Sequence[Deployed]) -> list[Section]:
    """Per architecture and data set a column per model, so that DQ stands beside vanilla."""
    found = [list(own) for _, own in groupby(models, lambda m: (m.data, m.model))]
    return [_deployed(own, i) for i, own in enumerate(found, 1)]


def _deployed(models: Sequence[Deployed], index: int) -> Section:
    blocks = {
        "Integers": _integers(models), "Accuracy": _accuracies(models), "Cost": _costs(models),
        "Latency": _latencies(models),
    }  # fmt: skip
    rows = tuple((name, *row) for name, block in blocks.items() for row in block)
    head = ("", "", *(str(model.family) for model in models))
    title = f"Deployed: {models[0].model} on {models[0].data}"
    table = Table(head, rows, SHIPPED)
    return Section(f"deployed-{index}", title, (), (table,), tuple(_deployed_panels(models)))


SHIPPED = (
    "The networks as trained, and as deployed: ONNX files that onnxruntime runs. Images are made "
    "on the trained network, rounded to 8 bits, and shown to both, but Square's, which is run on "
    "each. ✗: the file's accuracy leaves the trained network's 95% interval. × is the share of "
    "float32's; latency: median, and how many times as fast as each engine with float32. Fewer "
    "than 8 bits run at int8 speed on CPUs: they save bytes and BOPs, not milliseconds."
)


def _integers(models: Sequence[Deployed]) -> list[tuple[Entry, ...]]:
    def convolutions(model: Deployed) -> str:
        integer, every = model.convolutions
        return f"{'✗ ' * (integer < every)}{integer} of {every}"

    def ranges(model: Deployed) -> str:
        return f"measured on {model.calibrated:,} images" if model.calibrated else "learnt"

    same = [rate_of(model.parity.agreement, model.parity.images) for model in models]
    return [
        ("Precision", *(m.precision for m in models)),
        ("Run", *(f"{m.run}, seed {m.seed}" for m in models)),
        ("Convolutions in integers", *map(convolutions, models)),
        ("Ranges of the quantisers", *map(ranges, models)),
        ("Input", *(m.input for m in models)),
        ("Same answer as trained", *same),
        ("Codes flipped", *(f"{100 * m.parity.flipped_codes:.3f}%" for m in models)),
    ]


def rate_of(share: float, images: int) -> str:
    """`99.81% of 10,000`."""
    return f"{100 * share:.2f}% of {images:,}"


def _accuracies(models: Sequence[Deployed]) -> list[tuple[Entry, ...]]:
    every = sorted((p for m in models for p in m.scores), key=lambda pair: pair.order)
    rows: list[tuple[Entry, ...]] = []
    for attack, eps in distinct((pair.attack, pair.eps) for pair in every):
        found = [_find(model, attack, eps) for model in models]
        name = attack if attack == "clean" else f"{attack} {eps_text(eps)}"
        if any(pair and pair.trained for pair in found):
            rows.append((f"{name}, trained", *(_score(p.trained if p else None) for p in found)))
        rows.append((f"{name}, deployed", *(_score(p.deployed if p else None) for p in found)))
        if any(pair and pair.outside for pair in found):
            words = [f"✗ {p.outside}" if p and p.outside else "" for p in found]
            rows.append((f"{name}, against the interval", *words))
    return rows


def _score(score: Score | None) -> Number | None:
    return rate((score.correct, score.total)) if score else None


def _find(model: Deployed, attack: str, eps: float) -> Pair | None:
    return next((p for p in model.scores if (p.attack, p.eps) == (attack, eps)), None)


def _costs(models: Sequence[Deployed]) -> list[tuple[Entry, ...]]:
    def macs(model: Deployed) -> str:
        rest = model.cost.float_macs
        return short(model.cost.macs).strip() + f", {short(rest).strip()} in float" * bool(rest)

    def memory(model: Deployed) -> str:
        cost = model.cost
        share = cost.peak_activation_bytes / cost.float_peak_activation_bytes
        stored = f"{short(cost.uint8_peak_activation_bytes)}B as bytes"
        return f"{short(cost.peak_activation_bytes)}B, {share:.3f}×, {stored}"

    files = [
        f"{short(m.cost.file_bytes)}B, {m.cost.file_bytes / m.cost.float_file_bytes:.3f}×"
        for m in models
    ]
    bops = [f"{short(m.cost.bops).strip()}, {m.cost.bops / m.cost.float_bops:.3f}×" for m in models]
    return [
        ("File", *files),
        ("MACs", *map(macs, models)),
        ("BOPs, MACs × bits × bits", *bops),
        ("Peak activations, packed", *map(memory, models)),
    ]


def _latencies(models: Sequence[Deployed]) -> list[tuple[Entry, ...]]:
    batches = sorted({batch for model in models for batch in model.cost.latency})
    return [(f"Batch {b}", *(_latency(model, b) for model in models)) for b in batches]


def _latency(model: Deployed, batch: int) -> str:
    engines = model.cost.latency.get(batch, {})
    if INTEGER not in engines:
        return NOTHING
    own = engines[INTEGER].median_ms
    others = [
        f"{other.median_ms / own:.2f}× {name.removesuffix(' float32')}"
        for name, other in engines.items()
        if name != INTEGER
    ]
    return ", ".join([milliseconds(own), *others])


def _deployed_panels(models: Sequence[Deployed]) -> list[Panel]:
    """Accuracy over eps, a panel per attack, as trained and as deployed."""
    attacks = {pair.attack for model in models for pair in model.scores} - {"clean"}
    panels = []
    for attack in sorted(attacks, key=attack_order):
        lines = [line for model in models for line in _both(model, attack)]
        panels.append(Panel(attack, EPS, "accuracy", tuple(lines)))
    return panels


def _both(model: Deployed, attack: str) -> list[Line]:
    attacked = [pair for pair in model.scores if pair.attack == attack]
    pairs = [pair for pair in model.scores if pair.attack == "clean" and attacked] + attacked
    at = [(eps_number(pair.eps), pair) for pair in pairs]
    name = f"{model.family}, {model.bits} × {model.weight_bits} bits"
    sides = {
        "deployed": [(x, _score(pair.deployed)) for x, pair in at],
        "trained": [(x, _score(pair.trained)) for x, pair in at if pair.trained],
    }
    return [
        Line(f"{name}, {side}", tuple((x, n) for x, n in points if n), str(model.family))
        for side, points in sides.items()
        if len(points) > 1 or (side == "deployed" and points)
    ]


def every_card(models: Sequence[Deployed]) -> list[Table]:
    """Every number of the cards: parity, right of images, latency, versions."""
    tables = [
        Table(PARITY, tuple(map(_parity, models)), PARITY_IS),
        Table(
            ("File", "Images", "As trained", "As deployed"),
            tuple(_right(model, pair) for model in models for pair in model.scores),
            "Right / images",
        ),
        Table(
            ("File", "Batch", "Engine", "Median", "Quartiles", "Repeats", "Threads"),
            tuple(row for model in models for row in _times(model)),
            "Latency, all engines in turn",
        ),
        Table(("Package", "Version"), _versions(models), "Versions"),
    ]
    return [table for table in tables if table.rows]


PARITY = (
    "File", "Test images", "n", "onnxruntime", "unoptimised", "OpenVINO",
    "Mismatches", "Logit error",
)  # fmt: skip
PARITY_IS = (
    "Parity. Fingerprint and number of the test images; share of them to which the file, in each "
    "engine, gives the trained network's answer; codes that differ from the integer reference; "
    "largest difference of a logit, in standard deviations of the logits."
)


def _parity(model: Deployed) -> tuple[str, ...]:
    p = model.parity
    others = (p.unoptimised_agreement, p.openvino_agreement)
    shares = [NOTHING if v is None else f"{100 * v:.2f}%" for v in (p.agreement, *others)]
    counts = (f"{p.reference_mismatches:,}", f"{p.logit_error:.3g}")
    return (model.place, model.fingerprint[:16], f"{p.images:,}", *shares, *counts)


def _right(model: Deployed, pair: Pair) -> tuple[str, ...]:
    images = pair.settings if pair.attack != "clean" and pair.settings else pair.attack
    both = [f"{s.correct:,} / {s.total:,}" if s else NOTHING for s in (pair.trained, pair.deployed)]
    return (model.place, images, *both)


def _times(model: Deployed) -> list[tuple[str, ...]]:
    cost = model.cost
    return [
        (
            model.place, str(batch), engine, milliseconds(time.median_ms),
            f"{milliseconds(time.low_ms)} to {milliseconds(time.high_ms)}", str(cost.repeats),
            str(cost.threads),
        )
        for batch, engines in cost.latency.items()
        for engine, time in engines.items()
    ]  # fmt: skip


def _versions(models: Sequence[Deployed]) -> tuple[tuple[str, str], ...]:
    items = [item for model in models for item in model.versions.items()]
    names = distinct(name for name, _ in items)
    return tuple((name, " · ".join(distinct(v for n, v in items if n == name))) for name in names)


def short(amount: float) -> str:
    """Three digits: `71.4 k`, `1.23 G`."""
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if amount >= 0.9995 * size:
            return f"{_digits(amount / size)} {unit}"
    return f"{amount:.0f} "


def milliseconds(time: float) -> str:
    """Three digits."""
    return f"{_digits(time)} ms"


def _digits(value: float) -> str:
    return f"{value:.{2 if value < 9.995 else 1 if value < 99.95 else 0}f}"
