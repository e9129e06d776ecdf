"""Numeric arrays out of a MATLAB 5 file, each length checked before it is believed.

Layout (MAT-File Format, MathWorks): 128 bytes of header, then elements, each a tag (kind, length)
and its bytes, padded to 8; an array is one element of elements: flags, dimensions, name, values.
"""

import math
import os
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from defquant.files import opened

__all__ = ["mat_shapes", "read_mat"]

_TYPES = {
    1: "i1", 2: "u1", 3: "<i2", 4: "<u2", 5: "<i4", 6: "<u4", 7: "<f4", 9: "<f8", 12: "<i8",
    13: "<u8",
}  # fmt: skip
_MATRIX, _COMPRESSED = 14, 15
_NUMERIC = range(6, 16)
_COMPLEX = 0x0800
_MOST = 1 << 29
"""Bytes of one array; SVHN's largest has 225 million."""
_HEAD = 1 << 12
"""Bytes that hold flags, dimensions and name."""


def read_mat(path: Path, *names: str) -> dict[str, NDArray[Any]]:
    """The arrays `names` of the file, in the types that they are stored in, and in Fortran order.

    Raises `ValueError` where the file is cut, of another version, or holds no such array, and
    `OSError` where it cannot be read.
    """
    found = {name: _array(shape, rest) for name, shape, rest in _arrays(path, names, _MOST)}
    missing = [name for name in names if name not in found]
    if missing:
        raise ValueError(f"no array {' '.join(missing)}")
    return {name: found[name] for name in names}


def mat_shapes(path: Path, *names: str) -> dict[str, tuple[int, ...]]:
    """Shapes of the arrays `names` that the file holds, from their heads alone; raises as above."""
    return {name: shape for name, shape, _ in _arrays(path, names, _HEAD)}


def _arrays(
    path: Path, names: tuple[str, ...], most: int
) -> Iterator[tuple[str, tuple[int, ...], memoryview]]:
    """Name, shape and the element of the values, or its first bytes up to `most`."""
    with opened(path) as file:
        if file.read(128)[124:] != b"\0\1IM":
            raise ValueError("no header of a MATLAB 5 file")
        size = os.fstat(file.fileno()).st_size
        while (start := file.tell()) < size:
            kind, length = _tag(file.read(8))
            if length > size - start - 8:
                raise ValueError(f"an element of {length:,} bytes at {start:,} is cut")
            body = memoryview(file.read(min(length, most)))
            if kind == _COMPRESSED:
                kind, body = _inflated(body, most)
            if kind != _MATRIX:
                raise ValueError(f"an element of kind {kind} at {start:,}")
            name, shape, rest = _head(body)
            if name in names:
                yield name, shape, rest
            file.seek(start + 8 + length)


def _inflated(raw: memoryview, most: int) -> tuple[int, memoryview]:
    """Kind and bytes of the one element that is compressed in `raw`."""
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
