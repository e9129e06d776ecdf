"""The monitor of adversarial training: what it measures, that it touches nothing, what it says."""

import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import defquant as dq
from conftest import alike, refused
from defquant import training
from defquant.attacks import Attack
from defquant.config import TrainConfig
from defquant.data import Dataset, load
from defquant.distributed import Workers
from defquant.training import (
    History,
    collapsed,
    monitor,
    monitor_eps,
    train,
    training_attack,
    warn_of_weak_steps,
)

CONFIG = TrainConfig(
    epochs=2, batch_size=16, lr=0.05, attack="rfgsm", attack_eps=8 / 255, device="cpu"
)
BOTH = ("monitor_fgsm", "monitor_pgd")


def network(dropout: float = 0.2) -> nn.Module:
    """Its dropout draws from the global random state; batch norm has running statistics."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), dq.QuantReLU(4),
        nn.Dropout(dropout), nn.Flatten(), nn.Linear(8 * 16, 4),
    )  # fmt: skip


def digits(count: int) -> Dataset:
    return load("digits", None, "train").first(count)


def thin_network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Flatten(), nn.Linear(16 * 16, 10),
    )  # fmt: skip


class Masked(nn.Module):
    """Wrong once the mean pixel falls by eps/2, but at the clean image the gradient points away."""

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.scale, self.eps = nn.Parameter(torch.ones(())), eps

    def forward(self, x: Tensor) -> Tensor:
        rise = (x - torch.full((1,), 128.0) / 255).mean((1, 2, 3))
        away = torch.where(rise.detach() == 0, -rise, rise)
        margin = self.scale * (away + self.eps / 2)
        return torch.stack([margin, torch.zeros_like(margin)], 1)


GREY = Dataset(
    torch.full((40, 1, 8, 8), 128, dtype=torch.uint8), torch.zeros(40, dtype=torch.int64),
    ("a", "b"), "grey",
)  # fmt: skip


def told(history: History, epochs: int) -> list[str]:
    """What is said after each epoch; empty where nothing is."""
    said = []
    for epoch in range(len(history) + 1):
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            warn_of_weak_steps(history[:epoch], epochs)
        assert all(warning.category is dq.DefquantWarning for warning in found)
        said.append("; ".join(str(warning.message) for warning in found))
    return said


def records(*pairs: tuple[float, float], first: int = 1) -> History:
    return tuple(
        {"epoch": epoch, "monitor_fgsm": fgsm, "monitor_pgd": pgd}
        for epoch, (fgsm, pgd) in enumerate(pairs, first)
    )


# --- what is measured --------------------------------------------------------------------------


def test_it_is_robust_accuracy_on_the_first_images() -> None:
    data, eps, model = digits(300), 24 / 255, thin_network()
    train(model, data, replace(CONFIG, attack="none"))
    found = monitor(model, data, eps)
    for name, attack in zip(BOTH, (dq.FGSM(eps), dq.PGD(eps, steps=10)), strict=True):
        assert found[name] == dq.robust_accuracy(model, data.first(256), attack).accuracy
    assert 0 < found["monitor_pgd"] < found["monitor_fgsm"] < 1
    assert found == monitor(model, data, eps, batch_size=64)  # neither chance nor batches


def test_a_masking_network_shows_its_gap() -> None:
    """FGSM follows the one false gradient; PGD starts beside it, although FGSM broke nothing."""
    assert monitor(Masked(0.1), GREY, 0.1) == {"monitor_fgsm": 1.0, "monitor_pgd": 0.0}


def test_the_radius_is_the_trainings() -> None:
    random = replace(CONFIG, attack_eps=None, attack_sigma=0.02)
    assert monitor_eps(CONFIG, training_attack(CONFIG)) == 8 / 255
    assert monitor_eps(random, training_attack(random)) == 0.02
    assert monitor_eps(replace(CONFIG, attack="none"), None) is None
    assert monitor_eps(replace(CONFIG, mix=0.0), training_attack(CONFIG)) is None
    assert monitor_eps(CONFIG, dq.PGD(0.1)) == 0.1  # an attack of one's own knows its eps
    assert monitor_eps(random, dq.PGD(0.1).last) == 0.02  # or does not
    own = type("Own", (), {"eps": 8.0, "__call__": training_attack(CONFIG)})()
    refused(lambda: monitor_eps(CONFIG, own), "eps is a distance")


# --- it only looks -----------------------------------------------------------------------------


def test_weights_are_those_of_a_training_without_it(
    corners: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run() -> tuple[dict[str, Tensor], History]:
        model, state = network(), dict[str, Tensor]()
        history = train(model, corners, CONFIG, keep=lambda _, momentum: state.update(momentum))
        state |= {f"model.{name}": value for name, value in model.state_dict().items()}
        return state | {"chance": torch.get_rng_state()}, history

    with_it, mine = run()
    monkeypatch.setattr(training, "monitor", lambda *_, **__: {})
    without, plain = run()
    assert alike(with_it, without)
    for a, b in zip(mine, plain, strict=True):
        assert a.keys() - b.keys() == set(BOTH) and a["loss"] == b["loss"]
        assert all(0 <= a[name] <= 1 for name in BOTH)


def test_only_adversarial_training_and_only_the_first_process_is_watched(
    corners: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    def watched(own: Attack | None = None, **changes: Any) -> bool:
        config = replace(CONFIG, epochs=1, **changes)
        return "monitor_pgd" in train(network(), corners, config, attack=own)[0]

    assert not watched(mix=0.0) and not watched(attack="none")
    assert watched(dq.FGSM(8 / 255), attack="none") and watched()
    monkeypatch.setattr(Workers, "leads", property(lambda _: False))
    assert not watched()


# --- what it means -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pairs", "epoch"),
    [
        ([], None),
        ([(0.5, 0.41), (0.78, 0.03)], 2),
        ([(0.5, 0.41), (0.6, 0.5), (0.9, 0.2), (0.9, 0.0)], 3),  # the first of them
        ([(0.5, 0.4), (0.5, 0.3), (0.9, 0.19)], 3),  # its best value counts, not the last
        ([(0.5, 0.4), (0.9, 0.2)], None),  # not below half
        ([(0.3, 0.19), (0.9, 0.09)], 2),  # exactly 10 points
        ([(0.3, 0.18), (0.9, 0.085)], None),  # less than 10 points
        ([(0.5, 0.4), (0.41, 0.19)], 2),
        ([(0.5, 0.4), (0.39, 0.1)], None),  # FGSM's fell, too: the network has got worse
        ([(0.15, 0.14), (0.22, 0.02)], 2),  # a gap of exactly 20 points
        ([(0.15, 0.14), (0.22, 0.02), (0.8, 0.5)], 2),  # it may come back
        ([(0.15, 0.14), (0.22, 0.0201)], None),  # a gap of less than 20 points
        ([(0.8, 0.0), (0.9, 0.0)], None),  # masked from the outset: nothing fell
        ([(0.5, 0.4), (0.6, 0.5)], None),
    ],
)
def test_collapsed(pairs: list[tuple[float, float]], epoch: int | None) -> None:
    assert collapsed(records(*pairs)) == epoch
    unwatched: History = ({"epoch": 1, "loss": 2.0},)
    later = collapsed((*unwatched, *records(*pairs, first=2)))
    assert later == (None if epoch is None else epoch + 1)


def test_a_collapse_is_told_once() -> None:
    said = told(records((0.5, 0.41), (0.78, 0.03), (0.8, 0.02), (0.9, 0.0)), 4)
    assert [bool(each) for each in said] == [False, False, True, False, False]
    assert said[2].startswith(
        "PGD accuracy on the monitored batch fell from 41% to 3% in epoch 2 while FGSM's is 78%: "
        "catastrophic overfitting: "
    )


def test_a_gap_without_a_fall_is_told_at_the_end() -> None:
    *before, message = told(records((0.5, 0.1), (0.6, 0.2), (0.5, 0.3)), 3)
    assert before == [""] * 3
    assert "50% under FGSM and 30% under PGD" in message
    assert told(records((0.5, 0.31)), 1) == told(({"epoch": 1, "loss": 2.0},), 1) == ["", ""]


def test_a_masking_training_is_told_at_its_end() -> None:
    config = replace(CONFIG, attack="fgsm", attack_eps=0.1, lr=1e-3)
    with pytest.warns(dq.DefquantWarning, match="FGSM overstates") as found:
        history = train(Masked(0.1), GREY, config)
    assert len(found) == 1
    assert [[r[name] for name in BOTH] for r in history] == [[1.0, 0.0]] * 2


def test_fgsm_training_overfits_at_a_large_eps_and_not_at_a_small_one() -> None:
    config = TrainConfig(
        epochs=30, batch_size=32, lr=0.1, schedule="constant", weight_decay=0.0, augment=False,
        attack="fgsm", attack_eps=80 / 255, device="cpu",
    )  # fmt: skip
    with pytest.warns(dq.DefquantWarning, match="catastrophic overfitting") as found:
        history = train(thin_network(), digits(512), config)
    epoch = collapsed(history)
    assert epoch is not None and len(found) == 1 and len(history) == 30
    fallen = history[epoch - 1]
    assert fallen["monitor_fgsm"] > fallen["monitor_pgd"] + 0.2
    history = train(thin_network(), digits(512), replace(config, epochs=10, attack_eps=24 / 255))
    assert collapsed(history) is None
    assert history[-1]["monitor_pgd"] > 0.8
