"""`load`: one call for every data set; digits, SVHN's MATLAB files, npz, and what `pack` wrote."""

import json
import math
import os
import struct
import zipfile
import zlib
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import safetensors.torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from defquant.data.cifar import read_cifar10
from defquant.data.dataset import Dataset, as_labels, from_arrays, in_unit
from defquant.data.pictures import read_folder
from defquant.errors import UserError, near, shown, visible
from defquant.files import opened, write_bytes
from defquant.typed import from_mapping, parse_json

__all__ = ["DATASETS", "load", "pack", "read_mat"]

_SUFFIX = ".safetensors"  # of a packed file
_KEY, _FORMAT = "defquant-data", 1
_DIGITS = tuple("0123456789")
_SVHN = "{}_32x32.mat"
_SVHN_OFFICIAL = {"train": 73_257, "test": 26_032}
_MOST_CLASSES = 10_000

_TYPES = {
    1: "i1", 2: "u1", 3: "<i2", 4: "<u2", 5: "<i4", 6: "<u4", 7: "<f4", 9: "<f8", 12: "<i8",
    13: "<u8",
}  # fmt: skip
_MATRIX, _COMPRESSED = 14, 15
_NUMERIC = range(6, 16)
_COMPLEX = 0x0800
_MOST = 1 << 29  # bytes of one array; SVHN's largest has 225 million
_HEAD = 1 << 12  # bytes that hold flags, dimensions and name


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
        root: where it lies; digits need none. Or the file that `data pack` made of it.
        split: `train` or `test`.

    Raises `UserError` for an unknown name or split, and for files missing, broken or out of range.
    """
    if name not in _READERS:
        known = ", ".join(DATASETS)
        raise UserError(f"unknown data set {name!r}{near(name, DATASETS)}: choose one of {known}")
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
        if path.suffix == _SUFFIX and path.is_file():
            return _read_packed(name, path, split)
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
    path = root / _SVHN.format(split)
    if not path.is_file():
        raise UserError(f"found no {path.name} in {root}: run `defquant data fetch svhn`")
    try:
        images, labels = read_mat(path, "X", "y")
    except (ValueError, zlib.error) as error:
        raise UserError(
            f"{path} must be a MATLAB file with X and y ({error}): it may be cut, run "
            "`defquant data fetch svhn`"
        ) from None
    labels, counts = labels.reshape(-1), {split: labels.size}
    with suppress(OSError, ValueError, zlib.error):  # it says itself what is wrong when it is read
        other = "test" if split == "train" else "train"
        counts[other] = read_mat(root / _SVHN.format(other), "y")[0].size
    if images.dtype != np.uint8 or images.shape != (32, 32, 3, len(labels)):
        raise UserError(
            f"{path} must hold X, uint8 (32, 32, 3, n), and y (n, 1); found {images.dtype} "
            f"{images.shape} and {len(labels)} labels: run `defquant data fetch svhn`"
        )
    wrong = labels[~np.isin(labels, np.arange(1, 11))]
    if wrong.size:
        raise UserError(f"{path}: labels must lie in 1..10, 10 for the digit 0; found {wrong[0]}")
    official = all(_SVHN_OFFICIAL[part] == count for part, count in counts.items())
    name = "SVHN" if official else f"SVHN ({sum(counts.values()):,} digits)"
    pixels, known = images.transpose(3, 2, 0, 1), labels.astype(np.int64) % 10
    return from_arrays(pixels, known, _DIGITS, name=name, where=str(path))


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
    unit = in_unit(images, f"{where}: ").numpy()  # floats become the nearest of 256 levels
    pixels = unit if unit.dtype == np.uint8 else np.rint(unit * 255).astype(np.uint8)
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
    """Whole numbers (n,), also of (n, 1)."""
    flat = labels.reshape(-1) if labels.size == len(labels) else labels
    return as_labels(flat, len(flat), _MOST_CLASSES, f"{where}: ").numpy()


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


def read_mat(path: Path, *names: str) -> list[NDArray[Any]]:
    """The arrays `names` of a MATLAB 5 file, as they are stored, and in Fortran order.

    Layout (MAT-File Format, MathWorks): 128 bytes of header, then elements, each a tag (kind,
    length) and its bytes, padded to 8; an array is one element of elements: flags, dimensions,
    name, values. Each length is checked before it is believed; of an array that is not asked for
    the head alone is read.

    Raises `ValueError` or `zlib.error` where the file is cut, of another version, or holds no such
    array, and `OSError` where it cannot be read.
    """
    found = {}
    with opened(path) as file:
        if file.read(128)[124:] != b"\0\1IM":
            raise ValueError("no header of a MATLAB 5 file")
        size = os.fstat(file.fileno()).st_size
        while (start := file.tell()) < size:
            kind, length = _tag(file.read(8))
            if length > size - start - 8:
                raise ValueError(f"an element of {length:,} bytes at {start:,} is cut")
            for most in (_HEAD, _MOST):
                file.seek(start + 8)
                inner, body = kind, memoryview(file.read(min(length, most)))
                if kind == _COMPRESSED:
                    inner, body = _inflated(body, most)
                if inner != _MATRIX:
                    raise ValueError(f"an element of kind {inner} at {start:,}")
                name, shape, rest = _head(body)
                if name not in names:
                    break
            else:
                found[name] = _array(shape, rest)
            file.seek(start + 8 + length)
    if missing := [name for name in names if name not in found]:
        raise ValueError(f"no array {' '.join(missing)}")
    return [found[name] for name in names]


def _inflated(raw: memoryview, most: int) -> tuple[int, memoryview]:
    """Kind and bytes, `most` of them, of the one element that is compressed in `raw`."""
    stream = zlib.decompressobj()
    start = stream.decompress(raw, _HEAD)
    kind, length = _tag(start[:8])
    if length > _MOST:
        raise ValueError(f"an array of {length:,} bytes, more than {_MOST:,}")
    if most > _HEAD and length + 8 > len(start):
        start += stream.decompress(stream.unconsumed_tail, length + 8 - len(start))
        if len(start) < length + 8:
            raise ValueError("a compressed array is cut")
    return kind, memoryview(start)[8 : 8 + length]


def _head(body: memoryview) -> tuple[str, tuple[int, ...], memoryview]:
    _, flags, body = _element(body)
    _, dimensions, body = _element(body)
    _, name, body = _element(body)
    flag = int.from_bytes(flags[:4], "little")
    shape = tuple(np.frombuffer(dimensions, "<i4").tolist())
    if flag & 0xFF not in _NUMERIC or flag & _COMPLEX or len(shape) > 8 or min(shape) < 0:
        return "", (), body  # no plain array: nobody asks for it
    return bytes(name).decode("ascii"), shape, body


def _array(shape: tuple[int, ...], rest: memoryview) -> NDArray[Any]:
    kind, values, _ = _element(rest)
    if kind not in _TYPES:
        raise ValueError(f"values of kind {kind}")
    array = np.frombuffer(values, _TYPES[kind])
    if array.size != math.prod(shape):
        raise ValueError(f"{array.size:,} values for an array of shape {shape}")
    return array.reshape(shape, order="F")


def _element(body: memoryview) -> tuple[int, memoryview, memoryview]:
    """Kind and bytes of the first element of `body`, and what follows it."""
    kind, length = _tag(body[:8])
    start, after = 8, 8 + length + -length % 8
    if kind >> 16:  # up to four bytes, kept within the tag
        kind, length, start, after = kind & 0xFFFF, kind >> 16, 4, 8
    if length > len(body) - start or (start == 4 and length > 4):
        raise ValueError(f"an element of {length:,} bytes where {len(body):,} are left")
    return kind, body[start : start + length], body[after:]


def _tag(raw: bytes | memoryview) -> tuple[int, int]:
    if len(raw) < 8:
        raise ValueError("a tag is cut")
    kind, length = struct.unpack("<II", raw)
    return kind, length


@dataclass(frozen=True)
class _Facts:
    """What the header holds in one JSON text, so that equal data make equal files."""

    format: int
    data: str  # as `load` takes it
    classes: tuple[str, ...]
    flip: bool
    shift: int
    names: dict[str, str]  # of each split, as shown
    fingerprints: dict[str, str]


def pack(data: str, train: Dataset, test: Dataset, path: Path) -> Path:
    """Write both splits of the data set `data` to `path`: uint8 images, uncompressed, and labels.

    Raises `UserError` where the name does not end in `.safetensors`, or cannot be written.
    """
    if path.suffix != _SUFFIX:
        raise UserError(f"a packed file is called NAME{_SUFFIX}; found {path}")
    splits = {"train": train, "test": test}
    header = {
        "format": _FORMAT, "data": data, "classes": train.classes, "flip": train.flip,
        "shift": train.shift, "names": {split: d.name for split, d in splits.items()},
        "fingerprints": {split: d.fingerprint for split, d in splits.items()},
    }  # fmt: skip
    tensors = {f"{split}.images": d.images for split, d in splits.items()}
    tensors |= {f"{split}.labels": d.labels for split, d in splits.items()}
    metadata = {_KEY: json.dumps(header)}
    return write_bytes(path, safetensors.torch.save(tensors, metadata=metadata))


def _read_packed(data: str, path: Path, split: str) -> Dataset:
    """One split of what `pack` wrote, its images mapped from the disk.

    Raises `UserError` where it is broken, holds another data set, or has another fingerprint than
    its header says.
    """
    try:
        with safe_open(path, framework="pt") as file:
            header = (file.metadata() or {}).get(_KEY)
            if header is None:
                raise UserError(f"{path} is no packed data: make one with `defquant data pack`")
            where = f"the header of {path}: "
            facts = from_mapping(_Facts, parse_json(header, f"the header of {path}"), where)
            images, labels = (file.get_tensor(f"{split}.{part}") for part in ("images", "labels"))
    except (SafetensorError, OSError, ValueError) as error:
        reason = shown(str(error), 200)
        raise UserError(f"{path} is not a whole packed file ({reason}): pack it again") from None
    if facts.format != _FORMAT or facts.data != data:
        raise UserError(
            f"{path} must hold {data} in format {_FORMAT}; found {shown(facts.data)} in format "
            f"{facts.format}: name another file or other data"
        )
    name = shown(visible(facts.names.get(split, "")), 100)
    found = Dataset(images, labels, facts.classes, name, facts.flip, facts.shift)
    if found.fingerprint != facts.fingerprints.get(split):
        raise UserError(f"{path} holds other images or labels than it says: pack it again")
    return found


_READERS: Mapping[str, Callable[[Path, str], Dataset]] = {
    "digits": lambda _, split: _read_digits(split),
    "cifar10": read_cifar10,
    "svhn": _read_svhn,
    "folder": read_folder,
    "npz": _read_npz,
}
DATASETS = tuple(_READERS)  # the names that `load` takes
