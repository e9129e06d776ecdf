"""`amp`: bfloat16 for the inner convolutions of training alone, never for pixels or attacks."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import defquant as dq
from conftest import tiny_images
from defquant.attacks import Attack
from defquant.config import ModelConfig, TrainConfig
from defquant.data import Dataset
from defquant.evaluate import robust
from defquant.models import build
from defquant.models.blocks import FirstConv
from defquant.training import train, training_attack

NETWORKS = {"wrn-10-1": "stem", "vgg-16x0.125": "features.0", "resnet-18x0.125": "stem.0"}
CONFIG = TrainConfig(epochs=1, batch_size=16, lr=0.05, beta=0.02, amp=True, device="cpu")
SETTINGS = {
    "plain": {},
    "random rfgsm": {"attack": "rfgsm", "mix": 0.5},
    "fgsm": {"attack": "fgsm", "attack_eps": 8 / 255},
    "pgd": {"attack": "pgd", "attack_eps": 2 / 255},
}


def network(name: str = "wrn-10-1", *, convex: bool = True) -> nn.Module:
    return build(ModelConfig(name, bits=4, convex=convex), num_classes=4, in_channels=1)


class Seen:
    """(name, whether the model is in training mode, type of the output) of every convolution."""

    def __init__(self, model: nn.Module) -> None:
        self.convolutions: list[tuple[str, bool, torch.dtype]] = []
        self.outputs: dict[str, Tensor] = {}
        for name, module in model.named_modules():
            if isinstance(module, nn.Conv2d):
                module.register_forward_hook(self.hook(name, model))

    def hook(
        self, name: str, model: nn.Module
    ) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def note(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            self.convolutions.append((name, model.training, output.dtype))
            self.outputs[name] = output

        return note


@pytest.mark.parametrize(("name", "first"), NETWORKS.items())
def test_the_first_convolution_alone_stays_in_float32(name: str, first: str) -> None:
    model = network(name).eval()
    x = torch.rand(3, 1, 8, 8)
    seen = Seen(model)
    with torch.no_grad():
        model(x)
        plain = seen.outputs[first]
        seen.convolutions.clear()
        with torch.autocast("cpu", torch.bfloat16):
            model(x)
    assert torch.equal(seen.outputs[first], plain)  # bit for bit
    types = {conv: kind for conv, _, kind in seen.convolutions}
    assert types.pop(first) == torch.float32
    assert set(types.values()) == {torch.bfloat16}


@pytest.mark.parametrize(("name", "first"), NETWORKS.items())
def test_gradients_of_the_first_convolution_are_float32_too(name: str, first: str) -> None:
    stem = network(name).get_submodule(first)
    assert isinstance(stem, FirstConv)
    x = torch.rand(3, 1, 8, 8, requires_grad=True)
    found = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            y = stem(x)
        found.append(torch.autograd.grad(y.square().sum(), [x, stem.weight]))
    assert all(torch.equal(plain, auto) for plain, auto in zip(*found, strict=True))


def test_it_is_a_plain_convolution_otherwise() -> None:
    ours, plain = FirstConv(3, 5), nn.Conv2d(3, 5, 3, padding=1, bias=False)
    assert ours.state_dict().keys() == plain.state_dict().keys() == {"weight"}
    plain.load_state_dict(ours.state_dict())
    x = torch.rand(2, 3, 9, 9)
    assert torch.equal(ours(x), plain(x))
    assert ours.double()(x.double()).dtype == torch.float64
    with torch.autocast("cpu", torch.bfloat16):
        assert ours.float()(x.bfloat16()).dtype == torch.float32
    assert ours.to("meta")(x.to("meta")).shape == (2, 5, 9, 9)
    for name, first in NETWORKS.items():
        state = network(name).state_dict()
        assert next(iter(state)) == f"{first}.weight"
        assert f"{first}.bias" not in state


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("convex", [False, True])
def test_networks_train_under_autocast(corners: Dataset, name: str, convex: bool) -> None:
    model = network(name, convex=convex)
    (record,) = train(model, corners, CONFIG)
    assert record["loss"] < 10
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


def test_it_learns_under_autocast(corners: Dataset) -> None:
    history = train(network(), corners, replace(CONFIG, epochs=10), test=tiny_images(seed=1))
    assert history[-1]["test_accuracy"] > 0.9


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_attacks_and_scores_of_training_are_float32(
    corners: Dataset, settings: dict[str, object]
) -> None:
    """In eval mode, in which attacks, monitor and test run, no convolution is bfloat16."""
    model = network()
    seen = Seen(model)
    train(model, corners, replace(CONFIG, **settings), test=corners)  # type: ignore[arg-type]
    kinds = {
        mode: {kind for name, training, kind in seen.convolutions if training is mode}
        for mode in (True, False)
    }
    assert kinds == {True: {torch.float32, torch.bfloat16}, False: {torch.float32}}
    in_training = {name for name, training, kind in seen.convolutions if training}
    half = {name for name, _, kind in seen.convolutions if kind == torch.bfloat16}
    assert in_training - half == {"stem"}


def test_training_attacks_do_not_depend_on_amp(corners: Dataset) -> None:
    """The first step's adversarial images, from the same weights, with and without autocast."""
    made: list[Tensor] = []
    config = replace(CONFIG, attack="rfgsm", attack_eps=8 / 255)
    attack = training_attack(config)
    assert attack is not None

    def spy(
        model: nn.Module, x: Tensor, y: Tensor, *, generator: torch.Generator | None = None
    ) -> Tensor:
        assert not torch.is_autocast_enabled("cpu")
        made.append(attack(model, x, y, generator=generator))
        return made[-1]

    for amp in (False, True):
        train(network(), corners, replace(config, amp=amp), attack=spy)
    assert torch.equal(made[0], made[len(made) // 2])
    assert not torch.equal(made[1], made[len(made) // 2 + 1])  # the weights have parted


@pytest.mark.parametrize("attack", [dq.FGSM(0.1), dq.PGD(0.1, steps=3)], ids=str)
def test_reported_attacks_leave_the_callers_autocast(corners: Dataset, attack: Attack) -> None:
    model = network().eval()
    x, y = corners.take(torch.arange(8))
    every = torch.ones(len(corners), dtype=torch.bool)
    plain = attack(model, x, y)
    standing = robust(model, corners, attack, standing=every)
    seen = Seen(model)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(attack(model, x, y), plain)
        assert torch.equal(robust(model, corners, attack, standing=every), standing)
    assert {kind for _, _, kind in seen.convolutions} == {torch.float32}
