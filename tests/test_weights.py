"""Weights on their grid: the grid, the layers, the penalty."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from torch import Tensor, nn

import defquant as dq
from defquant.config import ModelConfig
from defquant.lipschitz import OrthogonalPenalty, Target
from defquant.typed import from_mapping
from defquant.weights import QuantConv2d, QuantLinear, quantize_weight, weight_grid

WEIGHTS = arrays.arrays(np.float32, (3, 7), elements=st.floats(-4, 4, width=32))
LAYERS: Mapping[str, tuple[type[nn.Module], type[nn.Module], tuple[int, ...], dict[str, Any]]] = {
    "linear": (QuantLinear, nn.Linear, (8, 5), {}),
    "plain": (QuantConv2d, nn.Conv2d, (4, 6, 3), {}),
    "strided, with a wide border": (QuantConv2d, nn.Conv2d, (4, 6, 3), {"stride": 2, "padding": 2}),
    "grouped": (QuantConv2d, nn.Conv2d, (4, 6, 3), {"groups": 2, "bias": False}),
    "dilated, circular": (
        QuantConv2d, nn.Conv2d, (4, 6, 3), {"dilation": 2, "padding": 1, "padding_mode": "circular"}
    ),
}  # fmt: skip


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("bits", "weight", "integers"),
    [
        (8, [127.0, -127.0, 63.4, 0.5, 1.5, -2.5, 0.0], [127, -127, 63, 0, 2, -2, 0]),
        (7, [-63.0, 62.5, 61.5, 0.4, 0.6, 1.0, -1.0], [-63, 62, 62, 0, 1, 1, -1]),
        (4, [7.0, -6.6, 3.5, 2.5, 0.5, -0.51, 0.0], [7, -7, 4, 2, 0, -1, 0]),
        (2, [-1.0, 0.5, 0.51, -0.5, -0.7, 0.0, 1.0], [-1, 0, 1, 0, -1, 0, 1]),
    ],
)
def test_integers_and_scales_are_the_closed_form(
    bits: int, weight: list[float], integers: list[int]
) -> None:
    """Channels are powers of two times one row, so that each scale is exact, and one is zero.

    A channel knows nothing of the others.
    """
    scales = [0.25, 1.0, 2.0**-9, 0.0]
    k, s = weight_grid(torch.tensor([[w * scale for w in weight] for scale in scales]), bits)
    assert s.tolist() == [0.25, 1.0, 2.0**-9, 1.0]
    assert k.tolist() == [integers, integers, integers, [0] * 7]


@settings(deadline=None, max_examples=60)
@given(array=WEIGHTS, bits=st.integers(2, 8))
def test_the_grid_is_narrow_symmetric_and_within_half_a_step(array: np.ndarray, bits: int) -> None:
    """Down to weights so small that float32 holds few digits of their scale."""
    weight, most = torch.from_numpy(array), 2 ** (bits - 1) - 1
    k, s = weight_grid(weight, bits)
    assert (k == k.round()).all() and k.abs().max() <= most
    assert (s > 0).all()
    normal = weight.abs().amax(1) > 1e-30
    assert (k.abs().amax(1)[normal] == most).all()
    error = (weight - s[:, None] * k).abs()[normal]
    assert (error <= 0.5001 * s[normal, None]).all()
    assert all(map(torch.equal, weight_grid(-weight, bits), (-k, s)))


def test_nothing_leaves_the_range_where_the_scale_has_one_digit() -> None:
    """A channel of the smallest numbers there are: its scale is one or two of them."""
    weight = torch.tensor([[190.0, -1.0], [100.0, 0.0]]) * 2.0**-149
    assert weight_grid(weight, 8)[0].abs().max() <= 127


@pytest.mark.parametrize("bits", [2, 4, 7, 8])
def test_the_value_is_on_the_grid_bit_for_bit_with_the_identitys_gradient(bits: int) -> None:
    weight = random(6, 4, 3, 3).contiguous(memory_format=torch.channels_last).requires_grad_()
    before, grad = weight.detach().clone(), random(6, 4, 3, 3, seed=1)
    value, (k, s) = quantize_weight(weight, bits), weight_grid(weight, bits)
    assert torch.equal(value, k * s.view(-1, 1, 1, 1))
    assert torch.equal(weight_grid(value, bits)[0], k)
    assert value.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(torch.autograd.grad(value, weight, grad)[0], grad)
    assert torch.equal(weight, before)
    assert quantize_weight(weight, None) is weight


@pytest.mark.parametrize("bits", [-1, 0, 1, 9])
def test_other_weight_bits_are_refused(bits: int) -> None:
    with pytest.raises(dq.UserError, match=f"from 2 to 8; found {bits}"):
        weight_grid(torch.ones(1, 1), bits)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("bits", [None, 2, 8])
def test_a_layer_is_torchs_with_the_quantised_weight(name: str, bits: int | None) -> None:
    """The output, the gradient of x and, straight through, those of weight and bias."""
    ours, theirs, sizes, options = LAYERS[name]
    torch.manual_seed(0)
    layer, plain = ours(*sizes, weight_bits=bits, **options), theirs(*sizes, **options)
    plain.load_state_dict(layer.state_dict())  # the same names, the same shapes
    plain.weight.data = quantize_weight(layer.weight, bits).detach()  # type: ignore[arg-type]
    found = []
    for module in (layer, plain):
        x = random(2, 4, 9, 8).requires_grad_()
        y = module(x)
        grads = torch.autograd.grad(y, [x, *module.parameters()], random(*y.shape, seed=2))
        found.append([y, *grads])
    assert all(map(torch.equal, *found))


# ------------------------------------------------------------------------------------ the penalty


def layers(bits: int | None, last: bool) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        QuantConv2d(2, 9, 3, weight_bits=bits), QuantConv2d(9, 4, 1, stride=2, weight_bits=bits),
        QuantConv2d(4, 6, 3, groups=2, weight_bits=bits), QuantLinear(6, 3, weight_bits=bits),
        nn.Linear(3, 5),
    )  # fmt: skip
    return model.to(memory_format=torch.channels_last) if last else model  # type: ignore[call-overload]


def on_grid(model: nn.Module, bits: int) -> nn.Module:
    """`layers` without `weight_bits`, its weights on the grid: what the penalty must see."""
    plain = layers(None, last=False)
    for layer, theirs in zip(plain.children(), model.children(), strict=True):
        weight = theirs.weight.detach().contiguous()  # type: ignore[operator]
        value = weight if type(theirs) is nn.Linear else quantize_weight(weight, bits)
        layer.weight.data = value.clone()
    return plain


def matrices(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.dim() > 1]


@pytest.mark.parametrize("target", ["identity", "parseval"])
@pytest.mark.parametrize("last", [False, True], ids=["rows", "channels last"])
@pytest.mark.parametrize("bits", [8, 2])
def test_the_penalty_is_that_of_the_quantised_weights(
    bits: int, last: bool, target: Target
) -> None:
    """And the retraction moves the float weight W by theirs: W <- W + beta (Q - QQ'Q)."""
    model = layers(bits, last)
    plain = on_grid(model, bits)
    penalty, truth = (OrthogonalPenalty(m, 0.3, target=target) for m in (model, plain))
    value = truth.penalty()
    torch.autograd.backward(value)
    expected = [p.grad for p in matrices(plain)]

    torch.autograd.backward(penalty.penalty())
    torch.testing.assert_close(penalty.penalty(), value)
    torch.testing.assert_close([p.grad for p in matrices(model)], expected)
    model.zero_grad()
    torch.testing.assert_close(penalty.add_grad_(), value.detach())
    torch.testing.assert_close([p.grad for p in matrices(model)], expected)
    unquantised = OrthogonalPenalty(layers(None, last), 0.3, target=target)
    assert not torch.isclose(unquantised.penalty(), value, rtol=1e-3 if bits == 2 else 1e-6)

    before = [[p.detach().clone() for p in matrices(each)] for each in (model, plain)]
    truth.retract_()
    penalty.retract_()
    moved = [w + p - q for w, p, q in zip(before[0], matrices(plain), before[1], strict=True)]
    torch.testing.assert_close([p.detach() for p in matrices(model)], [m.detach() for m in moved])


@pytest.mark.parametrize("weight_bits", [0, 1, 3, 7, 16, "8", True, -8])
def test_other_weight_bits_of_a_run_are_refused(weight_bits: object) -> None:
    said = r"weight_bits must be (8, 4 or 2|a whole).*found '?" + str(weight_bits)
    with pytest.raises(dq.UserError, match=said):
        from_mapping(ModelConfig, {"weight_bits": weight_bits})


def test_runs_from_before_have_float_weights() -> None:
    config = from_mapping(ModelConfig, {"model": "wrn-10-1", "bits": 4})
    assert (config.weight_bits, config.deployable) == (None, False)
