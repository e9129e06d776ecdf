import json
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from conftest import alike, refused, uniform
from defquant.checkpoint import Checkpoint, Facts, load, load_model, save
from defquant.config import DataConfig, ModelConfig, TrainConfig
from defquant.models import FeatureSqueezing, build
from defquant.models.squeezing import squeeze


def facts(**model: object) -> Facts:
    return Facts(
        ModelConfig("wrn-10-1", **model), DataConfig(), TrainConfig(milestones=(3, 5), beta=0.1), 4,  # type: ignore[arg-type]
        1, ("a", "b", "c", "d"), "corners", "f00d", history=({"epoch": 1, "loss": 0.5},),
    )  # fmt: skip


def saved(folder: Path) -> Path:
    model = build(facts(bits=4).model, num_classes=4, in_channels=1)
    momentum = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    return save(folder, Checkpoint(facts(bits=4), model.state_dict(), momentum))


def broken(path: Path, *parts: str) -> None:
    refused(lambda: load_model(path), *parts)


def test_round_trip(tmp_path: Path) -> None:
    path = saved(tmp_path)
    again = load(tmp_path)
    assert again.facts == facts(bits=4)
    model, _ = load_model(path)
    assert alike(model.state_dict(), again.weights)
    assert again.momentum.keys() == dict(model.named_parameters()).keys()
    assert json.loads((tmp_path / "config.json").read_text())["train"]["beta"] == 0.1
    assert json.loads((tmp_path / "log.jsonl").read_text()) == {"epoch": 1, "loss": 0.5}


def test_a_squeezed_network_comes_back_behind_its_filter(tmp_path: Path) -> None:
    about = facts(bits=4, convex=True, squeeze=3)
    model = build(about.model, num_classes=4, in_channels=1, seed=5)
    save(tmp_path, Checkpoint(about, model.state_dict(), {}))
    again, x = load_model(tmp_path)[0], uniform(8, 1, 8, 8)
    assert isinstance(again, FeatureSqueezing) and alike(again.state_dict(), model.state_dict())
    assert torch.equal(again(x), again.model(squeeze(x, 3)))
    bare = replace(about, model=replace(about.model, squeeze=None))
    save(tmp_path, Checkpoint(bare, model.state_dict(), {}))
    broken(tmp_path, "of another architecture than WideResNet")


class Hostile:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return Path.touch, (Path("ran"),)  # type: ignore[return-value]


def test_cut_anywhere_it_is_refused_and_a_pickle_is_never_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = saved(tmp_path)
    whole = path.read_bytes()
    cuts = [whole[: int(share * len(whole))] for share in (0.0, 0.001, 0.5, 0.999)]
    for content in (*cuts, pickle.dumps(Hostile())):
        path.write_bytes(content)
        broken(path, "not a whole safetensors file")
    assert not Path("ran").exists()


def test_other_architectures_versions_and_programs_are_refused(tmp_path: Path) -> None:
    path = saved(tmp_path)
    whole = load(path)
    others: list[dict[str, Any]] = [
        {"model": ModelConfig("wrn-16-1")}, {"num_classes": 2, "classes": ("a", "b")},
    ]  # fmt: skip
    for changes in others:
        save(tmp_path, replace(whole, facts=replace(whole.facts, **changes)))
        broken(path, "of another architecture")
    safetensors.torch.save_file({"a": torch.zeros(1)}, path)
    broken(path, "another program's")
    safetensors.torch.save_file({"a": torch.zeros(1)}, path, {"defquant": '{"format": 99}'})
    broken(path, "upgrade defquant")
    for header in ("", "[]", "{}", '{"format": 1}', '{"format": "x"}', '{"format": 1, "model": 3}'):
        safetensors.torch.save_file({"a": torch.zeros(1)}, path, {"defquant": header})
        broken(path, "header")
    broken(tmp_path / "nothing", "no checkpoint at")


def test_a_full_disk_keeps_the_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = saved(tmp_path)
    before = path.read_bytes()

    def full(_: Path, content: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    refused(lambda: saved(tmp_path), "No space left on device")
    monkeypatch.undo()
    assert path.read_bytes() == before
    load_model(path)


@pytest.mark.parametrize(
    ("model", "train", "method"),
    [
        ({}, {}, "float"),
        ({"bits": 4}, {}, "vanilla"),
        ({"bits": 4, "convex": True}, {"beta": 0.1}, "DQ"),
        ({"convex": True}, {"beta": 0.1}, "DQ"),
        ({"convex": True}, {}, "DQ convex-only"),
        ({"bits": 4}, {"beta": 0.1}, "DQ plain-sums"),
        ({"bits": 4, "high": 1.0}, {"attack": "pgd"}, "vanilla ReLU1 + PGD"),
        ({"bits": 2, "activation": "tanh"}, {}, "vanilla tanh"),
        ({"convex": True}, {"beta": 0.1, "penalty": "parseval"}, "DQ Parseval"),
        ({"squeeze": 5}, {}, "float + squeezing"),
        ({"squeeze": 3}, {}, "float + squeezing 3-bit"),
        ({"bits": 4, "squeeze": 5}, {"attack": "rfgsm"}, "vanilla + squeezing + RFGSM"),
        ({"bits": 1, "convex": True, "squeeze": 5}, {"beta": 0.1}, "DQ + squeezing"),
        ({"weight_bits": 8}, {}, "float + W8"),
        ({"bits": 4, "weight_bits": 4}, {}, "vanilla + W4"),
        ({"bits": 4, "deployable": True}, {}, "vanilla + deployable"),
        ({"bits": 4, "convex": True, "weight_bits": 8, "deployable": True, "squeeze": 5},
         {"beta": 0.1, "attack": "rfgsm"}, "DQ + squeezing + W8 + deployable + RFGSM"),
    ],
)  # fmt: skip
def test_networks_that_differ_have_other_names(
    model: dict[str, object], train: dict[str, object], method: str
) -> None:
    whole = replace(facts(**model), train=TrainConfig(**train))  # type: ignore[arg-type]
    assert whole.method == method
