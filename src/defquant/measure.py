"""Attack a trained run and write what was measured into its folder."""

import base64
import io
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from defquant.attacks import Attack, Composition, Single
from defquant.checkpoint import Facts, load_on, versions
from defquant.data import Dataset
from defquant.evaluate import Scored, sweep, vanishing
from defquant.files import write_json
from defquant.results import Measurement, append

__all__ = ["example_ids", "examples", "load_on", "measure", "write_examples"]


def measure(
    run: Path,
    model: nn.Module,
    facts: Facts,
    images: Dataset,
    attacks: Sequence[Single | Composition],
    *,
    black_box: Sequence[Attack] = (),
    seed: int = 0,
    batch_size: int = 256,
    write: Callable[[Measurement], object] | None = None,
) -> Iterator[Measurement]:
    """Clean accuracy, every attack on `images`, then every one of `black_box`.

    Each measurement is given to `write` at once; without it, appended to the run's
    `results.jsonl`. `black_box` holds attacks ready made, as `defquant.replay` keeps them.
    """
    write = partial(append, run / "results.jsonl") if write is None else write
    evidence = {
        "versions": versions(next(model.parameters()).device),
        "command": shlex.join(["defquant", *sys.argv[1:]]),
        "epochs": facts.train.epochs,
        "train_images": facts.data.train_images,
        "batch_size": batch_size,
    }
    blind: float | None = None
    for scored in sweep(model, images, [*attacks, *black_box], batch_size=batch_size, seed=seed):
        if scored.attack is None:
            blind = vanishing(model, images, scored.survivors, batch_size=batch_size)
        measurement = _measurement(run, facts, images, scored, blind, seed, evidence)
        write(measurement)
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
    attack: Single | Composition,
    count: int = 8,
    seed: int = 0,
) -> Path:
    """What `examples` finds, as `examples.json` in the run's folder."""
    found = examples(model, facts, images, attack, count, seed)
    return write_json(run / "examples.json", {"run": run.name, **found})


def examples(
    model: nn.Module,
    facts: Facts,
    images: Dataset,
    attack: Single | Composition,
    count: int = 8,
    seed: int = 0,
) -> dict[str, Any]:
    """Clean and adversarial pictures (base64 of PNG) with the model's predictions (Figure 7)."""
    ids = example_ids(images.labels, count)
    clean, labels = images.take(ids)
    device = next(model.parameters()).device
    clean, labels = clean.to(device), labels.to(device)
    adversarial = attack(model, clean, labels, generator=torch.Generator().manual_seed(seed))
    adversarial = adversarial.mul(255).round().div(255)  # what a saved picture can hold
    answers = [_answers(model, x) for x in (clean, adversarial)]
    found = [
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
        "method": facts.method, "model": facts.model.model,
        "bits": facts.model.bits, "beta": facts.train.beta, "seed": facts.train.seed,
        "data": images.name, "attack": attack.name, "eps": attack.eps,
        "classes": list(images.classes),
    }  # fmt: skip
    return {**about, "examples": found}


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
