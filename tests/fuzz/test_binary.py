"""Binary files from elsewhere: mutated ones, and the smallest of each kind that once did harm."""

import io
import os
import signal
from pathlib import Path

import numpy as np
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
    raise UserError("two\nlines")


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


def test_postscript_is_not_run() -> None:
    assert "PNG, JPEG, WebP, BMP or GIF" in (outcome(read_picture, POSTSCRIPT) or "")
