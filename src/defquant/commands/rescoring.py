"""`defquant rescore`: any model on saved images."""

import importlib.util
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from jsonargparse import Namespace

from defquant.commands.rows import print_json
from defquant.errors import UserError

if TYPE_CHECKING:
    from torch import device, nn

    from defquant.manifest import Manifest
    from defquant.rescored import Rescored

__all__ = ["rescore"]


def rescore(settings: Namespace) -> int:
    """A row for each attack and eps: the model's score, and the one that the images had."""
    if (settings.model is None) == (settings.model_file is None):
        raise UserError(
            "rescore takes one model: a run's folder, an .onnx file, or --model_file my.py:make"
        )
    if settings.weights is not None and settings.model_file is None:
        raise UserError("--weights belongs to --model_file; a run knows its own: leave it out")
    if settings.batch_size < 1:
        raise UserError(f"--batch_size must be 1 or more; found {settings.batch_size}")
    from defquant.distributed import pick_device
    from defquant.manifest import read_manifest
    from defquant.rescored import rescored

    manifest = read_manifest(Path(settings.folder))
    model = _model(settings, manifest, pick_device(settings.device))
    found = rescored(manifest, model, batch_size=settings.batch_size)
    if settings.model_file is None:
        _print(found, as_json=settings.json)
        return 0
    from defquant.foreign import blamed

    with blamed(Path(settings.model_file.rpartition(":")[0])):
        _print(found, as_json=settings.json)
    return 0


def _model(settings: Namespace, manifest: "Manifest", place: "device") -> "nn.Module":
    if settings.model_file is not None:
        from defquant.foreign import load_foreign

        return load_foreign(settings.model_file, settings.weights, place).model
    path = Path(settings.model)
    if path.suffix == ".onnx":
        return _onnx(path)
    from defquant.checkpoint import load_on

    model, facts = load_on(path, place)
    if list(facts.classes) != list(manifest.head["classes"]):
        raise UserError(
            f"{path} knows other classes than the saved images, {facts.classes[0]!r}, ... and "
            f"{manifest.head['classes'][0]!r}, ...: use a model of the same data"
        )
    return model


def _onnx(path: Path) -> "nn.Module":
    if importlib.util.find_spec("onnxruntime") is None or importlib.util.find_spec("onnx") is None:
        raise UserError("this needs onnx and onnxruntime: pip install 'defquant[deploy]'")
    from defquant.deploy.runtime import OnnxModel, facts_of, open_model

    file = open_model(path)
    facts_of(file, path)
    return OnnxModel(file)


def _print(found: "Iterable[Rescored]", *, as_json: bool) -> None:
    from defquant.errors import visible

    for r in found:
        low, high = r.score.interval
        if as_json:
            record = {"attack": r.attack, "eps": r.eps, "settings": r.settings}
            record |= {"correct": r.score.correct, "total": r.score.total}
            record |= {"accuracy": r.score.accuracy, "low": low, "high": high}
            print_json(record | {"saved_correct": r.saved.correct})
        else:
            eps = f"{r.eps * 255:.4g}/255" if r.eps else ""
            saved = f"{r.saved.accuracy:.1%} ({r.saved.correct}/{r.saved.total})"
            name = visible(r.attack)
            print(f"{name:20} {eps:>8}  {r.score!s:34}  when saved {saved}", flush=True)
