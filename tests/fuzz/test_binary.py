"""Binary files from elsewhere: mutated ones, and the smallest of each kind that once did harm."""

import gzip
import io
import os
import pickle
import signal
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from scipy.io import savemat

from defquant.data import load
from defquant.data.pictures import decode
from defquant.errors import UserError
from defquant.files import read_json
from harness import SECONDS, Read, fuzz, outcome

_PIXELS = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)


def picture(kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(_PIXELS).save(buffer, kind)
    return buffer.getvalue()


def read_picture(raw: bytes) -> object:
    return decode([raw], "here")


def burst(_: bytes) -> object:
    return bytearray(300 << 20)


def rude(_: bytes) -> object:
    raise UserError("far too long " * 100)


@pytest.mark.parametrize(
    ("read", "fault"),
    [
        (lambda _: os.kill(os.getpid(), signal.SIGKILL), "SIGKILL"),
        (lambda _: os.close(-1), "OSError"),
        (burst, "MiB"), (rude, "not one short line"),
    ],
)  # fmt: skip
def test_the_harness_sees(read: Read, fault: str) -> None:
    with pytest.raises(AssertionError, match=rf"(?s){fault}.*5 bytes: b'bytes'"):
        outcome(read, b"bytes")


@pytest.mark.parametrize("name", ["pipe", "/dev/zero", "folder"])
def test_what_is_no_file_is_not_read(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    said = outcome(lambda _: read_json(tmp_path / name), b"")
    assert said is not None
    assert "not a regular file" in said


@pytest.mark.slow
def test_fuzz_pictures() -> None:
    fuzz(read_picture, [picture(kind) for kind in ("PNG", "JPEG", "WEBP", "BMP", "GIF")])


def write_svhn(folder: Path, compressed: bool = False) -> bytes:
    path = folder / "train_32x32.mat"
    pixels = np.random.default_rng(1).integers(0, 256, (32, 32, 3, 3), np.uint8)
    labels = np.array([[1.0], [2.0], [10.0]])
    savemat(path, {"X": pixels, "y": labels}, do_compression=compressed)
    return path.read_bytes()


def read_svhn(folder: Path) -> Read:
    return lambda raw: ((folder / "train_32x32.mat").write_bytes(raw), load("svhn", folder))


@pytest.mark.slow
@pytest.mark.parametrize("compressed", [False, True])
def test_fuzz_mat(tmp_path: Path, compressed: bool) -> None:
    fuzz(read_svhn(tmp_path), [write_svhn(tmp_path, compressed)], seconds=SECONDS / 2)


def test_a_changed_tag_of_a_mat_kills_nothing(tmp_path: Path) -> None:
    """SciPy 1.17 dies of byte 185 = 0xf5: it reads far beyond the file."""
    whole = write_svhn(tmp_path)
    for place in range(176, 192):
        outcome(read_svhn(tmp_path), whole[:place] + b"\xf5" + whole[place + 1 :])


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n{ } loop\n"


@pytest.mark.parametrize("kind", ["PPM", "TIFF", "TGA", "ICO"])
def test_formats_that_no_data_set_needs_are_not_opened(kind: str) -> None:
    assert "PNG, JPEG, WebP, BMP or GIF" in (outcome(read_picture, picture(kind)) or "")


@pytest.mark.parametrize(("side", "said"), [(9400, "4096 pixels a side"), (4000, "one size")])
def test_a_giant_picture_is_not_decoded(side: int, said: str) -> None:
    buffer = io.BytesIO()
    Image.new("1", (side, side)).save(buffer, "PNG")
    read = lambda raw: decode([picture("PNG"), raw], "here")  # noqa: E731
    assert said in (outcome(read, buffer.getvalue()) or "")


def test_postscript_is_not_run() -> None:
    assert "PNG, JPEG, WebP, BMP or GIF" in (outcome(read_picture, POSTSCRIPT) or "")


def batch() -> bytes:
    pixels = np.random.default_rng(2).integers(0, 256, (1, 3072), np.uint8)
    return pickle.dumps({b"data": pixels, b"labels": [3], b"filenames": [b"a.png"]}, 2 + 1)


def read_batch(folder: Path) -> Read:
    return lambda raw: ((folder / "test_batch").write_bytes(raw), load("cifar10", folder, "test"))


@pytest.mark.slow
def test_fuzz_pickle(tmp_path: Path) -> None:
    tokens = [bytes([code]) for code in range(128)]  # operations
    fuzz(read_batch(tmp_path), [batch()], tokens=tokens)


def laughs(depth: int) -> bytes:
    """A key that is a tuple of twenty tuples of twenty ... tuples."""
    levels = b"".join(b"(" + b"h\0" * 20 + b"tq\0" for _ in range(depth))
    return b"\x80\x02})q\0" + levels + b"K\0s."


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (b"\x80\x02]r\xff\xff\xff\x1f.", "LONG_BINPUT"), (laughs(20), "BINGET"),
        (b"(" * 50_000 + b"l" * 50_000 + b".", "found list"),
    ],
    ids=["memo", "laughs", "deep"],
)  # fmt: skip
def test_a_small_pickle_costs_little(tmp_path: Path, raw: bytes, said: str) -> None:
    assert said in (outcome(read_batch(tmp_path), raw) or "")


def tar(*members: tuple[tarfile.TarInfo, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT) as file:
        for info, content in members:
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def read_tar(folder: Path) -> Read:
    """Of the bytes of a tar, which is packed here, so that changes reach what is inside."""
    path = folder / "cifar-10-python.tar.gz"
    return lambda raw: (path.write_bytes(gzip.compress(raw, 1)), load("cifar10", folder, "test"))


@pytest.mark.slow
def test_fuzz_tar(tmp_path: Path) -> None:
    whole = tar((tarfile.TarInfo("x" * 120), b""), (tarfile.TarInfo("a/test_batch"), batch()))
    path = tmp_path / "cifar-10-python.tar.gz"
    packed = gzip.compress(whole)
    fuzz(read_tar(tmp_path), [whole], seconds=SECONDS / 2)
    read = lambda raw: (path.write_bytes(raw), load("cifar10", tmp_path, "test"))  # noqa: E731
    fuzz(read, [packed], seconds=SECONDS / 2)


@pytest.mark.parametrize("kind", [tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE])
def test_a_long_name_is_not_read(tmp_path: Path, kind: bytes) -> None:
    info = tarfile.TarInfo("long")
    info.type, info.size = kind, 4 << 30
    raw = info.tobuf(tarfile.GNU_FORMAT) + bytes(1 << 12)
    assert "a name or header of 4,294,967," in (outcome(read_tar(tmp_path), raw) or "")


def test_endless_members_and_sparse_ones(tmp_path: Path) -> None:
    many = tar(*((tarfile.TarInfo(f"{i}"), b"") for i in range(1001)))
    assert "up to 1,000 files" in (outcome(read_tar(tmp_path), many) or "")
    sparse = tarfile.TarInfo("a/test_batch")
    sparse.type = tarfile.GNUTYPE_SPARSE
    assert "files and folders only" in (outcome(read_tar(tmp_path), tar((sparse, b""))) or "")


def npz(compressed: bool) -> bytes:
    buffer, save = io.BytesIO(), np.savez_compressed if compressed else np.savez
    images = np.random.default_rng(3).integers(0, 256, (10, 4, 4), np.uint8)
    save(buffer, images=images, labels=np.arange(10) % 2)
    return buffer.getvalue()


def read_npz(folder: Path) -> Read:
    return lambda raw: ((folder / "a.npz").write_bytes(raw), load("npz", folder / "a.npz"))


@pytest.mark.slow
def test_fuzz_npz(tmp_path: Path) -> None:
    """The whole file; and an array's own file, packed here, so that its check sum is right."""
    with zipfile.ZipFile(io.BytesIO(npz(False))) as file:
        images, labels = (file.read(f"{name}.npy") for name in ("images", "labels"))

    def packed(raw: bytes) -> object:
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as file:
            file.writestr("images.npy", raw)
            file.writestr("labels.npy", labels)
        return read_npz(tmp_path)(buffer.getvalue())

    fuzz(read_npz(tmp_path), [npz(False), npz(True)], seconds=SECONDS / 2)
    fuzz(packed, [images], tokens=[b"999999999", b"'|O'", b"(", b"{"], seconds=SECONDS / 2)


def test_an_npz_bomb_is_not_unpacked(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "b.npz", images=np.zeros((100, 1024, 1024), np.uint8))
    raw = (tmp_path / "b.npz").read_bytes()
    assert "'images.npy' unpacks" in (outcome(read_npz(tmp_path), raw) or "")


def parquet(rows: int, compression: str = "none") -> bytes:
    buffer = io.BytesIO()
    cell, label = {"bytes": picture("PNG"), "path": ""}, list(range(rows))
    pq.write_table(
        pa.table({"img": [cell] * rows, "label": label}), buffer, compression=compression
    )
    return buffer.getvalue()


def read_parquet(folder: Path) -> Read:
    path = folder / "test-0.parquet"
    return lambda raw: (path.write_bytes(raw), load("cifar10", folder, "test"))


@pytest.mark.slow
def test_fuzz_parquet(tmp_path: Path) -> None:
    fuzz(read_parquet(tmp_path), [parquet(3), parquet(9, "snappy")])


@pytest.mark.parametrize(
    ("value", "rows", "said"),
    [(b"x", 1 << 20, "1,048,576 rows and"), (bytes(1 << 24), 3000, "cannot decode")],
    ids=["rows", "size"],
)
def test_a_parquet_value_in_many_rows(tmp_path: Path, value: bytes, rows: int, said: str) -> None:
    """A few kB that were eight MB of labels, and fifty GB of images."""
    codes, buffer = pa.array(np.zeros(rows, np.int32)), io.BytesIO()
    image = pa.StructArray.from_arrays([pa.DictionaryArray.from_arrays(codes, [value])], ["bytes"])
    table = pa.table({"img": image, "label": np.zeros(rows, np.int64)})
    pq.write_table(table, buffer, compression="gzip")
    assert len(buffer.getvalue()) < 20_000
    assert said in (outcome(read_parquet(tmp_path), buffer.getvalue()) or "")
