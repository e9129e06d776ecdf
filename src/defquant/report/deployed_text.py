"""What is said of exported models in words, and how their amounts are written."""

from collections.abc import Sequence
from itertools import groupby

from defquant.paper.section import listed
from defquant.report.deployed import INTEGER, SINGLE, Deployed, Latency, Pair
from defquant.report.names import distinct, eps_text, percent
from defquant.report.values import NOTHING
from defquant.results import Score

__all__ = [
    "SEARCH", "bytes_text", "convolutions", "milliseconds", "notes", "parity_row", "robustness",
    "same_cost", "score_row", "short", "time_rows",
]  # fmt: skip

SEARCH = "Square"  # attacks of this name need no gradient, so each network is searched itself
UNITS = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def convolutions(models: Sequence[Deployed]) -> str:
    many = f"all {len(models)} exported models" if len(models) > 1 else "the exported model"
    floating = [
        f"{every - integer} of {every} in {_name(model)}"
        for model in models
        for integer, every in [model.convolutions]
        if integer < every
    ]
    if floating:
        return f"Convolutions run in float: {listed(floating)}."
    return f"Every convolution of {many} runs in integers."


def robustness(models: Sequence[Deployed]) -> str:
    """How many robust accuracies lie within the trained networks' intervals."""
    attacked = [
        (model, pair)
        for model in models
        for pair in model.scores
        if pair.attack != "clean" and pair.trained is not None
    ]
    if not attacked:
        return "No attack was run on both the trained network and the file."
    outside = [
        f"{_name(model)} under {pair.attack} {eps_text(pair.eps)} lies {pair.outside} it"
        for model, pair in attacked
        if pair.outside
    ]
    within = f"{len(attacked) - len(outside)} of {len(attacked)} robust accuracies of what ships"
    if not outside:
        within = f"All {len(attacked)} robust accuracies of what ships"
    rest = f"; {listed(outside)}" if outside else ""
    return f"{within} lie within the trained network's 95% interval{rest}."


def same_cost(models: Sequence[Deployed]) -> list[str]:
    """DQ against vanilla at equal bits: the first of each."""
    found = []
    for precision, own in groupby(models, lambda m: m.precision):
        group = list(own)
        dq = next((m for m in group if m.family.is_dq), None)
        vanilla = next((m for m in group if not m.family.is_dq), None)
        if dq and vanilla:
            found.append(f"At {precision}, {_compared(dq, vanilla)}.")
    return found


def _compared(dq: Deployed, vanilla: Deployed) -> str:
    amounts = {"MACs": "macs", "BOPs": "bops", "activation memory": "peak_activation_bytes"}
    same = {
        name: getattr(dq.cost, field) == getattr(vanilla.cost, field)
        for name, field in amounts.items()
    }
    equal, unequal = ([name for name in same if same[name] is kind] for kind in (True, False))
    parts = [f"need the same {listed(equal)}"] * bool(equal)
    parts += [f"differ in {listed(unequal)}"] * bool(unequal)
    sizes = distinct(bytes_text(model.cost.file_bytes) for model in (dq, vanilla))
    ends = [f"files have {listed(sizes)}"]
    for batch in sorted({*dq.cost.latency} & {*vanilla.cost.latency}):
        engines = [model.cost.latency[batch] for model in (dq, vanilla)]
        if all({INTEGER, SINGLE} <= {*own} for own in engines):
            # of one run each: milliseconds of two runs would compare what the machine did besides
            gains = [own[SINGLE].median_ms / own[INTEGER].median_ms for own in engines]
            times = listed(distinct(f"{gain:.2f}" for gain in gains))
            ends.append(f"batch {batch} is {times} times as fast as in float32 onnxruntime")
    return f"DQ and vanilla {listed(parts)}; their {'; '.join(ends)}"


def notes(models: Sequence[Deployed]) -> list[str]:
    attacks = distinct(pair.attack for model in models for pair in model.scores)
    replayed = [name for name in attacks if name != "clean" and not name.startswith(SEARCH)]
    direct = [name for name in attacks if name.startswith(SEARCH)]
    notes = []
    if replayed:
        notes.append(
            f"{listed(replayed)}: images made on the trained network, rounded to 8 bits, shown to "
            "it and to the file: to the file they are a transfer from its nearest relative."
        )
    if direct:
        notes.append(
            f"{listed(direct)}: a search without gradients, run on the file itself and, where two "
            "numbers stand, on the trained network too."
        )
    if any(min(model.bits, model.weight_bits) < 8 for model in models):
        notes.append(
            "Fewer than 8 bits run at int8 speed on CPUs, which have no narrower arithmetic: they "
            "save bytes and BOPs, not milliseconds."
        )
    timed = distinct((m.cost.repeats, m.cost.threads) for m in models if m.cost.latency)
    each = [f"{runs} repeats on {threads} thread{'s' * (threads != 1)}" for runs, threads in timed]
    return notes + [f"Latency: median of {listed(each)}, all engines in turn."] * bool(each)


def parity_row(model: Deployed) -> tuple[str, ...]:
    p = model.parity
    others = [
        NOTHING if v is None else f"{100 * v:.2f}%"
        for v in (p.unoptimised_agreement, p.openvino_agreement)
    ]
    images = f"{model.fingerprint[:8]}…" if len(model.fingerprint) > 8 else model.fingerprint
    mismatches, error = f"{p.reference_mismatches:,}", f"{p.logit_error:.3g}"
    return (
        model.place,
        images,
        f"{p.images:,}",
        f"{100 * p.agreement:.2f}%",
        *others,
        mismatches,
        error,
    )


def score_row(model: Deployed, pair: Pair) -> tuple[str, ...]:
    images = pair.settings if pair.attack != "clean" and pair.settings else pair.attack
    both = [_right(score) for score in (pair.trained, pair.deployed)]
    return (model.place, images, *both)


def time_rows(model: Deployed) -> list[tuple[str, ...]]:
    return [
        (model.place, f"{batch}", engine, milliseconds(time.median_ms), _quartiles(time))
        for batch, engines in model.cost.latency.items()
        for engine, time in engines.items()
    ]


def _quartiles(time: Latency) -> str:
    return f"{milliseconds(time.low_ms)} to {milliseconds(time.high_ms)}"


def _right(score: Score | None) -> str:
    if score is None:
        return NOTHING
    low, high = score.interval
    return f"{score.correct:,} / {score.total:,} ({percent(low)} to {percent(high)})"


def _name(model: Deployed) -> str:
    return f"{model.family} {model.bits}\u00a0×\u00a0{model.weight_bits}"


def bytes_text(amount: float) -> str:
    return f"{short(amount)}B"


def short(amount: float) -> str:
    """Three digits: `71.4 k`, `1.23 G`."""
    for size, unit in UNITS:
        if amount >= 0.9995 * size:
            return f"{_digits(amount / size)} {unit}"
    return f"{amount:.0f} "


def milliseconds(time: float) -> str:
    return f"{_digits(time)} ms"


def _digits(value: float) -> str:
    return f"{value:.{2 if value < 9.995 else 1 if value < 99.95 else 0}f}"
