"""`defquant attack --model-file`: a model of the user's own."""

from pathlib import Path

from jsonargparse import Namespace

from defquant.commands.rows import print_measurements, shown_attack
from defquant.errors import UserError

__all__ = ["attack_foreign"]


def attack_foreign(settings: Namespace) -> int:
    """Scores of the model in `--model_file`, appended to `results.jsonl` in `--out`."""
    _check(settings)
    from defquant.attacks.names import parse_attack
    from defquant.data import load
    from defquant.distributed import pick_device
    from defquant.foreign import blamed, load_foreign, probe, warn_of_chance
    from defquant.manifest import MANIFEST
    from defquant.measure import write_examples
    from defquant.progress import AttackProgress
    from defquant.saved import measure_and_save

    attacks = [parse_attack(name, eps) for name in settings.attack for eps in settings.eps]
    out, device = Path(settings.out), pick_device(settings.device)
    images = load(settings.data, settings.data_root, "test").first(settings.images)
    foreign = load_foreign(settings.model_file, settings.weights, device)
    model, subject = foreign.model, foreign.subject
    probe(foreign, images, settings.batch_size)
    saved = Path(settings.save_images) if settings.save_images else None
    with blamed(foreign.path):
        measurements = measure_and_save(
            saved, out, model, subject, images.to(device), attacks,
            seed=settings.seed, batch_size=settings.batch_size,
            watch=AttackProgress(out.name, len(images), len(attacks)),
        )  # fmt: skip
        for measurement in measurements:
            print_measurements([measurement], as_json=settings.json, width=20)
            if measurement.attack == "clean":
                warn_of_chance(measurement.score, images.num_classes)
        if settings.examples:
            shown = shown_attack(settings.attack, settings.eps)
            write_examples(
                out, model, subject, images, shown, settings.examples, settings.seed,
                settings.batch_size,
            )  # fmt: skip
    print(out / "results.jsonl")
    if saved:
        print(saved / MANIFEST)
    return 0


def _check(settings: Namespace) -> None:
    if settings.runs:
        raise UserError(
            f"attack takes folders of runs or --model_file, not both; found {settings.runs[0]!r}"
        )
    for name, what in (("data", "digits, cifar10, svhn, folder or npz"), ("out", "FOLDER")):
        if getattr(settings, name) is None:
            raise UserError(f"--model_file needs --{name}: {what}")
    for name in ("substitute", "unaware", "detector"):
        if getattr(settings, name):
            raise UserError(f"--{name} is for runs of `defquant train`: leave it out")
    if settings.split != "test":
        raise UserError("--split is for runs of `defquant train`: leave it out")
    if settings.batch_size < 1 or settings.examples < 0:
        raise UserError("--batch_size must be 1 or more and --examples 0 or more")
    if (Path(settings.out) / "checkpoint.safetensors").exists():
        raise UserError(f"{settings.out} holds a run of `defquant train`: choose another --out")
