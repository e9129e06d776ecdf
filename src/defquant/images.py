"""Adversarial images as PNG files with a manifest: 8 bits, saved, scored and shown to any model.

The folder may come from anywhere: reading it runs no code, follows no path out of it, and decodes
no picture before its size is known.
"""

import hashlib
import json
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import groupby
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from defquant.attacks import Attack, Composition, Single
from defquant.attacks.contract import Target, attacked, eight_bit
from defquant.checkpoint import Facts
from defquant.data import Dataset
from defquant.data.pictures import decode, encode, open_image
from defquant.errors import UserError, shown
from defquant.evaluate import Watch, answers, device_of, lint_classes
from defquant.files import owned_folder, read_lines, write_bytes
from defquant.measure import Subject, measure
from defquant.records import ABOUT, EIGHT_BIT, Measurement, Score, append
from defquant.typed import NOT_NEGATIVE, POSITIVE, UNIT, Rule, from_mapping

__all__ = [
    "KIND", "MANIFEST", "Manifest", "Rescored", "Saved", "fingerprint_of", "measure_and_save",
    "read_manifest", "rescored",
]  # fmt: skip

MANIFEST = "manifest.jsonl"
KIND = "defquant saved images"
_SHAPE = Rule(
    "must be 1 or 3 channels and two sides up to 4096",
    lambda shape: shape[0] in (1, 3) and all(0 < side <= 4096 for side in shape[1:]),
)


@dataclass(frozen=True)
class Saved:
    """One picture, a line of the manifest.

    Attributes:
        file: its path below the manifest's folder.
        id: place of the image in the data set.
        label: its true class.
        attack, eps, settings: as in `Measurement`; `clean`, 0, `clean` for the image itself.
        clean, adversarial: what the network takes the image for before and after.
        distance: largest change of a pixel, in steps of 1/255.
        sha256: of the shape and the pixels.
    """

    file: str
    id: Annotated[int, NOT_NEGATIVE]
    label: int
    attack: str
    eps: Annotated[float, UNIT]
    settings: str
    clean: int
    adversarial: int
    distance: Annotated[int, Rule("must lie in 0..255", range(256).__contains__)]
    sha256: str


@dataclass(frozen=True)
class _Head:
    """What the reader needs of the first line."""

    shape: Annotated[tuple[int, int, int], _SHAPE]
    classes: tuple[str, ...]
    pictures: Annotated[int, POSITIVE]


def fingerprint_of(pixels: NDArray[np.uint8]) -> str:
    """SHA-256 over the shape (c, h, w) and the pixels."""
    digest = hashlib.sha256(repr(tuple(pixels.shape)).encode())
    digest.update(np.ascontiguousarray(pixels).data)
    return digest.hexdigest()


@dataclass(frozen=True)
class Manifest:
    """`head` is its first line: the run, the data, the scores. `pictures` are the other lines."""

    folder: Path
    head: Mapping[str, Any]
    shape: tuple[int, int, int]
    classes: int
    pictures: tuple[Saved, ...]


def read_manifest(folder: Path) -> Manifest:
    """The manifest of `folder`. Raises `UserError` where it is missing, cut, or not ours."""
    path = folder / MANIFEST
    if not path.exists():
        raise UserError(
            f"no {MANIFEST} in {folder}: give a folder that `defquant attack --save-images` wrote "
            "to the end"
        )
    records = list(read_lines(path))
    head = records[0][1] if records else None
    if not isinstance(head, dict) or head.get("kind") != KIND or head.get("format") != 1:
        raise UserError(f"{path} is no manifest of saved images, or was cut: copy it again")
    about = from_mapping(_Head, head, records[0][0])
    classes, count = len(about.classes), about.pictures
    if count != len(records) - 1:
        raise UserError(
            f"{path} must list its {count} pictures; found {len(records) - 1}: it was cut, copy it "
            "again"
        )
    pictures = tuple(_picture(record, classes, where) for where, record in records[1:])
    return Manifest(folder, head, about.shape, classes, pictures)


def _picture(record: Any, classes: int, where: str) -> Saved:
    """A line of the manifest, checked field by field."""
    found = from_mapping(Saved, record, where)
    path = PurePosixPath(found.file)
    if path.is_absolute() or ".." in path.parts or "\\" in found.file or path.suffix != ".png":
        raise UserError(
            f"{where}pictures are .png files inside the folder; found '{shown(found.file)}'"
        )
    answers = (found.label, found.clean, found.adversarial)
    if not all(0 <= answer < classes for answer in answers):
        raise UserError(f"{where}labels and answers lie in 0..{classes - 1}; found {answers}")
    return found


def measure_and_save(
    folder: Path | None,
    run: Path,
    model: nn.Module,
    facts: Facts | Subject,
    images: Dataset,
    attacks: Sequence[Single | Composition],
    *,
    black_box: Sequence[Attack] = (),
    seed: int = 0,
    batch_size: int = 256,
    watch: Watch | None = None,
) -> Iterator[Measurement]:
    """`measure`; then the images of `attacks` in `folder`, if there is one, and their 8-bit scores.

    The images are made anew, with the same draws, because the score stops at an example's fall.
    """
    how: Any = {"seed": seed, "batch_size": batch_size, "watch": watch}
    measured = measure(run, model, facts, images, [*attacks, *black_box], **how)
    if folder is None:
        yield from measured
        return
    with owned_folder(folder):
        found = sorted(path.name for path in folder.iterdir() if path.name != ".lock")
        if found:
            raise UserError(
                f"saved images need an empty folder; found {found[0]!r} in {folder}: remove it, or "
                "choose another"
            )
        scores = []
        for measurement in measured:
            scores.append(measurement)
            yield measurement
        for measurement in _saved(folder, model, images, attacks, scores, seed, batch_size):
            append(run / "results.jsonl", measurement)
            yield measurement


def _saved(
    folder: Path, model: nn.Module, images: Dataset, attacks: Sequence[Single | Composition],
    scores: Sequence[Measurement], seed: int, batch_size: int,
) -> Iterator[Measurement]:  # fmt: skip
    """Save what `attacks` make; yields the 8-bit scores beside `scores`, the same in floats.

    Images that the network has wrong are saved as they are. Where a radius of a family leaves an
    image right that a smaller one did not, the smaller one's is saved. The manifest is written
    last, so that it is never half.
    """
    images = images.to(device_of(model, images.images.device))
    clean = answers(model, images, batch_size=batch_size)
    target = Target(model, images.images, images.labels, seed, batch_size)
    floats = {(m.settings, m.eps): m for m in scores}
    lines = _pictures(folder, "00-clean", scores[0], images, images.images, clean, clean)
    told = [_score(scores[0])]
    before = dict[str, tuple[Tensor, Tensor]]()
    names = [attack.name for attack in attacks]
    order = sorted(attacks, key=lambda a: (names.index(a.name), a.eps))
    for place, attack in enumerate(order, 1):
        start = time.perf_counter()
        made, found = _made(attack, target, clean, before.get(attack.name))
        before[attack.name] = made, found
        name = re.sub(r"[^a-z0-9]+", "-", attack.name.lower()).strip("-")[:40]
        name, of = f"{place:02}-{name}-{attack.eps * 255:.4g}", floats[repr(attack), attack.eps]
        lines += _pictures(folder, name, of, images, made, clean, found)
        right = int((found == images.labels).sum())
        told.append(_score(of) | {"eight_bit": right})
        yield replace(
            of, attack=of.attack + EIGHT_BIT, correct=right, total=len(found),
            settings=f"{of.settings} as 8-bit images",
            seconds=round(time.perf_counter() - start, 3),
        )  # fmt: skip
    head = {
        "kind": KIND, "format": 1, "pictures": len(lines), "shape": images.shape,
        **{name: getattr(scores[0], name) for name in ABOUT}, "classes": images.classes,
        "attack_seed": seed, "scores": told, "evidence": scores[0].evidence,
    }  # fmt: skip
    text = "".join(json.dumps(line) + "\n" for line in [head, *map(asdict, lines)])
    write_bytes(folder / MANIFEST, text.encode())


def _made(
    attack: Single | Composition, target: Target, clean: Tensor,
    weaker: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Pixels and answers; those of a `weaker` attack where they alone fool the network."""
    pixels, labels = target.images.clone(), target.labels
    make = partial(eight_bit, attack, target.model, seed=target.seed)
    for ids, part in attacked(make, target, (clean == labels).nonzero().squeeze(1)):
        pixels[ids] = part.mul(255).round().to(torch.uint8)
    found = answers(target.model, (pixels, labels), batch_size=target.batch_size)
    if weaker is not None:
        fell = (found == labels) & (weaker[1] != labels)
        pixels[fell], found[fell] = weaker[0][fell], weaker[1][fell]
    return pixels, found


def _score(m: Measurement) -> dict[str, Any]:
    return {name: getattr(m, name) for name in ("attack", "eps", "settings", "correct", "total")}


def _pictures(
    folder: Path, name: str, of: Measurement, images: Dataset, made: Tensor, clean: Tensor,
    found: Tensor,
) -> list[Saved]:  # fmt: skip
    """Write the pictures `made` into `name` and return their lines: `clean` and `found` answers."""
    pixels, labels = made.cpu().numpy(), images.labels
    far = (made.int() - images.images.int()).abs().amax((1, 2, 3))
    columns = (column.tolist() for column in (labels, clean, found, far))
    lines = []
    try:
        (folder / name).mkdir()
        for i, (label, was, now, distance) in enumerate(zip(*columns, strict=True)):
            file = f"{name}/{i:06}.png"
            (folder / file).write_bytes(encode(pixels[i]))
            about, after = (label, of.attack, of.eps, of.settings), (was, now, distance)
            lines.append(Saved(file, i, *about, *after, fingerprint_of(pixels[i])))
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"cannot write into {folder / name}: {reason}") from None
    return lines


@dataclass(frozen=True)
class Rescored:
    """`score` of the pictures of one attack and eps; `saved`: that of the run they were made on."""

    attack: str
    eps: float
    settings: str
    score: Score
    saved: Score


def rescored(manifest: Manifest, model: nn.Module, *, batch_size: int = 256) -> Iterator[Rescored]:
    """What `model` scores on the pictures, attack by attack; clean first.

    A picture counts when the model is right on it. Raises `UserError` for a picture that is
    missing, cut, of another size, or whose pixels are not those of the manifest.
    """
    few = _read(manifest, manifest.pictures[: min(8, batch_size)])
    try:
        lint_classes(model, few, manifest.classes, "the saved images")
    except UserError:
        raise
    except Exception as error:  # a model of other images fails in its own words
        raise UserError(
            f"the model cannot take images of {' x '.join(map(str, manifest.shape))} "
            f"({' '.join(str(error).split())[:200]}): use one of the same data"
        ) from None
    for key, some in groupby(manifest.pictures, lambda p: (p.attack, p.eps, p.settings)):
        pictures, right, before = list(some), 0, 0
        for start in range(0, len(pictures), batch_size):
            part = pictures[start : start + batch_size]
            images, labels = _read(manifest, part)
            given = answers(model, (images, labels), batch_size=batch_size).cpu()
            right += int((given == labels).sum())
            before += sum(p.adversarial == p.label for p in part)
        yield Rescored(*key, Score(right, len(pictures)), Score(before, len(pictures)))


def clean_images(manifest: Manifest, most: int = 256) -> Dataset:
    """Its first clean pictures, at most so many: what the others were made of."""
    some = [picture for picture in manifest.pictures if picture.attack == "clean"][:most]
    images, labels = _read(manifest, some or manifest.pictures[:most])
    return Dataset(images, labels, tuple(manifest.head["classes"]), "the saved images")


def _read(manifest: Manifest, pictures: Sequence[Saved]) -> tuple[Tensor, Tensor]:
    images = np.stack([_pixels(manifest, picture) for picture in pictures])
    return torch.from_numpy(images), torch.tensor([p.label for p in pictures])


def _pixels(manifest: Manifest, picture: Saved) -> NDArray[np.uint8]:
    """One picture, (c, h, w), checked before and after it is decoded."""
    path = manifest.folder / picture.file
    if not path.resolve().is_relative_to(manifest.folder.resolve()):
        raise UserError(f"{path} is a link to outside of {manifest.folder}: remove it")
    if not path.is_file():
        raise UserError(f"the manifest names {path}, which is not there: copy the folder again")
    channels, height, width = manifest.shape
    if path.stat().st_size > (1 << 16) + 4 * channels * height * width:
        raise UserError(f"{path} is far too large a file for {width} x {height} pixels: remove it")
    wanted = ("L" if channels == 1 else "RGB", (width, height), "PNG")
    with open_image(path, str(path)) as image:
        found = image.mode, image.size, image.format
    if found != wanted:
        raise UserError(
            f"{path} must be a PNG of mode {wanted[0]} and {width} x {height} pixels; found "
            f"{found[0]}, {found[1][0]} x {found[1][1]}, {found[2]}: copy the folder again"
        )
    pixels: NDArray[np.uint8] = decode([path], str(manifest.folder), gray=channels == 1)[0]
    if fingerprint_of(pixels) != picture.sha256:
        raise UserError(
            f"the pixels of {path} are not those that were saved: copy the folder again"
        )
    return pixels
