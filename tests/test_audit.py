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
from defquant.diagnose import Audit, audit, jacobian_norms, surrogate
from defquant.diagnose.bound import Reach, reach
from defquant.diagnose.norms import kernel_matrix, layer_norm
from defquant.errors import UserError
from defquant.lipschitz import ConvexSum, OrthogonalPenalty, conv_spectral_norm, spectral_norm
from defquant.quantize import Quantizer, QuantReLU


def uniform(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


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


@pytest.mark.parametrize("kind", CONVS)
def test_the_norm_of_a_convolution_is_that_of_its_matrix(kind: str) -> None:
    torch.manual_seed(1)
    conv = CONVS[kind]()
    size = (conv.in_channels, 7, 6)
    exact, found = norm_of(conv, size), layer_norm(conv, size)
    assert found.value == pytest.approx(exact, rel=1e-4)
    assert exact <= found.upper <= exact * 1.03
    assert found.value == pytest.approx(conv_spectral_norm(conv, size[1:]), rel=5e-3)
    matrix = kernel_matrix(conv)
    if conv.groups == 1:
        assert matrix.largest == pytest.approx(spectral_norm(conv.weight), rel=1e-4)
    residual = math.sqrt(OrthogonalPenalty(conv, 2.0).penalty().item())
    assert matrix.residual == pytest.approx(residual, rel=1e-5)


def test_upper_bounds_hold_where_the_steps_do_not_exhaust_the_space() -> None:
    """32 channels of 6 x 6 have 1,152 dimensions; a hundred steps leave room for doubt."""
    for seed in range(5):
        torch.manual_seed(seed)
        conv = nn.Conv2d(32, 32, 3, padding=1, bias=False)
        exact, found = norm_of(conv, (32, 6, 6)), layer_norm(conv, (32, 6, 6))
        assert found.value <= exact * (1 + 1e-5)
        assert found.value == pytest.approx(exact, rel=1e-3)
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
    assert together * last.norm <= found.bound <= together * last.norm * 1.02


def test_layers_one_after_the_other_multiply() -> None:
    torch.manual_seed(4)
    first = nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), normed(nn.BatchNorm2d(3)))
    second = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), normed(nn.BatchNorm2d(4), 5))
    third = nn.Conv2d(4, 2, 3, padding=1)
    parts = ((first, 1), (second, 3), (third, 4))
    product = math.prod(norm_of(part, (channels, 8, 8)) for part, channels in parts)
    found = bound(nn.Sequential(first, nn.ReLU(), second, nn.MaxPool2d(1), third), 1, 8, 8).bound
    assert product <= found <= 1.03 * product
    apart = bound(nn.Sequential(first, nn.ReLU(), normed(nn.BatchNorm2d(3), 7)), 1, 8, 8)
    expected = norm_of(first, (1, 8, 8)) * apart.batch_norms[1].gain
    assert expected <= apart.bound <= 1.02 * expected


def test_a_linear_layer_and_its_batch_norm() -> None:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10), normed(nn.BatchNorm1d(10)))
    found = audited(model, labelled())
    exact = norm_of(model, (1, 8, 8))
    assert found.bound == pytest.approx(exact, rel=1e-4)
    assert found.lower == pytest.approx(exact, rel=1e-4)


def test_an_orthonormal_kernel_has_norm_one_as_a_matrix_and_up_to_three_as_a_map() -> None:
    conv = nn.Conv2d(4, 8, 3, padding=1, bias=False)
    nn.init.orthogonal_(conv.weight)
    found = audited(nn.Sequential(conv, nn.Flatten(), nn.Linear(512, 10)), labelled(channels=4))
    layer = found.layers[0]
    assert layer.matrix_norm == pytest.approx(1, abs=1e-5)
    assert layer.matrix_least == pytest.approx(1, abs=1e-5)
    assert layer.residual == pytest.approx(0, abs=1e-5)
    assert 1.3 < layer.norm <= 3
    flat = nn.Conv2d(1, 1, 3, padding=1, bias=False)  # the worst: all nine taps the same
    nn.init.constant_(flat.weight, 1 / 3)
    assert kernel_matrix(flat).residual == pytest.approx(0, abs=1e-6)
    assert 2.9 < layer_norm(flat, (1, 32, 32)).value < 3


class Residual(nn.Module):
    """x + c x, or a convex sum of both, with c a 1x1 convolution of one channel."""

    def __init__(self, factor: float, convex: bool) -> None:
        super().__init__()
        self.branch = nn.Conv2d(1, 1, 1, bias=False)
        nn.init.constant_(self.branch.weight, factor)
        self.join = ConvexSum() if convex else None

    def forward(self, x: Tensor) -> Tensor:
        branch = self.branch(x)
        y: Tensor = x + branch if self.join is None else self.join(x, branch)
        return y.flatten(1)


def test_plain_sums_add_one_and_convex_sums_weigh() -> None:
    data = labelled(classes=64)
    for factor in (0.5, -3.0):
        plain, convex = (
            audited(Residual(factor, False), data),
            audited(Residual(factor, True), data),
        )
        assert plain.bound == pytest.approx(1 + abs(factor), rel=1e-4)
        assert plain.lower == pytest.approx(abs(1 + factor), rel=1e-4)
        assert convex.bound == pytest.approx((1 + abs(factor)) / 2, rel=1e-4)
        model = Residual(factor, True)
        assert isinstance(model.join, ConvexSum)
        model.join.alpha.data = torch.tensor([0.8, 0.2])
        assert audited(model, data).bound == pytest.approx(0.8 + 0.2 * abs(factor), rel=1e-4)


def bound(model: nn.Module, *size: int) -> Reach:
    return reach(nn.Sequential(model).eval(), uniform(1, *size))


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        (nn.AvgPool2d(2), 1 / 2),
        (nn.AvgPool2d((2, 4)), 1 / math.sqrt(8)),
        (nn.AdaptiveAvgPool2d(1), 1 / 8),
        (nn.MaxPool2d(2), 1),
        (nn.MaxPool2d(2, ceil_mode=True), 1),
        (nn.MaxPool2d(3, stride=2), 2),
        (nn.MaxPool2d(2, stride=1), 2),
        (QuantReLU(1), 1),
        (nn.ReLU(), 1),
    ],
)
def test_layers_without_weights(layer: nn.Module, expected: float) -> None:
    assert bound(layer, 2, 8, 8).bound == pytest.approx(expected)


@pytest.mark.parametrize(
    "pool", [nn.AvgPool2d(3, stride=1, padding=1), nn.AvgPool2d(3, stride=2), nn.AvgPool2d(2)]
)
def test_average_pooling_is_bounded_by_its_matrix(pool: nn.Module) -> None:
    exact = norm_of(pool, (1, 8, 8))
    assert exact <= bound(pool, 1, 8, 8).bound * (1 + 1e-6) <= 1.4 * exact


class Normalised(nn.Module):
    mean: Tensor
    std: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor([0.5, 0.4]).view(1, 2, 1, 1))
        self.register_buffer("std", torch.tensor([0.2, 0.25]).view(1, 2, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        z = (x - self.mean) / self.std
        return torch.cat([z, 2 * z], 1).mean((2, 3)).view(x.size(0), -1)


def test_a_normalisation_inside_the_network_counts() -> None:
    assert bound(Normalised(), 2, 8, 8).bound == pytest.approx(5 * math.sqrt(5) / 8)


NETWORKS: dict[str, Callable[[bool], nn.Module]] = {
    "wrn": lambda convex: dq.wide_resnet(10, 1, bits=4, convex=convex, in_channels=1),
    "vgg": lambda convex: dq.vgg16(bits=2, convex=convex, in_channels=1, width=0.125),
    "resnet": lambda convex: dq.resnet18(bits=1, convex=convex, in_channels=1, width=0.125),
    "tanh": lambda convex: dq.wide_resnet(
        10, 1, bits=2, convex=convex, in_channels=1, activation="tanh"
    ),
    "squeezed": lambda convex: dq.FeatureSqueezing(
        dq.wide_resnet(10, 1, bits=3, convex=convex, in_channels=1)
    ),
}


def network(kind: str, convex: bool) -> nn.Module:
    torch.manual_seed(0)
    model = NETWORKS[kind](convex)
    for i in range(4):  # batch norm's statistics
        model(uniform(16, 1, 8, 8, seed=i))
    return model.eval()


@pytest.mark.parametrize("convex", [False, True])
@pytest.mark.parametrize("kind", NETWORKS)
def test_bound_jacobian_and_differences_stand_in_this_order(kind: str, convex: bool) -> None:
    model = network(kind, convex)
    found = audited(model, labelled(8))
    twin = surrogate(model)
    x = labelled(8)[0]
    towards = (uniform(8, 1, 8, 8, seed=9) - 0.5) * 1e-2
    with torch.no_grad():
        ratio = (twin(x + towards) - twin(x)).norm(dim=1) / towards.flatten(1).norm(dim=1)
    assert found.bound >= found.lower > 0
    assert found.bound >= float(ratio.max())
    assert found.lower == max(found.jacobians)
    assert torch.isfinite(torch.tensor(found.jacobians)).all()
    json.dumps(asdict(found), allow_nan=False)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), size=st.sampled_from([1e-3, 1e-2, 0.1, 1.0]))
def test_no_difference_exceeds_the_bound(seed: int, size: float) -> None:
    """Random weights, batch norms and pairs, near and far, on the surrogate."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), normed(nn.BatchNorm2d(4), seed), QuantReLU(2, high=1.0),
        nn.MaxPool2d(2), nn.Conv2d(4, 4, 3, stride=2, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3),
    ).eval()  # fmt: skip
    twin = surrogate(model)
    top = reach(twin, uniform(1, 1, 8, 8)).bound
    x, moved = uniform(16, 1, 8, 8, seed=seed), uniform(16, 1, 8, 8, seed=seed + 1)
    step = size * (moved - x)
    with torch.no_grad():
        ratios = (twin(x + step) - twin(x)).norm(dim=1) / step.flatten(1).norm(dim=1)
    assert float(ratios.max()) <= top
    assert float(jacobian_norms(twin, x).max()) <= top


def test_the_jacobian_of_a_linear_network_is_its_matrix() -> None:
    torch.manual_seed(0)
    fc = nn.Linear(64, 7)
    model = nn.Sequential(nn.Flatten(), fc)
    x, _ = labelled(3)
    expected = float(torch.linalg.matrix_norm(fc.weight.detach().double(), 2))
    assert jacobian_norms(model, x).tolist() == pytest.approx([expected] * 3)


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
    with torch.no_grad():
        y = surrogate(model)(x).argmax(1)
    found: Audit = audited(model, (x, y))
    twin = surrogate(model)
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


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) if x.sum() > 0 else -x.flatten(1)


class Attention(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x.sigmoid() * x).flatten(1)


def test_what_has_no_known_constant_is_refused_by_name() -> None:
    data = labelled(classes=64)
    model = nn.Sequential(nn.Flatten(), nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64)))
    with pytest.raises(UserError, match=r"of the layer '1\.1' \(LayerNorm\)"):
        audited(model, data)
    with pytest.raises(UserError, match=r"of the layer 'mul, in '0'' \(mul\)|mul"):
        audited(nn.Sequential(Attention()), data)
    with pytest.raises(UserError, match="Branching has none"):
        audited(Branching(), data)
    bare = nn.Sequential(nn.BatchNorm2d(1, track_running_stats=False), nn.Flatten())
    with pytest.raises(UserError, match="'0' normalises by its batch"):
        audited(bare, (data[0][:1], data[1][:1]))
    with pytest.raises(UserError, match="images must lie in"):
        audited(network("wrn", False), (data[0] * 2, data[1] % 10))


def test_the_model_is_left_as_it_was_found() -> None:
    model = network("resnet", True)
    before = [t.clone() for t in model.state_dict().values()]
    random_state = torch.get_rng_state()
    audited(model, labelled())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    for old, new in zip(before, model.state_dict().values(), strict=True):
        assert torch.equal(old, new)
    assert torch.equal(random_state, torch.get_rng_state())
