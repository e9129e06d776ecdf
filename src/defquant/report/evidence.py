"""The evidence behind the numbers, as rows of text: data, attacks, versions, commands, settings."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from defquant.report.figures import sparkline
from defquant.report.names import Series, attack_order, distinct, eps_text, is_validation
from defquant.report.sources import Run, flatten
from defquant.results import Measurement

__all__ = ["Evidence", "Training", "evidence", "training"]

SETTINGS = ("config", "model", "data", "train", "training")  # shown from config.json instead
TIMES = ("seconds", "images_per_second")


@dataclass(frozen=True)
class Evidence:
    """What was measured where; every field is rows for the page."""

    data: list[tuple[str, str, str, str, str]]
    mixed: list[str]
    attacks: list[tuple[str, str, str]]
    environment: list[tuple[str, list[str]]]
    commands: list[str]
    differing: list[str]
    runs: list[tuple[str, list[str]]]
    shared: list[tuple[str, str]]
    hours: str


@dataclass(frozen=True)
class Training:
    """The training of one network over its seeds: sparklines and their last values."""

    name: str
    css: str
    seeds: int
    epochs: int
    loss: Markup
    last_loss: str
    accuracy: Markup
    last_accuracy: str
    penalty: Markup
    last_penalty: str
    monitor: Markup
    last_monitor: str
    time: str


def evidence(measurements: Sequence[Measurement], runs: Sequence[Run]) -> Evidence:
    """Rows of the settings section."""
    differing, rows, shared = _differences(runs)
    data = _data(measurements)
    names = [row[0] for row in data]
    return Evidence(
        data=data,
        mixed=sorted({name for name in names if names.count(name) > 1}),
        attacks=_attacks(measurements),
        environment=_environment(measurements),
        commands=_commands(measurements),
        differing=differing,
        runs=rows,
        shared=shared,
        hours=duration(sum(m.seconds for m in measurements)),
    )


def training(
    runs: Sequence[Run], measurements: Sequence[Measurement], classes: Mapping[Series, str]
) -> list[Training]:
    """One row per network, its seeds overlaid; a run without results stands under its name."""
    on_test_last = sorted(measurements, key=lambda m: not is_validation(m.data))
    known = {m.run: (m.data, m.model, Series(m.method, m.bits, m.beta)) for m in on_test_last}
    several = len({item[:2] for item in known.values()}) > 1
    groups: dict[tuple[str, str], list[Run]] = {}
    for run in (run for run in runs if run.log):
        data, model, series = known.get(run.name, ("", "", None))
        name = f"{series}{f', {model} on {data}' if several else ''}" if series else run.name
        groups.setdefault((name, classes[series] if series else ""), []).append(run)
    ordered = sorted(groups.items(), key=lambda item: _css_order(item[0][1]))
    tops = {field: _top(runs, field) for field in ("loss", "penalty")}
    return [_training(name, css, group, tops) for (name, css), group in ordered]


def _css_order(css: str) -> int:
    return int(css[1:]) if css else len(css) + 10_000


def _training(name: str, css: str, runs: Sequence[Run], tops: Mapping[str, float]) -> Training:
    def line(field: str) -> Markup:
        curves = [curve for run in runs if (curve := run.curve(field))]
        top = tops.get(field, 1.0)
        return sparkline(curves, f"{name}: {field} over epochs", top, css) if curves else Markup()

    test = "test_accuracy" if any(run.curve("test_accuracy") for run in runs) else "accuracy"
    seconds = [sum(run.curve("seconds")) for run in runs if run.curve("seconds")]
    return Training(
        name=name,
        css=css,
        seeds=len(runs),
        epochs=max(len(run.log) for run in runs),
        loss=line("loss"),
        last_loss=_last(runs, "loss", "{:.3f}"),
        accuracy=line(test),
        last_accuracy=_last(runs, test, "{:.1%}"),
        penalty=line("penalty") if _top(runs, "penalty") else Markup(),
        last_penalty=_last(runs, "penalty", "{:.3g}") if _top(runs, "penalty") else "",
        monitor=(pgd := line("monitor_pgd")),
        last_monitor=_last_monitor(runs) if pgd else "",
        time=duration(sum(seconds) / len(seconds)) if seconds else "–",
    )


def _last(runs: Iterable[Run], field: str, form: str) -> str:
    ends = [curve[-1] for run in runs if (curve := run.curve(field))]
    return form.format(sum(ends) / len(ends)) if ends else "–"


def _last_monitor(runs: Sequence[Run]) -> str:
    pgd, fgsm = (_last(runs, f"monitor_{name}", "{:.1%}") for name in ("pgd", "fgsm"))
    return f"{pgd} ({fgsm})"


def _top(runs: Iterable[Run], field: str) -> float:
    return max((value for run in runs for value in run.curve(field)), default=0.0)


def duration(seconds: float) -> str:
    """`45 s`, `12 min`, `3.2 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _data(measurements: Sequence[Measurement]) -> list[tuple[str, str, str, str, str]]:
    rows = []
    for name, fingerprint in distinct((m.data, m.fingerprint) for m in measurements):
        same = [m for m in measurements if (m.data, m.fingerprint) == (name, fingerprint)]
        totals = sorted({m.total for m in same})
        images = f"{totals[0]:,}" + (f" to {totals[-1]:,}" if len(totals) > 1 else "")
        seeds = ", ".join(str(seed) for seed in sorted({m.seed for m in same}))
        draws = ", ".join(str(seed) for seed in sorted({m.attack_seed for m in same}))
        rows.append((name, fingerprint, images, seeds, draws))
    return rows


def _attacks(measurements: Iterable[Measurement]) -> list[tuple[str, str, str]]:
    found = distinct((m.attack, m.eps, m.settings) for m in measurements if m.attack != "clean")
    ordered = sorted(found, key=lambda item: (attack_order(item[0]), item[1]))
    return [(attack, eps_text(eps), settings) for attack, eps, settings in ordered]


def _environment(measurements: Iterable[Measurement]) -> list[tuple[str, list[str]]]:
    found: dict[str, list[str]] = {}
    for evidence in _evidences(measurements):
        kept = {k: v for k, v in evidence.items() if k not in (*SETTINGS, "command")}
        for name, value in flatten(kept).items():
            found.setdefault(name, []).append(value)
    return [(name, distinct(values)) for name, values in found.items()]


def _commands(measurements: Iterable[Measurement]) -> list[str]:
    commands = [evidence.get("command") for evidence in _evidences(measurements)]
    texts = [" ".join(map(str, c)) if isinstance(c, list) else str(c) for c in commands if c]
    return distinct(texts)


def _evidences(measurements: Iterable[Measurement]) -> list[dict[str, object]]:
    kept: dict[str, dict[str, object]] = {}
    for m in measurements:
        if isinstance(m.evidence, dict):
            kept.setdefault(json.dumps(m.evidence, sort_keys=True, default=str), m.evidence)
    return list(kept.values())


def _differences(
    runs: Sequence[Run],
) -> tuple[list[str], list[tuple[str, list[str]]], list[tuple[str, str]]]:
    """Fields that differ, each run's values of them, and the fields that all runs share."""
    configured = [run for run in runs if run.config]
    names = distinct(name for run in configured for name in run.config)
    values = {name: {run.config.get(name, "–") for run in configured} for name in names}
    differing = [name for name in names if len(values[name]) > 1]
    rows = [(run.name, [run.config.get(f, "–") for f in differing]) for run in configured]
    shared = [(name, values[name].pop()) for name in names if name not in differing]
    return differing, rows if differing else [], shared
