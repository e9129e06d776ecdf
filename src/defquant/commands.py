"""What each verb does: settings in, files and rows out, exit status back."""

import json
import sys
from collections.abc import Iterable
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import Namespace

from defquant.config import DataConfig, ModelConfig, TrainConfig, from_mapping
from defquant.errors import UserError
from defquant.results import Measurement, read_folder

if TYPE_CHECKING:
    from defquant.checkpoint import Facts

__all__ = ["attack", "data", "demo", "report", "train"]


def train(settings: Namespace) -> int:
    """`defquant train`: one run into its folder."""
    if settings.out is None:
        raise UserError("train needs --out FOLDER, the folder of the run")
    values = settings.as_dict()
    if values["convex"] is None:
        values["convex"] = values["beta"] > 0
    known = {f.name for kind in (ModelConfig, DataConfig, TrainConfig) for f in fields(kind)}
    values = {name: value for name, value in values.items() if name in known}
    configs = (
        from_mapping(ModelConfig, values),
        from_mapping(DataConfig, values),
        from_mapping(TrainConfig, values),
    )
    from defquant.distributed import leads
    from defquant.runs import train_run

    out = Path(settings.out)
    last = train_run(*configs, out, resume=settings.resume).history[-1]
    if not leads():
        return 0
    if settings.json:
        print(json.dumps({"run": str(out), **last}))
    else:
        print(f"loss {last['loss']:.4f}  accuracy {last['accuracy']:.2%}", end="  ")
        print(f"test accuracy {last['test_accuracy']:.2%}  epochs {last['epoch']}")
    print(out)
    return 0


def attack(settings: Namespace) -> int:
    """`defquant attack`: scores of each run, appended to its `results.jsonl`."""
    from defquant.attacks.names import parse_attack
    from defquant.distributed import pick_device
    from defquant.measure import load_on, measure, write_examples
    from defquant.runs import test_images

    if settings.batch_size < 1 or settings.examples < 0:
        raise UserError("--batch_size must be 1 or more and --examples 0 or more")
    attacks = [parse_attack(name, eps) for name in settings.attack for eps in settings.eps]
    device = pick_device(settings.device)
    substitute = load_on(Path(settings.substitute), device) if settings.substitute else None
    runs = [Path(run) for run in settings.runs]
    loaded = [load_on(run, device) for run in runs]  # all are sound before the first is attacked
    if substitute is not None:
        for run, (_, facts) in zip(runs, loaded, strict=True):
            _check_substitute(facts, substitute[1], run, settings.substitute)
    for run, (model, facts) in zip(runs, loaded, strict=True):
        images = test_images(facts, settings.data_root, settings.images)
        measurements = measure(
            run, model, facts, images, attacks, substitute=substitute and substitute[0],
            source=settings.substitute or "", seed=settings.seed, batch_size=settings.batch_size,
        )  # fmt: skip
        _print_measurements(measurements, as_json=settings.json)
        strongest = max(attacks, key=lambda a: a.walk.steps * a.walk.restarts)
        middle = sorted(settings.eps)[len(settings.eps) // 2]
        shown = parse_attack(settings.attack[attacks.index(strongest) // len(settings.eps)], middle)
        if settings.examples:
            write_examples(run, model, facts, images, shown, settings.examples, settings.seed)
        print(run / "results.jsonl")
    return 0


def report(settings: Namespace) -> int:
    """`defquant report`: the page, and the summary on stdout."""
    from defquant.report import build_report, markdown_table, plot_curves

    folder = Path(settings.folder)
    measurements = read_folder(folder)
    page = build_report(folder, Path(settings.out))
    if settings.markdown:
        from defquant.files import write_bytes

        write_bytes(Path(settings.markdown), markdown_table(measurements).encode())
    if settings.figure:
        plot_curves(measurements, Path(settings.figure))
    _print_summary(measurements, as_json=settings.json)
    print(page)
    return 0


def demo(settings: Namespace) -> int:
    """`defquant demo`: train, attack, report on digits."""
    from defquant.experiments.demo import run_demo
    from defquant.report import build_report

    if settings.seeds < 1:
        raise UserError(f"--seeds must be 1 or more; found {settings.seeds}")
    out = Path(settings.out)
    run_demo(out, seeds=settings.seeds, smoke=settings.smoke)
    page = build_report(out, out / "report.html")
    _print_summary(read_folder(out), as_json=settings.json)
    print(page)
    return 0


def data(settings: Namespace) -> int:
    """`defquant data fetch NAME`: download, check, unpack."""
    if settings.action != "fetch":
        raise UserError(f"unknown action {settings.action!r}: use `defquant data fetch NAME`")
    from defquant.data import fetch

    print(fetch(settings.name, Path(settings.data_root)))
    return 0


def _check_substitute(facts: "Facts", substitute: "Facts", run: Path, source: str) -> None:
    mine, other = ((f.in_channels, f.num_classes) for f in (facts, substitute))
    if mine != other:
        raise UserError(
            f"the substitute {source} takes {other[0]} channels and knows {other[1]} classes, "
            f"{run} {mine[0]} and {mine[1]}: train it on the same data set"
        )


def _print_measurements(measurements: Iterable[Measurement], *, as_json: bool) -> None:
    for m in measurements:
        if as_json:
            print(json.dumps(_record(m)), flush=True)
        else:
            eps = f"{m.eps * 255:.4g}/255" if m.eps else ""
            print(f"{m.run:24} {m.attack:12} {eps:>8}  {m.score}", flush=True)


def _print_summary(measurements: list[Measurement], *, as_json: bool) -> None:
    if as_json:
        _print_measurements(measurements, as_json=True)
        return
    from rich.console import Console

    from defquant.report import text_table

    # a pipe has no width: print it as wide as it needs
    Console(width=None if sys.stdout.isatty() else 160).print(text_table(measurements))


def _record(m: Measurement) -> dict[str, Any]:
    low, high = m.score.interval
    return asdict(m) | {"accuracy": m.score.accuracy, "low": low, "high": high}
