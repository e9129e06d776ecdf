import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from defquant.errors import UserError
from defquant.lipschitz import (
    ConvexSum,
    OrthogonalPenalty,
    conv_spectral_norm,
    project_simplex,
    project_simplex_,
    spectral_norm,
)
from reference_lipschitz import (
    dense_convolution,
    literal_penalty,
    missing_columns,
    nearest_on_simplex,
)

BETA = 0.3


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


# Rows fewer than, as many as and more than columns; 1x1 and 3x3; grouped and depthwise; linear.
LAYERS: dict[str, Callable[[], nn.Module]] = {
    "3x3 wide": lambda: nn.Conv2d(2, 5, 3),
    "3x3 square": lambda: nn.Conv2d(1, 9, 3, bias=False),
    "3x3 tall": lambda: nn.Conv2d(1, 12, 3),
    "1x1 wide": lambda: nn.Conv2d(6, 4, 1),
    "1x1 tall": lambda: nn.Conv2d(3, 7, 1),
    "grouped": lambda: nn.Conv2d(4, 6, 3, groups=2),
    "grouped tall": lambda: nn.Conv2d(4, 10, 1, groups=2),
    "depthwise": lambda: nn.Conv2d(3, 3, 3, groups=3),
    "linear": lambda: nn.Linear(7, 3),
}


@st.composite
def layers(draw: st.DrawFn) -> nn.Module:
    torch.manual_seed(draw(st.integers(0, 1000)))
    rows, columns = draw(st.integers(1, 6)), draw(st.integers(1, 6))
    if draw(st.booleans()):
        return nn.Linear(columns, rows).double()
    groups, kernel = draw(st.integers(1, 3)), draw(st.sampled_from([(1, 1), (3, 3), (1, 3)]))
    conv = nn.Conv2d(columns * groups, rows * groups, kernel, groups=groups).double()
    return channels_last(conv) if draw(st.booleans()) else conv


def channels_last(conv: nn.Conv2d) -> nn.Conv2d:
    conv.weight.data = conv.weight.data.contiguous(memory_format=torch.channels_last)
    return conv


def weight_grads(model: nn.Module) -> list[Tensor]:
    grads = [p.grad for name, p in model.named_parameters() if name.endswith("weight")]
    return [grad.clone() for grad in grads if grad is not None]


def literal_grads(model: nn.Module, beta: float, scale: float = 1.0) -> list[Tensor]:
    model.zero_grad()
    torch.autograd.backward(literal_penalty(model, beta, scale))
    expected = weight_grads(model)
    model.zero_grad()
    return expected


def float64(name: str) -> nn.Module:
    return LAYERS[name]().double()


@settings(deadline=None, max_examples=60)
@given(model=layers(), beta=st.floats(0, 2))
def test_penalty_and_gradients_are_the_literal_ones(model: nn.Module, beta: float) -> None:
    expected = literal_grads(model, beta)
    penalty = OrthogonalPenalty(model, beta)
    value = penalty.penalty()
    literal = literal_penalty(model, beta).item()
    assert value.item() == pytest.approx(literal - beta / 2 * missing_columns(model), abs=1e-6)

    torch.autograd.backward(value)
    torch.testing.assert_close(weight_grads(model), expected, rtol=1e-6, atol=1e-6)

    model.zero_grad()
    logged = penalty.add_grad_()
    assert logged.shape == () and not logged.requires_grad
    assert logged.item() == pytest.approx(value.item(), rel=1e-12, abs=1e-12)
    torch.testing.assert_close(weight_grads(model), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", LAYERS)
def test_each_kind_of_layer(name: str) -> None:
    model = float64(name)
    expected = literal_grads(model, BETA)
    OrthogonalPenalty(model, BETA).add_grad_()
    torch.testing.assert_close(weight_grads(model), expected)


@pytest.mark.parametrize("name", LAYERS)
def test_the_gradient_is_the_finite_difference(name: str) -> None:
    model = float64(name)
    penalty = OrthogonalPenalty(model, BETA)
    weight = next(model.parameters())

    def value(_: Tensor) -> Tensor:
        return penalty.penalty()

    assert torch.autograd.gradcheck(value, (weight,))
    assert torch.autograd.gradgradcheck(value, (weight,))


def test_every_weight_and_nothing_else_is_penalised() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), ConvexSum(), nn.Flatten(), nn.Linear(4, 2)
    )
    OrthogonalPenalty(model, BETA).add_grad_()
    touched = {name for name, p in model.named_parameters() if p.grad is not None}
    assert touched == {"0.weight", "4.weight"}


def test_a_shared_weight_counts_once() -> None:
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    alone = OrthogonalPenalty(first, BETA).penalty().item()
    second.weight = first.weight
    both = OrthogonalPenalty(nn.Sequential(first, second, first), BETA)
    assert both.add_grad_().item() == pytest.approx(alone)
    torch.testing.assert_close(weight_grads(first), literal_grads(first, BETA))


def test_a_depthwise_convolution_is_penalised_per_channel() -> None:
    conv = nn.Conv2d(5, 5, 3, groups=5)
    with torch.no_grad():
        conv.weight.fill_(1 / 3)  # unit filters, all alike: orthogonal only if kept apart
    assert OrthogonalPenalty(conv, BETA).penalty().item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("grad_format", [torch.contiguous_format, torch.channels_last])
def test_channels_last_is_the_same(groups: int, grad_format: torch.memory_format) -> None:
    conv = nn.Conv2d(4, 6, 3, groups=groups).double()
    expected = literal_grads(conv, BETA)
    value = OrthogonalPenalty(conv, BETA).penalty().item()

    conv = channels_last(conv)
    penalty = OrthogonalPenalty(conv, BETA)
    conv.weight.grad = torch.zeros_like(conv.weight, memory_format=grad_format)
    assert penalty.add_grad_().item() == pytest.approx(value)
    torch.testing.assert_close(weight_grads(conv), expected)
    assert conv.weight.grad.is_contiguous(memory_format=grad_format)

    conv.weight.grad = None
    penalty.add_grad_()
    (grad,) = weight_grads(conv)
    torch.testing.assert_close([grad], expected)
    assert grad.stride() == conv.weight.stride()


def test_gradients_accumulate_in_place() -> None:
    linear = nn.Linear(5, 3).double()
    expected = literal_grads(linear, BETA)[0]
    before = linear.weight.grad = torch.randn(3, 5, dtype=torch.float64)
    expected = expected + before
    OrthogonalPenalty(linear, BETA).add_grad_()
    assert linear.weight.grad is before
    torch.testing.assert_close(before, expected)


def test_frozen_weights_get_no_gradient_but_count() -> None:
    frozen, trained = nn.Linear(4, 3), nn.Linear(3, 2)
    frozen.weight.requires_grad_(False)
    before = frozen.weight.clone()
    penalty = OrthogonalPenalty(nn.Sequential(frozen, trained), BETA)
    assert penalty.add_grad_().item() == pytest.approx(penalty.penalty().item())
    penalty.retract_()
    assert frozen.weight.grad is None and trained.weight.grad is not None
    assert torch.equal(frozen.weight, before)


@pytest.mark.parametrize("move", ["double", "assign"])
def test_the_penalty_follows_the_model(move: str) -> None:
    model = nn.Sequential(nn.Linear(4, 3))
    penalty = OrthogonalPenalty(model, BETA)
    if move == "double":
        model.double()
    else:
        model.load_state_dict(nn.Sequential(nn.Linear(4, 3)).state_dict(), assign=True)
    expected = literal_penalty(model, BETA).item() - BETA / 2 * missing_columns(model)
    assert penalty.add_grad_().item() == pytest.approx(expected, rel=1e-5)
    assert model[0].weight.grad is not None


def test_autocast_changes_nothing() -> None:
    conv = nn.Conv2d(16, 16, 3)
    penalty = OrthogonalPenalty(conv, BETA)
    value = penalty.penalty().item()
    penalty.add_grad_()
    grads = weight_grads(conv)
    conv.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert penalty.penalty().item() == value
        penalty.add_grad_()
    assert torch.equal(weight_grads(conv)[0], grads[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_weights_have_a_gram_in_float32(dtype: torch.dtype) -> None:
    half = nn.Conv2d(16, 16, 3).to(dtype)
    full = nn.Conv2d(16, 16, 3)
    full.load_state_dict(half.state_dict())
    value, expected = OrthogonalPenalty(half, BETA).add_grad_(), OrthogonalPenalty(full, BETA)
    assert value.dtype == torch.float32
    assert value.item() == expected.add_grad_().item()
    torch.testing.assert_close(weight_grads(half)[0], weight_grads(full)[0].to(dtype))


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
@pytest.mark.parametrize("name", LAYERS)
def test_retraction_is_a_step_of_one_half_and_ends_orthonormal(name: str, target: str) -> None:
    model = float64(name)
    c = 3.0 if target == "parseval" and "3x3" in name else 1.0
    if target == "parseval" and name in ("grouped", "depthwise"):
        c = 3.0
    weight = next(model.parameters())
    with torch.no_grad():
        weight.mul_(0.5)
    expected = c * weight.detach() - literal_grads(model, BETA, c)[0] / (2 * c)
    penalty = OrthogonalPenalty(model, BETA, target=target)  # type: ignore[arg-type]
    penalty.retract_()
    torch.testing.assert_close(c * weight.detach(), expected)
    for _ in range(60):
        penalty.retract_(0.5)
    assert penalty.penalty().item() == pytest.approx(0, abs=1e-12)


def orthonormal(conv: nn.Conv2d, scale: float = 1.0) -> nn.Conv2d:
    with torch.no_grad():
        for rows in conv.weight.chunk(conv.groups):
            q = torch.linalg.qr(torch.randn(rows[0].numel(), len(rows))).Q.T
            rows.copy_(scale * q.reshape(rows.shape))
    return conv.double()


def test_an_orthonormal_kernel_matrix_is_not_a_nonexpansive_convolution() -> None:
    conv = orthonormal(nn.Conv2d(16, 16, 3, padding=1))
    assert OrthogonalPenalty(conv, BETA).penalty().item() == pytest.approx(0, abs=1e-9)
    assert spectral_norm(conv.weight) == pytest.approx(1, abs=1e-6)
    assert 1.7 < conv_spectral_norm(conv, (16, 16)) < 2.2


def test_the_worst_orthonormal_kernel_reaches_three() -> None:
    box = nn.Conv2d(1, 1, 3, padding=1)
    with torch.no_grad():
        box.weight.fill_(1 / 3)
    assert spectral_norm(box.weight) == pytest.approx(1)
    zero_padded = (1 + 2 * math.cos(math.pi / 33)) ** 2 / 3
    assert conv_spectral_norm(box, (32, 32)) == pytest.approx(zero_padded, abs=1e-3)
    circular = nn.Conv2d(1, 1, 3, padding=1, padding_mode="circular")
    circular.load_state_dict(box.state_dict())
    assert conv_spectral_norm(circular, (8, 8)) == pytest.approx(3, abs=1e-5)


@pytest.mark.parametrize(
    ("c", "options"),
    [
        (3, {"padding": 1}),
        (3, {"padding": 1, "padding_mode": "circular"}),
        (2, {"padding": 1, "stride": 2}),
        (1, {"stride": 3}),
        (3, {"padding": 2, "dilation": 2, "stride": 2}),
        (2, {"padding": 2, "dilation": 3, "stride": 2}),
        (3, {"padding": 1, "groups": 2}),
    ],
)
def test_the_parseval_target_bounds_the_true_norm_by_one(
    c: int, options: dict[str, int | str]
) -> None:
    conv = orthonormal(nn.Conv2d(2, 4, 3, **options), 1 / c)  # type: ignore[arg-type]
    penalty = OrthogonalPenalty(conv, BETA, target="parseval")
    assert penalty.penalty().item() == pytest.approx(0, abs=1e-9)
    assert np.linalg.norm(dense_convolution(conv, (9, 9)), 2) < 1 + 1e-6

    with torch.no_grad():
        conv.weight.mul_(1.3)
    expected = literal_grads(conv, BETA, c)
    literal = literal_penalty(conv, BETA, c).item()
    assert penalty.add_grad_().item() == pytest.approx(literal - BETA / 2 * missing_columns(conv))
    torch.testing.assert_close(weight_grads(conv), expected)


def test_bad_input_is_named() -> None:
    with pytest.raises(UserError, match=r"not negative; found -0\.1"):
        OrthogonalPenalty(nn.Linear(2, 2), -0.1)
    with pytest.raises(UserError, match="found nan"):
        OrthogonalPenalty(nn.Linear(2, 2), math.nan)
    with pytest.raises(UserError, match="BatchNorm2d has none"):
        OrthogonalPenalty(nn.BatchNorm2d(2), 0.1)
    with pytest.raises(UserError, match="'0' has a parametrised one"):
        OrthogonalPenalty(nn.Sequential(weight_norm(nn.Linear(2, 2))), 0.1)
    with pytest.raises(UserError, match="found 'tight'"):
        OrthogonalPenalty(nn.Linear(2, 2), 0.1, target="tight")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="found 2"):
        OrthogonalPenalty(nn.Linear(2, 2), 2.0).retract_()
    with pytest.raises(UserError, match="2 branches; found 3 tensors"):
        ConvexSum()(*torch.zeros(3, 1))


@pytest.mark.parametrize("branches", [1, 2, 3])
def test_convex_sum_is_the_combination(branches: int) -> None:
    convex = ConvexSum(branches)
    assert torch.equal(convex.alpha, torch.full((branches,), 1 / branches))
    convex = convex.double()
    xs = [torch.randn(2, 3, 4, 4, dtype=torch.float64, requires_grad=True) for _ in range(branches)]
    with torch.no_grad():
        convex.alpha.copy_(torch.randn(branches))
    copies = [x.detach().clone() for x in xs]
    expected = sum(a * x for a, x in zip(convex.alpha, copies, strict=True))
    torch.testing.assert_close(convex(*xs), expected)
    torch.testing.assert_close([x.detach() for x in xs], copies)

    small = [x.detach()[:1, :1, :2, :2].requires_grad_() for x in xs]
    assert torch.autograd.gradcheck(lambda _, *ys: convex(*ys), (convex.alpha, *small))
    assert torch.autograd.gradgradcheck(lambda _, *ys: convex(*ys), (convex.alpha, *small))


def test_convex_sum_keeps_the_type_and_format_of_its_input() -> None:
    x = torch.randn(2, 3, 4, 4, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    y = ConvexSum()(x, x)
    assert y.dtype == torch.bfloat16 and y.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(y, x)


def test_convex_sum_can_be_traced() -> None:
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


vectors = arrays.arrays(
    np.float64, st.integers(1, 5), elements=st.floats(-10, 10, allow_subnormal=False)
)


@settings(deadline=None, max_examples=200)
@given(vectors)
def test_projection_is_the_nearest_point_of_the_simplex(v: np.ndarray) -> None:
    a = project_simplex(torch.from_numpy(v))
    torch.testing.assert_close(a, torch.from_numpy(nearest_on_simplex(v)), rtol=0, atol=1e-9)
    assert (a >= 0).all() and a.sum().item() == pytest.approx(1)
    torch.testing.assert_close(project_simplex(a), a, rtol=0, atol=1e-12)


@settings(deadline=None, max_examples=100)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=40).filter(lambda v: sum(v) > 0.1))
def test_feasible_points_stay(weights: list[float]) -> None:
    a = torch.tensor(weights, dtype=torch.float64)
    a = a / a.sum()
    torch.testing.assert_close(project_simplex(a), a, rtol=0, atol=1e-12)


def test_project_simplex_projects_every_convex_sum() -> None:
    two, three, linear = ConvexSum(), ConvexSum(3), nn.Linear(2, 2)
    before, parameter = linear.weight.clone(), two.alpha
    with torch.no_grad():
        two.alpha.copy_(torch.tensor([0.9, 0.5]))
        three.alpha.copy_(torch.tensor([2.0, 0.0, -1.0]))
    project_simplex_(nn.Sequential(two, nn.Sequential(three), linear))
    assert two.alpha is parameter and parameter.requires_grad
    torch.testing.assert_close(two.alpha.detach(), torch.tensor([0.7, 0.3]))
    torch.testing.assert_close(three.alpha.detach(), torch.tensor([1.0, 0.0, 0.0]))
    assert torch.equal(linear.weight, before)


@pytest.mark.parametrize("shape", [(4, 9), (9, 4), (5, 2, 3, 3), (1, 1)])
def test_spectral_norm_is_the_largest_singular_value(shape: tuple[int, ...]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    exact = torch.linalg.matrix_norm(weight.flatten(1), ord=2).item()
    assert spectral_norm(weight, iterations=5000, tolerance=1e-13) == pytest.approx(exact, rel=1e-8)
    assert spectral_norm(weight.float()) == pytest.approx(exact, rel=1e-3)
    assert spectral_norm(0 * weight) == 0


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(2, 3, 3, padding=1),
        nn.Conv2d(3, 2, 3, padding=1, stride=2),
        nn.Conv2d(2, 4, 3, dilation=2, padding="same", bias=False),
        nn.Conv2d(4, 6, 3, padding=(0, 1), stride=(1, 2), groups=2),
        nn.Conv2d(3, 3, (1, 3), padding=1, groups=3),
        nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect"),
        nn.Conv2d(2, 3, 1, stride=2),
    ],
    ids=str,
)
def test_conv_spectral_norm_is_that_of_the_dense_operator(conv: nn.Conv2d) -> None:
    conv.reset_parameters()
    exact = np.linalg.svd(dense_convolution(conv.double(), (6, 7)), compute_uv=False)[0]
    norm = conv_spectral_norm(conv, (6, 7), iterations=5000, tolerance=1e-13)
    assert norm == pytest.approx(exact, rel=1e-6)
    assert conv_spectral_norm(conv, (6, 7)) <= exact * (1 + 1e-9)


def test_norms_do_not_depend_on_the_caller() -> None:
    conv = nn.Conv2d(3, 4, 3, padding=1)
    norms = {
        conv_spectral_norm(conv, (6, 6)),
        conv_spectral_norm(conv.requires_grad_(False), (6, 6)),
    }
    state = torch.random.get_rng_state()
    with torch.inference_mode():
        norms.add(conv_spectral_norm(conv, (6, 6)))
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        norms.add(conv_spectral_norm(conv, (6, 6)))
    assert len(norms) == 1
    assert torch.equal(state, torch.random.get_rng_state())
    assert conv.weight.grad is None
