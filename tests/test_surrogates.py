"""Backward surrogates: the answers stay exact, the gradients are as written, all is put back."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import defquant as dq
from conftest import left_alone, refused
from defquant.attacks import APGD
from defquant.attacks.engine import Plan, Surrogate, look
from defquant.attacks.surrogates import (
    EOT,
    ClipFree,
    FloatTwin,
    Precisions,
    SoftRound,
    staircase_slope,
)
from defquant.evaluate import robust
from defquant.quantize import QuantReLU, QuantTanh
from linear_scenes import network

ALL: list[Surrogate] = [
    EOT(1), ClipFree(), SoftRound(), SoftRound(4), FloatTwin(), EOT(2),
    Precisions((2, None)),
]  # fmt: skip


def gradient(surrogate: Surrogate, model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    with surrogate(model) as forwards:
        answers = [forward(x) for forward in forwards]
        grads = [torch.autograd.grad(answer.sum(), x)[0] for answer in answers]
    return torch.stack([a.detach() for a in answers]).mean(0), torch.stack(grads).mean(0)


@pytest.mark.parametrize("surrogate", ALL)
@pytest.mark.parametrize("bits", [1, 2, None])
def test_the_answers_stay_exact(surrogate: Surrogate, bits: int | None) -> None:
    model, x = network(bits), torch.rand(16, 1, 8, 8)
    with torch.no_grad():
        own = model(x)
    assert torch.equal(gradient(surrogate, model, x)[0], own)


@pytest.mark.parametrize("surrogate", ALL)
def test_the_model_is_put_back(surrogate: Surrogate) -> None:
    model, x = network(2), torch.rand(4, 1, 8, 8)
    before = gradient(EOT(1), model, x)[1]
    with left_alone(model):
        gradient(surrogate, model, x)
        with pytest.raises(RuntimeError, match="boom"), surrogate(model) as forwards:
            forwards[0](x)
            raise RuntimeError("boom")
    assert torch.equal(gradient(EOT(1), model, x)[1], before)


def test_a_forward_of_the_users_own_comes_back() -> None:
    quantizer = QuantReLU(2)
    mine: Any = quantizer.forward
    quantizer.__dict__["forward"] = mine
    with SoftRound()(quantizer), ClipFree()(quantizer):
        pass
    assert quantizer.__dict__["forward"] is mine


def numeric(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    x, h = x.double(), 1e-6
    return ((function(x + h) - function(x - h)) / (2 * h)).float()


@settings(max_examples=40, deadline=None)
@given(bits=st.integers(1, 8), slope=st.floats(0.5, 30), high=st.sampled_from([1.0, 6.0]))
def test_soft_round_is_the_gradient_of_its_staircase(bits: int, slope: float, high: float) -> None:
    levels = 2**bits - 1
    x = torch.linspace(-0.4 * high, 1.4 * high, 301)

    def stair(u: Tensor, cell: Tensor) -> Tensor:
        """From `cell` at its lower end to `cell` + 1 at its upper one."""
        part = torch.tanh(slope * (u - cell - 0.5) / 2) / math.tanh(slope / 4)
        return cell + (1 + part) / 2

    zero = torch.zeros(1, dtype=torch.float64)
    torch.testing.assert_close(stair(zero, zero), zero)
    torch.testing.assert_close(stair(zero + 1, zero), zero + 1)

    def stairs(z: Tensor) -> Tensor:
        u = z * levels / high
        cell = (x.double() * levels / high).floor().clamp(0, levels - 1)  # of x, not of x ± h
        rounded: Tensor = stair(u, cell) * high / levels
        return rounded

    got = gradient(SoftRound(slope), QuantReLU(bits, high), x[:, None])[1][:, 0]
    torch.testing.assert_close(got, numeric(stairs, x), rtol=1e-3, atol=1e-4)

    def tanh_stairs(z: Tensor) -> Tensor:
        u, here = (z.tanh() + 1) * levels / 2, (x.double().tanh() + 1) * levels / 2
        cell = here.floor().clamp(0, levels - 1)
        rounded: Tensor = 2 * stair(u, cell) / levels - 1
        return rounded

    got = gradient(SoftRound(slope), QuantTanh(bits), x[:, None])[1][:, 0]
    torch.testing.assert_close(got, numeric(tanh_stairs, x), rtol=2e-3, atol=1e-3)


def test_soft_round_is_rounding_under_logistic_noise() -> None:
    """E[Q(u + noise)] moves as the staircase says, where the noise is small beside a cell."""
    generator = torch.Generator().manual_seed(0)
    p = torch.rand(400_000, generator=generator)
    noise = (p / (1 - p)).log() / 12
    quantizer, h = QuantReLU(2, high=3.0), 0.05  # cells of width 1
    for u in (0.3, 0.5, 1.6, 2.45):
        mean = [quantizer(u + way + noise).mean() for way in (-h, h)]
        slope = float(mean[1] - mean[0]) / (2 * h)
        got = gradient(SoftRound(12), quantizer, torch.tensor([[u]]))[1].item()
        assert abs(got - slope) < 0.1, u


def test_a_gentle_soft_round_is_straight_through_within_the_range() -> None:
    x = torch.linspace(0.01, 5.99, 50)[:, None]
    quantizer = QuantReLU(5)
    own = gradient(EOT(1), quantizer, x)[1]
    torch.testing.assert_close(gradient(SoftRound(0.01), quantizer, x)[1], own, rtol=1e-4, atol=0)


def test_clip_free_is_the_identity_and_straight_through_is_not() -> None:
    x = torch.tensor([[-1.0], [2.0], [7.0]])
    for quantizer in (QuantReLU(2), QuantTanh(2), QuantReLU(None)):
        assert gradient(ClipFree(), quantizer, x)[1].flatten().tolist() == [1, 1, 1]
    assert gradient(EOT(1), QuantReLU(2), x)[1].flatten().tolist() == [0, 1, 0]


def test_the_float_twin_is_the_network_at_full_precision() -> None:
    model, x = network(2), torch.rand(8, 1, 8, 8)
    got = gradient(FloatTwin(), model, x)[1]
    expected = gradient(EOT(1), dq.set_bits(model, None), x)[1]
    assert torch.equal(got, expected)
    dq.set_bits(model, 2)
    both = gradient(Precisions((2, None)), model, x)[1]
    own = gradient(EOT(1), model, x)[1]
    torch.testing.assert_close(both, (own + expected) / 2)


def test_eot_averages_a_random_network() -> None:
    class Noisy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            noise = torch.randn(len(x), 2)
            return noise * x.mean((1, 2, 3))[:, None]

    x, y = torch.rand(64, 1, 4, 4), torch.zeros(64, dtype=torch.int64)
    spread = []
    for passes in (1, 100):
        with EOT(passes)(Noisy()) as forwards:
            spread.append(float(look(forwards, {"at": x, "y": y, "target": y}, Plan(1)).grad.std()))
    assert spread[1] < 0.3 * spread[0]


def test_the_slope_by_bits() -> None:
    assert [round(staircase_slope(bits), 1) for bits in (1, 2, 3, 4)] == [15.8, 12.0, 9.7, 8.0]
    soft, named = SoftRound(), SoftRound(staircase_slope(2))
    model, x = network(2), torch.rand(4, 1, 8, 8)
    assert torch.equal(gradient(soft, model, x)[1], gradient(named, model, x)[1])


def test_soft_round_finds_what_straight_through_misses() -> None:
    """Attacks under each surrogate keep the rules, and on 2 bits they do not agree."""
    model = network(2)
    x = torch.rand(24, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        y = model(x).argmax(1)
    found = []
    for surrogate in ALL:
        attack = APGD(2 / 255, 5, loss="margin", surrogate=surrogate)
        whole = robust(model, (x, y), attack)
        assert torch.equal(whole, robust(model, (x, y), attack, batch_size=7))
        found.append(int(whole.sum()))
    assert len(set(found)) > 1
    assert min(found) < 24


def test_a_users_mistakes() -> None:
    for make in (
        lambda: SoftRound(0), lambda: SoftRound(math.nan), lambda: EOT(0), lambda: Precisions(()),
        lambda: Precisions((9,)),
    ):  # fmt: skip
        refused(make)
