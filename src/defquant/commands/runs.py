"""Verbs that make and measure runs: train, attack."""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import Namespace

from defquant.commands.rows import print_json, print_measurements, shown_attack
from defquant.config import DataConfig, ModelConfig, TrainConfig
from defquant.errors import UserError
from defquant.results import EIGHT_BIT
from defquant.typed import from_mapping

if TYPE_CHECKING:
    from defquant.checkpoint import Facts

__all__ = ["attack", "train"]


def train(settings: Namespace) -> int:
    """`defquant train`: one run into its folder."""
    if settings.out is None:
        raise UserError("train needs --out FOLDER, the folder of the run")
    values = settings.as_dict()
    if values["convex"] is None:
        values["convex"] = values["beta"] > 0
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
        print_json({"run": str(out), **last})
    else:
        print(f"loss {last['loss']:.4f}  accuracy {last['accuracy']:.2%}", end="  ")
        print(f"test accuracy {last['test_accuracy']:.2%}  epochs {last['epoch']}")
    print(out)
    return 0


def attack(settings: Namespace) -> int:
    """`defquant attack`: scores of each run, appended to its `results.jsonl`."""
    if settings.model_file is not None:
        from defquant.commands.foreign import attack_foreign

        return attack_foreign(settings)
    _check_own(settings)
    from defquant.attacks import FirstOrder
    from defquant.attacks.names import parse_attack
    from defquant.defenses import Unaware
    from defquant.detection import CALIBRATION, detect
    from defquant.distributed import pick_device
    from defquant.manifest import MANIFEST
    from defquant.measure import load_on, write_examples
    from defquant.progress import AttackProgress
    from defquant.replay import replay
    from defquant.runs import test_images
    from defquant.saved import measure_and_save

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
    first_order = [a for a in attacks if isinstance(a, FirstOrder)]
    asking = [a for a in first_order if a.walk.steps]  # Random asks no network
    unaware = [Unaware(a) for a in asking] if settings.unaware else []
    for run, (model, facts) in zip(runs, loaded, strict=True):
        images = test_images(facts, settings.data_root, settings.images, settings.split)
        how = {"seed": settings.seed, "batch_size": settings.batch_size}
        black_box = [
            replay(a, Path(source), images, device=device, source=source, **how)
            for a in asking
            if source
        ]
        saved = Path(settings.save_images) if settings.save_images else None
        measurements = measure_and_save(
            saved, run, model, facts, images, attacks, black_box=[*unaware, *black_box], **how,
            watch=AttackProgress(run.name, len(images), len([*attacks, *unaware, *black_box])),
        )  # fmt: skip
        names = [a.name + EIGHT_BIT * bool(saved) for a in attacks]
        names += [a.name for a in unaware] + [a.name for a in black_box]
        width = max(12, *map(len, names))
        print_measurements(measurements, as_json=settings.json, width=width)
        if settings.detector:
            train = test_images(facts, settings.data_root, split="train")
            clean = train.first(min(len(train), CALIBRATION))
            records = detect(run, model, facts, images, clean, first_order, **how)
            _print_detections(records, as_json=settings.json, width=width)
        if settings.examples:
            shown = shown_attack(settings.attack, settings.eps)
            write_examples(run, model, facts, images, shown, settings.examples, **how)
        print(run / "results.jsonl")
        if settings.detector:
            print(run / "detector.json")
        if saved:
            print(saved / MANIFEST)
    return 0


def _check_own(settings: Namespace) -> None:
    if not settings.runs:
        raise UserError("attack needs folders of runs, or --model_file my.py:make_model")
    for name in ("weights", "data", "out"):
        if getattr(settings, name) is not None:
            raise UserError(f"--{name} belongs to --model_file; a run knows its own: leave it out")
    if settings.save_images and len(settings.runs) > 1:
        raise UserError(
            f"--save_images keeps the images of one run; found {len(settings.runs)}: attack them "
            "one at a time"
        )


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


def _print_detections(records: Iterable[dict[str, Any]], *, as_json: bool, width: int) -> None:
    for r in records:
        if as_json:
            print_json(r)
        else:
            eps = f"{r['eps'] * 255:.4g}/255"
            detected = _share(r["detected"], r["fooling"])
            false = _share(r["false_positives"], r["clean"])
            print(f"detector  {r['attack']:{width}} {eps:>8}  detects {detected:20}", end="  ")
            print(f"false positives {false}", flush=True)


def _share(part: int, whole: int) -> str:
    """`3/40 (7.5%)`."""
    return f"{part}/{whole} ({part / whole:.1%})" if whole else "0/0"
