"""Binary files from elsewhere: mutated ones, and the smallest of each kind that once did harm."""

import gzip
import io
import os
import signal
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from defquant.data import load
from defquant.data.pictures import decode
from defquant.data.readers import pack
from defquant.errors import UserError
from defquant.files import read_json
from harness import SECONDS, Read, fuzz, outcome
from test_data import batch, encode, in_memory, npz, parquet, pixels, svhn

# ---------------------------------------------------------------------- a small file of each kind


def picture(kind: str) -> bytes:
    return encode(pixels(8, 8, 3), kind)


def tar(*members: tuple[tarfile.TarInfo, bytes]) -> bytes:
    def write(buffer: io.BytesIO) -> None:
        with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT) as file:
            for info, content in members:
                info.size = len(content)
                file.addfile(info, io.BytesIO(content))

    return in_memory(write)


def small_tar() -> bytes:
    return tar((tarfile.TarInfo("x" * 120), b""), (tarfile.TarInfo("a/test_batch"), batch(1)))


def small_npz(compressed: bool = False) -> bytes:
    return npz(pixels(10, 4, 4), np.arange(10) % 2, compressed=compressed)


def small_pack() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "a.safetensors")
        digits = load("digits").first(2), load("digits", split="test").first(3)
        return pack("svhn", *digits, path).read_bytes()


def inside(name: str) -> bytes:
    with zipfile.ZipFile(io.BytesIO(small_npz())) as file:
        return file.read(name)


def rows(n: int, compression: str = "none") -> bytes:
    return parquet([picture("PNG")] * n, list(range(n)), compression=compression)


FILES = {
    "svhn": "train_32x32.mat", "batch": "test_batch", "tar": "cifar-10-python.tar.gz",
    "packed": "cifar-10-python.tar.gz", "npz": "a.npz", "array": "a.npz",
    "parquet": "test-0.parquet", "data": "a.safetensors",
}  # fmt: skip


def reader(kind: str, folder: Path) -> Read:
    """Of a tar's bytes, or an array's, which are packed here, so that changes reach the inside."""
    if kind == "picture":
        return lambda raw: decode([picture("PNG"), raw], "here")
    path = folder / FILES[kind]
    words = {
        "svhn": ("svhn", folder),
        "data": ("svhn", path),
        "npz": ("npz", path),
        "array": ("npz", path),
    }

    def read(raw: bytes) -> object:
        if kind == "array":
            with zipfile.ZipFile(path, "w") as file:
                file.writestr("images.npy", raw)
                file.writestr("labels.npy", inside("labels.npy"))
        else:
            path.write_bytes(gzip.compress(raw, 1) if kind == "tar" else raw)
        return load(*words.get(kind, ("cifar10", folder, "test")))

    return read


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "seeds", "tokens", "share"),
    [
        ("picture", lambda: map(picture, ("PNG", "JPEG", "WEBP", "BMP", "GIF")), (), 1),
        ("svhn", lambda: [svhn(3)], (), 2), ("svhn", lambda: [svhn(3, True)], (), 2),
        ("batch", lambda: [batch(1)], [bytes([code]) for code in range(128)], 1),  # operations
        ("tar", lambda: [small_tar()], (), 2),
        ("packed", lambda: [gzip.compress(small_tar())], (), 2),
        ("npz", lambda: [small_npz(), small_npz(True)], (), 2),
        ("array", lambda: [inside("images.npy")], [b"999999999", b"'|O'", b"(", b"{"], 2),
        ("data", lambda: [small_pack()], [b"999999999", b"-1", b"{"], 2),
        ("parquet", lambda: [rows(3), rows(9, "snappy")], (), 1),
    ],
)  # fmt: skip
def test_fuzz(
    tmp_path: Path, kind: str, seeds: Callable[[], Sequence[bytes]], tokens: Sequence[bytes],
    share: int,
) -> None:  # fmt: skip
    fuzz(reader(kind, tmp_path), [*seeds()], tokens=tokens, seconds=SECONDS / share)


# ----------------------------------------------------------------------------- what once did harm


def giant(side: int) -> bytes:
    return in_memory(lambda file: Image.new("1", (side, side)).save(file, "PNG"))


def laughs(depth: int) -> bytes:
    """A key that is a tuple of twenty tuples of twenty ... tuples."""
    levels = b"".join(b"(" + b"h\0" * 20 + b"tq\0" for _ in range(depth))
    return b"\x80\x02})q\0" + levels + b"K\0s."


def long_name(kind: bytes) -> bytes:
    info = tarfile.TarInfo("long")
    info.type, info.size = kind, 4 << 30
    return info.tobuf(tarfile.GNU_FORMAT) + bytes(1 << 12)


def sparse() -> bytes:
    info = tarfile.TarInfo("a/test_batch")
    info.type = tarfile.GNUTYPE_SPARSE
    return tar((info, b""))


def one_value(value: bytes, rows: int) -> bytes:
    """A few kB that were eight MB of labels, and fifty GB of images."""
    codes = pa.DictionaryArray.from_arrays(pa.array(np.zeros(rows, np.int32)), [value])
    image = pa.StructArray.from_arrays([codes], ["bytes"])
    raw = parquet(image, np.zeros(rows, np.int64), compression="gzip")
    assert len(raw) < 20_000
    return raw


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n{ } loop\n"
OPENED = "PNG, JPEG, WebP, BMP or GIF"
HARMFUL: dict[str, tuple[str, Callable[[], bytes], str]] = {
    **{kind: ("picture", partial(picture, kind), OPENED) for kind in ("PPM", "TIFF", "TGA", "ICO")},
    "postscript, which is not run": ("picture", lambda: POSTSCRIPT, OPENED),
    "giant": ("picture", lambda: giant(9400), "4096 pixels a side"),
    "large": ("picture", lambda: giant(4000), "one size"),
    "memo": ("batch", lambda: b"\x80\x02]r\xff\xff\xff\x1f.", "b'data', uint8"),
    "laughs": ("batch", lambda: laughs(20), "b'data', uint8"),
    "deep": ("batch", lambda: b"(" * 50_000 + b"l" * 50_000 + b".", "b'data', uint8"),
    "long name": ("tar", lambda: long_name(tarfile.GNUTYPE_LONGNAME), "or header of 4,294,967,"),
    "long header": ("tar", lambda: long_name(tarfile.XHDTYPE), "or header of 4,294,967,"),
    "members": (
        "tar", lambda: tar(*((tarfile.TarInfo(f"{i}"), b"") for i in range(1001))),
        "up to 1,000 files",
    ),
    "sparse": ("tar", sparse, "files and folders only"),
    "npz bomb": (
        "npz", lambda: npz(np.zeros((100, 1024, 1024), np.uint8), compressed=True),
        "'images.npy' unpacks",
    ),
    "rows": ("parquet", lambda: one_value(b"x", 1 << 20), "1,048,576 rows and"),
    "size": ("parquet", lambda: one_value(bytes(1 << 24), 3000), "cannot decode"),
}  # fmt: skip


@pytest.mark.parametrize("name", HARMFUL)
def test_a_small_file_costs_little(tmp_path: Path, name: str) -> None:
    kind, raw, said = HARMFUL[name]
    assert said in (outcome(reader(kind, tmp_path), raw()) or "")


def test_a_changed_tag_of_a_mat_kills_nothing(tmp_path: Path) -> None:
    """SciPy 1.17 dies of byte 185 = 0xf5: it reads far beyond the file."""
    whole = svhn(3)
    for place in range(176, 192):
        outcome(reader("svhn", tmp_path), whole[:place] + b"\xf5" + whole[place + 1 :])


@pytest.mark.parametrize("name", ["pipe", "/dev/zero", "folder"])
def test_what_is_no_file_is_not_read(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    assert "not a regular file" in (outcome(lambda _: read_json(tmp_path / name), b"") or "")


def rude(_: bytes) -> object:
    raise UserError("far too long " * 100)


@pytest.mark.parametrize(
    ("read", "fault"),
    [
        (lambda _: os.kill(os.getpid(), signal.SIGKILL), "SIGKILL"),
        (lambda _: os.close(-1), "OSError"), (lambda _: bytearray(300 << 20), "MiB"),
        (rude, "not one short line"),
    ],
)  # fmt: skip
def test_the_harness_sees(read: Read, fault: str) -> None:
    with pytest.raises(AssertionError, match=rf"(?s){fault}.*5 bytes: b'bytes'"):
        outcome(read, b"bytes")
