"""The transfer matrix: of networks whose answers are known, and as a verb."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import defquant as dq
from conftest import tiny_images
from defquant.attacks import DIVA, PGD, Attack, Transfer
from defquant.cli import main
from defquant.diagnose import at_bits, transfer_matrix
from defquant.errors import UserError
from defquant.quantize import Quantizer
from defquant.report.matrix import plot_matrix, text_matrix
from defquant.results import Score


def linear(*w: float, offset: float) -> nn.Module:
    """Class 1 is w x > offset."""
    layer = nn.Linear(len(w), 2)
    layer.weight.data = torch.tensor([[0.0] * len(w), [*w]])
    layer.bias.data = torch.tensor([0.0, -offset])
    return nn.Sequential(nn.Flatten(), layer).eval()


def trained(bits: int | None, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = dq.wide_resnet(10, 1, bits=bits, in_channels=1, num_classes=4)
    config = dq.TrainConfig(epochs=2, batch_size=16, device="cpu", augment=False)
    dq.train(model, tiny_images(128), config, show=False)
    return model.eval()


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return trained(4)


def test_equal_networks_fall_alike_and_as_in_the_white_box(model: nn.Module) -> None:
    data, attack = tiny_images(40, seed=1), PGD(40 / 255, steps=5)
    found = transfer_matrix({"a": model, "b": at_bits(model, 4)}, data, attack)
    x, y = data.take(torch.arange(40))
    with torch.no_grad():
        right = model(x).argmax(1) == y
        last = attack.last(model, x, y, generator=torch.Generator().manual_seed(0))
        fooled = int(((model(last).argmax(1) != y) & right).sum())
    assert 0 < fooled < int(right.sum())
    assert found.cells == ((Score(fooled, int(right.sum())),) * 2,) * 2
    assert (found.names, found.attack) == (("a", "b"), repr(attack))


def test_each_cell_is_a_transfer(model: nn.Module) -> None:
    """Images that the source has wrong do not count, unlike in `dq.robust_accuracy`."""
    networks = {"2": at_bits(model, 2), "4": model, "float": at_bits(model, None)}
    data, attack = tiny_images(40, seed=1), PGD(40 / 255, steps=5)
    found = transfer_matrix(networks, data, attack, seed=3)
    x, y = data.take(torch.arange(40))
    for i, source in enumerate(networks.values()):
        for j, target in enumerate(networks.values()):
            with torch.no_grad():
                both = (source(x).argmax(1) == y) & (target(x).argmax(1) == y)
                generator = torch.Generator().manual_seed(3)
                moved = Transfer(attack, source)(target, x, y, generator=generator)
                fooled = (target(moved).argmax(1) != y) & both
            assert found.cells[i][j] == Score(int(fooled.sum()), int(both.sum()))


def test_linear_networks_transfer_where_the_signs_of_their_weights_agree() -> None:
    """PGD goes to -eps sign(w): it moves v x by -eps sum(v sign(w)), for every image."""
    models = {
        "w": linear(3, 1, offset=2), "near": linear(3, -1, offset=1),
        "against": linear(-3, -1, offset=-2),
    }  # fmt: skip
    x = torch.tensor([[0.55, 0.55], [0.6, 0.6], [0.8, 0.6]]).view(3, 1, 1, 2)
    data = (x, torch.ones(3, dtype=torch.long))
    found = transfer_matrix(models, data, PGD(0.08, steps=10))
    # margins 0.2 0.4 1.0 of w and 0.1 0.2 0.8 of near fall by 0.32, by 0.16 on the other's images
    assert found.cells[0][:2] == (Score(1, 3), Score(1, 3))
    assert found.cells[1][:2] == (Score(0, 3), Score(2, 3))
    assert found.cells[2] == (None, None, None)  # wrong on all of them
    assert [row[2] for row in found.cells] == [None] * 3


def test_the_batch_does_not_matter_and_networks_are_left_alone(model: nn.Module) -> None:
    networks = {"2": at_bits(model, 2), "4": model}
    data, attack = tiny_images(20, seed=1), PGD(0.1, steps=3)
    before = [t.clone() for t in model.state_dict().values()]
    grads = [p.grad for p in model.parameters()]
    found = transfer_matrix(networks, data, attack)
    assert found == transfer_matrix(networks, data, attack, batch_size=3)
    assert all(map(torch.equal, before, model.state_dict().values()))
    assert all(a is b.grad for a, b in zip(grads, model.parameters(), strict=True))
    assert {m.bits for m in model.modules() if isinstance(m, Quantizer)} == {4}


def darken(
    model: nn.Module, x: Tensor, y: Tensor, *, generator: torch.Generator | None = None
) -> Tensor:
    return (x - 0.2).clamp(0, 1)


def test_any_attack_will_do(model: nn.Module) -> None:
    data = tiny_images(20, seed=1)
    attacks: list[Attack] = [darken, DIVA(0.1, at_bits(model, None), steps=2)]
    for attack in attacks:
        assert transfer_matrix({"a": model}, data, attack, batch_size=7).cells[0][0] is not None


def test_networks_that_cannot_be_compared_are_refused(model: nn.Module) -> None:
    data, attack = tiny_images(8), PGD(0.1, steps=1)
    with pytest.raises(UserError, match="one network or more"):
        transfer_matrix({}, data, attack)
    torch.manual_seed(0)
    more = dq.wide_resnet(10, 1, in_channels=1, num_classes=7).eval()
    with pytest.raises(UserError, match="a knows 4, b 7"):
        transfer_matrix({"a": model, "b": more}, data, attack)
    colour = dq.wide_resnet(10, 1, in_channels=3, num_classes=4).eval()
    with pytest.raises(UserError, match="b does not"):
        transfer_matrix({"a": model, "b": colour}, data, attack)


# ------------------------------------------------------------------- the verb

TRAIN = ["train", "--data", "digits", "--train-images", "160", "--epochs", "2", "--batch-size=32"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    for name, flags in (("two", ["--bits", "2"]), ("float", ["--seed", "1"])):
        assert main([*TRAIN, *flags, "--out", str(folder / name)]) == 0
    return folder


def call(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, list[str], list[str]]:
    capsys.readouterr()
    status = main(words)
    captured = capsys.readouterr()
    return status, captured.out.splitlines(), captured.err.splitlines()


def test_the_verb_prints_and_writes(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["transfer", str(runs / "two"), str(runs / "float"), "--images", "40"]
    words += ["--eps", "32/255", "--out", str(tmp_path / "out")]
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

    network, _ = dq.load_model(runs / "two")
    other, _ = dq.load_model(runs / "float")
    images = dq.load("digits", split="test").first(40)
    expected = transfer_matrix({"a": network, "b": other}, images, PGD(32 / 255, steps=20))
    flat = [score for line in expected.cells for score in line if score]
    assert [(c["fooled"], c["total"]) for c in record["cells"]] == [
        (s.correct, s.total) for s in flat
    ]


def test_every_run_at_every_bits(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["transfer", str(runs / "two"), str(runs / "float"), "--bits", "1", "2", "none"]
    words += ["--attack", "fgsm", "--images", "20", "--out", str(tmp_path), "--json"]
    status, out, _ = call(capsys, *words)
    assert status == 0
    cells = [json.loads(line) for line in out]
    assert len(cells) == 36
    names = [f"{run} {bits}" for run in ("two", "float") for bits in ("1-bit", "2-bit", "float")]
    assert [cell["source"] for cell in cells[::6]] == names
    assert [cell["target"] for cell in cells[:6]] == names
    assert cells == json.loads((tmp_path / "transfer.json").read_text())["cells"]


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    status, out, err = call(capsys, "transfer", *words)
    assert (status, out, len(err)) == (2, [], 1)
    return err[0]


def test_mistakes_take_one_line(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    two = str(runs / "two")
    out = ["--out", str(tmp_path / "out")]
    assert "no checkpoint" in refused(capsys, str(runs / "nothing"), *out)
    assert "1 to 8" in refused(capsys, two, "--bits", "9", *out)
    assert "1 to 8" in refused(capsys, two, "--bits", "many", *out)
    assert "write 8/255" in refused(capsys, two, "--eps", "8", *out)
    assert "unknown attack" in refused(capsys, two, "--attack", "cw", *out)
    assert "named once" in refused(capsys, two, two, *out)
    assert "--batch_size" in refused(capsys, two, "--batch-size", "0", *out)
    assert not (tmp_path / "out").exists()


def test_runs_of_other_data_are_refused(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import numpy as np

    images, labels = np.zeros((40, 8, 8, 3), np.uint8), np.arange(40) % 4
    np.savez(tmp_path / "colour.npz", images=images, labels=labels)
    words = ["train", "--data", "npz", "--data-root", str(tmp_path / "colour.npz")]
    status = main([*words, "--epochs", "1", "--batch-size", "20", "--out", str(tmp_path / "c")])
    assert status == 0
    message = refused(capsys, str(runs / "two"), str(tmp_path / "c"))
    assert "1 channels and knows 10 classes" in message
    assert "3 and 4" in message


def test_two_folders_of_one_name(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    again = tmp_path / "elsewhere" / "two"
    shutil.copytree(runs / "two", again)
    words = ["transfer", str(runs / "two"), str(again), "--images", "20", "--attack", "fgsm"]
    status, _, _ = call(capsys, *words, "--out", str(tmp_path / "out"))
    record = json.loads((tmp_path / "out" / "transfer.json").read_text())
    assert status == 0
    for network, run in zip(record["networks"], (runs / "two", again), strict=True):
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
