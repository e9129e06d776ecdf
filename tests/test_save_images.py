"""Adversarial images as files: what is written, and that the 8-bit score is of these files."""

import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import defquant as dq
from conftest import tiny_images
from defquant.attacks import Attack, Composition, Single
from defquant.attacks.names import parse_attack
from defquant.cli import main
from defquant.evaluate import answers, robust
from defquant.images import MANIFEST, fingerprint_of, measure_and_save, read_manifest
from defquant.measure import Subject
from defquant.results import Measurement, read_folder, read_jsonl

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
    folder: Path, model: nn.Module, attacks: list[Single | Composition], *, batch_size: int = 256
) -> list[Measurement]:
    subject = Subject("your model", "net")
    (folder.parent / "run").mkdir(exist_ok=True)
    return list(
        measure_and_save(
            folder, folder.parent / "run", model, subject, DATA, attacks, seed=3,
            batch_size=batch_size,
        )
    )  # fmt: skip


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


def test_the_images_are_those_of_the_score(model: nn.Module, tmp_path: Path) -> None:
    """At a whole number of levels FGSM and the score's own walk lose nothing by rounding."""
    eps = 50 / 255
    found = saved(tmp_path / "images", model, [dq.FGSM(eps)])
    assert found[1].correct == found[2].correct < found[0].correct


def test_wrong_images_are_saved_as_they_are_and_curves_fall(tmp_path: Path) -> None:
    torch.manual_seed(1)
    untrained = nn.Sequential(nn.Flatten(), nn.Linear(64, 4)).eval()
    attacks = [parse_attack("random", eps) for eps in (4 / 255, 8 / 255, 64 / 255)]
    found = saved(tmp_path / "images", untrained, attacks)
    scores = [m.correct for m in found if m.attack == "Random (8-bit)"]
    assert scores == sorted(scores, reverse=True)
    for picture in read_manifest(tmp_path / "images").pictures:
        if picture.clean != picture.label:
            assert picture.distance == 0


@pytest.mark.parametrize("name", ["pgd-4", "square-15", "adaptive-4", "fab-5"])
def test_neither_batch_nor_neighbours_matter(name: str, model: nn.Module, tmp_path: Path) -> None:
    attack = parse_attack(name, 0.1)
    saved(tmp_path / "a", model, [attack])
    saved(tmp_path / "b", model, [attack], batch_size=7)
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
    with pytest.raises(dq.UserError, match=r"need an empty folder; found 'mine\.txt'"):
        saved(folder, model, [dq.FGSM(0.1)])

    class Stop(dq.FGSM):
        @property
        def plan(self):  # type: ignore[no-untyped-def]
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        saved(tmp_path / "b", model, [Stop(0.1)])
    assert not (tmp_path / "b" / MANIFEST).exists()
    two = dq.Dataset(torch.zeros(4, 2, 8, 8, dtype=torch.uint8), torch.zeros(4).long(), ("a",), "x")
    attacks: list[Single | Composition] = [dq.FGSM(0.1)]
    with pytest.raises(dq.UserError, match="1 or 3 channels; found an image of 2"):
        list(
            measure_and_save(
                tmp_path / "c", tmp_path / "run",
                nn.Sequential(nn.Flatten(), nn.Linear(128, 2)).eval(),
                Subject("your model", "net"), two, attacks,
            )
        )  # fmt: skip


def test_foreign_attacks_are_refused(model: nn.Module, tmp_path: Path) -> None:
    def mine(model: nn.Module, x: torch.Tensor, y: torch.Tensor, **_: object) -> torch.Tensor:
        return x

    parts: tuple[Attack, ...] = (mine,)
    with pytest.raises(dq.UserError, match="only attacks of this library are saved"):
        saved(tmp_path / "images", model, [dq.Worst(parts)])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "small"
    words = ["--data", "digits", "--train-images", "128", "--epochs", "1", "--batch-size", "32"]
    assert main(["train", *words, "--out", str(out)]) == 0
    return out


def test_from_the_command_line(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["attack", str(run), "--attack", "fgsm", "--eps", "8/255", "--images", "20"]
    words += ["--examples", "0"]
    capsys.readouterr()
    assert main([*words, "--save-images", str(tmp_path / "s")]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[-1] == str(tmp_path / "s" / MANIFEST)
    assert any("FGSM (8-bit)" in line for line in out)
    assert [m.attack for m in read_folder(run)] == ["clean", "FGSM", "FGSM (8-bit)"]
    assert main([*words, "--save-images", str(tmp_path / "s")]) == 2
    assert "need an empty folder" in capsys.readouterr().err
    assert main([*words, str(run), "--save-images", str(tmp_path / "t")]) == 2
    command = ["attack", str(run), str(run), "--save-images", str(tmp_path / "t")]
    assert main(command) == 2
    assert "images of one run; found 2" in capsys.readouterr().err
    table = tmp_path / "t.md"
    page = ["report", str(run), "--out", str(tmp_path / "p.html"), "--markdown", str(table)]
    assert main(page) == 0
    assert "FGSM (8-bit) 8/255" in table.read_text()


def test_a_killed_run_leaves_no_manifest(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "killed"
    words = ["attack", str(run), "--attack", "fgsm", "pgd-400", "--eps", "8/255", "--images", "40"]
    command = [sys.executable, "-m", "defquant", *words, "--save-images", str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if b"FGSM (8-bit)" in line or b"PGD" in line:
                process.send_signal(signal.SIGKILL)
                break
    assert not (folder / MANIFEST).exists()
    assert main(["rescore", str(folder), str(run)]) == 2
