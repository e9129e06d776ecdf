"""Attack a trained run and write what was measured, and what was made, into its folder."""

import base64
import hashlib
import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from defquant.attacks import Attack, Composition, FirstOrder, Replay, Single, untouched
from defquant.attacks.contract import Target, attacked, called, eps_of
from defquant.checkpoint import Facts, find, load_on, stamp
from defquant.config import digest, plain
from defquant.data import Dataset
from defquant.data.pictures import encode
from defquant.errors import DefquantWarning, UserError
from defquant.evaluate import Watch, device_of, sweep
from defquant.files import make_folder, write_whole
from defquant.records import Measurement, append

__all__ = [
    "Subject", "about", "example_ids", "examples", "load_on", "measure", "replay", "subject_of",
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
        "train_fingerprint": facts.fingerprint, "config_sha256": config, "train": plain(train),
    }  # fmt: skip
    return Subject(facts.method, model.model, model.bits, train.beta, train.seed, trained)


def about(run: Path, subject: Subject, images: Dataset) -> dict[str, Any]:
    """What each record begins with: the fields of `results.ABOUT`."""
    of = {name: getattr(subject, name) for name in ("method", "model", "bits", "beta", "seed")}
    return {"run": run.name, **of, "data": images.name, "fingerprint": images.fingerprint}


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
    """Clean accuracy, then every attack on `images`, also ready made, as `replay` does.

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


def replay(
    attack: FirstOrder,
    run: Path,
    data: Dataset,
    *,
    seed: int = 0,
    device: torch.device,
    batch_size: int = 256,
    source: str = "",
) -> Replay:
    """The black box of `attack` on the network of `run`, over all images of `data`, in that order.

    Scores are those of `Transfer(attack, substitute, source)`, but each network attacked costs a
    forward pass alone: the last iterates lie in `run/transfer/HASH.safetensors` and are read from
    there, memory-mapped. A file that is missing, cut or not what its name says is made again, on
    `device`. HASH is of the attack, the seed of its draws, the fingerprint of `data` and the
    substitute's checkpoint. Images are kept as float32, 4 bytes a value: 10,000 of CIFAR-10 take
    123 MB for each attack. FGSM leaves the 8-bit grid, too, by the rounding of x + eps. The folder
    can be deleted at any time. `source` names the substitute in the results; `run`, when not given.

    Raises `UserError` where there is no finished run. Warns where the folder cannot be written.
    """
    checkpoint = find(run)
    with checkpoint.open("rb") as file:
        substitute = hashlib.file_digest(file, "sha256").hexdigest()
    header = json.dumps({  # all that decides the images; the attack whole, as its repr rounds
        "format": 1, "attack": repr(attack), "eps": attack.eps, "walk": asdict(attack.walk),
        "seed": seed, "data": data.fingerprint, "substitute": substitute,
    })  # fmt: skip
    name = hashlib.sha256(header.encode()).hexdigest()[:16]
    path = checkpoint.parent / "transfer" / f"{name}.safetensors"
    images = _read(path, header, data.images.shape)
    if images is None:
        images, there = torch.empty(data.images.shape), data.to(device)
        target = Target(load_on(run, device)[0], there.images, there.labels, seed, batch_size)
        for ids, made in attacked(called(attack, target, last=True), target):
            images[ids.cpu()] = made.cpu()
        try:
            write_whole(path, partial(_write, images, header))
        except UserError:
            warnings.warn(
                "a substitute's folder cannot be written: its images are made again each time",
                DefquantWarning, stacklevel=2,
            )  # fmt: skip
        kept = _read(path, header, images.shape)  # so that memory holds no second copy
        images = images if kept is None else kept
    return Replay(attack, images, source or str(run))


def _read(path: Path, header: str, shape: torch.Size) -> Tensor | None:
    """The images of a whole file with this header, memory-mapped; None for any other file."""
    try:
        with safe_open(path, framework="pt") as file:
            if (file.metadata() or {}).get("defquant") != header:
                return None
            images: Tensor = file.get_tensor("images")
    except (SafetensorError, OSError):
        return None
    return images if images.shape == shape and images.dtype == torch.float32 else None


def _write(images: Tensor, header: str, path: Path) -> None:
    try:
        save_file({"images": images}, path, metadata={"defquant": header})
    except SafetensorError as error:  # a full disk, for one
        raise OSError(str(error)) from None
