"""The exported models side by side, as the page shows them: accuracy, parity, cost.

A column per model, so that DQ stands beside vanilla at equal bits and attacks add rows.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby

from defquant.report import deployed_text as text
from defquant.report.deployed import INTEGER, Deployed, Pair
from defquant.report.deployed_plot import figure
from defquant.report.deployed_text import SEARCH, bytes_text, milliseconds, short
from defquant.report.multiples_svg import Multiples
from defquant.report.names import distinct, eps_text
from defquant.report.values import NOTHING
from defquant.results import Score

__all__ = ["Section", "Table", "section"]


@dataclass(frozen=True)
class Value:
    """A place of the table: what is read first, the lines below it, and what is amiss."""

    text: str
    more: str = ""
    amiss: str = ""


@dataclass(frozen=True)
class Row:
    name: str
    about: str
    values: list[Value]


@dataclass(frozen=True)
class Table:
    """The models of one architecture on one data set.

    `precisions` span so many columns each; a block has a name and says what all its rows hold.
    """

    name: str
    said: list[str]
    precisions: list[tuple[str, int]]
    heads: list[tuple[str, str]]
    blocks: list[tuple[str, str, list[Row]]]
    figure: Multiples | None


@dataclass(frozen=True)
class Section:
    """The whole section; `parity`, `scores` and `times` are rows for tables of every number."""

    tables: list[Table]
    notes: list[str]
    parity: list[tuple[str, ...]]
    scores: list[tuple[str, ...]]
    times: list[tuple[str, ...]]
    versions: list[tuple[str, str]]
    commands: list[str]


def section(models: Sequence[Deployed]) -> Section:
    """Of models in the order of `read_deployed`."""
    groups = [list(own) for _, own in groupby(models, lambda m: (m.data, m.model))]
    items = [item for model in models for item in model.versions.items()]
    names = distinct(name for name, _ in items)
    return Section(
        tables=[_table(group) for group in groups],
        notes=text.notes(models),
        parity=[text.parity_row(model) for model in models],
        scores=[text.score_row(model, pair) for model in models for pair in model.scores],
        times=[row for model in models for row in text.time_rows(model)],
        versions=[(name, " · ".join(distinct(v for n, v in items if n == name))) for name in names],
        commands=distinct(model.command for model in models),
    )


def _table(models: Sequence[Deployed]) -> Table:
    spans = [(name, len(list(own))) for name, own in groupby(models, lambda m: m.precision)]
    accuracy = "%, trained → deployed, each with its 95% interval"
    latency = "median, and how many times as fast as each engine with float32"
    return Table(
        name=f"{models[0].model} on {models[0].data}",
        said=[text.convolutions(models), text.robustness(models), *text.same_cost(models)],
        precisions=spans,
        heads=[(str(model.family), f"{model.run}, seed {model.seed}") for model in models],
        blocks=[
            ("Integers", "", _integers(models)),
            ("Accuracy", accuracy, _accuracies(models)),
            ("Cost", "of an image; × is the share of float32's", _costs(models)),
            ("Latency", latency, _latencies(models)),
        ],
        figure=figure(models),
    )


def _row(
    name: str, about: str, models: Sequence[Deployed], value: Callable[[Deployed], Value]
) -> Row:
    return Row(name, about, [value(model) for model in models])


def _integers(models: Sequence[Deployed]) -> list[Row]:
    def ranges(model: Deployed) -> Value:
        measured = f"measured on {model.calibrated:,}" if model.calibrated else ""
        return Value(measured or "learnt", "training images" * bool(measured))

    def convolutions(model: Deployed) -> Value:
        integer, every = model.convolutions
        return Value(
            f"{integer} of {every}", amiss=f"{every - integer} in float" * (integer < every)
        )

    def agreement(model: Deployed) -> Value:
        share, images = model.parity.agreement, model.parity.images
        return Value(f"{100 * share:.2f}%", f"of {images:,} images")

    return [
        _row("Convolutions", "run in integers", models, convolutions),
        _row("Ranges", "of the quantisers", models, ranges),
        _row("Input", "", models, lambda m: Value(m.input)),
        _row("Same answer", "top-1 agreement with the trained network", models, agreement),
        _row("Codes flipped", "", models, lambda m: Value(f"{100 * m.parity.flipped_codes:.3f}%")),
    ]


def _accuracies(models: Sequence[Deployed]) -> list[Row]:
    every = sorted((p for m in models for p in m.scores), key=lambda pair: pair.order)
    rows = []
    for attack, eps in distinct((pair.attack, pair.eps) for pair in every):
        found = [_find(model, attack, eps) for model in models]
        clean = attack == "clean"
        name = "Clean" if clean else f"{attack} {eps_text(eps)}"
        direct = attack.startswith(SEARCH)
        about = "run on each itself" * direct
        rows.append(Row(name, about, [_accuracy(pair) for pair in found]))
    return rows


def _find(model: Deployed, attack: str, eps: float) -> Pair | None:
    return next((p for p in model.scores if (p.attack, p.eps) == (attack, eps)), None)


def _accuracy(pair: Pair | None) -> Value:
    if pair is None:
        return Value(NOTHING)
    scores = [pair.deployed] if pair.trained is None else [pair.trained, pair.deployed]
    amiss = f"{pair.outside} the interval" if pair.outside else ""
    return Value(
        " → ".join(f"{100 * score.accuracy:.1f}" for score in scores),
        " → ".join(map(_interval, scores)),
        amiss,
    )


def _interval(score: Score) -> str:
    low, high = score.interval
    return f"{100 * low:.1f}–{100 * high:.1f}"


def _costs(models: Sequence[Deployed]) -> list[Row]:
    def file(model: Deployed) -> Value:
        cost = model.cost
        return Value(bytes_text(cost.file_bytes), f"{cost.file_bytes / cost.float_file_bytes:.3f}×")

    def macs(model: Deployed) -> Value:
        rest = model.cost.float_macs
        return Value(short(model.cost.macs), f"and {short(rest).strip()} in float" * bool(rest))

    def bops(model: Deployed) -> Value:
        return Value(short(model.cost.bops), f"{model.cost.bops / model.cost.float_bops:.3f}×")

    def memory(model: Deployed) -> Value:
        cost = model.cost
        share = cost.peak_activation_bytes / cost.float_peak_activation_bytes
        stored = f"{bytes_text(cost.uint8_peak_activation_bytes)} as bytes"
        return Value(bytes_text(cost.peak_activation_bytes), f"{share:.3f}×\n{stored}")

    return [
        _row("File", "", models, file),
        _row("MACs", "", models, macs),
        _row("BOPs", "MACs × bits × bits", models, bops),
        _row("Peak activations", "packed", models, memory),
    ]


def _latencies(models: Sequence[Deployed]) -> list[Row]:
    batches = sorted({batch for model in models for batch in model.cost.latency})
    return [Row(f"Batch {b}", "", [_latency(model, b) for model in models]) for b in batches]


def _latency(model: Deployed, batch: int) -> Value:
    engines = model.cost.latency.get(batch, {})
    if INTEGER not in engines:
        return Value(NOTHING)
    own = engines[INTEGER].median_ms
    others = [
        f"{other.median_ms / own:.2f}× {name.removesuffix(' float32')}"
        for name, other in engines.items()
        if name != INTEGER
    ]
    return Value(milliseconds(own), "\n".join(others))
