import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import defquant as dq
import reference_lipschitz as slow
from conftest import alike, refused, tiny_images
from defquant import checkpoint, step
from defquant.attacks import Attack
from defquant.checkpoint import Facts
from defquant.config import PRESETS, DataConfig, ModelConfig, TrainConfig
from defquant.data import Dataset, batches
from defquant.errors import DefquantWarning, UserError
from defquant.evaluate import robust
from defquant.files import write_bytes
from defquant.models import build
from defquant.runs import _check_momentum, train_run
from defquant.training import learning_rate, train, training_attack
from defquant.typed import from_mapping

CONFIG = TrainConfig(epochs=2, batch_size=16, lr=0.05, device="cpu")


def network(bits: int | None = 4, *, name: str = "wrn-10-1", **options: Any) -> nn.Module:
    return build(ModelConfig(name, bits=bits, **options), num_classes=4, in_channels=1)


def trained(corners: Dataset, model: nn.Module | None = None, **changes: Any) -> nn.Module:
    model = network() if model is None else model
    train(model, corners, replace(CONFIG, epochs=1, **changes))
    return model


def same(a: nn.Module, b: nn.Module) -> bool:
    return alike(a.state_dict(), b.state_dict())


FEW_BITS: dict[str, Any] = {"weight_bits": 4, "deployable": True}


@pytest.mark.parametrize(("amp", "options", "least"), [
    (False, {}, 0.95), (True, {"convex": True}, 0.9), (False, FEW_BITS | {"convex": True}, 0.9),
])  # fmt: skip
def test_it_learns(corners: Dataset, amp: bool, options: dict[str, Any], least: float) -> None:
    config = replace(CONFIG, epochs=10, amp=amp)
    history = train(network(**options), corners, config, test=tiny_images(seed=1))
    assert history[-1]["test_accuracy"] > least
    assert history[-1]["loss"] < history[0]["loss"]
    assert [h["epoch"] for h in history] == list(range(1, 11))


@pytest.mark.parametrize("penalty", ["fused", "loss"])
def test_the_loop_is_plain_sgd_on_the_papers_objective(corners: Dataset, penalty: Any) -> None:
    """Against a loop written out with torch's own SGD and the literal penalty of Eq. 8.

    Convex sums start uneven, so that a decay of theirs would show.
    """
    beta, decay = 0.03, 0.05
    config = replace(
        CONFIG, beta=beta, penalty=penalty, weight_decay=decay, schedule="constant",
        channels_last=False,
    )  # fmt: skip
    model, plain = network(convex=True), network(convex=True)
    for module in (*model.modules(), *plain.modules()):
        if isinstance(module, dq.ConvexSum):
            module.alpha.data = torch.tensor([0.9, 0.1])
    assert train(model, corners, config)[-1]["penalty"] > 0
    alphas = [p for n, p in plain.named_parameters() if n.endswith("alpha")]
    others = [p for n, p in plain.named_parameters() if not n.endswith("alpha")]
    groups = [{"params": others, "weight_decay": decay}, {"params": alphas, "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(groups, lr=0.05, momentum=0.9)
    plain.train()
    for epoch in range(2):
        for x, y in batches(corners, 16, seed=0, epoch=epoch):
            loss = nn.functional.cross_entropy(plain(x), y)
            loss = loss + slow.literal_penalty(plain, beta)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            dq.project_simplex_(plain)
    torch.testing.assert_close(
        dict(model.state_dict()), dict(plain.state_dict()), rtol=2e-3, atol=2e-4
    )


@pytest.mark.parametrize("penalty", ["fused", "parseval"])
def test_penalties_pull_weights_towards_orthonormal(corners: Dataset, penalty: str) -> None:
    found = []
    for beta in (0.1, 0.0):
        model = network(None)
        settings: dict[str, Any] = {"epochs": 10, "weight_decay": 0.0, "penalty": penalty}
        train(model, corners, replace(CONFIG, beta=beta, **settings))
        found.append(dq.OrthogonalPenalty(model, 1.0).penalty().item())
    assert found[0] < 0.2 * found[1]


def test_same_seed_same_weights_other_seed_other_weights(corners: Dataset) -> None:
    models = []
    for seed in (0, 0, 1):
        torch.rand(7)  # the global random state must not matter
        models.append(trained(corners, seed=seed))
    assert same(models[0], models[1])
    assert not same(models[0], models[2])


@pytest.mark.parametrize(
    ("changes", "fits"),
    [
        ({"beta": 0.02, "clip": 0.5}, True),
        ({"beta": 0.02, "penalty": "loss", "amp": True}, True),
        ({"beta": 0.02, "penalty": "parseval", "momentum": 0.0}, True),
        ({"attack": "fgsm"}, True),
        ({"attack": "rfgsm", "mix": 0.5}, True),
        ({"attack": "pgd", "attack_eps": 0.03}, True),
        ({"attack": "pgd"}, False),  # its steps are drawn
    ],
)
def test_a_step_on_buffers_that_stay_is_the_step(
    corners: Dataset, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], fits: bool
) -> None:
    """What a GPU records is run here as it is: after its runs beforehand, and the short batches."""
    call, steps = step.Replay.__call__, list[int]()

    def counted(self: step.Replay, draws: Tensor, index: int) -> None:
        steps.append(index)
        call(self, draws, index)

    monkeypatch.setattr(step.Replay, "__call__", counted)
    found = []
    for wanted in (False, True):
        monkeypatch.setattr(step, "recordable", lambda _, wanted=wanted: wanted)
        model = network(convex=True)
        (record,) = train(model, corners, replace(CONFIG, epochs=1, batch_size=24, **changes))
        found.append((model.state_dict(), record["loss"], record["penalty"]))
    assert steps == ([0, 1] if fits else [])
    assert alike(found[0][0], found[1][0]) and found[0][1:] == found[1][1:]


class Spy:
    """An attack of training that keeps what it makes."""

    def __init__(self, config: TrainConfig) -> None:
        attack = training_attack(config)
        assert attack is not None
        self.attack, self.draws = attack, set[int]()
        self.made: list[Tensor] = []
        self.moved: list[float] = []

    def __call__(
        self, model: nn.Module, x: Tensor, y: Tensor, *, generator: torch.Generator | None = None
    ) -> Tensor:
        assert not model.training and not torch.is_autocast_enabled("cpu")
        assert generator is not None
        self.draws.add(generator.initial_seed())
        self.made.append(self.attack(model, x, y, generator=generator))
        self.moved.append(float((self.made[-1] - x).abs().max()))
        return self.made[-1]


@pytest.mark.parametrize("attack", ["fgsm", "rfgsm", "pgd"])
def test_adversarial_training_sees_the_attacked_images(corners: Dataset, attack: str) -> None:
    settings: dict[str, Any] = {"attack": attack, "attack_eps": 8 / 255}
    config = replace(CONFIG, epochs=1, **settings)
    spy, attacked, plain = Spy(config), network(), trained(corners)
    train(attacked, corners, config, attack=spy)
    assert 0 < max(spy.moved) <= 8 / 255 + 1e-6
    assert len(spy.draws) == len(spy.moved) == 4  # each step draws anew
    assert same(attacked, trained(corners, **settings))
    assert not same(attacked, plain)
    assert same(trained(corners, **settings, mix=0.0), plain)


def test_diverging_stops_with_a_clear_word(corners: Dataset) -> None:
    with pytest.raises(UserError, match="training diverged: the loss is"):
        trained(corners, network(None), lr=1e30, schedule="constant")


def test_impossible_settings_are_refused() -> None:
    for wrong in (
        {"momentum": 1.0}, {"nesterov": True, "momentum": 0.0}, {"weight_decay": -1.0},
        {"clip": -1.0}, {"gamma": 0.0}, {"beta": 2.0, "penalty": "parseval"}, {"mix": 2.0},
        {"attack_eps": 8.0}, {"epochs": 0}, {"batch_size": 1}, {"lr": 0.0}, {"beta": -1.0},
    ):  # fmt: skip
        with pytest.raises(UserError, match=next(iter(wrong)).replace("attack_", "")):
            TrainConfig(**wrong)


def test_clipped_gradients_take_shorter_steps(corners: Dataset) -> None:
    settings: dict[str, Any] = {"weight_decay": 0.0, "momentum": 0.0, "schedule": "constant"}
    start = nn.utils.parameters_to_vector(network().parameters())
    far, near = (
        float((nn.utils.parameters_to_vector(model.parameters()) - start).norm().detach())
        for model in (trained(corners, **settings, clip=clip) for clip in (0.0, 1e-3))
    )
    assert 0 < near <= 0.05 * 1e-3 * 4 * 1.01  # lr times length times steps
    assert far > 10 * near


def test_learning_rates() -> None:
    step = from_mapping(TrainConfig, PRESETS["cifar10-paper"])
    rates = [learning_rate(step, epoch * 391, 391) for epoch in (0, 59, 60, 119, 120, 160, 199)]
    assert rates == pytest.approx([0.1, 0.1, 0.02, 0.02, 0.004, 0.0008, 0.0008])
    curve = [learning_rate(TrainConfig(epochs=4, lr=0.2), s, 10) for s in range(40)]
    assert max(curve) == curve[9] == pytest.approx(0.2)
    assert 0 < curve[-1] < 0.01
    assert min(curve) > 0


def test_presets_are_the_papers() -> None:
    kinds: tuple[Any, ...] = (ModelConfig, DataConfig, TrainConfig)
    known = {field for kind in kinds for field in kind.__annotations__}
    for name, values in PRESETS.items():
        assert all(from_mapping(kind, values) for kind in kinds)
        assert set(values) <= known, name
    paper = PRESETS["svhn-paper"]
    assert (paper["epochs"], paper["lr"], paper["gamma"], paper["beta"]) == (160, 0.01, 0.1, 2e-3)


# --- amp: bfloat16 for the inner convolutions of training alone, never for pixels or attacks ------


def convolutions(model: nn.Module) -> list[tuple[str, bool, torch.dtype]]:
    """(name, whether the model trains, type of the output) of each convolution that runs."""
    seen = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(
                lambda _, x, y, name=name: seen.append((name, model.training, y.dtype))
            )
    return seen


@pytest.mark.parametrize(
    "settings",
    [{}, {"attack": "rfgsm", "mix": 0.5}, {"attack": "fgsm", "attack_eps": 8 / 255},
     {"attack": "pgd", "attack_eps": 2 / 255}],
    ids=str,
)  # fmt: skip
def test_attacks_and_scores_of_training_are_float32(
    corners: Dataset, settings: dict[str, Any]
) -> None:
    """In eval mode, in which attacks, monitor and test run, no convolution is bfloat16."""
    model, config = network(), replace(CONFIG, epochs=1, amp=True, **settings)
    seen, spy = convolutions(model), Spy(config) if settings else None
    train(model, corners, config, attack=spy, test=corners)
    half = {(name, training) for name, training, kind in seen if kind == torch.bfloat16}
    full = {(name, training) for name, training, kind in seen if kind == torch.float32}
    assert all(training for _, training in half)
    assert {name for name, training in full if training} == {"stem"}
    assert {name for name, training in full if not training} == {name for name, *_ in seen}


@pytest.mark.parametrize("attack", [dq.FGSM(0.1), dq.PGD(0.1, steps=3)], ids=str)
def test_reported_attacks_leave_the_callers_autocast(corners: Dataset, attack: Attack) -> None:
    model, (x, y) = network().eval(), corners.take(torch.arange(8))
    every = torch.ones(len(corners), dtype=torch.bool)
    plain = attack(model, x, y), robust(model, corners, attack, standing=every)
    seen = convolutions(model)
    with torch.autocast("cpu", torch.bfloat16):
        auto = attack(model, x, y), robust(model, corners, attack, standing=every)
    assert all(map(torch.equal, auto, plain))
    assert {kind for *_, kind in seen} == {torch.float32}


# --- whole runs in folders ---------------------------------------------------------------------

RUN = """
import sys, pathlib
from defquant.config import *
from defquant.runs import train_run
train_run(ModelConfig("wrn-10-1", bits=4, convex=True), DataConfig("digits", train_images=192),
          TrainConfig(epochs=4, batch_size=32, beta=0.05, attack="rfgsm", device="cpu"),
          pathlib.Path(sys.argv[1]), resume=True)
"""


def run(folder: Path) -> subprocess.Popen[str]:
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", RUN, str(folder)]
    return subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True)


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
        assert alike(first.weights, other.weights) and alike(first.momentum, other.momentum)


MODEL, DATA = ModelConfig("wrn-10-1"), DataConfig("digits", train_images=64)
TWO = TrainConfig(epochs=2, batch_size=64, device="cpu")


def begin(config: TrainConfig, folder: Path, **options: Any) -> Facts:
    return train_run(MODEL, DATA, config, folder, show=False, **options)


def stop(*_: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("shape", "how"),
    [
        ({**FEW_BITS, "convex": True}, {"beta": 0.05}), ({}, {"attack": "rfgsm"}),
        ({"convex": True, "squeeze": 3}, {"beta": 0.1}),
    ],
)  # fmt: skip
def test_a_run_stopped_after_an_epoch_resumes_to_the_same_weights(
    tmp_path: Path, shape: dict[str, Any], how: dict[str, Any]
) -> None:
    """With momentum, ranges of branches, the monitor and the filter before the network."""
    model, config = ModelConfig("wrn-10-1", bits=4, **shape), replace(TWO, batch_size=16, **how)
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    heard: list[dict[str, float]] = []

    def hook(record: dict[str, float]) -> None:
        heard.append(record)
        assert len(checkpoint.load(stopped).facts.history) == record["epoch"]
        if record["epoch"] == 1:
            raise KeyboardInterrupt

    train_run(model, DATA, config, whole, show=False)
    with pytest.raises(KeyboardInterrupt):
        train_run(model, DATA, config, stopped, show=False, on_epoch=hook)
    half = checkpoint.load(stopped)
    train_run(model, DATA, config, stopped, resume=True, show=False, on_epoch=hook)
    one, two = checkpoint.load(whole), checkpoint.load(stopped)
    assert heard == list(two.facts.history)  # no epoch is told twice
    assert len(half.facts.history) == 1 and one.facts.model == model
    assert alike(one.weights, two.weights) and alike(one.momentum, two.momentum)
    for name, value in half.weights.items():
        assert not torch.equal(value, one.weights[name]) or name.endswith("alpha"), name
    for a, b in zip(one.facts.history, two.facts.history, strict=True):
        assert a.keys() == b.keys() and all(a[k] == b[k] for k in a if "second" not in k)
    assert alike(checkpoint.load_model(stopped)[0].state_dict(), one.weights)


@pytest.mark.parametrize("lost", ["config.json", "log.jsonl"])
@pytest.mark.parametrize("epochs", [1, 2])
def test_a_kill_between_a_checkpoint_and_its_companions_loses_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost: str, epochs: int
) -> None:
    def killed(path: Path, content: bytes) -> None:
        (stop if path.name == lost else write_bytes)(path, content)

    config = replace(TWO, epochs=epochs)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(checkpoint, "write_bytes", killed)
        begin(config, tmp_path)
    facts = begin(config, tmp_path, resume=True)
    records = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert records == list(facts.history)
    assert len(records) == epochs
    written = json.loads((tmp_path / "config.json").read_text())
    assert (written["train"]["epochs"], written["versions"]) == (epochs, facts.versions)


def test_what_a_resumed_run_does_differently_is_said_and_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(checkpoint, "write_companions", stop)  # after the first epoch
        begin(TWO, tmp_path)
    before = checkpoint.load(tmp_path).facts.versions
    now = {"torch": "9.0", "instructions": "none", "processes": "4", "threads": "3"}
    said = "torch .*, now 9.0, instructions .*, now none, threads 1, now 3, processes 1, now 4"
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "versions", lambda _: {**before, **now})
        with pytest.warns(DefquantWarning, match=f"goes on with {said}: its weights will not be"):
            begin(TWO, tmp_path, resume=True)
    after = checkpoint.load(tmp_path).facts.versions
    assert (after["threads"], after["processes"]) == ("1 then 3", "1 then 4")
    assert after["python"] == before["python"]
    # a finished run is not trained: nothing differs
    assert begin(TWO, tmp_path, resume=True).versions == after


def test_a_folder_removed_in_training_ends_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def removing(*_: object) -> dq.Score:
        shutil.rmtree(tmp_path / "run")
        return dq.Score(1, 1)

    monkeypatch.setattr("defquant.training.accuracy", removing)
    refused(lambda: begin(TWO, tmp_path / "run"), "was removed while a run was in it")
    assert not (tmp_path / "run").exists()


class Viewed(nn.Module):
    """Reshapes by `view`, which knows the usual order of memory alone."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Sequential(nn.Conv2d(1, 8, 3), nn.Conv2d(8, 8, 1))
        self.fc = nn.Linear(8 * 36, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.conv(x).view(x.size(0), -1))  # type: ignore[no-any-return]


@pytest.mark.parametrize(("channels", "last"), [(8, True), (4, False)])
def test_a_skip_of_few_channels_is_not_trained_channels_last(
    corners: Dataset, channels: int, last: bool
) -> None:
    """Its weights' gradient is written out of bounds by oneDNN on AVX2: runs crashed."""
    first = nn.Conv2d(1, channels, 3)
    skip = nn.Conv2d(channels, 8, 1, stride=2)
    seen: list[bool] = []
    skip.register_forward_hook(
        lambda *args: seen.append(args[-1].is_contiguous(memory_format=torch.channels_last))
    )
    trained(corners, nn.Sequential(first, skip, nn.Flatten(), nn.Linear(72, 4)))
    assert seen[-1] == last


def test_memory_formats_are_the_users_own_after_training(corners: Dataset) -> None:
    assert trained(corners, Viewed())(torch.rand(2, 1, 8, 8)).shape == (2, 4)

    def strides() -> dict[str, tuple[int, ...]]:
        return {name: tensor.stride() for name, tensor in model.state_dict().items()}

    def moved(*_: object) -> None:
        assert strides() != before
        raise KeyboardInterrupt

    model = network()
    before = strides()
    with pytest.raises(KeyboardInterrupt):
        train(model, corners, CONFIG, keep=moved)
    assert strides() == before


def test_a_hook_hears_each_epoch_and_disturbs_nothing(corners: Dataset) -> None:
    def trained_with(**hook: Any) -> tuple[nn.Module, Any]:
        torch.manual_seed(0)
        model = nn.Sequential(network(), nn.Dropout(0.5))  # draws from torch's own state
        return model, train(model, corners, CONFIG, test=corners, **hook)

    def hook(record: dict[str, float]) -> None:
        heard.append(dict(record))
        record["loss"] = torch.rand(()).item()

    heard: list[dict[str, float]] = []
    (a, _), (b, history) = trained_with(), trained_with(on_epoch=hook)
    assert same(a, b) and heard == list(history)
    assert {type(value) for value in heard[-1].values()} <= {int, float}


def test_a_foreign_attack_in_training_is_checked(corners: Dataset) -> None:
    def broken(model: nn.Module, x: Tensor, y: Tensor, *, generator: object = None) -> Tensor:
        assert not model.training
        y.zero_()  # a copy
        return x[:1]

    refused(lambda: train(network(), corners, CONFIG, attack=broken), "must return float images")


def test_momentum_that_is_missing_or_of_another_shape_is_refused() -> None:
    """Resuming without it would give other weights, and say nothing."""
    model = nn.Linear(2, 3)
    whole = {"weight": torch.zeros(3, 2), "bias": torch.zeros(3)}
    _check_momentum(model, whole, Path("run"))
    for found in ({}, whole | {"bias": torch.zeros(1)}, whole | {"more": torch.zeros(1)}):
        with pytest.raises(UserError, match="cannot resume run: the momentum of"):
            _check_momentum(model, found, Path("run"))
