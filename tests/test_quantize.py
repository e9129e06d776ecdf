from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import defquant as dq
from conftest import alike, refused
from defquant.quantize import QuantBranch, QuantTanh
from defquant.rounding import fake_quantize
from defquant.weights import quantize_weight

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


def test_ties_go_to_the_even_code_and_without_bits_it_is_the_clamp() -> None:
    x = torch.tensor([0.5, 1.5, 2.5, 3.5])
    assert fake_quantize(x, 3, 7.0).tolist() == [0.0, 2.0, 2.0, 4.0]
    assert torch.equal(fake_quantize(4 * x - 5, None), nn.functional.relu6(4 * x - 5))


def test_a_gradient_lies_as_the_input_did() -> None:
    """Also where the next layer gives it another layout: layers before are fast in their own."""
    for quantizer in (dq.QuantReLU(4), dq.QuantSigned(4, peak=2.0)):
        x = torch.randn(3, 5, 4, 4).to(memory_format=torch.channels_last).requires_grad_(True)
        (made,) = torch.autograd.grad(quantizer(x).mean((2, 3)).sum(), x)
        assert made.stride() == x.stride()


def test_one_byte_per_element_is_saved() -> None:
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    x = torch.randn(4, 3, 8, 8, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        fake_quantize(x, 4)
    assert [t.element_size() * t.numel() for t in saved] == [x.numel()]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("peak", [None, 0.0, 2.0])
def test_half_precision_is_rounded_in_float32(dtype: torch.dtype, peak: float | None) -> None:
    """By the quantisers of activations and of branches (`peak`); autocast is given float32."""
    modules = [dq.QuantReLU(8), QuantTanh(8)] if peak is None else [branch(peak)]
    x = torch.randn(100).to(dtype).requires_grad_()
    for module in modules:
        for amp in (False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=amp):
                y = module(x)
            assert y.dtype == (torch.float32 if amp else dtype)
            assert torch.equal(y, module(x.float()).to(y.dtype))
        (grad,), (full,) = (torch.autograd.grad(module(z).sum(), z) for z in (x, x.float()))
        assert torch.equal(grad, full.to(dtype))


@pytest.mark.parametrize("bits", [0, 9, "four", 4.0, True, -1])
def test_other_bits_are_refused(bits: Any) -> None:
    for call in (dq.QuantReLU, QuantTanh, lambda bits: fake_quantize(torch.zeros(1), bits)):
        with pytest.raises(dq.UserError, match="bits must be a whole number from 1 to 8"):
            call(bits)


@pytest.mark.parametrize("high", [0.0, -1.0, float("inf"), float("nan")])
def test_other_ranges_are_refused(high: float) -> None:
    refused(lambda: dq.QuantReLU(4, high), "must be positive")


def test_set_bits_changes_the_function_not_the_state() -> None:
    model = dq.wide_resnet(10, 1, bits=4, in_channels=1).eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    x = torch.rand(2, 1, 8, 8)
    four = model(x)
    assert dq.set_bits(model, None) is model
    assert not torch.equal(four, model(x))
    assert torch.equal(dq.set_bits(model, 4)(x), four)
    assert alike(before, model.state_dict())
    refused(lambda: dq.set_bits(model, 9), "bits must")
    refused(lambda: dq.set_bits(nn.Flatten(), 4), "no activation quantiser")


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


# ------------------------------------------------------- what torch and its users do with a module

Form = Callable[[Tensor], Tensor]


def branch(peak: float = 0.0) -> QuantBranch:
    module = QuantBranch().eval()
    module.peak.fill_(peak)
    return module


def slow_relu(x: Tensor) -> tuple[Tensor, Tensor]:
    step = 6.0 / 15
    slope = torch.autograd.functional.jacobian(lambda x: nn.functional.relu6(x).sum(), x)
    return (x / step).round().clamp(0, 15) * step, slope


def slow_tanh(x: Tensor) -> tuple[Tensor, Tensor]:
    t = torch.tanh(x)
    return t + (((t + 1) * 7.5).round() * (2 / 15) - 1 - t), torch.ops.aten.tanh_backward(
        torch.ones_like(t), t
    )


def slow_branch(x: Tensor) -> tuple[Tensor, Tensor]:
    step = torch.tensor(2.0) / 127
    codes = (x / step).round()
    return codes.clamp(-128, 127) * step, ((codes >= -128) & (codes <= 127)).float()


def slow_weight(x: Tensor) -> tuple[Tensor, Tensor]:
    step = x.abs().max() / 7
    return (x / step).round() * step, torch.ones_like(x)


FORMS: dict[str, tuple[Callable[[], Form], Callable[[Tensor], tuple[Tensor, Tensor]]]] = {
    "relu": (lambda: dq.QuantReLU(4), slow_relu),
    "tanh": (lambda: QuantTanh(4), slow_tanh),
    "branch": (lambda: branch(2.0), slow_branch),
    "new branch": (branch, lambda x: (x, torch.ones_like(x))),
    "weight": (lambda: lambda x: quantize_weight(x[None], 4)[0], slow_weight),
}


def derivatives(form: Form, x: Tensor) -> dict[str, Callable[[], Tensor]]:
    """The slope of `form` at each x, by every road that torch has."""
    at = x.clone().requires_grad_()
    rows = torch.eye(len(x))
    traced = torch.jit.trace(form, (x,), check_trace=False)
    compiled = torch.compile(form, backend="aot_eager")

    def backward(form: Form) -> Tensor:
        return torch.autograd.grad(form(at).sum(), at)[0]

    return {
        "backward": lambda: backward(form),
        "func.grad": lambda: torch.func.grad(lambda x: form(x).sum())(x),
        "jacrev": lambda: torch.func.jacrev(form)(x).diag(),
        "vmap of grad": lambda: torch.func.vmap(torch.func.grad(lambda x: form(x).sum()))(
            torch.stack([x, x])
        )[1],
        "grad of vmap": lambda: torch.func.grad(
            lambda x: torch.func.vmap(form)(torch.stack([x, x]))[0].sum()
        )(x),
        "batched": lambda: torch.autograd.grad(form(at), at, rows, is_grads_batched=True)[0].diag(),
        "traced": lambda: backward(traced),
        "compiled": lambda: backward(compiled),
    }


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # torch.jit's
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("name", FORMS)
def test_value_and_slope_are_the_slow_ones_to_the_last_bit_by_every_road(name: str) -> None:
    make, slow = FORMS[name]
    x = torch.randn(40, generator=torch.Generator().manual_seed(1)) * 3
    form, (value, slope) = make(), slow(x)
    traced = torch.jit.trace(form, (x,), check_trace=False)
    for road in (form, torch.compile(form, backend="aot_eager"), traced):
        assert torch.equal(road(x), value)
    assert torch.equal(torch.func.vmap(form)(x[None])[0], value)
    for road, found in derivatives(form, x).items():
        assert torch.equal(found(), slope), road


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", FORMS)
def test_inductor_compiles_them(name: str) -> None:
    torch.compiler.reset()  # of one forward torch compiles but so many forms
    form, x = FORMS[name][0](), torch.randn(40, requires_grad=True)
    compiled = torch.compile(form, fullgraph=True)
    assert torch.equal(compiled(x), form(x))
    theirs, ours = (torch.autograd.grad(f(x).sum(), x)[0] for f in (compiled, form))
    torch.testing.assert_close(theirs, ours)


@pytest.mark.parametrize("amp", [False, True])
def test_a_network_is_one_graph_to_a_compiler(amp: bool) -> None:
    """Old versions of torch broke it at a quantiser's question whether autocast is on."""
    net = dq.wide_resnet(10, 1, bits=4, weight_bits=8, convex=True, deployable=True).eval()
    x = torch.rand(2, 3, 8, 8)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=amp):
        compiled = torch.compile(net, backend="eager", fullgraph=True)
        assert torch.equal(compiled(x), net(x))


@pytest.mark.parametrize("name", FORMS)
def test_what_follows_may_work_in_place_and_nan_stays(name: str) -> None:
    form, x = FORMS[name][0](), torch.randn(40, requires_grad=True)
    y = form(x)
    y += x
    assert torch.equal(torch.relu_(y), torch.relu(form(x) + x))
    y.sum().backward()
    for road in (form, torch.compile(form, backend="aot_eager")):
        assert road(torch.tensor([1.0, torch.nan]))[1].isnan()


# ---------------------------------------------------------------------------- branches on a grid


def test_a_branch_is_the_closed_form_and_its_gradient_ends_with_its_range() -> None:
    x = torch.tensor([-500.0, -128.6, -128.4, -128, -127.5, -0.5, 0.5, 1.5, 2.5, 127.4, 127.6, 500])
    codes = torch.tensor([-128.0, -128, -128, -128, -128, 0, 0, 2, 2, 127, 127, 127])
    inside = torch.tensor([0.0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0])
    for step in (1.0, 0.25, 2.0**-20):
        y = branch(127 * step)(at := (x * step).requires_grad_())
        assert torch.equal(y, codes * step)
        assert torch.equal(torch.autograd.grad(3 * y.sum(), at)[0], 3 * inside)


@pytest.mark.parametrize("least", [None, 0.0, 0.17])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_signed_grid_is_the_nearest_of_its_values(bits: int, least: float | None) -> None:
    """As many as 2^bits, of which the share of the negative range lies below 0."""
    x, top = torch.linspace(-3.013, 2.987, 401, dtype=torch.float64), 2**bits - 1
    below = 2 ** (bits - 1) if least is None else round(top * least / (2 + least))
    grid = torch.arange(-below, top + 1 - below).double() * (2 / (top - below))
    module = dq.QuantSigned(bits, peak=2.0, least=least).eval().double()
    y = module(at := x.requires_grad_())
    nearest = grid[(x[:, None] - grid).abs().argmin(1)]
    torch.testing.assert_close(y, nearest.to(y))
    half = 1 / (top - below)
    inside = (x > grid[0] - half) & (x < grid[-1] + half)
    assert torch.equal(torch.autograd.grad(y.sum(), at)[0], inside.to(x))
    cells = module.cells(x.detach())
    assert cells is not None
    torch.testing.assert_close(cells.scaled.round().clamp(0, top) - below, y / (2 / (top - below)))


def test_a_signed_range_is_the_one_of_least_squared_error() -> None:
    x = torch.randn(64, 100, generator=torch.Generator().manual_seed(0))
    x[0, 0] = 12.0
    module = dq.QuantSigned(3).train()
    module(x)
    assert float(module.peak) == 3.0  # a quarter of the outlier


def test_zeros_give_a_branch_no_range() -> None:
    training = QuantBranch().train()
    assert torch.equal(training(torch.zeros(5)), torch.zeros(5))  # and no NaN
    assert training.peak == 0


def test_the_range_is_a_moving_average_in_training_alone() -> None:
    """From the first batch on, which is rounded onto its own range."""
    module, seen = QuantBranch().train(), []
    for largest in (4.0, -8.0, torch.inf, torch.nan, 2.0):
        y = module(x := torch.tensor([0.5, largest, -1.0]))
        step = module.peak / 127
        expected = (x / step).round().clamp(-128, 127) * step
        torch.testing.assert_close(y, expected, equal_nan=True)
        seen.append(float(module.peak))
    assert seen == pytest.approx([4.0, 4.4, 4.4, 4.4, 4.16])  # one bad batch is passed over
    module.eval()(torch.full((3,), 1e6))
    assert float(module.peak) == seen[-1]
    assert module.peak.shape == () and not module.peak.requires_grad
