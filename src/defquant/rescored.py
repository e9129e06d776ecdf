"""Saved images read back and shown to any model. No picture is decoded before its size is known."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from defquant.attacks.access import untouched
from defquant.attacks.lint import lint_model
from defquant.data import to_unit
from defquant.data.pictures import decode
from defquant.errors import UserError
from defquant.evaluate import answers, device_of
from defquant.files import opened
from defquant.manifest import Manifest, Saved, fingerprint_of
from defquant.results import Score

__all__ = ["Rescored", "rescored"]


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
    _lint(manifest, model, batch_size)
    for key, some in groupby(manifest.pictures, lambda p: (p.attack, p.eps, p.settings)):
        pictures, right, before = list(some), 0, 0
        for start in range(0, len(pictures), batch_size):
            part = pictures[start : start + batch_size]
            images, labels = _read(manifest, part)
            given = answers(model, (images, labels), batch_size=batch_size).cpu()
            right += int((given == labels).sum())
            before += sum(p.adversarial == p.label for p in part)
        yield Rescored(*key, Score(right, len(pictures)), Score(before, len(pictures)))


def _lint(manifest: Manifest, model: nn.Module, batch_size: int) -> None:
    images, _ = _read(manifest, list(manifest.pictures[: min(8, batch_size)]))
    device = device_of(model, torch.device("cpu"))
    every = torch.tensor([p.label for p in manifest.pictures])
    try:
        lint_model(model, to_unit(images.to(device)), every)
        with untouched(model), torch.no_grad():
            known = model(to_unit(images[:1].to(device))).shape[1]
    except UserError:
        raise
    except Exception as error:  # a model of other images fails in its own words
        raise UserError(
            f"the model cannot take images of {' x '.join(map(str, manifest.shape))} "
            f"({' '.join(str(error).split())[:200]}): use one of the same data"
        ) from None
    if known != manifest.classes:
        raise UserError(
            f"the model knows {known} classes, the saved images {manifest.classes}: use one of the "
            "same data"
        )


def _read(manifest: Manifest, pictures: list[Saved]) -> tuple[Tensor, Tensor]:
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
    wanted = ("L" if channels == 1 else "RGB", (width, height))
    found = _header(path)
    if found != wanted:
        raise UserError(
            f"{path} must be a PNG of mode {wanted[0]} and {width} x {height} pixels; found "
            f"{found[0]}, {found[1][0]} x {found[1][1]}: copy the folder again"
        )
    pixels: NDArray[np.uint8] = decode([path], str(manifest.folder), gray=channels == 1)[0]
    if fingerprint_of(pixels) != picture.sha256:
        raise UserError(
            f"the pixels of {path} are not those that were saved: copy the folder again"
        )
    return pixels


def _header(path: Path) -> tuple[str, tuple[int, int]]:
    try:
        with opened(path) as file, Image.open(file, formats=["PNG"]) as image:
            return image.mode, image.size
    except Exception as error:  # warnings of huge pictures are among them
        reason = " ".join(str(error).split())
        raise UserError(f"cannot read {path} as PNG ({reason}): copy the folder again") from None
