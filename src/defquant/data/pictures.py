"""PNG, JPEG, WebP, BMP and GIF -> one uint8 array; and folders of them, one for each class."""

import hashlib
import io
import os
import warnings
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from defquant.data.dataset import Dataset, from_arrays
from defquant.errors import DefquantWarning, UserError, shown
from defquant.files import opened

__all__ = ["decode", "encode", "fitted", "open_image", "read_folder"]

_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif"}
_LARGEST = 4096  # pixels of a side


@contextmanager
def open_image(source: Path | bytes, name: str) -> Iterator[Image.Image]:
    """The picture, called `name` in messages, with its header read and nothing decoded.

    It is PNG, JPEG, WebP, BMP or GIF by its content, whatever the file is called: of its other
    formats Pillow hands PostScript to Ghostscript, which runs it.
    Raises `UserError` for other files, sides above 4096, and what goes wrong while it is decoded.
    """
    try:
        file = io.BytesIO(source) if isinstance(source, bytes) else opened(source)
        formats = ("PNG", "JPEG", "WEBP", "BMP", "GIF")
        with file, Image.open(file, formats=formats) as image:
            if max(image.size) > _LARGEST:
                raise ValueError(f"{_size(image.size[::-1])} is more than {_LARGEST} pixels a side")
            yield image
    except UserError:
        raise
    except Exception as error:  # a broken file raises whatever its decoder stumbles over
        unknown = isinstance(error, UnidentifiedImageError)
        reason = "no PNG, JPEG, WebP, BMP or GIF" if unknown else shown(str(error), 200)
        raise UserError(f"cannot decode {name} ({reason}): restore or remove it") from None


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
            with open_image(source, name) as image:
                size = image.size[::-1]
                if i == 0:
                    images = _room(len(sources), size, where)
                if size != images.shape[2:]:
                    raise UserError(
                        f"all images must have one size, here {_size(images.shape[2:])}; found "
                        f"{_size(size)} in {name}: resize or remove it"
                    )
                pixels = _pixels(image, name)
            gray &= pixels.ndim == 2
            images[i] = pixels if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
    return np.ascontiguousarray(images[:, :1]) if gray else images


def fitted(source: bytes, name: str, shape: tuple[int, int, int]) -> NDArray[np.uint8]:
    """The middle of one encoded picture, upright and resized, as an image of `shape`, (c, h, w).

    Raises `UserError`, naming it, where it does not decode or c is neither 1 nor 3.
    """
    channels, height, width = shape
    if channels not in (1, 3):
        raise UserError(f"a picture has 1 or 3 channels; these networks take {channels}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with open_image(source, name) as image:
            turned = Image.fromarray(_pixels(ImageOps.exif_transpose(image), name))
            plain = turned.convert("L" if channels == 1 else "RGB")
            small = np.asarray(ImageOps.fit(plain, (width, height), Image.Resampling.LANCZOS))
    return small[None] if channels == 1 else np.ascontiguousarray(small.transpose(2, 0, 1))


def encode(pixels: NDArray[np.uint8]) -> bytes:
    """A PNG file of one image (c, h, w), of 1 or 3 channels. Raises `UserError` for others."""
    if len(pixels) not in (1, 3):
        raise UserError(f"a PNG file holds 1 or 3 channels; found an image of {len(pixels)}")
    buffer = io.BytesIO()
    array = pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0)
    Image.fromarray(np.ascontiguousarray(array)).save(buffer, "PNG")
    return buffer.getvalue()


def read_folder(root: Path, split: str) -> Dataset:
    """Images in `root/{train,test}/CLASS/`, or in `root/CLASS/` and split here; at any depth.

    Split here, the fifth of each class whose names have the lowest hash is for the test. Images
    come in the order of that hash, so that the first n are a mixture of the classes. Warns of what
    is skipped, hidden files aside, and of images that lie deeper than in their class folder.
    Raises `UserError` where there are not two classes, no image of the split, or a class in the
    test set alone.
    """
    if not root.is_dir():
        raise UserError(f"the data root must be a folder of class folders; found the file {root}")
    notes: _Notes = defaultdict(list)
    train, test = _splits(root, split, notes)
    classes = tuple(train)
    unknown = [name for name in test if name not in train]
    if unknown and split == "test":
        raise UserError(
            f"{root / split} must hold classes of the training set only; found "
            f"{shown(unknown[0])!r}"
        )
    said = "; ".join(
        f"{len(some)} {what} ({some[0].relative_to(root).as_posix()}{', ...' * (len(some) > 1)})"
        for what, some in notes.items()
    )
    mine, other = (train, test) if split == "train" else (test, train)
    chosen = sorted((*item, classes.index(name)) for name in mine for item in mine[name])
    if not chosen or len(classes) < 2:
        raise UserError(
            f"a data folder must hold images ({' '.join(sorted(_SUFFIXES))}) in one folder for "
            f"each of two classes or more; found {len(classes)} classes and {len(chosen)} {split} "
            f"images in {root}" + f" ({said})" * bool(said)
        )
    if said:
        warnings.warn(
            f"the data folder {root} holds more than images in class folders: {said}",
            DefquantWarning,
            stacklevel=3,
        )
    # both splits need as many channels
    gray = not any(_has_colour(path) for images in other.values() for _, path in images)
    images = decode([path for _, path, _ in chosen], str(root), gray=gray)
    labels = np.array([label for *_, label in chosen])
    return from_arrays(images, labels, classes, name=root.resolve().name, where=str(root))


_Classes = dict[str, list[tuple[str, Path]]]  # the hash of each image's name, and its file
_Notes = dict[str, list[Path]]  # what is not as one would expect, and which


def _splits(root: Path, split: str, notes: _Notes) -> tuple[_Classes, _Classes]:
    """Training and test images, by class."""
    if not any((root / part).is_dir() for part in ("train", "test")):
        whole = _classes(root, notes)
        cuts = {name: max(1, round(len(whole[name]) / 5)) for name in whole}
        cuts |= {name: 0 for name in whole if len(whole[name]) == 1}
        return (
            {name: images[cuts[name] :] for name, images in whole.items()},
            {name: images[: cuts[name]] for name, images in whole.items() if cuts[name]},
        )
    for part in ("train", split):
        if not (root / part).is_dir():
            raise UserError(
                f"a data root holds train/CLASS/ and test/CLASS/, or CLASS/ alone; found no "
                f"{root / part}: make it, or move the classes up"
            )
    for path in _entries(root):
        if path.name not in ("train", "test"):
            notes["beside train and test are skipped"].append(path)
    return _classes(root / "train", notes), _classes(root / "test", notes)


def _classes(folder: Path, notes: _Notes) -> _Classes:
    """The images below each subfolder that has any, in the order of their hash."""
    found: _Classes = {}
    for entry in _entries(folder):
        if not entry.is_dir():
            notes["files outside of a class folder are skipped"].append(entry)
            continue
        images = []
        for path in _below(entry, notes):
            if path.suffix.lower() not in _SUFFIXES:
                notes["files of another ending are skipped"].append(path)
                continue
            if path.parent != entry:
                notes["images in deeper folders count for the class above"].append(path)
            name = path.relative_to(entry).as_posix().encode(errors="surrogateescape")
            images.append((hashlib.sha256(name).hexdigest(), path))
        if images:
            found[entry.name] = sorted(images)
        else:
            notes["folders without an image are no class"].append(entry)
    return found


def _below(folder: Path, notes: _Notes) -> Iterator[Path]:
    """All files at any depth; a link to a folder might lead in a circle."""
    for entry in _entries(folder):
        if not entry.is_dir():
            yield entry
        elif entry.is_symlink():
            notes["links to folders within a class are skipped"].append(entry)
        else:
            yield from _below(entry, notes)


def _entries(folder: Path) -> list[Path]:
    """What lies there and is not hidden; nothing where the folder is missing."""
    found = folder.iterdir() if folder.is_dir() else ()
    return sorted(path for path in found if path.name[0] != ".")


def _has_colour(path: Path) -> bool:
    """From the file's header alone; a broken file has its say when its own split is read."""
    with suppress(UserError), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with open_image(path, str(path)) as image:
            return image.mode not in ("L", "1")
    return False


def _pixels(image: Image.Image, name: str) -> NDArray[np.uint8]:
    """(h, w) where the image is 8-bit grayscale or black and white, else RGB (h, w, 3)."""
    if image.mode[0] in "IF":
        raise UserError(
            f"images must have 8 bits a channel; found mode {image.mode} in {name}: convert it"
        )
    return np.asarray(image.convert("L" if image.mode in ("L", "1") else "RGB"))


def _room(n: int, size: Sequence[int], where: str) -> NDArray[np.uint8]:
    with suppress(MemoryError):
        if 3 * n * size[0] * size[1] < os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"):
            return np.empty((n, 3, *size), np.uint8)
    raise UserError(
        f"all images must fit in memory; found {n:,} of {_size(size)} in {where}: make them smaller"
    )


def _size(shape: Sequence[int]) -> str:
    """Width x height, as image viewers show it."""
    return f"{shape[1]} x {shape[0]}"
