"""The Lipschitz audit against dense matrices, and networks whose constants are known."""

import json
import math
from collections.abc import Callable
from dataclasses import asdict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import defquant as dq
from conftest import refused, uniform
from defquant.captured import capture
from defquant.config import ModelConfig
from defquant.diagnose import Audit, audit, jacobian_norms, surrogate
from defquant.diagnose.bound import LayerAudit, Reach, reach
from defquant.lipschitz import ConvexSum, OrthogonalPenalty, conv_spectral_norm, spectral_norm
from defquant.models import build
from defquant.quantize import Quantizer, QuantReLU


def audited(model: nn.Module, data: tuple[Tensor, Tensor]) -> Audit:
    return audit(model.eval(), data)


def labelled(n: int = 4, channels: int = 1, classes: int = 10) -> tuple[Tensor, Tensor]:
    return uniform(n, channels, 8, 8), torch.arange(n) % classes


def dense(layer: nn.Module, size: tuple[int, ...]) -> Tensor:
    """The matrix of the map x -> layer(x) - layer(0), column by column."""
    basis = torch.eye(math.prod(size)).view(-1, *size)
    with torch.no_grad():
        columns: Tensor = layer(basis) - layer(torch.zeros(1, *size))
    return columns.flatten(1).T


def norm_of(layer: nn.Module, size: tuple[int, ...]) -> float:
    return float(torch.linalg.matrix_norm(dense(layer.eval(), size).double(), 2))


def normed(norm: nn.Module, seed: int = 0) -> nn.Module:
    """A batch norm as training might leave it."""
    assert isinstance(norm, nn.BatchNorm2d | nn.BatchNorm1d)
    assert norm.running_var is not None and norm.running_mean is not None
    norm.weight.data.copy_(4 * uniform(len(norm.weight), seed=seed) - 2)
    norm.running_var.copy_(0.2 + uniform(len(norm.weight), seed=seed + 1))
    norm.running_mean.copy_(uniform(len(norm.weight), seed=seed + 2))
    return norm


CONVS: dict[str, Callable[[], nn.Conv2d]] = {
    "plain": lambda: nn.Conv2d(2, 5, 3, padding=1),
    "strided": lambda: nn.Conv2d(2, 5, 3, stride=2, padding=1, bias=False),
    "grouped": lambda: nn.Conv2d(4, 6, 3, groups=2, padding=1),
    "dilated": lambda: nn.Conv2d(2, 3, 3, dilation=2, padding=2),
    "circular": lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"),
    "reflect": lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"),
    "shortcut": lambda: nn.Conv2d(3, 7, 1, stride=2, bias=False),
}


def bound(model: nn.Module, *size: int) -> Reach:
    x = uniform(1, *size)
    return reach(capture(nn.Sequential(model, nn.Flatten()), x), x)


def layer(model: nn.Module, *size: int) -> LayerAudit:
    (found,) = bound(model, *size).layers
    return found


@pytest.mark.parametrize("kind", CONVS)
def test_the_norm_of_a_convolution_is_that_of_its_matrix(kind: str) -> None:
    torch.manual_seed(1)
    conv = CONVS[kind]()
    size = (conv.in_channels, 7, 6)
    exact, found = norm_of(conv, size), layer(conv, *size)
    assert (found.layer, found.size) == ("0", size)
    assert found.norm == pytest.approx(exact, rel=1e-4)
    assert exact <= found.upper <= exact * 1.03
    assert found.norm == pytest.approx(conv_spectral_norm(conv, size[1:]), rel=5e-3)
    if conv.groups == 1:
        assert found.matrix_norm == pytest.approx(spectral_norm(conv.weight), rel=1e-4)
    residual = math.sqrt(OrthogonalPenalty(conv, 2.0).penalty().item())
    assert found.residual == pytest.approx(residual, rel=1e-5)


def test_upper_bounds_hold_where_the_steps_do_not_exhaust_the_space() -> None:
    """32 channels of 6 x 6 have 1,152 dimensions; a hundred steps leave room for doubt."""
    for seed in range(3):
        torch.manual_seed(seed)
        conv = nn.Conv2d(32, 32, 3, padding=1, bias=False)
        exact, found = norm_of(conv, (32, 6, 6)), layer(conv, 32, 6, 6)
        assert found.norm <= exact * (1 + 1e-5)
        assert found.norm == pytest.approx(exact, rel=1e-3)
        assert exact < found.upper < exact * 1.02


def test_the_composed_norm_is_that_of_convolution_and_batch_norm_as_one_map() -> None:
    torch.manual_seed(2)
    conv, bn = nn.Conv2d(2, 5, 3, padding=1), normed(nn.BatchNorm2d(5))
    fc = nn.Linear(5 * 64, 10)
    model = nn.Sequential(conv, bn, QuantReLU(2), nn.Flatten(), fc)
    found = audited(model, labelled(channels=2))
    first, last = found.layers
    together = norm_of(nn.Sequential(conv, bn), (2, 8, 8))
    assert first.batch_norm == "1"
    assert first.gain == pytest.approx(together, rel=1e-4)
    assert first.norm == pytest.approx(norm_of(conv, (2, 8, 8)), rel=1e-4)
    (norm,) = found.batch_norms
    assert norm.gain == pytest.approx(float(torch.linalg.matrix_norm(dense(bn, (5, 8, 8)), 2)))
    assert together < 0.95 * first.norm * norm.gain  # the product would overstate it
    assert last.batch_norm is None
    assert last.gain == last.norm == pytest.approx(spectral_norm(fc.weight), rel=1e-4)
    assert found.bound is not None
    assert together * last.norm <= found.bound <= together * last.norm * 1.02


def test_layers_one_after_the_other_multiply() -> None:
    torch.manual_seed(4)
    first = nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), normed(nn.BatchNorm2d(3)))
    second = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), normed(nn.BatchNorm2d(4), 5))
    third = nn.Conv2d(4, 2, 3, padding=1)
    parts = ((first, 1), (second, 3), (third, 4))
    product = math.prod(norm_of(part, (channels, 8, 8)) for part, channels in parts)
    found = bound(nn.Sequential(first, nn.ReLU(), second, nn.MaxPool2d(1), third), 1, 8, 8).bound
    assert found is not None and product <= found <= 1.03 * product
    apart = bound(nn.Sequential(first, nn.ReLU(), normed(nn.BatchNorm2d(3), 7)), 1, 8, 8)
    expected = norm_of(first, (1, 8, 8)) * apart.batch_norms[1].gain
    assert apart.bound is not None and expected <= apart.bound <= 1.02 * expected


def test_a_linear_layer_and_its_batch_norm() -> None:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10), normed(nn.BatchNorm1d(10)))
    found = audited(model, labelled())
    exact = norm_of(model, (1, 8, 8))
    assert found.bound == pytest.approx(exact, rel=1e-4)
    assert list(found.jacobians) == pytest.approx([exact] * 4, rel=1e-4)


def test_an_orthonormal_kernel_has_norm_one_as_a_matrix_and_up_to_three_as_a_map() -> None:
    conv = nn.Conv2d(4, 8, 3, padding=1, bias=False)
    nn.init.orthogonal_(conv.weight)
    found = layer(conv, 4, 8, 8)
    assert found.matrix_norm == pytest.approx(1, abs=1e-5)
    assert found.matrix_least == pytest.approx(1, abs=1e-5)
    assert found.residual == pytest.approx(0, abs=1e-5)
    assert 1.3 < found.norm <= 3
    flat = nn.Conv2d(1, 1, 3, padding=1, bias=False)  # the worst: all nine taps the same
    nn.init.constant_(flat.weight, 1 / 3)
    assert layer(flat, 1, 32, 32).residual == pytest.approx(0, abs=1e-6)
    assert 2.9 < layer(flat, 1, 32, 32).norm < 3


class Residual(nn.Module):
    """x + c x, or a convex sum of both, with c a 1x1 convolution."""

    def __init__(self, factor: float, convex: bool, channels: int = 1) -> None:
        super().__init__()
        self.branch = nn.Conv2d(channels, channels, 1, bias=False, groups=channels)
        nn.init.constant_(self.branch.weight, factor)
        self.join = ConvexSum() if convex else None

    def forward(self, x: Tensor) -> Tensor:
        branch = self.branch(x)
        y: Tensor = x + branch if self.join is None else self.join(x, branch)
        return y


@pytest.mark.parametrize("factor", [0.5, -3.0])
def test_plain_sums_add_one_and_convex_sums_weigh(factor: float) -> None:
    plain = audited(nn.Sequential(Residual(factor, False), nn.Flatten()), labelled(classes=64))
    assert plain.bound == pytest.approx(1 + abs(factor), rel=1e-4)
    assert plain.lower == pytest.approx(abs(1 + factor), rel=1e-4)
    model = Residual(factor, True)
    assert bound(model, 1, 8, 8).bound == pytest.approx((1 + abs(factor)) / 2, rel=1e-4)
    assert isinstance(model.join, ConvexSum)
    model.join.alpha.data = torch.tensor([0.8, 0.2])
    assert bound(model, 1, 8, 8).bound == pytest.approx(0.8 + 0.2 * abs(factor), rel=1e-4)


OPERATIONS: dict[str, tuple[Callable[[Tensor], Tensor], float]] = {
    "average": (lambda x: nn.functional.avg_pool2d(x, 2), 1 / 2),
    "oblong average": (lambda x: nn.functional.avg_pool2d(x, (2, 4)), 1 / math.sqrt(8)),
    "global average": (lambda x: x.mean((2, 3)), 1 / 8),
    "sum": (lambda x: x.sum((2, 3)), 8),
    "maximum": (lambda x: nn.functional.max_pool2d(x, 2, ceil_mode=True), 1),
    "overlapping maximum": (lambda x: nn.functional.max_pool2d(x, 3, 2), 2),
    "dense maximum": (lambda x: nn.functional.max_pool2d(x, 2, 1), 2),
    "adaptive maximum": (lambda x: nn.functional.adaptive_max_pool2d(x, 3), 2),
    "quantised": (lambda x: dq.fake_quantize(x, 1), 1),
    "rounded": (lambda x: (4 * x).round() / 4, 1),
    "sigmoid": (lambda x: x.sigmoid(), 1 / 4),
    "leaky": (lambda x: nn.functional.leaky_relu(x, -3), 3),
    "copied": (lambda x: x.mean((2, 3), keepdim=True).expand(-1, -1, 8, 8), 1),
    "broadcast": (lambda x: x + x.mean((2, 3), keepdim=True), 2),
    "twice": (lambda x: torch.cat([x, x], 1), math.sqrt(2)),
    "cancelled": (lambda x: 3 * x + (x - x), 3),
    "padded": (lambda x: nn.functional.pad(x, (1, 1, 1, 1), value=5.0), 1),
    "reflected": (lambda x: nn.functional.pad(x, (1, 1, 1, 1), mode="reflect"), 2),
    "normalised": (lambda x: (x - 0.5) / torch.tensor([0.2, 0.25]).view(2, 1, 1), 5),
    "picked": (lambda x: x[:, [0, 1, 1, 1]], math.sqrt(3)),
    "matrix product": (lambda x: x @ torch.diag(torch.arange(8.0)), 7),
    "larger of two": (lambda x: torch.maximum(x, 0 * x + 0.5), 1),
}


@pytest.mark.parametrize(("function", "expected"), OPERATIONS.values(), ids=OPERATIONS)
def test_operations_without_weights(function: Callable[[Tensor], Tensor], expected: float) -> None:
    assert bound(Function(function), 2, 8, 8).bound == pytest.approx(expected, rel=2e-4)


class Function(nn.Module):
    def __init__(self, function: Callable[..., Tensor], *parts: nn.Module) -> None:
        super().__init__()
        self.function, self.parts = function, nn.ModuleList(parts)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, *self.parts)


NETWORKS: dict[str, Callable[[bool], nn.Module]] = {
    "deployable": lambda convex: build(
        ModelConfig(
            "wrn-10-1", bits=4, weight_bits=4, convex=convex, deployable=True, round_sums=True
        ),
        num_classes=10, in_channels=1,
    ),
    "wrn": lambda convex: dq.wide_resnet(10, 1, bits=4, convex=convex, in_channels=1),
    "vgg": lambda convex: dq.vgg16(bits=2, convex=convex, in_channels=1, width=0.125),
    "resnet": lambda convex: dq.resnet18(bits=1, convex=convex, in_channels=1, width=0.125),
    "tanh": lambda convex: dq.wide_resnet(
        10, 1, bits=2, convex=convex, in_channels=1, activation="tanh"
    ),
    "squeezed": lambda convex: dq.FeatureSqueezing(
        dq.wide_resnet(10, 1, bits=3, convex=convex, in_channels=1)
    ),
}  # fmt: skip


def network(kind: str, convex: bool) -> nn.Module:
    torch.manual_seed(0)
    model = NETWORKS[kind](convex)
    for i in range(4):  # batch norm's statistics
        model(uniform(16, 1, 8, 8, seed=i))
    return model.eval()


@pytest.mark.parametrize("kind", NETWORKS)
def test_bound_jacobian_and_differences_stand_in_this_order(kind: str) -> None:
    model = network(kind, convex=kind not in ("vgg", "squeezed"))
    found = audited(model, labelled(8))
    x = labelled(8)[0]
    twin = surrogate(capture(model, x))
    towards = (uniform(8, 1, 8, 8, seed=9) - 0.5) * 1e-2
    with torch.no_grad():
        ratio = (twin(x + towards) - twin(x)).norm(dim=1) / towards.flatten(1).norm(dim=1)
    assert found.bound is not None and found.bound >= found.lower > 0
    assert found.bound >= float(ratio.max())
    assert found.lower == max(found.jacobians)
    assert torch.isfinite(torch.tensor(found.jacobians)).all()
    json.dumps(asdict(found), allow_nan=False)


STEPS: list[Callable[[], nn.Module]] = [
    lambda: nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"),
    lambda: nn.Conv2d(4, 4, 3, padding="same", dilation=2, groups=2),
    lambda: nn.ConvTranspose2d(4, 4, 3, padding=1),
    lambda: nn.Sequential(Centred(4, 4, 3, padding=1), normed(nn.BatchNorm2d(4))),
    lambda: normed(nn.BatchNorm2d(4), 5),
    lambda: Function(lambda x, fc: x + fc(x), nn.Linear(8, 8)),
    lambda: QuantReLU(2, high=1.0),
    lambda: Residual(-2.0, True, 4),
    nn.GELU, nn.SiLU, nn.Hardswish, nn.ELU, nn.Tanh, nn.Softplus,
    lambda: nn.MaxPool2d(3, 1, 1), lambda: nn.AvgPool2d(3, 1, 1),
    lambda: nn.Sequential(nn.AvgPool2d(2), nn.Upsample(scale_factor=2)),
    lambda: Function(lambda x: torch.cat([x[:, 1:], x[:, :1] - x.amax(1, keepdim=True)], 1)),
    lambda: Function(lambda x: torch.minimum(x.abs(), x.transpose(2, 3).clamp(-1, 2))),
    lambda: Function(lambda x: torch.stack(x.split(2, 1), 2).flatten(1, 2)),
    lambda: nn.Sequential(nn.PixelUnshuffle(2), nn.PixelShuffle(2)),
    lambda: Function(lambda x: x + x.mean(1, keepdim=True)),
    lambda: Function(lambda x: x.lerp(-x.flip(1), 0.3).addcmul(x, torch.ones(8), value=-0.5)),
]  # fmt: skip


class Centred(nn.Conv2d):
    """As timm's StdConv2d: its weight is computed, and its gain is not the parameter's."""

    def forward(self, x: Tensor) -> Tensor:
        W = self.weight / self.weight.std((1, 2, 3), keepdim=True)
        return self._conv_forward(x, W, self.bias)  # type: ignore[no-any-return]


@settings(max_examples=12, deadline=None)
@given(
    picks=st.lists(st.integers(0, len(STEPS) - 1), min_size=1, max_size=4),
    seed=st.integers(0, 10_000), size=st.sampled_from([1e-3, 0.1, 1.0]),
)  # fmt: skip
def test_no_measure_exceeds_the_bound(picks: list[int], seed: int, size: float) -> None:
    """Random networks of all supported kinds; pairs near and far, and Jacobians."""
    torch.manual_seed(seed)
    steps = [STEPS[pick]() for pick in picks]
    model = nn.Sequential(*steps, nn.AvgPool2d(4), nn.Flatten(), nn.Linear(16, 3)).eval()
    x, moved = uniform(8, 4, 8, 8, seed=seed), uniform(8, 4, 8, 8, seed=seed + 1)
    program = capture(model, x)
    top, twin = reach(program, x[:1]).bound, surrogate(program)
    step = size * (moved - x)
    with torch.no_grad():
        ratios = (twin(x + step) - twin(x)).norm(dim=1) / step.flatten(1).norm(dim=1)
    assert top is not None
    assert float(ratios.max()) <= top
    assert float(jacobian_norms(twin, x).max()) <= top


CHANGED: dict[str, Callable[[nn.Conv2d], object]] = {
    "a hook": lambda conv: conv.register_forward_hook(lambda c, x, y: 3 * y),
    "a parametrisation": lambda conv: nn.utils.parametrizations.weight_norm(conv),
    "a pre-hook": lambda conv: conv.register_forward_pre_hook(lambda c, x: (x[0] * 2,)),
}


@pytest.mark.parametrize("change", [*CHANGED, "a subclass"])
def test_what_is_computed_is_audited_whatever_its_name(change: str) -> None:
    """Of a subclass like StdConv2d the parameter's norm would lie far below the measured one."""
    torch.manual_seed(0)
    kind = Centred if change == "a subclass" else nn.Conv2d
    conv = kind(1, 3, 3, padding=1)
    CHANGED.get(change, id)(conv)
    exact = norm_of(conv, (1, 8, 8))
    model = nn.Sequential(conv, nn.Flatten(), nn.Dropout()).train()  # audited as in eval mode
    found = audit(model.eval(), labelled(classes=192))
    assert found.bound is not None
    assert exact * 0.999 <= found.lower <= found.bound <= 1.03 * exact
    assert found.layers[0].layer == "0"


def test_the_radius_of_a_two_class_linear_network() -> None:
    """z = (w x, -w x): ||W|| = sqrt(2) ||w||, and the boundary is |w x| / ||w|| away: exact."""
    w = torch.linspace(-1, 1, 64)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 2, bias=False))
    model[1].weight.data = torch.stack([w, -w])
    x, _ = labelled(6)
    side = (x.flatten(1) @ w).double()
    y = (side < 0).long()
    y[0] = 1 - y[0]  # one is misclassified
    found = audited(model, (x, y)).surrogate_radii
    assert (found[0].l2, found[0].linf) == (0, 0)
    assert found[0].margin == pytest.approx(-2 * abs(float(side[0])), rel=1e-5)
    for radius, distance in zip(found[1:], side[1:].abs() / w.double().norm(), strict=True):
        assert radius.l2 == pytest.approx(float(distance), rel=1e-4)
        assert radius.linf == pytest.approx(radius.l2 / 8)


def test_the_surrogate_withstands_everything_within_its_radius() -> None:
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1), QuantReLU(2, 1.0), nn.Flatten(), nn.Linear(192, 4)
    )
    x = uniform(20, 1, 8, 8)
    twin = surrogate(capture(model, x))
    with torch.no_grad():
        y = twin(x).argmax(1)
    found: Audit = audited(model, (x, y))
    for row, radius in enumerate(found.surrogate_radii):
        assert radius.l2 > 0
        step = torch.randn(500, 1, 8, 8, generator=torch.Generator().manual_seed(row))
        step *= (0.999 * radius.l2 / step.flatten(1).norm(dim=1))[:, None, None, None]
        with torch.no_grad():
            assert (twin(x[row] + step).argmax(1) == y[row]).all()


def test_the_audit_is_of_the_surrogate_whatever_the_bits() -> None:
    model, data = network("wrn", True), labelled()
    assert audited(model, data) == audited(dq.set_bits(network("wrn", True), 1), data)
    assert {m.bits for m in model.modules() if isinstance(m, Quantizer)} == {4}


def attention(x: Tensor, mixer: nn.Module) -> Tensor:
    tokens = x.flatten(2)
    return mixer(tokens, tokens, tokens)[0].flatten(1)  # type: ignore[no-any-return]


UNBOUNDED: dict[str, tuple[nn.Module, str]] = {
    "layer norm": (nn.LayerNorm(8), "no bound: layer_norm in 1"),
    "group norm": (nn.GroupNorm(1, 1), "no bound: group_norm in 1"),
    "batch statistics": (
        nn.BatchNorm2d(1, track_running_stats=False), "no bound: batch_norm by its own batch in 1"
    ),
    "batch mean": (Function(lambda x: x - x.mean(0)), "no bound: mean over the batch in 1"),
    "product": (Function(lambda x: x.sigmoid() * x), "no bound: mul of two moving tensors in 1"),
    "square": (Function(lambda x: x**2), "no bound: pow in 1"),
    "quotient": (Function(lambda x: x / (1 + x.abs())), "no bound: div by what moves in 1"),
    "softmax": (Function(lambda x: x.softmax(-1)), "no bound: softmax in 1"),
    "attention": (
        Function(attention, nn.MultiheadAttention(64, 2, batch_first=True)),
        "no bound: bmm of two moving tensors in 1.parts.0, and 2 more",
    ),
    "no gradient": (Function(lambda x: (4 * x).long().float()), "no bound: to in 1"),
}  # fmt: skip


@pytest.mark.parametrize(("part", "why"), UNBOUNDED.values(), ids=UNBOUNDED)
def test_what_has_no_constant_is_named_and_layers_are_audited(part: nn.Module, why: str) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(1, 1, 3, padding=1)
    model = nn.Sequential(conv, part, nn.Flatten(), nn.Linear(64, 4))
    found = audited(model, labelled(1, classes=4))
    assert found.bound is None and found.unbounded.startswith(why)
    assert found.layers[0].norm == pytest.approx(norm_of(conv, (1, 8, 8)), rel=1e-4)
    assert found.layers[-1].layer == "3"
    assert {(radius.l2, radius.linf) for radius in found.surrogate_radii} == {(0, 0)}


def test_what_cannot_be_audited_is_refused() -> None:
    x, y = labelled()
    decides = Function(lambda x: x.flatten(1) if x.sum() > 0 else -x.flatten(1))
    refused(lambda: audited(decides, (x, y)), "cannot follow Function: it decides by the values")
    endless = nn.Sequential(nn.Conv2d(1, 1, 1), nn.ReLU6(), nn.Flatten())
    endless.get_parameter("0.weight").data.fill_(math.inf)
    refused(lambda: audited(endless, (x, y)), "'0.weight'")
    refused(lambda: audited(network("wrn", False), (x * 2, y)), "images must lie in")
