import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import defquant as dq
from defquant.quantize import QuantTanh, fake_quantize

BITS = st.integers(1, 8)
HIGH = st.sampled_from([1.0, 2.5, 6.0])
EDGES = [-1e30, -3.0, -1e-38, -0.0, 0.0, 1e-40, 1e-7, 5.9999995, 6.0, 6.0000005, 9.0, 1e30]


def reference(x: Tensor, bits: int, high: float) -> Tensor:
    """The paper's own words: y = r + stop_gradient[Quantize(r) - r], r = relu6(x)."""
    r = nn.functional.hardtanh(x, 0.0, high)
    step = high / (2**bits - 1)
    quantized: Tensor = r + (torch.round(r / step) * step - r).detach()
    return quantized


@settings(max_examples=60, deadline=None)
@given(bits=BITS, high=HIGH, seed=st.integers(0, 10**6))
def test_value_and_gradient_are_the_papers(bits: int, high: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.cat([torch.randn(200, generator=generator) * high, torch.tensor(EDGES)])
    x = x.double().requires_grad_()
    grad = torch.randn(len(x), generator=generator).double()
    ours, theirs = fake_quantize(x, bits, high), reference(x, bits, high)
    torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)
    (mine,) = torch.autograd.grad(ours, x, grad)
    (paper,) = torch.autograd.grad(theirs, x, grad)
    assert torch.equal(mine, paper)
    clamp = nn.functional.hardtanh(x, 0.0, high)
    assert torch.equal(mine, torch.autograd.grad(clamp, x, grad)[0])


@settings(max_examples=40, deadline=None)
@given(bits=BITS, high=HIGH)
def test_output_is_on_the_grid_and_quantising_again_changes_nothing(bits: int, high: float) -> None:
    x = torch.linspace(-2, high + 2, 5001)
    q = fake_quantize(x, bits, high)
    codes = q / (high / (2**bits - 1))
    assert (codes - codes.round()).abs().max() < 1e-4
    assert len(codes.round().unique()) == 2**bits
    assert (q >= 0).all()
    torch.testing.assert_close(q.max(), torch.tensor(high))
    assert torch.equal(fake_quantize(q, bits, high), q)
    assert (q.diff() >= 0).all()


def test_ties_go_to_the_even_code() -> None:
    x = torch.tensor([0.5, 1.5, 2.5, 3.5])
    assert fake_quantize(x, 3, 7.0).tolist() == [0.0, 2.0, 2.0, 4.0]


def test_one_byte_per_element_is_saved() -> None:
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    x = torch.randn(4, 3, 8, 8, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        fake_quantize(x, 4)
    assert [t.element_size() * t.numel() for t in saved] == [x.numel()]


def test_full_precision_is_the_clamp() -> None:
    x = torch.randn(100) * 5
    assert torch.equal(fake_quantize(x, None), nn.functional.relu6(x))


def test_autocast_quantises_in_float32() -> None:
    x = torch.full((4,), 2.7)
    with torch.autocast("cpu", torch.bfloat16):
        y = dq.QuantReLU(8)(x.bfloat16())
    assert y.dtype == torch.float32
    assert torch.equal(y, fake_quantize(x.bfloat16().float(), 8))


def test_gradient_reaches_half_precision_input() -> None:
    x = torch.tensor([-1.0, 2.0, 7.0], dtype=torch.bfloat16, requires_grad=True)
    fake_quantize(x, 4).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [0.0, 1.0, 0.0]


@pytest.mark.parametrize("bits", [0, 9, "four", 4.0, True, -1])
def test_other_bits_are_refused_in_one_line(bits: object) -> None:
    for call in (lambda: dq.QuantReLU(bits), lambda: fake_quantize(torch.zeros(1), bits)):  # type: ignore[arg-type]
        with pytest.raises(dq.UserError, match="bits must be a whole number from 1 to 8") as error:
            call()
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("high", [0.0, -1.0, float("inf"), float("nan")])
def test_other_ranges_are_refused(high: float) -> None:
    with pytest.raises(dq.UserError, match="must be positive"):
        dq.QuantReLU(4, high)


def test_set_bits_changes_the_function_not_the_state() -> None:
    model = dq.wide_resnet(10, 1, bits=4, in_channels=1)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    x = torch.rand(2, 1, 8, 8)
    four = model.eval()(x)
    assert dq.set_bits(model, None) is model
    full = model(x)
    assert not torch.equal(four, full)
    assert torch.equal(dq.set_bits(model, 4)(x), four)
    assert before.keys() == dq.wide_resnet(10, 1, in_channels=1).state_dict().keys()
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    with pytest.raises(dq.UserError):
        dq.set_bits(model, 9)
    with pytest.raises(dq.UserError, match="no activation quantiser"):
        dq.set_bits(nn.Linear(2, 2), 4)


@settings(max_examples=20, deadline=None)
@given(bits=BITS)
def test_tanh_quantiser(bits: int) -> None:
    x = torch.linspace(-4, 4, 401, dtype=torch.float64, requires_grad=True)
    y = QuantTanh(bits)(x)
    levels = 2**bits - 1
    expected = 2 * torch.round(levels * (torch.tanh(x) + 1) / 2) / levels - 1
    torch.testing.assert_close(y, expected.detach(), atol=1e-12, rtol=0)
    (grad,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(grad, 1 - torch.tanh(x.detach()) ** 2)
    assert QuantTanh()(x).equal(torch.tanh(x))
