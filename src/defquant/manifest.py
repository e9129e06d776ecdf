"""The manifest of saved images: what `defquant attack --save-images` lists, and its reader.

The folder may come from anywhere: reading it runs no code and follows no path out of it.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from defquant.errors import UserError

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
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise UserError(
            f"no {MANIFEST} in {folder}: give a folder that `defquant attack --save-images` wrote "
            "to the end"
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    try:
        records = [json.loads(line) for line in lines]
        head = records[0]
        if head["kind"] != KIND or head["format"] != 1:
            raise ValueError(head["kind"])
        channels, height, width = (int(side) for side in head["shape"])
        classes, count = len(head["classes"]), int(head["pictures"])
    except (ValueError, KeyError, TypeError, IndexError, RecursionError):
        raise UserError(
            f"{path} is no manifest of saved images, or was cut: copy it again"
        ) from None
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
    pictures = tuple(
        _picture(r, classes, f"{path}, line {i}") for i, r in enumerate(records[1:], 2)
    )
    return Manifest(folder, head, (channels, height, width), classes, pictures)


def _picture(record: Any, classes: int, where: str) -> Saved:
    """A line of the manifest, checked field by field."""
    wanted = {item.name: item.type for item in fields(Saved)}
    if not isinstance(record, dict) or set(record) != set(wanted):
        raise UserError(f"{where}: a picture has the fields {', '.join(wanted)}; found others")
    for name, kind in wanted.items():
        value = record[name]
        kinds = (int, float) if kind is float else (kind,)
        if type(value) not in kinds:
            raise UserError(f"{where}: {name} cannot be {value!r}")
    path = PurePosixPath(record["file"])
    if path.is_absolute() or ".." in path.parts or "\\" in record["file"] or path.suffix != ".png":
        raise UserError(
            f"{where}: pictures are .png files inside the folder; found {record['file']!r}"
        )
    if not 0 <= record["label"] < classes or not 0 <= record["eps"] <= 1:
        raise UserError(
            f"{where}: labels lie in 0..{classes - 1} and eps in [0, 1]; found label "
            f"{record['label']} and eps {record['eps']}"
        )
    return Saved(**record)
