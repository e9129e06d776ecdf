"""Adversarial images as files: what is written and scored, read back, and altered by someone."""

import json
import shutil
import struct
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import defquant as dq
from conftest import refused, tiny_images
from defquant.attacks import Attack
from defquant.attacks.names import parse_attack
from defquant.cli import main
from defquant.evaluate import answers, robust
from defquant.images import MANIFEST, fingerprint_of, measure_and_save, read_manifest, rescored
from defquant.measure import Subject
from defquant.records import Measurement, read_folder, read_jsonl

FIRST = "00-clean/000000.png"
DATA = tiny_images(48)


def net(bits: int | None = None) -> nn.Module:
    """Learns the corners in a few steps; the same each time."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), dq.QuantReLU(bits), nn.Flatten(),
        nn.Linear(512, 4),
    )  # fmt: skip
    images = tiny_images(64, seed=1)
    dq.train(model, images, dq.TrainConfig(epochs=6, batch_size=16, lr=0.02, device="cpu"))
    return model.eval()


def saved(
    folder: Path, model: nn.Module, attacks: list[Any], *, data: dq.Dataset = DATA, batch: int = 256
) -> list[Measurement]:
    subject, run = Subject("your model", "net"), folder.parent / "run"
    run.mkdir(exist_ok=True)
    how: dict[str, Any] = {"seed": 3, "batch_size": batch}
    return list(measure_and_save(folder, run, model, subject, data, attacks, **how))


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return net()


def test_files_are_what_the_manifest_says(model: nn.Module, tmp_path: Path) -> None:
    attacks = [parse_attack(n, eps) for n in ("pgd-5", "square-20") for eps in (0.05, 0.22)]
    found = saved(tmp_path / "images", model, attacks)
    assert [m.attack for m in found[5:]] == [
        "PGD-5 (8-bit)", "PGD-5 (8-bit)", "Square-20 (8-bit)", "Square-20 (8-bit)",
    ]  # fmt: skip
    assert read_jsonl(tmp_path / "run" / "results.jsonl") == found
    manifest = read_manifest(tmp_path / "images")
    assert len(manifest.pictures) == 5 * len(DATA)
    clean = answers(model, DATA)
    for picture in manifest.pictures:
        pixels = np.asarray(Image.open(tmp_path / "images" / picture.file))[None]
        assert fingerprint_of(pixels) == picture.sha256
        original = DATA.images[picture.id].int()
        far = (torch.from_numpy(pixels.copy()).int() - original).abs().max()
        assert far == picture.distance <= picture.eps * 255 + 1e-6
        assert picture.label == DATA.labels[picture.id]
        assert picture.clean == clean[picture.id]
        unit = torch.from_numpy(pixels.copy())[None].float() / 255
        assert model(unit).argmax() == picture.adversarial
    head = manifest.head
    assert (head["data"], head["fingerprint"]) == (DATA.name, DATA.fingerprint)
    for score, m in zip(head["scores"][1:], found[5:], strict=True):
        mine = [p for p in manifest.pictures if (p.settings, p.eps) == (score["settings"], m.eps)]
        assert sum(p.adversarial == p.label for p in mine) == score["eight_bit"] == m.correct


def test_at_whole_levels_the_images_are_those_of_the_score_and_curves_fall(
    model: nn.Module, tmp_path: Path
) -> None:
    """FGSM and the score's own walk lose nothing there by rounding; wrong images stay."""
    found = saved(tmp_path / "a", model, [dq.FGSM(50 / 255)])
    assert found[1].correct == found[2].correct < found[0].correct
    torch.manual_seed(1)
    untrained = nn.Sequential(nn.Flatten(), nn.Linear(64, 4)).eval()
    attacks = [parse_attack("random", eps) for eps in (4 / 255, 8 / 255, 64 / 255)]
    found = saved(tmp_path / "b", untrained, attacks)
    scores = [m.correct for m in found if m.attack == "Random (8-bit)"]
    assert scores == sorted(scores, reverse=True)
    pictures = read_manifest(tmp_path / "b").pictures
    assert all(p.distance == 0 for p in pictures if p.clean != p.label)


@pytest.mark.parametrize("name", ["pgd-4", "square-15", "adaptive-4", "fab-5"])
def test_neither_batch_nor_neighbours_matter(name: str, model: nn.Module, tmp_path: Path) -> None:
    attack = parse_attack(name, 0.1)
    saved(tmp_path / "a", model, [attack])
    saved(tmp_path / "b", model, [attack], batch=7)
    one, two = (read_manifest(tmp_path / part).pictures for part in "ab")
    same = [a.adversarial == b.adversarial for a, b in zip(one, two, strict=True)]
    assert sum(same) >= len(same) - 1  # float32 sums differ in their last digit


def test_a_quantised_network_and_a_composition(tmp_path: Path) -> None:
    model = net(bits=2)
    attack = dq.Adaptive(40 / 255, steps=8)
    found = saved(tmp_path / "images", model, [attack])
    float_score = int(robust(model, DATA, attack, seed=3).sum())
    assert found[1].correct == float_score
    assert abs(found[2].correct - float_score) <= 4


def test_only_empty_folders_and_no_half_manifest(model: nn.Module, tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "mine.txt").write_text("x")
    refused(lambda: saved(folder, model, [dq.FGSM(0.1)]), "need an empty folder; found 'mine.txt'")

    class Stop(dq.FGSM):
        @property
        def plan(self):  # type: ignore[no-untyped-def]
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        saved(tmp_path / "b", model, [Stop(0.1)])
    assert not (tmp_path / "b" / MANIFEST).exists()
    two = dq.Dataset(torch.zeros(4, 2, 8, 8, dtype=torch.uint8), torch.zeros(4).long(), ("a",), "x")
    flat = nn.Sequential(nn.Flatten(), nn.Linear(128, 2)).eval()
    refused(lambda: saved(tmp_path / "c", flat, [dq.FGSM(0.1)], data=two), "found an image of 2")

    def mine(model: nn.Module, x: torch.Tensor, y: torch.Tensor, **_: object) -> torch.Tensor:
        return x

    parts: tuple[Attack, ...] = (mine,)
    refused(lambda: saved(tmp_path / "d", model, [dq.Worst(parts)]), "only attacks of this library")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "small"
    words = ["--data", "digits", "--train-images", "128", "--epochs", "1", "--batch-size", "32"]
    words += ["--bits", "4", "--weight-bits", "8", "--deployable"]
    assert main(["train", *words, "--out", str(out)]) == 0
    return out


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


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten()), "cannot take images of 1 x 8 x 8"),
        (nn.Sequential(nn.Flatten(), nn.Linear(64, 9)), "knows 9 classes, the saved images 4"),
        (nn.Sequential(nn.Flatten(), nn.Linear(64, 3)), "knows 3 classes, the saved images 4"),
    ],
)
def test_models_of_other_data(whole: Path, other: nn.Module, said: str) -> None:
    refused(lambda: list(rescored(read_manifest(whole), other.eval())), said)


def giant(folder: Path, side: int) -> None:
    """A PNG whose header claims `side` x `side` pixels."""
    head = b"IHDR" + struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    part = struct.pack(">I", 13) + head + struct.pack(">I", zlib.crc32(head))
    (folder / FIRST).write_bytes(
        b"\x89PNG\r\n\x1a\n" + part + struct.pack(">I", 90) + b"IDAT" + bytes(94)
    )


def altered(folder: Path) -> None:
    pixels = np.asarray(Image.open(folder / FIRST)).copy()
    pixels[3, 3] ^= 1
    Image.fromarray(pixels).save(folder / FIRST)


def linked(folder: Path) -> None:
    outside = folder.parent / "outside.png"
    shutil.move(folder / FIRST, outside)
    (folder / FIRST).symlink_to(outside)


def rewritten(change: Callable[[bytes], bytes]) -> Callable[[Path], object]:
    return lambda folder: (folder / FIRST).write_bytes(change((folder / FIRST).read_bytes()))


def drawn(mode: str, size: tuple[int, int] = (8, 8), form: str = "PNG") -> Callable[[Path], None]:
    return lambda folder: Image.new(mode, size).save(folder / FIRST, form)


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (rewritten(lambda raw: raw[:40]), "cannot decode"),
        (rewritten(lambda raw: raw[:-30]), "cannot decode"),
        (rewritten(lambda raw: raw + bytes(1 << 17)), "far too large"),
        (drawn("L", (9, 8)), "8 x 8 pixels; found L, 9 x 8"),
        (drawn("RGB"), "mode L"),
        (drawn("L", form="JPEG"), "JPEG: copy the folder again"),
        (partial(giant, side=5000), "5000 x 5000 is more than"),
        (partial(giant, side=50_000), "decompression bomb"),
        (altered, "are not those that were saved"),
        (lambda folder: (folder / FIRST).unlink(), "which is not there"),
        (linked, "a link to outside"),
    ],
)
def test_altered_pictures_are_named(
    harm: Callable[[Path], object], message: str, folder: Path, model: nn.Module
) -> None:
    harm(folder)
    refused(lambda: list(rescored(read_manifest(folder), model)), message, "000000.png")


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
        (3, {"label": 4}, "labels and answers lie in 0..3"),
        (3, {"label": True}, "line 4: label must be a whole number"),
        (3, {"eps": float("nan")}, "eps must be a finite number; found nan"),
        (3, {"sha256": None}, "sha256 must be a text; found None"),
        (3, {"adversarial": 4}, "labels and answers"),
        (3, {"distance": 256}, "distance must lie in 0..255"),
    ],
)
def test_altered_manifests_are_named(
    line: int, changes: dict[str, Any], message: str, folder: Path
) -> None:
    lines = (folder / MANIFEST).read_text().splitlines()
    lines[line] = json.dumps(json.loads(lines[line]) | changes)
    (folder / MANIFEST).write_text("\n".join(lines) + "\n")
    refused(lambda: read_manifest(folder), message)


def test_cut_manifests(folder: Path, tmp_path: Path) -> None:
    path = folder / MANIFEST
    text = path.read_bytes()
    for content, said in (
        (text[:-300], "cut"), (b"", "cut"), (b"\0", "cut"), (b"[" * 100_000, "nested too deep"),
        (b"\xff\xfe\xff", "must be UTF-8"),
    ):  # fmt: skip
        path.write_bytes(content)
        refused(lambda: read_manifest(folder), said)
    refused(lambda: read_manifest(tmp_path / "none"), "wrote to the end")


def test_save_and_rescore_from_the_command_line(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images, onnx, table = (str(tmp_path / name) for name in ("images", "m.onnx", "t.md"))
    words = ["attack", str(run), "--attack", "pgd-2", "--eps", "8/255", "--images", "24"]
    words += ["--examples", "0", "--save-images"]
    capsys.readouterr()
    assert main([*words, images]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[-1] == f"{images}/{MANIFEST}"
    assert any("PGD-2 (8-bit)" in line for line in out)
    assert [m.attack for m in read_folder(run)] == ["clean", "PGD-2", "PGD-2 (8-bit)"]
    assert main(["report", str(run), "--out", f"{tmp_path}/p.html", "--markdown", table]) == 0
    assert "PGD-2 (8-bit) 8/255" in Path(table).read_text()
    export = ["export", str(run), onnx, "--images", "24", "--attacked", "4"]
    export += ["--attack", "fgsm", "--eps", "8/255", "--queries", "0", "--repeats", "0"]
    assert main(export) == 0
    capsys.readouterr()
    assert main(["rescore", images, str(run), "--json"]) == 0
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [r["attack"] for r in records] == ["clean", "PGD-2"]
    assert all(r["correct"] == r["saved_correct"] and r["total"] == 24 for r in records)
    assert main(["rescore", images, onnx]) == 0
    assert "when saved" in capsys.readouterr().out
    for wrong, message in (
        ([*words, images], "need an empty folder"),
        (["attack", str(run), str(run), "--save-images", "t"], "images of one run; found 2"),
        (["rescore", images], "rescore takes one model"),
        (["rescore", images, str(run), "--weights", "w"], "--weights belongs to --model_file"),
        (["rescore", images, str(run), "--batch-size", "0"], "--batch_size"),
        (["rescore", images, str(tmp_path / "no.onnx")], "no file"),
        (["rescore", str(run), str(run)], "no manifest.jsonl in"),
    ):
        assert main(wrong) == 2
        assert message in capsys.readouterr().err
