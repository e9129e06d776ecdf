"""What each verb does: settings in, files and rows out, exit status back."""

import json
import sys
from collections.abc import Iterable
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import Namespace

from defquant.config import DataConfig, ModelConfig, TrainConfig, check_bits, from_mapping
from defquant.errors import UserError
from defquant.results import Measurement, read_folder

if TYPE_CHECKING:
    from defquant.checkpoint import Facts

__all__ = ["attack", "data", "demo", "report", "reproduce", "train", "transfer"]


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
    from defquant.defenses import Unaware
    from defquant.detection import CALIBRATION, detect
    from defquant.distributed import pick_device
    from defquant.measure import load_on, measure, write_examples
    from defquant.replay import replay
    from defquant.runs import test_images

    if settings.batch_size < 1 or settings.examples < 0:
        raise UserError("--batch_size must be 1 or more and --examples 0 or more")
    attacks = [parse_attack(name, eps) for name in settings.attack for eps in settings.eps]
    device = pick_device(settings.device)
    source = settings.substitute
    runs = [Path(run) for run in settings.runs]
    loaded = [load_on(run, device) for run in runs]  # all are sound before the first is attacked
    if source:
        _, substitute = load_on(Path(source), device)
        for run, (_, facts) in zip(runs, loaded, strict=True):
            _check_substitute(facts, substitute, run, source)
    if settings.unaware:
        for run, (_, facts) in zip(runs, loaded, strict=True):
            _check_squeezed(facts, run)
    asking = [a for a in attacks if a.walk.steps]  # Random asks no network
    unaware = [Unaware(a) for a in asking] if settings.unaware else []
    for run, (model, facts) in zip(runs, loaded, strict=True):
        images = test_images(facts, settings.data_root, settings.images, settings.split)
        how = {"seed": settings.seed, "batch_size": settings.batch_size}
        black_box = [
            replay(a, Path(source), images, device=device, source=source, **how)
            for a in asking
            if source
        ]
        measurements = measure(
            run, model, facts, images, attacks, black_box=[*unaware, *black_box], **how
        )
        width = max(12, *(len(a.name) for a in unaware)) if unaware else 12
        _print_measurements(measurements, as_json=settings.json, width=width)
        if settings.detector:
            train = test_images(facts, settings.data_root, split="train")
            clean = train.first(min(len(train), CALIBRATION))
            records = detect(run, model, facts, images, clean, attacks, **how)
            _print_detections(records, as_json=settings.json, width=width)
        strongest = max(attacks, key=lambda a: a.walk.steps * a.walk.restarts)
        middle = sorted(settings.eps)[len(settings.eps) // 2]
        shown = parse_attack(settings.attack[attacks.index(strongest) // len(settings.eps)], middle)
        if settings.examples:
            write_examples(run, model, facts, images, shown, settings.examples, settings.seed)
        print(run / "results.jsonl")
        if settings.detector:
            print(run / "detector.json")
    return 0


def transfer(settings: Namespace) -> int:
    """`defquant transfer`: the matrix on stdout, `transfer.json` and `transfer.png` in --out."""
    if settings.batch_size < 1:
        raise UserError(f"--batch_size must be 1 or more; found {settings.batch_size}")
    bits = [check_bits(width) for width in settings.bits]
    from defquant.attacks.names import parse_attack
    from defquant.distributed import pick_device
    from defquant.files import write_json
    from defquant.report.matrix import plot_matrix, text_matrix
    from defquant.transfers import transfer_runs

    out = Path(settings.out)
    record = transfer_runs(
        [Path(run) for run in settings.runs], parse_attack(settings.attack, settings.eps),
        bits=bits, images=settings.images, data_root=settings.data_root, seed=settings.seed,
        device=pick_device(settings.device), batch_size=settings.batch_size,
    )  # fmt: skip
    lines = map(json.dumps, record["cells"]) if settings.json else text_matrix(record)
    print("\n".join(lines))
    print(plot_matrix(record, out / "transfer.png"))
    print(write_json(out / "transfer.json", record))
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


def reproduce(settings: Namespace) -> int:
    """`defquant reproduce`: tables and figures of the paper; what is missing is made first."""
    from defquant.experiments import reproduction

    if settings.list:
        reproduction.print_list()
        return 0
    scale = reproduction.scale_of(
        settings.preset, settings.data_root, settings.svhn_root, settings.device
    )
    names = reproduction.names_of(settings.names, scale)
    out = Path(settings.out or f"runs/{scale.name}")
    if settings.jobs is not None and settings.jobs < 1:
        raise UserError(f"--jobs must be 1 or more; found {settings.jobs}")
    if settings.dry_run:
        reproduction.print_plan(names, scale, out, settings.jobs)
        return 0
    failed: list[str] = []
    if not settings.render_only:
        failed = reproduction.make(names, scale, out, settings.jobs, settings.workers)
    print(reproduction.show(names, scale, out, as_json=settings.json))
    return 1 if failed else 0


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


def _check_squeezed(facts: "Facts", run: Path) -> None:
    if facts.model.squeeze is None:
        raise UserError(
            f"--unaware attacks the network behind a feature squeezing; {run} has none: leave it "
            "out, or train with --squeeze 5"
        )


def _print_measurements(
    measurements: Iterable[Measurement], *, as_json: bool, width: int = 12
) -> None:
    for m in measurements:
        if as_json:
            print(json.dumps(_record(m)), flush=True)
        else:
            eps = f"{m.eps * 255:.4g}/255" if m.eps else ""
            print(f"{m.run:24} {m.attack:{width}} {eps:>8}  {m.score}", flush=True)


def _print_detections(records: Iterable[dict[str, Any]], *, as_json: bool, width: int) -> None:
    for r in records:
        if as_json:
            print(json.dumps(r), flush=True)
        else:
            eps = f"{r['eps'] * 255:.4g}/255"
            detected = _share(r["detected"], r["fooling"])
            false = _share(r["false_positives"], r["clean"])
            print(f"detector  {r['attack']:{width}} {eps:>8}  detects {detected:20}", end="  ")
            print(f"false positives {false}", flush=True)


def _share(part: int, whole: int) -> str:
    """`3/40 (7.5%)`."""
    return f"{part}/{whole} ({part / whole:.1%})" if whole else "0/0"


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
