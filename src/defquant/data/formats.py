"""`load`: one call for every data set, and the short readers of three of them."""

import zipfile
import zlib
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from defquant.data.cifar import read_cifar10
from defquant.data.dataset import Dataset, from_arrays, in_unit
from defquant.data.matlab import mat_shapes, read_mat
from defquant.data.pictures import read_folder
from defquant.errors import UserError, shown
from defquant.files import opened

__all__ = ["DATASETS", "load"]

_DIGITS = tuple("0123456789")
_SVHN_OFFICIAL = {"train": 73_257, "test": 26_032}
_MOST_CLASSES = 10_000


def load(
    name: str, root: str | Path | None = None, split: Literal["train", "test"] = "train"
) -> Dataset:
    """One split of a data set, on the CPU.

    Args:
        name: `digits`: scikit-learn's 1,797 images of 8 x 8, of which every fourth, counted
            class by class, is for the test (1,347 + 450);
            `cifar10`: a folder with the official pickles, the official tar.gz or the hub's
            parquet files, or the tar.gz itself;
            `svhn`: a folder with `train_32x32.mat` and `test_32x32.mat`;
            `folder`: images at any depth of `root/train/CLASS/` and `root/test/CLASS/`, or of
            `root/CLASS/` alone, of which a fifth, by a hash of their names, is for the test;
            `npz`: a file with `x_train y_train x_test y_test`, or with `images labels`, of which
            every fifth, counted class by class, is for the test.
        root: where it lies; digits need none.
        split: `train` or `test`.

    Raises `UserError` for an unknown name or split, and for files missing, broken or out of range.
    """
    if name not in _READERS:
        raise UserError(f"unknown data set {name!r}: choose one of {', '.join(DATASETS)}")
    if split not in ("train", "test"):
        raise UserError(f"the split must be train or test; found {split!r}")
    if name == "digits":
        return _read_digits(split)
    fetchable = f", or run `defquant data fetch {name}`" if name in ("cifar10", "svhn") else ""
    if root is None:
        raise UserError(
            f"data set {name} needs its files: give their place as the data root{fetchable}"
        )
    path = Path(root).expanduser()
    if not path.exists():
        raise UserError(f"found no data at {path}: correct the data root{fetchable}")
    try:
        return _READERS[name](path, split)
    except OSError as error:
        raise UserError(
            f"cannot read {error.filename or path}: {error.strerror or error}"
        ) from None


def _read_digits(split: str) -> Dataset:
    from sklearn.datasets import load_digits

    found = load_digits()
    images = np.rint(found.images * (255 / 16)).astype(np.uint8)[:, None]
    chosen = _every(found.target, 4, split)
    return from_arrays(
        images[chosen], found.target[chosen], _DIGITS, name="digits", where="digits", shift=1
    )


def _every(labels: NDArray[np.integer], nth: int, split: str) -> NDArray[np.bool_]:
    """Mask of a split that takes every `nth` image of the list sorted by class for the test."""
    test = np.zeros(len(labels), np.bool_)
    test[np.argsort(labels, kind="stable")[::nth]] = True
    return test if split == "test" else ~test


def _read_svhn(root: Path, split: str) -> Dataset:
    paths = {part: root / f"{part}_32x32.mat" for part in ("train", "test")}
    path = paths[split]
    if not path.is_file():
        raise UserError(f"found no {path.name} in {root}: run `defquant data fetch svhn`")
    try:
        images, labels = read_mat(path, "X", "y").values()
    except (ValueError, zlib.error) as error:
        raise UserError(
            f"{path} must be a MATLAB file with X and y ({error}): it may be cut, run "
            "`defquant data fetch svhn`"
        ) from None
    labels = labels.reshape(-1)
    if images.dtype != np.uint8 or images.shape != (32, 32, 3, len(labels)):
        raise UserError(
            f"{path} must hold X, uint8 (32, 32, 3, n), and y (n, 1); found {images.dtype} "
            f"{images.shape} and {len(labels)} labels: run `defquant data fetch svhn`"
        )
    wrong = labels[~np.isin(labels, np.arange(1, 11))]
    if wrong.size:
        raise UserError(f"{path}: labels must lie in 1..10, 10 for the digit 0; found {wrong[0]}")
    labels = labels.astype(np.int64) % 10
    return from_arrays(
        images.transpose(3, 2, 0, 1), labels, _DIGITS, name=_svhn_name(paths), where=str(path)
    )


def _svhn_name(paths: Mapping[str, Path]) -> str:
    """`SVHN` where the files that are there have the official counts, else with their sum."""
    counts = {}
    for split, path in paths.items():
        if path.is_file():
            # the other split says itself what is wrong when it is read
            with suppress(OSError, ValueError, zlib.error, KeyError, IndexError):
                counts[split] = mat_shapes(path, "X")["X"][-1]
    if all(counts[split] == _SVHN_OFFICIAL[split] for split in counts):
        return "SVHN"
    return f"SVHN ({sum(counts.values()):,} digits)"


def _read_npz(root: Path, split: str) -> Dataset:
    try:
        with opened(root) as raw, zipfile.ZipFile(raw) as archive:
            _check_members(archive)
        with opened(root) as raw, np.load(raw, allow_pickle=False) as file:
            images, labels, classes = _npz_arrays(file, split, str(root))
    except UserError:
        raise
    except Exception as error:  # a damaged file raises errors of many kinds
        raise UserError(
            f"{root} must be an .npz file of plain arrays ({shown(str(error), 200)}): "
            "write it again with numpy.savez"
        ) from None
    where = f"{root} ({split})"
    pixels = _to_bytes(images, where)
    names = tuple(map(str, range(classes)))
    return from_arrays(pixels, labels, names, name=root.stem, where=where)


def _check_members(archive: zipfile.ZipFile) -> None:
    """Raise `ValueError` for an array that is packed as no images are: four MB may hold four GB."""
    for member in archive.infolist():
        plain = member.compress_type in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
        if not plain or member.file_size > (64 << 20) + 100 * member.compress_size:
            raise ValueError(
                f"{shown(member.filename)!r} unpacks {member.compress_size:,} bytes to "
                f"{member.file_size:,}"
            )


def _npz_arrays(
    file: Mapping[str, NDArray[Any]], split: str, where: str
) -> tuple[NDArray[Any], NDArray[np.integer], int]:
    """Images (n, c, h, w) and labels of one split, and the number of classes in both."""
    if {"x_train", "y_train", "x_test", "y_test"} <= set(file):
        every = {part: _whole(file[f"y_{part}"], where) for part in ("train", "test")}
        images, labels = _to_nchw(file[f"x_{split}"], where), every[split]
        highest = max(part.max(initial=0) for part in every.values())
    elif {"images", "labels"} <= set(file):
        images, labels = _to_nchw(file["images"], where), _whole(file["labels"], where)
        highest = labels.max(initial=0)
        if images.shape[:1] == labels.shape:
            chosen = _every(labels, 5, split)
            images, labels = images[chosen], labels[chosen]
    else:
        raise UserError(
            f"{where} must hold x_train, y_train, x_test and y_test, or images and labels; "
            f"found {shown(', '.join(sorted(file)), 200) or 'nothing'}: name the arrays so"
        )
    return images, labels, int(highest) + 1


def _whole(labels: NDArray[Any], where: str) -> NDArray[np.integer]:
    if not np.issubdtype(labels.dtype, np.integer) or labels.size != len(labels):
        raise UserError(
            f"{where}: labels must be whole numbers, one for each image; found {labels.dtype} "
            f"{labels.shape}: store class numbers, such as argmax of one-hot rows"
        )
    wrong = labels[(labels < 0) | (labels >= _MOST_CLASSES)]
    if wrong.size:
        raise UserError(
            f"{where}: labels must lie in 0..{_MOST_CLASSES - 1}; found {wrong[0]}: number the "
            "classes from 0"
        )
    return labels.reshape(-1)


def _to_nchw(images: NDArray[Any], where: str) -> NDArray[Any]:
    """(n, h, w) gains a channel; in four dimensions the channels are the side of 1 or 3."""
    if images.ndim == 3:
        return images[:, None]
    first, last = (images.ndim == 4 and images.shape[side] in (1, 3) for side in (1, -1))
    if first == last:
        raise UserError(
            f"{where}: images must be (n, h, w), or (n, h, w, c) or (n, c, h, w) with c = 1 or 3 "
            f"and no other side so small; found {images.shape}: reshape them"
        )
    return images if first else images.transpose(0, 3, 1, 2)


def _to_bytes(images: NDArray[Any], where: str) -> NDArray[np.uint8]:
    """Floats in [0, 1] become the nearest of 256 levels."""
    found: NDArray[Any] = in_unit(images, f"{where}: ").numpy()
    levels: NDArray[np.uint8] = (
        found if found.dtype == np.uint8 else np.rint(found * 255).astype(np.uint8)
    )
    return levels


_READERS: Mapping[str, Callable[[Path, str], Dataset]] = {
    "digits": lambda _, split: _read_digits(split),
    "cifar10": read_cifar10,
    "svhn": _read_svhn,
    "folder": read_folder,
    "npz": _read_npz,
}
DATASETS = tuple(_READERS)
"""The names that `load` takes."""
