"""The verbs `diagnose` and `transfer` on short runs: what they print, keep and refuse."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import defquant as dq
from defquant.attacks import PGD
from defquant.cli import main
from defquant.diagnose import Effort, masking_verdict, runs, transfer_matrix
from defquant.diagnose.masking import RULES
from defquant.report import plot_matrix, text_matrix
from test_masking import Fronted, levels

TRAIN = ["train", "--data", "digits", "--train-images", "320", "--epochs", "3", "--batch-size=32"]
FAST = ["--images", "100", "--steps", "5", "--restarts", "1", "--queries", "20", "--audited", "2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    for name, flags in (
        ("float", []),
        ("two", ["--bits", "2", "--deployable"]),
        ("other", ["--seed", "1"]),
    ):
        assert main([*TRAIN, *flags, "--out", str(folder / name)]) == 0
    return folder


def call(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, list[str], list[str]]:
    capsys.readouterr()
    status = main([str(word) for word in words])
    captured = capsys.readouterr()
    return status, captured.out.splitlines(), captured.err.splitlines()


def test_diagnose_prints_three_parts_and_writes_them(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [folder / "two", "--against", folder / "float", "--eps", "4/255", *FAST]
    status, out, _ = call(capsys, "diagnose", *words, "--substitute", folder / "other")
    assert out[-1] == str(folder / "two" / "diagnosis.json")
    record = json.loads((folder / "two" / "diagnosis.json").read_text())
    assert status == int(record["verdict"] in ("FAIL", "OVERSTATED"))
    assert [n["name"] for n in record["amplification"]] == ["two", "float"]
    assert len(record["audit"]["layers"]) == len(record["amplification"][0]["layers"]) > 5
    assert 0 < record["audit"]["lower"] <= record["audit"]["bound"]
    assert [s["name"] for s in record["masking"]["signs"]] == list(RULES)
    assert (record["bits"], record["images"], record["eps"]) == (2, 100, 4 / 255)
    text = "\n".join(out)
    for head in ("Error amplification", "Lipschitz audit", "Masked gradients?"):
        assert head in text
    for sign in record["masking"]["signs"]:
        assert f"{sign['verdict']:11} {sign['name']:13} {sign['rate']:.1%}" in text
        assert sign["low"] <= sign["rate"] <= sign["high"]

    model, _ = dq.load_model(folder / "two")
    other, _ = dq.load_model(folder / "other")
    effort = Effort(steps=5, restarts=1, queries=20)
    data = dq.load("digits", None, "test").first(100)
    found = masking_verdict(model, data, 4 / 255, substitute=other, effort=effort)
    assert [s["count"] for s in record["masking"]["signs"]] == [
        s.finding.correct for s in found.signs
    ]


def test_a_fail_exits_with_1_and_the_audit_can_be_left_out(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [folder / "float", *FAST, "--no-audit", "--json"]
    status, out, _ = call(capsys, "diagnose", *words)
    record = json.loads(out[0])
    assert (status, record["audit"], len(out)) == (0, None, 1)
    assert record == json.loads((folder / "float" / "diagnosis.json").read_text())

    model, facts = dq.load_model(folder / "float")
    masked = Fronted(levels, model).eval()
    monkeypatch.setattr(runs, "load_on", lambda run, device: (masked, facts))
    status, out, _ = call(capsys, "diagnose", *words)
    assert (status, json.loads(out[0])["verdict"]) == (1, "FAIL")


FOREIGN = """
import torch
from torch import nn

class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.gate = nn.Linear(64, 10), nn.Linear(64, 10)

    def forward(self, x):
        z = nn.functional.linear(x.flatten(1), self.fc.weight, self.fc.bias)
        return z * self.gate(x.flatten(1)).sigmoid()

def make_model():
    torch.manual_seed(0)
    return Gated()

def counting():
    model = make_model()
    model.register_forward_hook(lambda m, x, y: y if y.detach().sum() > 1e9 else 2 * y)
    return model
"""


@pytest.mark.filterwarnings("always::defquant.DefquantWarning")
def test_a_model_of_ones_own_is_diagnosed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """No bound is a line, and so is what cannot be captured; neither costs the verdict."""
    (tmp_path / "own.py").write_text(FOREIGN)
    words = ["diagnose", "--data", "digits", *FAST, "--out", tmp_path / "out", "--model-file"]
    status, out, err = call(capsys, *words, f"{tmp_path}/own.py:make_model")
    assert "runs your code" in err[0] and "the model guesses" in err[1]
    record = json.loads((tmp_path / "out" / "diagnosis.json").read_text())
    assert status == int(record["verdict"] in ("FAIL", "OVERSTATED"))
    assert out[-1] == str(tmp_path / "out" / "diagnosis.json")
    assert (record["run"], record["bits"], record["masking"]["quantized"]) == ("out", None, False)
    assert [n["layer"] for n in record["audit"]["layers"]] == ["fc", "gate"]
    assert any("or more; no bound: mul of two moving tensors" in line for line in out)
    assert any(line.endswith("100 images, float") for line in out)
    _, out, err = call(capsys, *words, f"{tmp_path}/own.py:counting", "--json")
    record = json.loads(out[0])
    assert set(record["left_out"]) == {"amplification", "audit"} and record["masking"]["signs"]
    assert "it decides by the values it sees" in record["left_out"]["audit"]
    assert len(err) == 3


def test_transfer_prints_and_writes(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["transfer", folder / "two", folder / "float", "--images", "40"]
    words += ["--eps", "32/255", "--out", tmp_path / "out"]
    status, out, _ = call(capsys, *words)
    assert status == 0
    assert out[-1] == str(tmp_path / "out" / "transfer.json")
    record = json.loads((tmp_path / "out" / "transfer.json").read_text())
    assert [(n["name"], n["bits"]) for n in record["networks"]] == [
        ("two 2-bit", 2), ("float float", None),
    ]  # fmt: skip
    assert (record["images"], record["seed"]) == (40, 0)
    assert record["attack"].startswith("PGD(eps=32/255, steps=20")
    assert record["eps"] == pytest.approx(32 / 255)
    assert {"versions", "command"} <= record["evidence"].keys()
    rows = [line for line in out if line.startswith("[")]
    assert len({len(row) for row in rows}) == 1
    for i, row in enumerate(rows):
        for cell in record["cells"][2 * i : 2 * i + 2]:
            shown = f"{cell['rate']:.1%} [{cell['low']:.1%}, {cell['high']:.1%}]"
            assert shown in row
    with Image.open(tmp_path / "out" / "transfer.png") as figure:
        assert min(figure.size) > 300

    network, _ = dq.load_model(folder / "two")
    other, _ = dq.load_model(folder / "float")
    images = dq.load("digits", split="test").first(40)
    expected = transfer_matrix({"a": network, "b": other}, images, PGD(32 / 255, steps=20))
    flat = [score for line in expected.cells for score in line if score]
    assert [(c["fooled"], c["total"]) for c in record["cells"]] == [
        (s.correct, s.total) for s in flat
    ]


def test_every_run_at_every_bits(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["transfer", folder / "two", folder / "float", "--bits", "1", "2", "none"]
    words += ["--attack", "fgsm", "--images", "20", "--out", tmp_path, "--json"]
    status, out, _ = call(capsys, *words)
    assert status == 0
    cells = [json.loads(line) for line in out]
    assert len(cells) == 36
    names = [f"{run} {bits}" for run in ("two", "float") for bits in ("1-bit", "2-bit", "float")]
    assert [cell["source"] for cell in cells[::6]] == names
    assert [cell["target"] for cell in cells[:6]] == names
    assert cells == json.loads((tmp_path / "transfer.json").read_text())["cells"]


def test_two_folders_of_one_name(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    again = tmp_path / "elsewhere" / "two"
    shutil.copytree(folder / "two", again)
    words = ["transfer", folder / "two", again, "--images", "20", "--attack", "fgsm"]
    status, _, _ = call(capsys, *words, "--out", tmp_path / "out")
    record = json.loads((tmp_path / "out" / "transfer.json").read_text())
    assert status == 0
    for network, run in zip(record["networks"], (folder / "two", again), strict=True):
        name = network["name"].removesuffix(" 2-bit")
        assert str(run).endswith(name) and name != "two"
    assert len({(c["fooled"], c["total"]) for c in record["cells"]}) == 1


def test_an_empty_cell_is_a_dash(tmp_path: Path) -> None:
    cell = {"source": "a", "target": "a", "fooled": 0, "total": 0, "rate": None}
    record = {
        "networks": [{"name": "a"}], "cells": [{**cell, "low": None, "high": None}],
        "attack": "PGD", "images": 3, "data": "digits",
    }  # fmt: skip
    assert text_matrix(record)[-1].split() == ["[1]", "a", "-"]
    assert plot_matrix(record, tmp_path / "t.png").stat().st_size > 1000


def colour(folder: Path) -> Path:
    """A run of pictures of other channels and classes."""
    images, labels = np.zeros((40, 8, 8, 3), np.uint8), np.arange(40) % 4
    np.savez(folder / "colour.npz", images=images, labels=labels)
    words = ["train", "--data", "npz", "--data-root", str(folder / "colour.npz")]
    words += ["--epochs", "1", "--batch-size", "20", "--out", str(folder / "colour")]
    assert main(words) == 0
    return folder / "colour"


MISTAKES = [
    ("diagnose NONE", "no checkpoint"),
    ("diagnose RUN --against NONE", "no checkpoint"),
    ("diagnose RUN --substitute NONE", "no checkpoint"),
    ("diagnose", "diagnose needs folders of runs, or --model_file"),
    ("diagnose RUN --out OUT", "--out belongs to --model_file"),
    ("diagnose --model-file own.py:f --data digits", "--model_file needs --out"),
    ("diagnose --model-file own.py:f --data digits --out OUT --against RUN", "--against is for"),
    ("diagnose RUN --eps 8", "write 8/255"),
    ("diagnose RUN --eps 0", "eps above 0"),
    ("diagnose RUN --steps 0", "--steps must be 1 or more"),
    ("diagnose RUN --audited -1", "0 images (none) or more"),
    ("diagnose RUN --against RUN", "named once"),
    ("diagnose RUN --images 100000", "ask for fewer"),
    ("transfer NONE --out OUT", "is no run's folder: another model needs --data"),
    ("transfer RUN --bits 9 --out OUT", "1 to 8"),
    ("transfer RUN --bits many --out OUT", "1 to 8"),
    ("transfer RUN --eps 8 --out OUT", "write 8/255"),
    ("transfer RUN --attack cw --out OUT", "unknown attack"),
    ("transfer RUN RUN --out OUT", "named once"),
    ("transfer RUN --batch-size 0 --out OUT", "--batch_size"),
    ("transfer RUN COLOUR --out OUT", "1 channels and knows 10 classes"),
    ("transfer RUN COLOUR --out OUT", "3 and 4"),
]


@pytest.mark.parametrize(("words", "message"), MISTAKES)
def test_mistakes_take_one_line(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: str, message: str
) -> None:
    places = {"RUN": folder / "other", "NONE": folder / "nothing", "OUT": tmp_path / "out"}
    if "COLOUR" in words:
        places["COLOUR"] = colour(tmp_path)
    status, out, err = call(capsys, *(places.get(word, word) for word in words.split()))
    assert (status, out, len(err)) == (2, [], 1) and message in err[0]
    assert not (folder / "other" / "diagnosis.json").exists() and not (tmp_path / "out").exists()
