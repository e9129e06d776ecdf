"""PNG, JPEG and their like -> one uint8 array; and folders of them, one for each class."""

import hashlib
import io
import warnings
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from defquant.data.dataset import Dataset, from_arrays
from defquant.errors import UserError

__all__ = ["decode", "encode", "read_folder"]

_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff"}


def decode(sources: Sequence[Path | bytes], where: str, *, gray: bool = False) -> NDArray[np.uint8]:
    """RGB images (n, 3, h, w); one channel where `gray` allows it and all images have but one.

    `sources` are encoded images or the files that hold them, at least one; `where` names the place
    that bytes came from. The orientation that a camera noted is not applied.
    Raises `UserError`, naming the file, where one does not decode or has another size.
    """
    images = np.empty((0, 3, 0, 0), np.uint8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        # serial: at 32 x 32 the threads of a pool wait for the interpreter twice as long as this
        for i, source in enumerate(sources):
            name = str(source) if isinstance(source, Path) else f"{where}, image {i}"
            pixels = _pixels(source, name)
            if i == 0:
                images = _room(len(sources), pixels.shape[:2], where)
            if pixels.shape[:2] != images.shape[2:]:
                raise UserError(
                    f"all images must have one size, here {_size(images.shape[2:])}; found "
                    f"{_size(pixels.shape[:2])} in {name}: resize or remove it"
                )
            gray &= pixels.ndim == 2
            images[i] = pixels if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
    return np.ascontiguousarray(images[:, :1]) if gray else images


def encode(pixels: NDArray[np.uint8]) -> bytes:
    """A PNG file of one image (c, h, w), of 1 or 3 channels. Raises `UserError` for others."""
    if len(pixels) not in (1, 3):
        raise UserError(f"a PNG file holds 1 or 3 channels; found an image of {len(pixels)}")
    buffer = io.BytesIO()
    array = pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0)
    Image.fromarray(np.ascontiguousarray(array)).save(buffer, "PNG")
    return buffer.getvalue()


def read_folder(root: Path, split: str) -> Dataset:
    """Images in `root/{train,test}/CLASS/`, or in `root/CLASS/` and split here.

    Split here, the fifth of each class whose file names have the lowest hash is for the test.
    Images come in the order of that hash, so that the first n are a mixture of the classes.
    Raises `UserError` where there is no class, no image, or a class in the test set alone.
    """
    if not root.is_dir():
        raise UserError(f"the data root must be a folder of class folders; found the file {root}")
    ready = (root / "train").is_dir() or (root / "test").is_dir()
    classes = _subfolders(root / "train" if ready else root)
    here = root / split if ready else root
    unknown = sorted(set(_subfolders(here)) - set(classes))
    if unknown:
        raise UserError(f"{here} must hold classes of the training set only; found {unknown[0]!r}")
    chosen, rest = _split(root, split, classes, ready)
    if not chosen:
        raise UserError(
            f"a data folder must hold images ({' '.join(sorted(_SUFFIXES))}) in one folder for "
            f"each class; found {len(classes)} classes and no {split} image in {here}"
        )
    gray = not any(_has_colour(path) for path, _ in rest)  # both splits need as many channels
    images = decode([path for path, _ in chosen], str(here), gray=gray)
    labels = np.array([label for _, label in chosen])
    return from_arrays(images, labels, classes, name=root.resolve().name, where=str(here))


def _split(
    root: Path, split: str, classes: Sequence[str], ready: bool
) -> tuple[list[tuple[Path, int]], list[tuple[Path, int]]]:
    """Files and labels of `split`, in the order of their hash, and those of the other one."""
    chosen, rest = [], []
    for label, name in enumerate(classes):
        if ready:
            parts = {part: _images(root / part / name) for part in ("train", "test")}
        else:
            found = _images(root / name)
            cut = max(1, round(len(found) / 5)) if len(found) > 1 else 0
            parts = {"test": found[:cut], "train": found[cut:]}
        chosen += [(path, label) for path in parts.pop(split)]
        rest += [(path, label) for paths in parts.values() for path in paths]
    return sorted(chosen, key=lambda item: _hash(item[0])), rest


def _subfolders(folder: Path) -> tuple[str, ...]:
    if not folder.is_dir():
        raise UserError(
            f"a data root holds train/CLASS/ and test/CLASS/, or CLASS/ alone; found no {folder}: "
            "make it, or move the classes up"
        )
    return tuple(
        sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and entry.name[0] != ".")
    )


def _images(folder: Path) -> list[Path]:
    """Image files of one class, in the order of their hash; none where the folder is missing."""
    entries = folder.iterdir() if folder.is_dir() else ()
    return sorted(
        (path for path in entries if path.suffix.lower() in _SUFFIXES and path.name[0] != "."),
        key=_hash,
    )


def _hash(path: Path) -> tuple[str, str]:
    return hashlib.sha256(path.name.encode(errors="surrogateescape")).hexdigest(), str(path)


def _has_colour(path: Path) -> bool:
    """From the file's header alone; a broken file has its say when its own split is read."""
    with suppress(Exception), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Image.open(path) as image:
            return image.mode not in ("L", "1")
    return False


def _pixels(source: Path | bytes, name: str) -> NDArray[np.uint8]:
    """(h, w) where the image is 8-bit grayscale or black and white, else RGB (h, w, 3)."""
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            mode = image.mode
            if mode[0] not in "IF":
                return np.asarray(image.convert("L" if mode in ("L", "1") else "RGB"))
    except Exception as error:  # a broken file raises whatever its decoder stumbles over
        unknown = isinstance(error, UnidentifiedImageError)
        reason = "no known format" if unknown else " ".join(str(error).split())
        raise UserError(f"cannot decode {name} ({reason}): restore or remove it") from None
    raise UserError(f"images must have 8 bits a channel; found mode {mode} in {name}: convert it")


def _room(n: int, size: Sequence[int], where: str) -> NDArray[np.uint8]:
    try:
        return np.empty((n, 3, *size), np.uint8)
    except MemoryError:
        raise UserError(
            f"all images must fit in memory; found {n:,} of {_size(size)} in {where}: make them "
            "smaller"
        ) from None


def _size(shape: Sequence[int]) -> str:
    """Width x height, as image viewers show it."""
    return f"{shape[1]} x {shape[0]}"
