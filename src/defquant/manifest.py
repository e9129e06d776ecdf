"""The manifest of saved images: what `defquant attack --save-images` lists, and its reader.

The folder may come from anywhere: reading it runs no code and follows no path out of it.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from defquant.errors import UserError, shown
from defquant.files import read_lines
from defquant.typed import from_mapping

__all__ = ["KIND", "MANIFEST", "Manifest", "Saved", "fingerprint_of", "read_manifest"]

MANIFEST = "manifest.jsonl"
KIND = "defquant saved images"
_LARGEST = 4096  # pixels of a side


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
    id: int
    label: int
    attack: str
    eps: float
    settings: str
    clean: int
    adversarial: int
    distance: int
    sha256: str


@dataclass(frozen=True)
class _Head:
    """What the reader needs of the first line."""

    shape: tuple[int, int, int]
    classes: tuple[str, ...]
    pictures: int


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
    (channels, height, width), classes, count = about.shape, len(about.classes), about.pictures
    if channels not in (1, 3) or not 0 < max(height, width) <= _LARGEST or min(height, width) < 1:
        raise UserError(
            f"saved images have 1 or 3 channels and sides up to {_LARGEST}; found "
            f"{channels} x {height} x {width} in {path}"
        )
    if count != len(records) - 1 or not count:
        raise UserError(
            f"{path} must list its {count} pictures; found {len(records) - 1}: it was cut, copy it "
            "again"
        )
    pictures = tuple(_picture(record, classes, where) for where, record in records[1:])
    return Manifest(folder, head, (channels, height, width), classes, pictures)


def _picture(record: Any, classes: int, where: str) -> Saved:
    """A line of the manifest, checked field by field."""
    found = from_mapping(Saved, record, where)
    path = PurePosixPath(found.file)
    if path.is_absolute() or ".." in path.parts or "\\" in found.file or path.suffix != ".png":
        raise UserError(
            f"{where}pictures are .png files inside the folder; found '{shown(found.file)}'"
        )
    answers = (found.label, found.clean, found.adversarial)
    if not all(0 <= answer < classes for answer in answers) or not 0 <= found.eps <= 1:
        raise UserError(
            f"{where}labels and answers lie in 0..{classes - 1} and eps in [0, 1]; found "
            f"{answers} and eps {found.eps:g}"
        )
    if found.id < 0 or not 0 <= found.distance <= 255:
        raise UserError(
            f"{where}id must not be negative and distance lie in 0..255; found {found.id} and "
            f"{found.distance}"
        )
    return found
