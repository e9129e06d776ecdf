"""The monitor of adversarial training: what it measures, that it touches nothing, what it says."""

import warnings
from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import defquant as dq
from defquant import training
from defquant.config import TrainConfig
from defquant.data import Dataset, load
from defquant.distributed import Workers
from defquant.monitor import History, collapsed, monitor, monitor_eps, warn_of_weak_steps
from defquant.training import train, training_attack

CONFIG = TrainConfig(
    epochs=2, batch_size=16, lr=0.05, attack="rfgsm", attack_eps=8 / 255, device="cpu"
)


def network(dropout: float = 0.2) -> nn.Module:
    """Its dropout draws from the global random state; batch norm has running statistics."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), dq.QuantReLU(4),
        nn.Dropout(dropout), nn.Flatten(), nn.Linear(8 * 16, 4),
    )  # fmt: skip


def digits(count: int) -> Dataset:
    return load("digits", None, "train").first(count)


def thin_network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Flatten(), nn.Linear(16 * 16, 10),
    )  # fmt: skip


GREY = torch.full((1,), 128.0) / 255


class Masked(nn.Module):
    """Wrong once the mean pixel falls by eps/2, but at the clean image the gradient points away."""

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        rise = (x - GREY).mean((1, 2, 3))
        away = torch.where(rise.detach() == 0, -rise, rise)
        margin = self.scale * (away + self.eps / 2)
        return torch.stack([margin, torch.zeros_like(margin)], 1)


def grey_images(count: int = 40) -> Dataset:
    images = torch.full((count, 1, 8, 8), 128, dtype=torch.uint8)
    return Dataset(images, torch.zeros(count, dtype=torch.int64), ("a", "b"), "grey")


def told(history: History, epochs: int) -> list[str]:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        warn_of_weak_steps(history, epochs)
    assert all(warning.category is dq.DefquantWarning for warning in found)
    return [str(warning.message) for warning in found]


def records(*pairs: tuple[float, float]) -> History:
    return tuple(
        {"epoch": epoch, "monitor_fgsm": fgsm, "monitor_pgd": pgd}
        for epoch, (fgsm, pgd) in enumerate(pairs, 1)
    )


# --- what is measured --------------------------------------------------------------------------


def test_it_is_robust_accuracy_on_the_first_images() -> None:
    data, eps = digits(300), 24 / 255
    model = thin_network(0)
    train(model, data, replace(CONFIG, attack="none"))
    first = data.first(256)
    found = monitor(model, data, eps)
    assert found == {
        "monitor_fgsm": dq.robust_accuracy(model, first, dq.FGSM(eps)).accuracy,
        "monitor_pgd": dq.robust_accuracy(model, first, dq.PGD(eps, steps=10)).accuracy,
    }
    assert 0 < found["monitor_pgd"] < found["monitor_fgsm"] < 1
    assert found == monitor(model, data, eps, batch_size=64)  # neither chance nor batches


def test_a_masking_network_shows_its_gap() -> None:
    """FGSM follows the one false gradient; PGD starts beside it, although FGSM broke nothing."""
    found = monitor(Masked(0.1), grey_images(), 0.1)
    assert found == {"monitor_fgsm": 1.0, "monitor_pgd": 0.0}


def test_the_radius_is_the_trainings() -> None:
    random = replace(CONFIG, attack_eps=None, attack_sigma=0.02)
    assert monitor_eps(CONFIG, training_attack(CONFIG)) == 8 / 255
    assert monitor_eps(random, training_attack(random)) == 0.02
    assert monitor_eps(replace(CONFIG, attack="none"), None) is None
    assert monitor_eps(replace(CONFIG, mix=0.0), training_attack(CONFIG)) is None
    assert monitor_eps(CONFIG, dq.PGD(0.1)) == 0.1  # an attack of one's own knows its eps
    assert monitor_eps(random, dq.PGD(0.1).last) == 0.02  # or does not
    with pytest.raises(dq.UserError, match="eps is a distance"):
        own = training_attack(CONFIG)
        own_eps = type("Own", (), {"eps": 8.0, "__call__": own})()
        monitor_eps(CONFIG, own_eps)


# --- it only looks -----------------------------------------------------------------------------


def test_weights_are_those_of_a_training_without_it(
    corners: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcomes: list[tuple[nn.Module, History, Mapping[str, Tensor], Tensor]] = []

    def run() -> None:
        last: list[Mapping[str, Tensor]] = []
        model = network()
        history = train(model, corners, CONFIG, on_epoch=lambda _, momentum: last.append(momentum))
        outcomes.append((model, history, last[-1], torch.get_rng_state()))

    run()
    monkeypatch.setattr(training, "monitor", lambda *_, **__: {})
    run()
    (watched, with_it, buffers, chance), (alone, without, others, same_chance) = outcomes
    for (name, a), b in zip(watched.state_dict().items(), alone.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert all(torch.equal(value, others[name]) for name, value in buffers.items())
    assert torch.equal(chance, same_chance)
    for a_record, b_record in zip(with_it, without, strict=True):
        assert a_record.keys() - b_record.keys() == {"monitor_fgsm", "monitor_pgd"}
        assert all(0 <= a_record[name] <= 1 for name in ("monitor_fgsm", "monitor_pgd"))
        assert a_record["loss"] == b_record["loss"]


def test_the_model_is_left_as_it_was(corners: Dataset) -> None:
    model = network().train()
    weight = next(model.parameters())
    weight.grad = torch.ones_like(weight)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    chance = torch.get_rng_state()
    monitor(model, corners, 8 / 255)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert [p.grad is not None for p in model.parameters()].count(True) == 1
    assert torch.equal(chance, torch.get_rng_state())


def test_a_resumed_training_watches_the_same(corners: Dataset) -> None:
    kept: list[tuple[History, dict[str, Tensor], dict[str, Tensor]]] = []
    config = replace(CONFIG, epochs=3)
    whole, again = network(0.0), network(0.0)  # dropout would go on with other draws

    def keep(history: History, momentum: Mapping[str, Tensor]) -> None:
        weights = {name: value.clone() for name, value in whole.state_dict().items()}
        kept.append((history, weights, {k: v.clone() for k, v in momentum.items()}))

    complete = train(whole, corners, config, on_epoch=keep)
    history, weights, momentum = kept[0]
    again.load_state_dict(weights)
    resumed = train(again, corners, config, history=history, momentum=momentum)
    for name in ("loss", "monitor_fgsm", "monitor_pgd"):
        assert [r[name] for r in resumed] == [r[name] for r in complete]
    for a, b in zip(whole.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)


def test_only_adversarial_training_and_only_the_first_process_is_watched(
    corners: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(CONFIG, epochs=1)
    for plain in (replace(config, attack="none"), replace(config, mix=0.0)):
        (record,) = train(network(), corners, plain)
        assert "monitor_pgd" not in record
    own = replace(config, attack="none")
    (record,) = train(network(), corners, own, attack=dq.FGSM(8 / 255))
    assert "monitor_pgd" in record
    monkeypatch.setattr(Workers, "leads", property(lambda _: False))
    (record,) = train(network(), corners, config)
    assert "monitor_pgd" not in record


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
    unwatched = ({"epoch": 1, "loss": 2.0},)
    later = tuple({**record, "epoch": record["epoch"] + 1} for record in records(*pairs))
    assert collapsed((*unwatched, *later)) == (None if epoch is None else epoch + 1)


def test_a_collapse_is_told_once() -> None:
    history = records((0.5, 0.41), (0.78, 0.03), (0.8, 0.02), (0.9, 0.0))
    messages = [told(history[:epochs], 4) for epochs in range(5)]
    assert [len(found) for found in messages] == [0, 0, 1, 0, 0]
    (message,) = messages[2]
    assert message.startswith(
        "PGD accuracy on the monitored batch fell from 41% to 3% in epoch 2 while FGSM's is 78%: "
        "catastrophic overfitting: "
    )
    assert "\n" not in message


def test_a_gap_without_a_fall_is_told_at_the_end() -> None:
    masked = records((0.5, 0.1), (0.6, 0.2), (0.5, 0.3))
    assert [len(told(masked[:epochs], 3)) for epochs in range(4)] == [0, 0, 0, 1]
    (message,) = told(masked, 3)
    assert "50% under FGSM and 30% under PGD" in message
    assert "\n" not in message
    assert not told(records((0.5, 0.31)), 1)
    assert not told(({"epoch": 1, "loss": 2.0},), 1)


def test_training_tells_and_goes_on(corners: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    script = iter([(0.5, 0.4), (0.8, 0.1), (0.9, 0.0)])

    def scripted(*_: object, **__: object) -> dict[str, float]:
        return dict(zip(("monitor_fgsm", "monitor_pgd"), next(script), strict=True))

    monkeypatch.setattr(training, "monitor", scripted)
    with pytest.warns(dq.DefquantWarning, match="overfitting") as found:
        history = train(network(), corners, replace(CONFIG, epochs=3))
    assert len(found) == 1
    assert len(history) == 3
    assert collapsed(history) == 2


def test_a_masking_training_is_told_at_its_end() -> None:
    config = replace(CONFIG, attack="fgsm", attack_eps=0.1, lr=1e-3)
    with pytest.warns(dq.DefquantWarning, match="FGSM overstates") as found:
        history = train(Masked(0.1), grey_images(), config)
    assert len(found) == 1
    assert [(r["monitor_fgsm"], r["monitor_pgd"]) for r in history] == [(1.0, 0.0)] * 2


def test_fgsm_training_overfits_at_a_large_eps_and_not_at_a_small_one() -> None:
    config = TrainConfig(
        epochs=30, batch_size=32, lr=0.1, schedule="constant", weight_decay=0.0, augment=False,
        attack="fgsm", attack_eps=80 / 255, device="cpu",
    )  # fmt: skip
    with pytest.warns(dq.DefquantWarning, match="catastrophic overfitting"):
        history = train(thin_network(0), digits(512), config)
    epoch = collapsed(history)
    assert epoch is not None
    fallen = history[epoch - 1]
    assert fallen["monitor_fgsm"] > fallen["monitor_pgd"] + 0.2
    small = replace(config, epochs=10, attack_eps=24 / 255)
    history = train(thin_network(0), digits(512), small)
    assert collapsed(history) is None
    assert history[-1]["monitor_pgd"] > 0.8
