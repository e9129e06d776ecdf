"""Attack a trained run and write what was measured into its folder."""

import base64
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from defquant.attacks import Attack, Composition, Single, untouched
from defquant.attacks.contract import Target, attacked, called, eps_of
from defquant.checkpoint import Facts, load_on, stamp
from defquant.config import digest
from defquant.data import Dataset
from defquant.data.pictures import encode
from defquant.evaluate import Scored, Watch, device_of, sweep
from defquant.files import make_folder, write_json
from defquant.results import Measurement, append

__all__ = [
    "Subject", "evidence_of", "example_ids", "examples", "load_on", "measure", "subject_of",
    "write_examples",
]  # fmt: skip


@dataclass(frozen=True)
class Subject:
    """What a measurement says of the network that was measured, as `Measurement` has it.

    `evidence` is what stands in the measurement's beside versions and command.
    """

    method: str
    model: str
    bits: int | None = None
    beta: float = 0.0
    seed: int = 0
    evidence: Mapping[str, Any] | None = None


def subject_of(facts: Facts | Subject) -> Subject:
    """A run, as its measurements name it."""
    if isinstance(facts, Subject):
        return facts
    model, train = facts.model, facts.train
    config = digest([digest(part) for part in (model, facts.data, replace(train, seed=0))])
    trained = {
        "epochs": train.epochs, "train_images": facts.data.train_images,
        "train_fingerprint": facts.fingerprint, "config_sha256": config,
    }  # fmt: skip
    return Subject(facts.method, model.model, model.bits, train.beta, train.seed, trained)


def evidence_of(subject: Subject, device: torch.device, batch_size: int) -> dict[str, Any]:
    """Versions, machine and command, and what is known of how the network was made."""
    return {**stamp(device), **(subject.evidence or {}), "batch_size": batch_size}


def measure(
    run: Path,
    model: nn.Module,
    facts: Facts | Subject,
    images: Dataset,
    attacks: Sequence[Single | Composition],
    *,
    black_box: Sequence[Attack] = (),
    seed: int = 0,
    batch_size: int = 256,
    write: Callable[[Measurement], object] | None = None,
    watch: Watch | None = None,
) -> Iterator[Measurement]:
    """Clean accuracy, every attack on `images`, then every one of `black_box`.

    Each measurement is given to `write` at once; without it, appended to the run's
    `results.jsonl`. `black_box` holds attacks ready made, as `defquant.replay` keeps them. `watch`
    shows how far each attack is.
    """
    keep = partial(append, run / "results.jsonl") if write is None else write
    subject = subject_of(facts)
    hashes = {"weights_sha256": weights_hash(model), "data_fingerprint": images.source}
    evidence = hashes | evidence_of(subject, device_of(model, images.images.device), batch_size)
    every = [*attacks, *black_box]
    for scored in sweep(model, images, every, batch_size=batch_size, seed=seed, watch=watch):
        measurement = _measurement(run, subject, images, scored, seed, evidence)
        if write is None and scored.attack is None:
            make_folder(run)  # once: where it is removed later, that is said
        keep(measurement)
        yield measurement


def _measurement(
    run: Path,
    subject: Subject,
    images: Dataset,
    scored: Scored,
    seed: int,
    evidence: dict[str, Any],
) -> Measurement:
    attack = scored.attack
    return Measurement(
        run=run.name,
        method=subject.method,
        model=subject.model,
        bits=subject.bits,
        beta=subject.beta,
        seed=subject.seed,
        data=images.name,
        fingerprint=images.fingerprint,
        attack="clean" if attack is None else str(getattr(attack, "name", attack)),
        eps=0.0 if attack is None else eps_of(attack),
        settings="clean" if attack is None else repr(attack),
        correct=scored.score.correct,
        total=scored.score.total,
        vanishing=scored.vanishing,
        attack_seed=seed,
        seconds=round(scored.seconds, 3),
        evidence=evidence | ({"carried_eps": list(scored.carried)} if scored.carried else {}),
    )


def weights_hash(model: nn.Module) -> str:
    """SHA-256 of names, types, shapes and values of the state; the same on every device."""
    found = hashlib.sha256()
    for name, value in model.state_dict().items():
        found.update(name.encode())
        if isinstance(value, Tensor) and not value.is_quantized:
            found.update(f"{value.dtype} {tuple(value.shape)}".encode())
            found.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        else:  # packed weights of an int8 model print their values
            found.update(repr(value).encode())
    return found.hexdigest()


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
    facts: Facts | Subject,
    images: Dataset,
    attack: Single | Composition,
    count: int = 8,
    seed: int = 0,
    batch_size: int = 256,
) -> Path:
    """What `examples` finds, as `examples.json` in the run's folder."""
    found = examples(model, facts, images, attack, count, seed, batch_size)
    return write_json(run / "examples.json", {"run": run.name, **found})


def examples(
    model: nn.Module,
    facts: Facts | Subject,
    images: Dataset,
    attack: Single | Composition,
    count: int = 8,
    seed: int = 0,
    batch_size: int = 256,
) -> dict[str, Any]:
    """Clean and adversarial pictures (base64 of PNG) with the model's predictions (Figure 7)."""
    ids = example_ids(images.labels, count)
    clean, labels = images.take(ids)
    device = device_of(model, clean.device)
    clean, labels = clean.to(device), labels.to(device)
    target = Target(model, clean, labels, seed, batch_size)
    moved = torch.cat([made for _, made in attacked(called(attack, target), target)])
    adversarial = moved.mul(255).round().div(255)  # what a saved picture can hold
    answers = [
        [answer for part in x.split(batch_size) for answer in _answers(model, part)]
        for x in (clean, adversarial)
    ]
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
    subject = subject_of(facts)
    about = {
        "method": subject.method, "model": subject.model,
        "bits": subject.bits, "beta": subject.beta, "seed": subject.seed,
        "data": images.name, "attack": attack.name, "eps": attack.eps,
        "classes": list(images.classes),
    }  # fmt: skip
    return {**about, "examples": found}


def _answers(model: nn.Module, x: Tensor) -> list[dict[str, float]]:
    with untouched(model), torch.no_grad():
        confidence, prediction = model(x).float().softmax(1).max(1)
    pairs = zip(prediction.tolist(), confidence.tolist(), strict=True)
    return [{"prediction": p, "confidence": round(c, 4)} for p, c in pairs]


def _png(image: Tensor) -> str:
    pixels = image.mul(255).round().to(torch.uint8).cpu()
    return base64.b64encode(encode(pixels.numpy())).decode()
