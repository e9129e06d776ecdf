"""Saved images read back: the same score, and no harm from a folder that someone altered."""

import json
import shutil
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import defquant as dq
from defquant.cli import main
from defquant.images import MANIFEST, read_manifest, rescored
from test_save_images import DATA, net, saved

FIRST = "00-clean/000000.png"


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return net()


@pytest.fixture(scope="module")
def whole(model: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "images"
    saved(folder, model, [dq.FGSM(0.05), dq.FGSM(0.2)])
    return folder


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "images"))


def test_the_same_model_scores_the_same(model: nn.Module, whole: Path) -> None:
    for batch_size in (7, 256):
        found = list(rescored(read_manifest(whole), model, batch_size=batch_size))
        assert [(r.attack, r.eps) for r in found] == [("clean", 0), ("FGSM", 0.05), ("FGSM", 0.2)]
        assert all(r.score == r.saved for r in found)
    assert found[0].score.correct > found[2].score.correct


def test_another_model(whole: Path) -> None:
    class Constant(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 3 * nn.functional.one_hot(torch.full((len(x),), 2), 4).float() + 0 * x.sum()

    found = list(rescored(read_manifest(whole), Constant().eval()))
    assert {r.score.correct for r in found} == {int((DATA.labels == 2).sum())}


def test_models_of_other_data(whole: Path) -> None:
    manifest = read_manifest(whole)
    with pytest.raises(dq.UserError, match="cannot take images of 1 x 8 x 8"):
        list(rescored(manifest, nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten()).eval()))
    with pytest.raises(dq.UserError, match="knows 9 classes, the saved images 4"):
        list(rescored(manifest, nn.Sequential(nn.Flatten(), nn.Linear(64, 9)).eval()))
    with pytest.raises(dq.UserError, match=r"labels must lie in 0\.\.2"):
        list(rescored(manifest, nn.Sequential(nn.Flatten(), nn.Linear(64, 3)).eval()))


def cut(folder: Path) -> None:
    path = folder / FIRST
    path.write_bytes(path.read_bytes()[:40])


def cut_late(folder: Path) -> None:
    path = folder / FIRST
    path.write_bytes(path.read_bytes()[:-30])


def resized(folder: Path) -> None:
    Image.new("L", (9, 8)).save(folder / FIRST)


def giant(folder: Path, side: int) -> None:
    """A PNG whose header claims `side` x `side` pixels."""
    head = b"IHDR" + struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    part = struct.pack(">I", 13) + head + struct.pack(">I", zlib.crc32(head))
    (folder / FIRST).write_bytes(
        b"\x89PNG\r\n\x1a\n" + part + struct.pack(">I", 90) + b"IDAT" + bytes(94)
    )


def huge(folder: Path) -> None:
    giant(folder, 5000)


def bomb(folder: Path) -> None:
    giant(folder, 50_000)


def coloured(folder: Path) -> None:
    Image.new("RGB", (8, 8)).save(folder / FIRST)


def jpeg(folder: Path) -> None:
    Image.new("L", (8, 8)).save(folder / FIRST, "JPEG")


def altered(folder: Path) -> None:
    pixels = np.asarray(Image.open(folder / FIRST)).copy()
    pixels[3, 3] ^= 1
    Image.fromarray(pixels).save(folder / FIRST)


def missing(folder: Path) -> None:
    (folder / FIRST).unlink()


def linked(folder: Path) -> None:
    outside = folder.parent / "outside.png"
    shutil.move(folder / FIRST, outside)
    (folder / FIRST).symlink_to(outside)


def padded(folder: Path) -> None:
    with (folder / FIRST).open("ab") as file:
        file.write(bytes(1 << 17))


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (cut, "cannot decode"), (cut_late, "cannot decode"),
        (resized, "8 x 8 pixels; found L, 9 x 8"),
        (huge, "5000 x 5000 is more than"), (bomb, "decompression bomb"),
        (coloured, "mode L"), (jpeg, "JPEG: copy the folder again"),
        (altered, "are not those that were saved"),
        (missing, "which is not there"), (linked, "a link to outside"), (padded, "far too large"),
    ],
)  # fmt: skip
def test_altered_pictures_are_named(
    harm: Callable[[Path], None], message: str, folder: Path, model: nn.Module
) -> None:
    harm(folder)
    with pytest.raises(dq.UserError, match=message) as error:
        list(rescored(read_manifest(folder), model))
    assert "000000.png" in str(error.value)
    assert "\n" not in str(error.value)


def edit(folder: Path, line: int, **changes: Any) -> None:
    lines = (folder / MANIFEST).read_text().splitlines()
    lines[line] = json.dumps(json.loads(lines[line]) | changes)
    (folder / MANIFEST).write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize(
    ("line", "changes", "message"),
    [
        (0, {"kind": "x"}, "no manifest of saved images"),
        (0, {"format": 2}, "no manifest of saved images"),
        (0, {"shape": [1, 8]}, "line 1: shape must be a list of 3"),
        (0, {"shape": [1, 9_000_000, 8]}, "sides up to 4096"),
        (0, {"pictures": 3}, "must list its 3 pictures"),
        (3, {"file": "../outside.png"}, "files inside the folder; found '../outside.png'"),
        (3, {"file": "/etc/passwd.png"}, "files inside the folder"),
        (3, {"file": "00-clean/a.svg"}, "files inside the folder"),
        (3, {"label": 4}, r"labels and answers lie in 0\.\.3"),
        (3, {"label": True}, "line 4: label must be a whole number"),
        (3, {"eps": float("nan")}, "eps must be a finite number; found nan"),
        (3, {"sha256": None}, "sha256 must be a text; found None"),
        (3, {"adversarial": 4}, "labels and answers"),
        (3, {"distance": 256}, r"distance lie in 0\.\.255"),
    ],
)
def test_altered_manifests_are_named(
    line: int, changes: dict[str, Any], message: str, folder: Path
) -> None:
    edit(folder, line, **changes)
    with pytest.raises(dq.UserError, match=message):
        read_manifest(folder)


def test_cut_manifests(folder: Path, tmp_path: Path) -> None:
    path = folder / MANIFEST
    text = path.read_text()
    for content in (text[:-300], "", "[" * 100_000, "\0"):
        path.write_text(content)
        with pytest.raises(dq.UserError, match=r"cut|nested too deep"):
            read_manifest(folder)
    path.write_bytes(b"\xff\xfe\xff")
    with pytest.raises(dq.UserError, match="must be UTF-8"):
        read_manifest(folder)
    with pytest.raises(dq.UserError, match="wrote to the end"):
        read_manifest(tmp_path / "none")


def test_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, images = tmp_path / "run", str(tmp_path / "images")
    words = ["--data", "digits", "--train-images", "128", "--epochs", "1", "--batch-size", "32"]
    assert main(["train", *words, "--bits", "4", "--out", str(run)]) == 0
    words = ["attack", str(run), "--attack", "pgd-2", "--eps", "8/255", "--images", "24"]
    assert main([*words, "--examples", "0", "--save-images", images]) == 0
    onnx = str(tmp_path / "m.onnx")
    words = ["export", str(run), onnx, "--images", "24", "--attacked", "4"]
    words += ["--attack", "fgsm", "--eps", "8/255", "--queries", "0", "--repeats", "0"]
    assert main(words) == 0
    capsys.readouterr()
    assert main(["rescore", images, str(run), "--json"]) == 0
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [r["attack"] for r in records] == ["clean", "PGD-2"]
    assert all(r["correct"] == r["saved_correct"] and r["total"] == 24 for r in records)
    assert main(["rescore", images, onnx]) == 0
    assert "when saved" in capsys.readouterr().out
    for words, message in (
        ([images], "rescore takes one model"),
        ([images, str(run), "--weights", "w"], "--weights belongs to --model_file"),
        ([images, str(run), "--batch-size", "0"], "--batch_size"),
        ([images, str(tmp_path / "no.onnx")], "no file"),
        ([str(run), str(run)], "no manifest.jsonl in"),
    ):
        assert main(["rescore", *words]) == 2
        assert message in capsys.readouterr().err
