"""Processes that train one network together, or that only seem to."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from defquant import checkpoint, distributed
from defquant.config import DataConfig, ModelConfig, TrainConfig
from defquant.distributed import Workers
from defquant.errors import UserError
from defquant.files import owned_folder
from defquant.runs import train_run
from test_training import RUN

HOOK = "show=False, on_epoch=print"


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path: Path) -> None:
    """Two gloo processes with half the batch each: the same loss as one, up to batch norm."""
    script = tmp_path / "run.py"
    script.write_text(RUN.replace('attack="rfgsm", ', "").replace("resume=True", HOOK))
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    words = [*launch, str(script), str(tmp_path / "two")]
    said = subprocess.run(words, env=env, check=True, timeout=240, capture_output=True, text=True)
    assert said.stdout.count("'epoch': ") == 4  # one of the two calls it
    subprocess.run([sys.executable, str(script), str(tmp_path / "one")], env=env, check=True)
    one, two = (checkpoint.load(tmp_path / name).facts.history for name in ("one", "two"))
    assert len(one) == len(two) == 4
    assert two[0]["loss"] == pytest.approx(one[0]["loss"], rel=0.1)
    assert two[-1]["test_accuracy"] == pytest.approx(one[-1]["test_accuracy"], abs=0.15)


def test_a_rank_without_a_world_is_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch scheduler sets RANK: two of its jobs still exclude each other from one folder."""
    monkeypatch.setenv("RANK", "1")
    assert distributed.place() == Workers(0, 1, 0)
    with owned_folder(tmp_path), pytest.raises(UserError, match="in use by another run"):
        train_run(ModelConfig(), DataConfig(), TrainConfig(device="cpu"), tmp_path, show=False)
    set_world(monkeypatch, "4", "1")
    assert distributed.place() == Workers(1, 4, 0)
    assert not distributed.leads()


def set_world(monkeypatch: pytest.MonkeyPatch, world: str, rank: str) -> None:
    names = {"WORLD_SIZE": world, "RANK": rank, "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    for name, value in names.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    ("world", "rank", "said"),
    [
        ("abc", "0", "WORLD_SIZE must be a whole number from 1 to .*; found 'abc'"),
        ("0", "0", "WORLD_SIZE must be .*; found '0'"),
        ("9" * 5000, "0", "WORLD_SIZE must be .*; found '9{80}'"),
        ("2", "2", "RANK must be a whole number from 0 to 1; found '2'"),
        ("2", "", "find each other by RANK, which is not set: start them with torchrun"),
    ],
)
def test_a_world_that_cannot_be_is_one_line(
    monkeypatch: pytest.MonkeyPatch, world: str, rank: str, said: str
) -> None:
    set_world(monkeypatch, world, rank)
    with pytest.raises(UserError, match=said):
        distributed.leads()


def test_a_process_that_hangs_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(distributed, "PATIENCE", 0.1)
    assert list(distributed.watched(range(3), Workers(1, 2))) == [0, 1, 2]
    time.sleep(0.2)
    assert capsys.readouterr().err == ""
    for _ in distributed.watched(range(2), Workers(1, 2)):
        time.sleep(0.2)
    (line,) = capsys.readouterr().err.splitlines()
    assert "process 1 of 2 has not ended a step in 0.1 s" in line


def test_processes_that_are_lost_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "place", lambda: Workers(0, 2))
    monkeypatch.setattr("torch.distributed.init_process_group", lambda _: None)
    cpu = torch.device("cpu")
    with (
        pytest.raises(UserError, match=r"process 0 of 2 lost the others \(\[gloo"),
        distributed.workers(cpu),
    ):
        raise RuntimeError("[gloo/transport/tcp/pair.cc] Connection closed by peer")
    with pytest.raises(RuntimeError, match="mine"), distributed.workers(cpu):
        raise RuntimeError("mine")
