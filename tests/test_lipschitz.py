import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

import reference_lipschitz as slow
from defquant.errors import UserError
from defquant.lipschitz import (
    ConvexSum,
    OrthogonalPenalty,
    Target,
    conv_spectral_norm,
    project_simplex,
    project_simplex_,
    spectral_norm,
)  # fmt: skip

BETA = 0.3


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


# Rows fewer than, as many as and more than columns; 1x1, 1x3, 3x3; grouped and depthwise; linear.
LAYERS: dict[str, Callable[[], nn.Module]] = {
    "3x3 wide": lambda: nn.Conv2d(2, 5, 3), "3x3 square": lambda: nn.Conv2d(1, 9, 3, bias=False),
    "3x3 tall": lambda: nn.Conv2d(1, 12, 3), "1x3": lambda: nn.Conv2d(2, 3, (1, 3)),
    "1x1 wide": lambda: nn.Conv2d(6, 4, 1), "1x1 tall": lambda: nn.Conv2d(3, 7, 1),
    "grouped": lambda: nn.Conv2d(4, 6, 3, groups=2), "linear": lambda: nn.Linear(7, 3),
    "grouped tall": lambda: nn.Conv2d(4, 10, 1, groups=2),
    "depthwise": lambda: nn.Conv2d(3, 3, 3, groups=3),
}  # fmt: skip
every_layer = pytest.mark.parametrize("name", LAYERS)


def weight_grads(model: nn.Module) -> list[Tensor]:
    grads = [p.grad for name, p in model.named_parameters() if name.endswith("weight")]
    return [grad.clone() for grad in grads if grad is not None]


def literal_grads(model: nn.Module, beta: float = BETA, scale: float = 1.0) -> list[Tensor]:
    torch.autograd.backward(slow.literal_penalty(model, beta, scale))
    expected = weight_grads(model)
    model.zero_grad()
    return expected


def value_of(module: nn.Module) -> float:
    return OrthogonalPenalty(module, BETA).penalty().item()


@every_layer
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("beta", [0.0, BETA])
def test_penalty_and_gradients_are_the_literal_ones(
    name: str, layout: torch.memory_format, beta: float
) -> None:
    """Of both memory formats; gradients accumulate in place in their own."""
    model = LAYERS[name]().to(dtype=torch.float64, memory_format=layout)  # type: ignore[call-overload]
    (expected,), weight = literal_grads(model, beta), next(model.parameters())
    penalty = OrthogonalPenalty(model, beta)
    value = penalty.penalty()
    assert value.item() == pytest.approx(slow.reduced_penalty(model, beta), abs=1e-12)
    torch.autograd.backward(value)
    torch.testing.assert_close(weight_grads(model), [expected])
    for before in (None, torch.randn_like(weight), torch.randn(weight.shape).to(weight)):
        weight.grad, added = before, 0 if before is None else before.clone()
        logged = penalty.add_grad_()
        assert logged.shape == () and not logged.requires_grad
        assert logged.item() == pytest.approx(value.item(), rel=1e-12, abs=1e-12)
        torch.testing.assert_close(weight_grads(model), [added + expected])
        assert weight.grad is not None and (before is None or weight.grad is before)
        assert before is not None or weight.grad.stride() == weight.stride()


@every_layer
def test_the_second_derivative_is_the_finite_difference(name: str) -> None:
    model = LAYERS[name]().double()
    penalty, weight = OrthogonalPenalty(model, BETA), next(model.parameters())
    assert torch.autograd.gradgradcheck(lambda _: penalty.penalty(), (weight,))


def test_every_weight_and_nothing_else_is_penalised() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), ConvexSum(), nn.Linear(4, 2))
    OrthogonalPenalty(model, BETA).add_grad_()
    touched = {name for name, p in model.named_parameters() if p.grad is not None}
    assert touched == {"0.weight", "3.weight"}


def test_a_shared_weight_counts_once() -> None:
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    second.weight = first.weight
    both, expected = nn.Sequential(first, second, first), literal_grads(first)
    assert OrthogonalPenalty(both, BETA).add_grad_().item() == pytest.approx(value_of(first))
    torch.testing.assert_close(weight_grads(both), expected)


@pytest.mark.parametrize("kdim", [8, 6])
def test_the_projections_of_an_attention_are_a_matrix_each(kdim: int) -> None:
    """Stacked in one parameter, or three where keys have another size; the output's is a layer."""
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(8, 2, kdim=kdim)
    stacked = attention.in_proj_weight
    single = [attention.q_proj_weight, attention.k_proj_weight, attention.v_proj_weight]
    matrices = [*(single if stacked is None else stacked.chunk(3)), attention.out_proj.weight]
    penalty, value = OrthogonalPenalty(attention, 2.0), torch.zeros(())
    for W in matrices:
        gram = W @ W.mT if len(W) <= W.shape[1] else W.mT @ W
        value = value + (gram - torch.eye(len(gram))).square().sum()
    value.backward()
    literal = {name: p.grad for name, p in attention.named_parameters() if p.grad is not None}
    attention.zero_grad(set_to_none=True)
    torch.testing.assert_close(penalty.add_grad_(), value.detach())
    for name, grad in literal.items():
        torch.testing.assert_close(attention.get_parameter(name).grad, grad)


def test_frozen_weights_get_no_gradient_but_count() -> None:
    frozen, trained = nn.Linear(4, 3).requires_grad_(False), nn.Linear(3, 2)
    before, model = frozen.weight.clone(), nn.Sequential(frozen, trained)
    penalty = OrthogonalPenalty(model, BETA)
    assert penalty.add_grad_().item() == pytest.approx(penalty.penalty().item())
    assert penalty.penalty().item() == pytest.approx(value_of(frozen) + value_of(trained))
    penalty.retract_()
    assert frozen.weight.grad is None and trained.weight.grad is not None
    assert torch.equal(frozen.weight, before)


def test_the_penalty_follows_the_model() -> None:
    model = nn.Sequential(nn.Linear(4, 3))
    penalty, other = OrthogonalPenalty(model, BETA), nn.Sequential(nn.Linear(4, 3))
    for move in (model.double, lambda: model.load_state_dict(other.state_dict(), assign=True)):
        move()
        expected = slow.reduced_penalty(model, BETA)
        assert penalty.add_grad_().item() == pytest.approx(expected, rel=1e-5)
        assert model[0].weight.grad is not None


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
def test_the_gram_is_in_float32(dtype: torch.dtype | None) -> None:
    """Of half weights, and (None) of float32 weights under autocast."""
    half = nn.Conv2d(16, 16, 3).to(dtype or torch.float32)
    full = nn.Conv2d(16, 16, 3)
    full.load_state_dict(half.state_dict())
    expected = OrthogonalPenalty(full, BETA).add_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype is None):
        penalty = OrthogonalPenalty(half, BETA)
        values = penalty.penalty().detach(), penalty.add_grad_()
    assert values[1].dtype == torch.float32
    assert values[1].item() == expected.item() == pytest.approx(values[0].item())
    torch.testing.assert_close(weight_grads(half)[0], weight_grads(full)[0].to(half.weight))


def test_weight_decay_moves_the_equilibrium() -> None:
    beta, decay = 2e-3, 5e-4
    linear = nn.Linear(6, 4, bias=False).double()
    penalty = OrthogonalPenalty(linear, beta)
    optimizer = torch.optim.SGD(linear.parameters(), lr=50, weight_decay=decay)
    for _ in range(500):
        optimizer.zero_grad()
        penalty.add_grad_()
        optimizer.step()
    expected = torch.full((4,), 1 - decay / (2 * beta), dtype=torch.float64)
    torch.testing.assert_close(torch.linalg.svdvals(linear.weight.detach()) ** 2, expected)


@pytest.mark.parametrize("target", ["identity", "parseval"])
@every_layer
def test_retraction_is_a_step_of_one_half_and_ends_orthonormal(name: str, target: Target) -> None:
    model = LAYERS[name]().double()
    area = math.prod(getattr(model, "kernel_size", ()))
    c = area**0.5 if target == "parseval" else 1.0
    weight = next(model.parameters())
    weight.data.mul_(0.5)
    expected = c * weight.detach() - literal_grads(model, BETA, c)[0] / (2 * c)
    penalty = OrthogonalPenalty(model, BETA, target=target)
    penalty.retract_()
    torch.testing.assert_close(c * weight.detach(), expected)
    for _ in range(60):
        penalty.retract_(0.5)
    assert penalty.penalty().item() == pytest.approx(0, abs=1e-12)


def orthonormal(conv: nn.Conv2d, scale: float = 1.0) -> nn.Conv2d:
    for rows in conv.double().weight.data.chunk(conv.groups):
        nn.init.orthogonal_(rows, scale)
    return conv


def test_the_worst_orthonormal_kernel_reaches_three() -> None:
    """Such a kernel matrix is no non-expansive convolution; nor is one drawn at random."""
    conv = orthonormal(nn.Conv2d(16, 16, 3, padding=1))
    assert value_of(conv) == pytest.approx(0, abs=1e-9)
    assert 1.7 < conv_spectral_norm(conv, (16, 16)) < 2.2
    zero_padded = (1 + 2 * math.cos(math.pi / 33)) ** 2 / 3
    for mode, size, norm in (("zeros", 32, zero_padded), ("circular", 8, 3)):
        box = nn.Conv2d(1, 1, 3, padding=1, padding_mode=mode)  # type: ignore[arg-type]
        nn.init.constant_(box.weight, 1 / 3)
        assert spectral_norm(box.weight) == pytest.approx(1)
        assert conv_spectral_norm(box, (size, size)) == pytest.approx(norm, abs=1e-3)


@pytest.mark.parametrize(
    ("c", "options"),
    [
        (3, {"padding": 1}), (3, {"padding": 1, "padding_mode": "circular"}),
        (2, {"padding": 1, "stride": 2}), (1, {"stride": 3}), (3, {"padding": 1, "groups": 2}),
        (3, {"padding": 2, "dilation": 2, "stride": 2}),
        (2, {"padding": 2, "dilation": 3, "stride": 2}),
    ],
)  # fmt: skip
def test_the_parseval_target_bounds_the_true_norm_by_one(
    c: int, options: dict[str, int | str]
) -> None:
    conv = orthonormal(nn.Conv2d(2, 4, 3, **options), 1 / c)  # type: ignore[arg-type]
    penalty = OrthogonalPenalty(conv, BETA, target="parseval")
    assert penalty.penalty().item() == pytest.approx(0, abs=1e-9)
    assert np.linalg.norm(slow.dense_convolution(conv, (9, 9)), 2) < 1 + 1e-6

    conv.weight.data.mul_(1.3)
    expected = literal_grads(conv, BETA, c)
    assert penalty.add_grad_().item() == pytest.approx(slow.reduced_penalty(conv, BETA, c))
    torch.testing.assert_close(weight_grads(conv), expected)


@pytest.mark.parametrize(
    ("module", "options", "said"),
    [
        (nn.Linear(2, 2), {"beta": -0.1}, r"not negative; found -0\.1"),
        (nn.Linear(2, 2), {"beta": math.nan}, "found nan"),
        (nn.BatchNorm2d(2), {"beta": 0.1}, "BatchNorm2d has none"),
        (nn.Sequential(weight_norm(nn.Linear(2, 2))), {"beta": 0.1}, "'0' has a parametrised one"),
        (nn.Linear(2, 2), {"beta": 0.1, "target": "tight"}, "found 'tight'"),
        (nn.Linear(2, 2), {"beta": 2.0}, "found 2"),  # to retract by
    ],
)
def test_bad_input_is_named(module: nn.Module, options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        OrthogonalPenalty(module, **options).retract_()


@pytest.mark.parametrize("branches", [1, 2, 3])
def test_convex_sum_is_the_combination(branches: int) -> None:
    convex = ConvexSum(branches)
    assert torch.equal(convex.alpha, torch.full((branches,), 1 / branches))
    with pytest.raises(UserError, match=f"{branches} branches; found 4 tensors"):
        convex(*torch.zeros(4, 1))
    convex = convex.double()
    xs = [torch.randn(2, 3, 4, 4, dtype=torch.float64, requires_grad=True) for _ in range(branches)]
    nn.init.normal_(convex.alpha)
    copies = [x.detach().clone() for x in xs]
    expected = sum(a * x for a, x in zip(convex.alpha, copies, strict=True))
    torch.testing.assert_close(convex(*xs), expected)
    torch.testing.assert_close([x.detach() for x in xs], copies)

    small = [x.detach()[:1, :1, :2, :2].requires_grad_() for x in xs]
    assert torch.autograd.gradcheck(lambda _, *ys: convex(*ys), (convex.alpha, *small))
    assert torch.autograd.gradgradcheck(lambda _, *ys: convex(*ys), (convex.alpha, *small))


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_a_compiled_convex_sum_is_the_same(kind: torch.dtype) -> None:
    torch.manual_seed(0)
    convex, found = ConvexSum(), []
    nn.init.normal_(convex.alpha)

    def by_channel(graph: Any, _: Any) -> Any:
        assert "expand" in graph.code and "addcmul" not in graph.code
        return graph

    for road in (convex, torch.compile(convex, backend=by_channel, fullgraph=True)):
        gen = torch.Generator().manual_seed(1)
        xs = [torch.randn(8, 3, 5, 4, generator=gen).to(kind).requires_grad_() for _ in range(2)]
        y = road(*xs)
        convex.alpha.grad = None
        y.float().pow(2).sum().backward()
        found.append([y.detach(), convex.alpha.grad, *(x.grad for x in xs)])
    bound = 1e-5 if kind == torch.float32 else 2e-2
    torch.testing.assert_close(*found, rtol=bound, atol=bound)


def test_convex_sum_can_be_traced_and_keeps_the_type_and_format_of_its_input() -> None:
    x = torch.randn(2, 3, 4, 4, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    y = ConvexSum()(x, x)
    assert y.dtype == torch.bfloat16 and y.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(y, x)

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.sum = nn.Conv2d(3, 3, 1), ConvexSum()

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.sum(x, self.conv(x))
            return y

    block, x = Block(), torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(torch.fx.symbolic_trace(block)(x), block(x))
    torch.testing.assert_close(torch.export.export(block, (x,)).module()(x), block(x))


@settings(deadline=None, max_examples=200)
@given(arrays.arrays(np.float64, st.integers(1, 5), elements=st.floats(-10, 10)))
def test_projection_is_the_nearest_point_of_the_simplex(v: np.ndarray) -> None:
    a = project_simplex(torch.from_numpy(v))
    torch.testing.assert_close(a, torch.from_numpy(slow.nearest_on_simplex(v)), rtol=0, atol=1e-9)
    assert (a >= 0).all() and a.sum().item() == pytest.approx(1)
    torch.testing.assert_close(project_simplex(a), a, rtol=0, atol=1e-12)


def test_project_simplex_projects_every_convex_sum() -> None:
    two, three, linear = ConvexSum(), ConvexSum(3), nn.Linear(2, 2)
    again = ConvexSum()
    again.alpha.data = torch.tensor([2.0, 0.5])
    before, parameter = linear.weight.clone(), two.alpha
    two.alpha.data = torch.tensor([0.9, 0.5])
    three.alpha.data = torch.tensor([2.0, 0.0, -1.0])
    project_simplex_(nn.Sequential(two, nn.Sequential(three, again), linear))
    assert two.alpha is parameter and parameter.requires_grad
    torch.testing.assert_close(two.alpha.detach(), torch.tensor([0.7, 0.3]))
    torch.testing.assert_close(three.alpha.detach(), torch.tensor([1.0, 0.0, 0.0]))
    torch.testing.assert_close(again.alpha.detach(), torch.tensor([1.0, 0.0]))
    assert torch.equal(linear.weight, before)


@pytest.mark.parametrize("shape", [(4, 9), (9, 4), (5, 2, 3, 3), (1, 1)])
def test_spectral_norm_is_the_largest_singular_value(shape: tuple[int, ...]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    exact = torch.linalg.matrix_norm(weight.flatten(1), ord=2).item()
    assert spectral_norm(weight) == pytest.approx(exact, rel=1e-12)
    assert spectral_norm(weight.float()) == pytest.approx(exact, rel=1e-6)
    assert spectral_norm(0 * weight) == 0


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(2, 3, 3, padding=1), nn.Conv2d(3, 2, 3, padding=1, stride=2),
        nn.Conv2d(2, 4, 3, dilation=2, padding="same", bias=False),
        nn.Conv2d(4, 6, 3, padding=(0, 1), stride=(1, 2), groups=2),
        nn.Conv2d(3, 3, (1, 3), padding=1, groups=3), nn.Conv2d(2, 3, 1, stride=2),
        nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect"),
    ],
    ids=str,
)  # fmt: skip
def test_conv_spectral_norm_is_that_of_the_dense_operator(conv: nn.Conv2d) -> None:
    conv.reset_parameters()
    exact = np.linalg.svd(slow.dense_convolution(conv.double(), (6, 7)), compute_uv=False)[0]
    assert conv_spectral_norm(conv, (6, 7)) == pytest.approx(exact, rel=1e-6)


def test_norms_do_not_depend_on_the_caller() -> None:
    conv = nn.Conv2d(3, 4, 3, padding=1)
    norms, state = {conv_spectral_norm(conv, (6, 6))}, torch.random.get_rng_state()
    conv.requires_grad_(False)
    for place in (torch.inference_mode(), torch.no_grad(), torch.autocast("cpu", torch.bfloat16)):
        with place:
            norms.add(conv_spectral_norm(conv, (6, 6)))
    assert len(norms) == 1
    assert torch.equal(state, torch.random.get_rng_state())
    assert conv.weight.grad is None
