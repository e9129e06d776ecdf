"""CIFAR-10 as its authors pack it (pickles, in a tar.gz or loose) and as the hub does (parquet)."""

import hashlib
import os
import pickletools
from collections.abc import Mapping, Sequence
from contextlib import suppress
from itertools import pairwise, takewhile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from defquant.data.dataset import Dataset, from_arrays
from defquant.data.fetch import LARGEST, read_tar
from defquant.data.pictures import decode
from defquant.errors import UserError, shown
from defquant.files import cache_folder, opened, read_bytes, write_whole

__all__ = ["read_cifar10"]

_CLASSES = (
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
)  # fmt: skip
_AS: dict[str, Any] = {"classes": _CLASSES, "flip": True, "shift": 4}
_BATCHES = {"train": tuple(f"data_batch_{i}" for i in range(1, 6)), "test": ("test_batch",)}
_OFFICIAL = {"train": 50_000, "test": 10_000}
_ARCHIVE = "cifar-10-python.tar.gz"
_AGAIN = "run `defquant data fetch cifar10`"
_WORTH_CACHING = 5_000
"""Images; fewer decode in half a second."""
_CACHE = 1 << 30  # bytes of decoded images that are kept; CIFAR-10 has a sixth of it


def read_cifar10(root: Path, split: str) -> Dataset:
    """Read one split from `root`, in the first of these forms that is there.

    1. the official pickles, in the folder or in its `cifar-10-batches-py/`;
    2. the official `cifar-10-python.tar.gz`, or the folder that holds it;
    3. the hub's `train-*.parquet` and `test-*.parquet`, in the folder or in its `plain_text/`.

    Raises `UserError` where nothing of this is there, or it is broken.
    """
    names = _BATCHES[split]
    for folder in (root, root / "cifar-10-batches-py"):
        there = {name: folder / name for name in names if (folder / name).is_file()}
        if there:
            batches = {name: read_bytes(path, LARGEST) for name, path in there.items()}
            return _from_pickles(batches, names, folder)
    archive = root if root.is_file() else root / _ARCHIVE
    if archive.exists():
        members = read_tar(archive, lambda path, _: path.name in names)
        return _from_pickles({path.name: raw for path, raw in members}, names, archive)
    for folder in (root, root / "plain_text"):
        shards = sorted(folder.glob(f"{split}-*.parquet"))
        if shards:
            return _from_parquet(shards, split)
    raise UserError(
        f"found no CIFAR-10 {split} set in {root}: looked for {names[0]}, "
        f"cifar-10-batches-py/{names[0]}, {_ARCHIVE} and {split}-*.parquet; {_AGAIN}"
    )


def _from_pickles(found: Mapping[str, bytes], names: Sequence[str], where: Path) -> Dataset:
    missing = [name for name in names if name not in found]
    if missing:
        raise UserError(f"{where} must hold all batches; missing {' '.join(missing)}: {_AGAIN}")
    parts = [_read_batch(found[name], f"{where}/{name}") for name in names]
    images, labels = (np.concatenate(part) for part in zip(*parts, strict=True))
    counts = {len(part) for _, part in parts}
    few = f"first {min(counts):,}" if len(counts) == 1 else "parts"
    name = "CIFAR-10" if counts == {10_000} else f"CIFAR-10 ({few} of each batch)"
    return from_arrays(images, labels, where=str(where), name=name, **_AS)


_ARRAYS = ("_reconstruct", "ndarray", "dtype")  # what a pickled array calls


def _read_batch(raw: bytes, where: str) -> tuple[NDArray[np.uint8], NDArray[np.integer]]:
    """Images (n, 3, 32, 32) and labels (n,) of one official batch.

    Its constants stand in this order: `data`, n, 3072, `u1`, whether columns come first, the
    pixels; and `labels`, then each label.
    """
    values = _constants(raw, where)
    try:
        told = values[values.index(b"data") :]
        end = list(pairwise(map(type, told))).index((bool, bytes))
        first, pixels = told[end : end + 2]
        n = len(pixels) // 3072
        after = values[values.index(b"labels") + 1 :]
        labels = list(takewhile(lambda value: type(value) is int, after))
        kind = {b"u1", "u1"} & set(told[:end])
        if (n, 3072) not in pairwise(told[:end]) or not kind or len(labels) != n:
            raise ValueError
        flat = np.frombuffer(pixels, np.uint8).reshape((n, 3072), order="F" if first else "C")
        return flat.reshape(-1, 3, 32, 32), np.array(labels, np.int64)
    except (ValueError, OverflowError):
        found = shown([shown(value, 20) for value in values[:9]], 200)
        raise UserError(
            f"{where} must hold b'data', uint8 (n, 3072), and b'labels', n integers; found "
            f"{found}: {_AGAIN}"
        ) from None


def _constants(raw: bytes, where: str) -> list[Any]:
    """What a pickle is made of, in its order: it is not run, and must call nothing but arrays."""
    values: list[Any] = []
    try:
        for operation, argument, _ in pickletools.genops(raw):
            kind = operation.name
            if kind in ("GLOBAL", "STACK_GLOBAL"):
                called = argument.split(" ") if argument else [str(v) for v in values[-2:]]
                if called[-1] not in _ARRAYS:
                    raise UserError(
                        f"{where} must be a pickle of plain arrays; found a call for "
                        f"{shown('.'.join(called))!r}, which is not run: remove the file and "
                        f"{_AGAIN}"
                    )
            elif kind in ("NEWTRUE", "NEWFALSE"):
                values.append(kind == "NEWTRUE")
            elif argument is not None and not kind.endswith(("PUT", "GET", "PROTO", "FRAME")):
                values.append(argument.encode("latin-1") if "STRING" in kind else argument)
    except UserError:
        raise
    except Exception as error:  # damaged opcodes raise errors of many kinds
        raise UserError(
            f"{where} must be a whole pickle ({shown(str(error), 200)}): it is damaged, {_AGAIN}"
        ) from None
    return values


def _from_parquet(shards: list[Path], split: str) -> Dataset:
    """All shards of one split; decoding is done once where there are many images."""
    images, labels, jpeg = [], [], False
    for path in shards:
        encoded, found = _read_parquet(path)
        images.append(_decoded(path, encoded))
        labels.append(found)
        jpeg |= any(raw.startswith(b"\xff\xd8") for raw in encoded)
    if len({part.shape[1:] for part in images}) > 1:
        raise UserError(f"all images must have one size; found several in {shards[0].parent}")
    n = sum(map(len, labels))
    notes = ["JPEG"] * jpeg + [f"{n:,} images"] * (n != _OFFICIAL[split])
    name = f"CIFAR-10 ({', '.join(notes)})" if notes else "CIFAR-10"
    where = str(shards[0].parent)
    return from_arrays(
        np.concatenate(images), np.concatenate(labels), where=where, name=name, **_AS
    )


def _read_parquet(path: Path) -> tuple[list[bytes], NDArray[np.integer]]:
    """The encoded images and the labels in one shard of the hub."""
    import pyarrow.parquet as pq

    encoded: list[bytes] = []
    labels = []
    try:
        with opened(path) as raw, pq.ParquetFile(raw) as file:
            column = "image" if "image" in file.schema_arrow.names else "img"
            rows, size = file.metadata.num_rows, path.stat().st_size
            groups = [file.metadata.row_group(i) for i in range(file.num_row_groups)]
            claimed = sum(max(group.total_byte_size, 0) for group in groups)
            if rows > size or claimed > (64 << 20) + 16 * size:  # far more than its bytes can hold
                raise ValueError(f"{rows:,} rows and {claimed:,} bytes in {size:,}")
        # a value that is stored once may stand in any number of rows: as a dictionary it stays one
        with opened(path) as raw, pq.ParquetFile(raw, read_dictionary=[f"{column}.bytes"]) as file:
            for number in range(file.num_row_groups):
                group = file.read_row_group(number, columns=[f"{column}.bytes", "label"])
                for chunk in group[column].chunks:
                    cells = chunk.field("bytes")
                    values = [*cells.dictionary.to_pylist(), b""]  # the last for empty cells
                    encoded += [
                        values[i] if i is not None else b"" for i in cells.indices.to_pylist()
                    ]
                labels.append(group["label"].to_numpy())
        whole = all(np.issubdtype(part.dtype, np.integer) for part in labels)
        if not whole or not all(isinstance(raw, bytes) and raw for raw in encoded):
            raise KeyError("an empty cell, or labels that are no integers")
    except Exception as error:  # a damaged file raises errors of many kinds
        raise UserError(
            f"{path} must be a parquet file with columns img or image (a struct with bytes) and "
            f"label (integer); found: {shown(str(error), 200)}: download it again"
        ) from None
    return encoded, np.concatenate(labels) if labels else np.empty(0, np.int64)


def _decoded(path: Path, encoded: list[bytes]) -> NDArray[np.uint8]:
    """The images of `path`, from the user's cache where it holds them."""
    if len(encoded) < _WORTH_CACHING:
        return decode(encoded, str(path))
    folder = cache_folder()
    with path.open("rb") as file:
        cached = folder / f"{hashlib.file_digest(file, 'sha256').hexdigest()}.npy"
    with suppress(OSError, ValueError, MemoryError), cached.open("rb") as file:
        images = np.lib.format.read_array(file, allow_pickle=False)
        if images.dtype == np.uint8 and images.ndim == 4 and len(images) == len(encoded):
            with suppress(OSError):
                os.utime(cached)  # used last
            return images
    images = decode(encoded, str(path))
    with suppress(UserError, OSError):  # a cache that cannot be written costs time, not the run
        write_whole(cached, lambda temporary: np.save(temporary, images))
        room = _CACHE
        for old in sorted(folder.glob("*.npy"), key=lambda old: -old.stat().st_mtime_ns):
            room -= old.stat().st_size
            if room < 0:  # used longest ago
                old.unlink(missing_ok=True)
    return images
