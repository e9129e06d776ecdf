import json
import math
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import defquant as dq
from conftest import tiny_images
from defquant import checkpoint, distributed
from defquant.config import PRESETS, DataConfig, ModelConfig, TrainConfig
from defquant.data import Dataset, batches
from defquant.distributed import Workers
from defquant.errors import DefquantWarning, UserError
from defquant.files import owned_folder, write_bytes
from defquant.lipschitz import ConvexSum
from defquant.runs import _check_momentum, train_run
from defquant.training import learning_rate, train, training_attack
from defquant.typed import from_mapping

CONFIG = TrainConfig(epochs=2, batch_size=16, lr=0.05, device="cpu")


def network(bits: int | None = 4, *, convex: bool = False, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return dq.wide_resnet(10, 1, bits=bits, convex=convex, in_channels=1, num_classes=4)


def same(a: nn.Module, b: nn.Module) -> bool:
    pairs = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    return all(torch.equal(x, y) for x, y in pairs)


def test_it_learns(corners: Dataset) -> None:
    history = train(network(), corners, replace(CONFIG, epochs=10), test=tiny_images(seed=1))
    assert history[-1]["test_accuracy"] > 0.95
    assert history[-1]["loss"] < history[0]["loss"]
    assert [h["epoch"] for h in history] == list(range(1, 11))


def test_the_loop_is_plain_sgd_on_the_papers_objective(corners: Dataset) -> None:
    """Against a loop written out with torch's own SGD and the literal penalty of Eq. 8."""
    beta, decay = 0.03, 5e-4
    config = replace(CONFIG, beta=beta, schedule="constant", channels_last=False)
    model, plain = network(convex=True), network(convex=True)
    train(model, corners, config)
    alphas = [p for n, p in plain.named_parameters() if n.endswith("alpha")]
    others = [p for n, p in plain.named_parameters() if not n.endswith("alpha")]
    groups = [{"params": others, "weight_decay": decay}, {"params": alphas, "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(groups, lr=0.05, momentum=0.9)
    plain.train()
    for epoch in range(2):
        for x, y in batches(corners, 16, seed=0, epoch=epoch):
            loss = nn.functional.cross_entropy(plain(x), y)
            for module in plain.modules():
                if isinstance(module, nn.Conv2d | nn.Linear):
                    W = module.weight.flatten(1)
                    loss = loss + beta / 2 * (W.T @ W - torch.eye(W.shape[1])).square().sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            dq.project_simplex_(plain)
    for (name, mine), theirs in zip(
        model.state_dict().items(), plain.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=2e-3, atol=2e-4, msg=name)


def test_penalty_as_loss_and_fused_train_alike(corners: Dataset) -> None:
    models = [network(None), network(None)]
    for model, mode in zip(models, ("fused", "loss"), strict=True):
        config = replace(CONFIG, epochs=1, beta=0.02, penalty=mode)  # type: ignore[arg-type]
        record = train(model, corners, config)[-1]
        assert record["penalty"] > 0
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("penalty", ["fused", "parseval"])
def test_penalties_pull_weights_towards_orthonormal(corners: Dataset, penalty: str) -> None:
    config = replace(CONFIG, epochs=10, beta=0.1, penalty=penalty, weight_decay=0.0)  # type: ignore[arg-type]
    pulled, free = network(None), network(None)
    train(pulled, corners, config)
    train(free, corners, replace(config, beta=0.0))

    def distance(model: nn.Module) -> float:
        return float(dq.OrthogonalPenalty(model, 1.0).penalty().detach())

    assert distance(pulled) < 0.2 * distance(free)


def test_convex_coefficients_stay_on_the_simplex_and_are_not_decayed(corners: Dataset) -> None:
    model = network(convex=True)
    train(model, corners, replace(CONFIG, weight_decay=0.5))
    for module in model.modules():
        if isinstance(module, ConvexSum):
            assert (module.alpha >= 0).all()
            assert abs(float(module.alpha.detach().sum()) - 1) < 1e-6


def test_same_seed_same_weights_other_seed_other_weights(corners: Dataset) -> None:
    models = [network() for _ in range(3)]
    for model, seed in zip(models, (0, 0, 1), strict=True):
        torch.rand(7)  # the global random state must not matter
        train(model, corners, replace(CONFIG, epochs=1, seed=seed))
    assert same(models[0], models[1])
    assert not same(models[0], models[2])


@pytest.mark.parametrize("attack", ["fgsm", "rfgsm", "pgd"])
def test_adversarial_training_sees_the_attacked_images(corners: Dataset, attack: str) -> None:
    config = replace(CONFIG, epochs=1, attack=attack, attack_eps=8 / 255)  # type: ignore[arg-type]
    made = training_attack(config)
    assert made is not None
    seen: list[float] = []
    draws: set[int] = set()

    def spy(
        model: nn.Module, x: Tensor, y: Tensor, *, generator: torch.Generator | None = None
    ) -> Tensor:
        assert not model.training
        assert generator is not None
        draws.add(generator.initial_seed())
        adversarial = made(model, x, y, generator=generator)
        seen.append(float((adversarial - x).abs().max()))
        return adversarial

    plain, attacked, again = network(), network(), network()
    train(plain, corners, replace(config, attack="none"))
    train(attacked, corners, config, attack=spy)
    train(again, corners, config)
    assert 0 < max(seen) <= 8 / 255 + 1e-6
    assert len(draws) == len(seen) == 4  # each step draws anew
    assert same(attacked, again)
    assert not same(attacked, plain)
    halved = network()
    train(halved, corners, replace(config, mix=0.0))
    assert same(halved, plain)


def test_diverging_stops_with_a_clear_word(corners: Dataset) -> None:
    with pytest.raises(dq.UserError, match="training diverged: the loss is") as error:
        train(network(None), corners, replace(CONFIG, lr=1e30, schedule="constant"))
    assert "\n" not in str(error.value)


def test_impossible_settings_are_refused() -> None:
    for wrong in (
        {"momentum": 1.0}, {"nesterov": True, "momentum": 0.0}, {"weight_decay": -1.0},
        {"clip": -1.0}, {"gamma": 0.0}, {"beta": 2.0, "penalty": "parseval"}, {"mix": 2.0},
        {"attack_eps": 8.0}, {"epochs": 0}, {"batch_size": 1}, {"lr": 0.0}, {"beta": -1.0},
    ):  # fmt: skip
        with pytest.raises(dq.UserError, match=next(iter(wrong)).replace("attack_", "")):
            TrainConfig(**wrong)


def test_clipped_gradients_take_shorter_steps(corners: Dataset) -> None:
    config = replace(CONFIG, epochs=1, weight_decay=0.0, momentum=0.0, schedule="constant")
    start, far, near = network(), network(), network()
    train(far, corners, config)
    train(near, corners, replace(config, clip=1e-3))

    def moved(model: nn.Module) -> float:
        pairs = zip(model.parameters(), start.parameters(), strict=True)
        return math.sqrt(sum(float((a - b).detach().square().sum()) for a, b in pairs))

    assert 0 < moved(near) <= 0.05 * 1e-3 * 4 * 1.01  # lr times length times steps
    assert moved(far) > 10 * moved(near)


def test_learning_rates() -> None:
    step = TrainConfig(
        **{k: v for k, v in PRESETS["cifar10-paper"].items() if k in TrainConfig.__annotations__}
    )
    rates = [learning_rate(step, epoch * 391, 391) for epoch in (0, 59, 60, 119, 120, 160, 199)]
    expected = [0.1, 0.1, 0.02, 0.02, 0.004, 0.0008, 0.0008]
    assert all(math.isclose(a, b) for a, b in zip(rates, expected, strict=True))
    cycle = TrainConfig(epochs=4, lr=0.2)
    curve = [learning_rate(cycle, s, 10) for s in range(40)]
    assert max(curve) == pytest.approx(0.2)
    assert curve.index(max(curve)) == 9
    assert 0 < curve[-1] < 0.01
    assert min(curve) > 0


def test_presets_are_the_papers() -> None:
    for name, values in PRESETS.items():
        from_mapping(ModelConfig, values)
        from_mapping(DataConfig, values)
        from_mapping(TrainConfig, values)
        known = {f for k in (ModelConfig, DataConfig, TrainConfig) for f in k.__annotations__}
        assert set(values) <= known, name
    paper = PRESETS["svhn-paper"]
    assert (paper["epochs"], paper["lr"], paper["gamma"], paper["beta"]) == (160, 0.01, 0.1, 2e-3)


# --- whole runs in folders ---------------------------------------------------------------------

RUN = """
import sys, pathlib
from defquant.config import *
from defquant.runs import train_run
train_run(ModelConfig("wrn-10-1", bits=4, convex=True), DataConfig("digits", train_images=192),
          TrainConfig(epochs=4, batch_size=32, beta=0.05, attack="rfgsm", device="cpu"),
          pathlib.Path(sys.argv[1]), resume=True)
"""


def run(folder: Path, **popen: object) -> subprocess.Popen[str]:
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", RUN, str(folder)]
    return subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True, **popen)  # type: ignore[call-overload,no-any-return]


def finish(folder: Path) -> None:
    with run(folder) as process:
        _, errors = process.communicate()
    assert process.returncode == 0, errors


@pytest.mark.slow
def test_a_run_killed_at_any_moment_resumes_to_the_same_weights(tmp_path: Path) -> None:
    finish(tmp_path / "whole")
    for epoch in (1, 2):
        with run(tmp_path / f"killed{epoch}") as killed:
            assert killed.stderr is not None
            for line in killed.stderr:
                if f"epoch {epoch}/4" in line:
                    killed.kill()
                    break
        assert len(checkpoint.load(tmp_path / f"killed{epoch}").facts.history) < 4
        finish(tmp_path / f"killed{epoch}")
    first, *others = [checkpoint.load(tmp_path / n) for n in ("whole", "killed1", "killed2")]
    for other in others:
        assert other.facts.history[-1]["loss"] == first.facts.history[-1]["loss"]
        assert all(torch.equal(v, other.weights[k]) for k, v in first.weights.items())
        assert all(torch.equal(v, other.momentum[k]) for k, v in first.momentum.items())


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path: Path) -> None:
    """Two gloo processes with half the batch each: the same loss as one, up to batch norm."""
    code = RUN.replace('attack="rfgsm", ', "").replace("resume=True", "show=False")
    script = tmp_path / "run.py"
    script.write_text(code)
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    subprocess.run([*launch, str(script), str(tmp_path / "two")], env=env, check=True, timeout=240)
    subprocess.run([sys.executable, str(script), str(tmp_path / "one")], env=env, check=True)
    one, two = (checkpoint.load(tmp_path / name).facts.history for name in ("one", "two"))
    assert len(one) == len(two) == 4
    assert two[0]["loss"] == pytest.approx(one[0]["loss"], rel=0.1)
    assert two[-1]["test_accuracy"] == pytest.approx(one[-1]["test_accuracy"], abs=0.15)


MODEL, DATA = ModelConfig("wrn-10-1"), DataConfig("digits", train_images=64)
TWO = TrainConfig(epochs=2, batch_size=64, device="cpu")


@pytest.mark.parametrize("lost", ["config.json", "log.jsonl"])
@pytest.mark.parametrize("epochs", [1, 2])
def test_a_kill_between_a_checkpoint_and_its_companions_loses_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost: str, epochs: int
) -> None:
    def killed(path: Path, content: bytes) -> None:
        if path.name == lost:
            raise KeyboardInterrupt
        write_bytes(path, content)

    monkeypatch.setattr(checkpoint, "write_bytes", killed)
    config = replace(TWO, epochs=epochs)
    with pytest.raises(KeyboardInterrupt):
        train_run(MODEL, DATA, config, tmp_path, show=False)
    monkeypatch.undo()
    facts = train_run(MODEL, DATA, config, tmp_path, resume=True, show=False)
    records = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert records == list(facts.history)
    assert len(records) == epochs
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["train"]["epochs"] == epochs
    assert written["versions"] == facts.versions


def test_what_a_resumed_run_does_differently_is_said_and_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "write_companions", stop)  # after the first epoch
    with pytest.raises(KeyboardInterrupt):
        train_run(MODEL, DATA, TWO, tmp_path, show=False)
    monkeypatch.undo()
    before = checkpoint.load(tmp_path).facts.versions
    now = {**before, "torch": "9.0", "instructions": "none", "processes": "4"}
    monkeypatch.setattr(checkpoint, "versions", lambda _: {**now, "threads": "3"})
    said = "torch .*, now 9.0, instructions .*, now none, threads 1, now 3, processes 1, now 4"
    with pytest.warns(DefquantWarning, match=f"goes on with {said}: its weights will not be"):
        train_run(MODEL, DATA, TWO, tmp_path, resume=True, show=False)
    after = checkpoint.load(tmp_path).facts.versions
    assert (after["threads"], after["processes"]) == ("1 then 3", "1 then 4")
    assert after["python"] == before["python"]
    monkeypatch.undo()  # a finished run is not trained: nothing differs
    assert train_run(MODEL, DATA, TWO, tmp_path, resume=True, show=False).versions == after


def test_a_folder_removed_in_training_ends_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def removing(*_: object) -> dq.Score:
        shutil.rmtree(tmp_path / "run")
        return dq.Score(1, 1)

    monkeypatch.setattr("defquant.training.accuracy", removing)
    with pytest.raises(UserError, match="was removed while a run was in it"):
        train_run(MODEL, DATA, TWO, tmp_path / "run", show=False)
    assert not (tmp_path / "run").exists()


# --- several processes -------------------------------------------------------------------------


def test_a_rank_without_a_world_is_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch scheduler sets RANK: two of its jobs still exclude each other from one folder."""
    monkeypatch.setenv("RANK", "1")
    assert distributed.place() == Workers(0, 1, 0)
    with owned_folder(tmp_path), pytest.raises(UserError, match="in use by another run"):
        train_run(MODEL, DATA, TWO, tmp_path, show=False)
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", "1")
    assert distributed.place() == Workers(1, 4, 0)
    assert not distributed.leads()


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
    names = {"WORLD_SIZE": world, "RANK": rank, "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    for name, value in names.items():
        monkeypatch.setenv(name, value)
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


class Viewed(nn.Module):
    """Reshapes by `view`, which knows the usual order of memory alone."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Sequential(nn.Conv2d(1, 8, 3), nn.Conv2d(8, 8, 1))
        self.fc = nn.Linear(8 * 36, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return self.fc(x.view(x.size(0), -1))  # type: ignore[no-any-return]


def test_memory_formats_are_the_users_own_after_training(corners: Dataset) -> None:
    x = torch.rand(2, 1, 8, 8)
    train(viewed := Viewed(), corners, replace(CONFIG, epochs=1))
    assert viewed(x).shape == (2, 4)

    def stop(*_: object) -> None:
        assert strides != {n: t.stride() for n, t in model.state_dict().items()}
        raise KeyboardInterrupt

    model = network()
    strides = {n: t.stride() for n, t in model.state_dict().items()}
    with pytest.raises(KeyboardInterrupt):
        train(model, corners, CONFIG, on_epoch=stop)
    assert {n: t.stride() for n, t in model.state_dict().items()} == strides


def test_a_foreign_attack_in_training_is_checked(corners: Dataset) -> None:
    def broken(model: nn.Module, x: Tensor, y: Tensor, *, generator: object = None) -> Tensor:
        assert not model.training
        y.zero_()  # a copy
        return x[:1]

    with pytest.raises(dq.UserError, match="must return float images"):
        train(network(), corners, replace(CONFIG, epochs=1), attack=broken)


def test_momentum_that_is_missing_or_of_another_shape_is_refused() -> None:
    """Resuming without it would give other weights, and say nothing."""
    model = nn.Linear(2, 3)
    whole = {"weight": torch.zeros(3, 2), "bias": torch.zeros(3)}
    _check_momentum(model, whole, Path("run"))
    for found in ({}, whole | {"bias": torch.zeros(1)}, whole | {"more": torch.zeros(1)}):
        with pytest.raises(UserError, match="cannot resume run: the momentum of"):
            _check_momentum(model, found, Path("run"))
