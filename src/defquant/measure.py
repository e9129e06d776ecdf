"""Attack a trained run and write what was measured into its folder."""

import base64
import io
import shlex
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from defquant.attacks import Attack, FirstOrder, Transfer
from defquant.checkpoint import Facts, load_model, versions
from defquant.data import Dataset
from defquant.errors import UserError
from defquant.evaluate import Scored, sweep, vanishing
from defquant.files import write_json
from defquant.results import Measurement, append

__all__ = ["example_ids", "load_on", "measure", "write_examples"]


def load_on(run: Path, device: torch.device) -> tuple[nn.Module, Facts]:
    """The network of a run on `device`. Raises `UserError` for an unfinished or broken run."""
    model, facts = load_model(run)
    if len(facts.history) < facts.train.epochs:
        raise UserError(
            f"{run} has done {len(facts.history)} of {facts.train.epochs} epochs: finish it with "
            "`defquant train --resume`"
        )
    layout = torch.channels_last if facts.train.channels_last else torch.contiguous_format
    return model.to(device=device, memory_format=layout), facts  # type: ignore[call-overload]


def measure(
    run: Path,
    model: nn.Module,
    facts: Facts,
    images: Dataset,
    attacks: Sequence[FirstOrder],
    *,
    substitute: nn.Module | None = None,
    source: str = "",
    seed: int = 0,
    batch_size: int = 256,
) -> Iterator[Measurement]:
    """Clean accuracy and every attack on `images`; each is appended to `results.jsonl` at once.

    With a `substitute`, named `source`, each attack is also made on it and transferred (black box).
    """
    black_box: list[Attack] = []
    if substitute is not None:
        asking = [attack for attack in attacks if attack.walk.steps]  # Random asks no network
        black_box = [Transfer(attack, substitute, source) for attack in asking]
    chosen: Iterable[Attack] = [*attacks, *black_box]
    evidence = {
        "versions": versions(next(model.parameters()).device),
        "command": shlex.join(["defquant", *sys.argv[1:]]),
        "epochs": facts.train.epochs,
        "train_images": facts.data.train_images,
        "batch_size": batch_size,
    }
    blind: float | None = None
    for scored in sweep(model, images, chosen, batch_size=batch_size, seed=seed):
        if scored.attack is None:
            blind = vanishing(model, images, scored.survivors, batch_size=batch_size)
        measurement = _measurement(run, facts, images, scored, blind, seed, evidence)
        append(run / "results.jsonl", measurement)
        yield measurement


def _measurement(
    run: Path,
    facts: Facts,
    images: Dataset,
    scored: Scored,
    blind: float | None,
    seed: int,
    evidence: dict[str, Any],
) -> Measurement:
    attack = scored.attack
    return Measurement(
        run=run.name,
        method=facts.method,
        model=facts.model.model,
        bits=facts.model.bits,
        beta=facts.train.beta,
        seed=facts.train.seed,
        data=images.name,
        fingerprint=images.fingerprint,
        attack="clean" if attack is None else str(getattr(attack, "name", attack)),
        eps=0.0 if attack is None else float(getattr(attack, "eps", 0.0)),
        settings="clean" if attack is None else repr(attack),
        correct=scored.score.correct,
        total=scored.score.total,
        vanishing=blind,
        attack_seed=seed,
        seconds=round(scored.seconds, 3),
        evidence=evidence,
    )


def example_ids(labels: Tensor, count: int) -> Tensor:
    """The first image of each class in turn, then the second of each, ...: `count` positions."""
    rank = torch.zeros_like(labels)
    for label in labels.unique():
        mine = labels == label
        rank[mine] = torch.arange(int(mine.sum()), device=labels.device)
    order = torch.argsort(rank * (int(labels.max()) + 1) + labels, stable=True)
    return order[:count]


def write_examples(
    run: Path,
    model: nn.Module,
    facts: Facts,
    images: Dataset,
    attack: FirstOrder,
    count: int = 8,
    seed: int = 0,
) -> Path:
    """Clean and adversarial pictures with the model's predictions (Figure 7): `examples.json`."""
    ids = example_ids(images.labels, count)
    clean, labels = images.take(ids)
    device = next(model.parameters()).device
    clean, labels = clean.to(device), labels.to(device)
    adversarial = attack(model, clean, labels, generator=torch.Generator().manual_seed(seed))
    adversarial = adversarial.mul(255).round().div(255)  # what a saved picture can hold
    answers = [_answers(model, x) for x in (clean, adversarial)]
    examples = [
        {
            "id": int(ids[i]),
            "label": int(labels[i]),
            "clean_png": _png(clean[i]),
            "adversarial_png": _png(adversarial[i]),
            "clean": answers[0][i],
            "adversarial": answers[1][i],
        }
        for i in range(len(ids))
    ]
    about = {
        "run": run.name, "method": facts.method, "model": facts.model.model,
        "bits": facts.model.bits, "beta": facts.train.beta, "seed": facts.train.seed,
        "data": images.name, "attack": attack.name, "eps": attack.eps,
        "classes": list(images.classes),
    }  # fmt: skip
    return write_json(run / "examples.json", {**about, "examples": examples})


def _answers(model: nn.Module, x: Tensor) -> list[dict[str, float]]:
    with torch.no_grad():
        confidence, prediction = model(x).softmax(1).max(1)
    pairs = zip(prediction.tolist(), confidence.tolist(), strict=True)
    return [{"prediction": p, "confidence": round(c, 4)} for p, c in pairs]


def _png(image: Tensor) -> str:
    from PIL import Image

    pixels = image.mul(255).round().to(torch.uint8).cpu()
    array = pixels[0].numpy() if len(pixels) == 1 else pixels.permute(1, 2, 0).numpy()
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()
