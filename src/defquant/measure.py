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
from defquant.evaluate import Watch, device_of, sweep
from defquant.files import make_folder
from defquant.results import Measurement, append

__all__ = [
    "Subject", "about", "example_ids", "examples", "load_on", "measure", "subject_of",
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


def about(run: Path, subject: Subject, images: Dataset) -> dict[str, Any]:
    """What each record begins with: the fields of `results.ABOUT`."""
    of = {"method": subject.method, "model": subject.model, "bits": subject.bits}
    trained = {"beta": subject.beta, "seed": subject.seed}
    shown = {"data": images.name, "fingerprint": images.fingerprint}
    return {"run": run.name, **of, **trained, **shown}


def measure(
    run: Path,
    model: nn.Module,
    facts: Facts | Subject,
    images: Dataset,
    attacks: Sequence[Attack],
    *,
    seed: int = 0,
    batch_size: int = 256,
    write: Callable[[Measurement], object] | None = None,
    watch: Watch | None = None,
) -> Iterator[Measurement]:
    """Clean accuracy, then every attack on `images`, also ready made, as `defquant.replay` does.

    Each measurement is given to `write` at once; without it, appended to the run's
    `results.jsonl`. `watch` shows how far each attack is.
    """
    keep = partial(append, run / "results.jsonl") if write is None else write
    subject = subject_of(facts)
    device = device_of(model, images.images.device)
    evidence = {
        "weights_sha256": weights_hash(model), "data_fingerprint": images.source, **stamp(device),
        **(subject.evidence or {}), "batch_size": batch_size,
    }  # fmt: skip
    for scored in sweep(model, images, attacks, batch_size=batch_size, seed=seed, watch=watch):
        attack, carried = scored.attack, {"carried_eps": list(scored.carried)}
        measurement = Measurement(
            **about(run, subject, images),
            attack="clean" if attack is None else str(getattr(attack, "name", attack)),
            eps=0.0 if attack is None else eps_of(attack),
            settings="clean" if attack is None else repr(attack),
            correct=scored.score.correct,
            total=scored.score.total,
            vanishing=scored.vanishing,
            attack_seed=seed,
            seconds=round(scored.seconds, 3),
            evidence=evidence | (carried if scored.carried else {}),
        )
        if write is None and scored.attack is None:
            make_folder(run)  # once: where it is removed later, that is said
        keep(measurement)
        yield measurement


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


def examples(
    run: Path,
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
    device = device_of(model, images.images.device)
    clean, labels = (part.to(device) for part in images.take(ids))
    target = Target(model, clean, labels, seed, batch_size)
    moved = torch.cat([made for _, made in attacked(called(attack, target), target)])
    shown = {"clean": clean, "adversarial": moved.mul(255).round().div(255)}  # as files hold them
    found: list[dict[str, Any]] = [
        {"id": i, "label": y} for i, y in zip(ids.tolist(), labels.tolist(), strict=True)
    ]
    for name, x in shown.items():
        with untouched(model), torch.no_grad():
            answers = torch.cat([model(some).float().softmax(1) for some in x.split(batch_size)])
        pixels = x.mul(255).round().to(torch.uint8).cpu().numpy()
        for entry, image, sure, top in zip(found, pixels, *answers.max(1), strict=True):
            entry[f"{name}_png"] = base64.b64encode(encode(image)).decode()
            entry[name] = {"prediction": int(top), "confidence": round(float(sure), 4)}
    names = {"attack": attack.name, "eps": attack.eps, "classes": list(images.classes)}
    return {**about(run, subject_of(facts), images), **names, "examples": found}
