"""Lowering: each layer in integers is PyTorch's layer, up to the rounding of its bias."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import defquant as dq
from conftest import left_alone, refused
from defquant.captured import capture, operation
from defquant.config import ModelConfig
from defquant.deploy.floats import pair
from defquant.deploy.graph import graph
from defquant.deploy.lower import calibrate, lower
from defquant.deploy.program import (
    Add,
    Affine,
    Call,
    Conv,
    Linear,
    MaxPool,
    Program,
    Quantize,
    rounded,
    run,
    steps,
    value,
)
from defquant.deploy.runtime import OnnxModel, open_model
from defquant.integers import snap_biases_
from defquant.models import build
from defquant.quantize import QuantBranch
from defquant.weights import QuantConv2d, weight_grid

SHAPE = (3, 16, 16)
NETWORKS = {"wrn-10-1": 9, "vgg-16x0.125": 13, "resnet-18x0.125": 20}  # and their convolutions


def pixels(n: int = 8, shape: tuple[int, int, int] = SHAPE, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, *shape), generator=generator).float() / 255


def lively(model: nn.Module, x: Tensor) -> nn.Module:
    """`model` as if trained on `x`: statistics, ranges, gains of both signs, uneven sums."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = None
                if module.affine:
                    module.weight.uniform_(0.5, 2, generator=generator)
                    module.weight[::3] *= -1
                    module.bias.uniform_(-1, 2, generator=generator)
            if isinstance(module, dq.ConvexSum):
                first = float(torch.rand((), generator=generator))
                module.alpha.copy_(torch.tensor([first, 1 - first]))
        model.train()(x)
    return model.eval()


def network(name: str, bits: int, weight_bits: int | None = 8, **options: Any) -> nn.Module:
    options = {"convex": True, "deployable": True, **options}
    config = ModelConfig(name, bits=bits, weight_bits=weight_bits, **options)
    return lively(build(config, num_classes=4, in_channels=3), pixels())


class Net(nn.Module):
    """Layers by name and a function of them."""

    def __init__(self, function: Callable[[Any, Tensor], Any], **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def conv(c_in: int = 3, c_out: int = 8, kernel: int = 3, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(c_in, c_out, kernel, **{"padding": kernel // 2, **options})


class _Keep:
    """What every operation of a model gives in float64, weights on their grid in float32."""

    def __init__(self, model: nn.Module, x: Tensor) -> None:
        seen = capture(model, x)
        seen.module.double()
        self.kept: dict[str, Tensor] = {}
        self.inputs: dict[str, str] = {}
        pixels = x.mul(255).round().double() / 255
        seen.values(pixels, lambda node, value: self.kept.update({node.name: value}))
        for node in seen.calls:
            if operation(node).startswith("defquant."):
                self.inputs[node.name] = node.all_input_nodes[0].name

    def before(self, name: str) -> Tensor:
        """What the quantiser `name` rounds; what is no quantiser is rounded itself."""
        return self.kept[self.inputs.get(name, name)]


@dataclass(frozen=True)
class Deviation:
    """Of one operation given PyTorch's own codes: in codes, and in steps before rounding."""

    name: str
    flipped: float
    largest: int
    unit: float  # of the bias, in steps: mean over the channels
    coarsest: float


@torch.no_grad()
def deviations(
    model: nn.Module,
    program: Program,
    x: Tensor,
    *,
    streams: bool = True,
    half: float = 0.5,
) -> list[Deviation]:
    """Compare each operation that ends in codes with PyTorch, which gives it its inputs.

    A convolution rounds its bias to whole units, the step of its sums: it may be off by half of
    one, and no more; all else only by float32. So a code differs only within that of a tie.
    `streams=False` leaves out what is quantised from sums of values that PyTorch does not round.
    `half`: of a unit, by which a bias may be off.
    """
    keep = _Keep(model, x)
    known = {"image": x, "pixels": x.mul(255).round().to(torch.uint8)}
    found, float32 = [], 0.0
    for op in program.ops[1:]:
        if op.name not in program.grids:
            if isinstance(op, Affine):  # the largest number that is rounded to float32
                float32 = float(np.abs(op.scale).max() * 30 + np.abs(op.bias).max()) * 1e-6
            known[op.name] = value(program, op, known)
            continue
        grid = program.grids[op.name]
        if isinstance(op, Quantize) and not streams:
            known[op.name] = rounded(grid, keep.before(op.name) / grid.scale)
            continue
        if isinstance(op, MaxPool):
            known[op.name] = rounded(grid, keep.kept[op.name] / grid.scale)
            assert torch.equal(value(program, op, known), known[op.name])
            continue
        exact, wanted = steps(program, op, known), keep.before(op.name).double() / grid.scale
        codes, known[op.name] = rounded(grid, exact), rounded(grid, wanted)
        unit, slack = torch.zeros(1), 1e-3 + float32 / grid.scale
        if isinstance(op, Conv):
            unit = torch.from_numpy(program.grids[op.source].scale * op.weight.scale / grid.scale)
            slack = 1e-3
        low, high = -grid.zero - 1, grid.top - grid.zero + 1
        away = (exact.double().clamp(low, high) - wanted.clamp(low, high)).abs()
        allowed = half * unit.view(-1, *[1] * (exact.dim() - 2)) + slack
        assert (away <= allowed).all(), f"{op.name}: {(away - allowed).max():.3g} steps too far"
        apart = (codes.int() - known[op.name].int()).abs()
        tie = (wanted - wanted.floor() - 0.5).abs()
        assert (tie[apart == 1] <= allowed.expand_as(tie)[apart == 1]).all(), op.name
        found.append(
            Deviation(
                op.name, float((apart > 0).double().mean()), int(apart.max()), float(unit.mean()),
                float(unit.max()),
            )
        )  # fmt: skip
    return found


def faithful(
    model: nn.Module,
    shape: tuple[int, int, int] = SHAPE,
    *,
    streams: bool = True,
    peaks: Mapping[str, float] | None = None,
) -> Program:
    """`model` lowered; it must do what PyTorch does, layer by layer."""
    program = lower(model.eval(), shape, peaks=peaks)
    for d in deviations(model, program, pixels(shape=shape), streams=streams):
        assert d.largest <= 1, d
        assert d.flipped <= d.coarsest / 2 + 0.01, d
    return program


# ---------------------------------------------------------------------------------- our networks


@pytest.mark.parametrize(("bits", "weight_bits"), [(1, 8), (2, 2), (4, 4), (7, 2), (8, 4)])
@pytest.mark.parametrize("name", NETWORKS)
def test_each_layer_is_pytorchs(name: str, bits: int, weight_bits: int) -> None:
    model = network(name, bits, weight_bits)
    program = lower(model, SHAPE)
    _, *others = (op for op in program.convolutions if not op.alone)
    assert 1 + len(others) == NETWORKS[name]
    assert {op.weight.bits for op in others} == {
        7 if (bits, weight_bits) == (8, 8) else weight_bits
    }
    assert {program.grids[op.source].bits for op in others} == {bits}
    found = deviations(model, program, pixels())
    assert len(found) >= NETWORKS[name]
    for d in found:
        # half a unit moves at most that share of evenly spread values over a tie
        assert d.flipped <= d.coarsest / 2 + 0.01, d
        assert d.largest <= max(1, d.coarsest), d
    if not name.startswith("resnet"):
        # without a batch norm before an 8-bit branch, units are small beside the output's step
        assert sum(d.flipped for d in found) / len(found) < 2e-3


@pytest.mark.parametrize("bits", [1, 4, 8])
@pytest.mark.parametrize("name", NETWORKS)
def test_biases_on_their_grid_are_exact(name: str, bits: int) -> None:
    """Then nothing is left but float32, beside a ResNet's coarse units, too; nor is it far."""
    model = network(name, bits, 8)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    snap_biases_(model, pixels(1))
    moved = [k for k, v in model.state_dict().items() if not torch.equal(v, before[k])]
    assert moved and all(k.endswith("bias") for k in moved)
    program = lower(model, SHAPE)
    found = deviations(model, program, pixels(), half=1e-3)
    assert all(d.largest <= 1 and d.flipped < 2e-3 for d in found)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    snap_biases_(model, pixels(1))
    assert all(torch.allclose(v, state[k], rtol=1e-5) for k, v in model.state_dict().items())


@pytest.mark.parametrize("bits", [1, 4, 8])
def test_rounded_sums_and_their_batch_norms_are_exact_in_integers(bits: int) -> None:
    """From pixels to what is pooled; a bias that is no whole number keeps its norm in floats."""
    model = network("wrn-10-1", bits, 8, round_sums=True)
    assert any(isinstance(op, Affine) for op in lower(model, SHAPE).ops)
    snap_biases_(model, pixels(1))
    program = lower(model, SHAPE)
    assert len(program.convolutions) == NETWORKS["wrn-10-1"] + 4
    floats = [op for op in program.ops if op.name not in program.grids]
    assert [type(op) for op in floats] == [Add, Add, Add, Call, Linear]
    found = deviations(model, program, pixels(), half=1e-3)
    assert all(d.largest <= 1 and d.flipped < 2e-3 for d in found)


def test_biases_stay_where_weights_are_floats_or_nothing_can_be_exported() -> None:
    untrained = build(ModelConfig(bits=4, weight_bits=8, deployable=True), num_classes=4,
                      in_channels=3)  # fmt: skip
    tanh = build(ModelConfig("vgg-16x0.125", bits=4, weight_bits=8, activation="tanh"),
                 num_classes=4, in_channels=3)  # fmt: skip
    for model in (network("wrn-10-1", 4, None), untrained, tanh, nn.Linear(2, 2)):
        before = {k: v.clone() for k, v in model.state_dict().items()}
        snap_biases_(model, pixels(1))
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def branching(net: Any, x: Tensor) -> Tensor:
    """What no tracer follows."""
    stream = net.act(net.bn(net.conv(x))) if x.sum() >= 0 else x
    return net.fc(net.act(net.bn2(net.more(stream))).mean((2, 3)))  # type: ignore[no-any-return]


@pytest.mark.parametrize("shared", [False, True])
def test_biases_move_where_they_have_one_unit_whatever_the_forward(shared: bool) -> None:
    """Layers are seen at work: no graph is needed, and nothing that cannot be moved is an error."""
    torch.manual_seed(0)
    options: Any = {"padding": 1, "bias": False, "weight_bits": 4}
    convs = {"conv": QuantConv2d(3, 8, 3, **options), "more": QuantConv2d(8, 8, 3, **options)}
    bn = nn.BatchNorm2d(8)
    norms = {"bn": bn, "bn2": bn if shared else nn.BatchNorm2d(8)}
    model = Net(branching, act=dq.QuantReLU(4), fc=nn.Linear(8, 4), **norms, **convs)
    lively(model, pixels())
    before = [norm.bias.clone() for norm in norms.values()]
    snap_biases_(model, pixels(1))
    moved = [not torch.equal(m.bias, b) for m, b in zip(norms.values(), before, strict=True)]
    assert moved == [not shared, not shared]


def test_integers_are_those_of_training_and_batch_norms_go_into_scales() -> None:
    model = network("vgg-16x0.125", 4, 4)
    program = lower(model, SHAPE)
    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    flipped = 0
    for op, layer, norm in zip(program.convolutions, layers, norms, strict=True):
        assert isinstance(layer, QuantConv2d) and layer.weight_bits is not None
        k, s = weight_grid(layer.weight, layer.weight_bits)
        var = norm.running_var
        assert var is not None
        gain = norm.weight.detach().double() / (var.double() + norm.eps).sqrt()
        sign = gain.sign().view(-1, 1, 1, 1)
        integers = torch.from_numpy(op.weight.integers).double()
        assert op.weight.integers.dtype == np.int8
        assert torch.equal(integers, k * sign * op.weight.multiple)
        expected = s * gain.abs() / op.weight.multiple
        torch.testing.assert_close(torch.from_numpy(op.weight.scale), expected.float())
        flipped += int((gain < 0).sum())
    assert flipped > 10


@pytest.mark.parametrize(("weight_bits", "convex"), [(8, True), (4, False)])
@pytest.mark.parametrize("name", NETWORKS)
def test_float_weights_are_quantised_and_ranges_calibrated_at_export(
    name: str, weight_bits: int, convex: bool
) -> None:
    model = network(name, 4, None, deployable=False, convex=convex)
    program = lower(model, SHAPE, peaks=calibrate(model, pixels()), weight_bits=weight_bits)
    assert len(program.convolutions) == NETWORKS[name]
    first, *others = program.convolutions
    assert first.weight.bits == min(weight_bits, 7)
    assert {op.weight.bits for op in others} == {weight_bits}
    quantise_weights(model, first.weight.bits, weight_bits)
    for d in deviations(model, program, pixels(), streams=False):
        assert d.largest <= max(1, d.coarsest), d


@torch.no_grad()
def quantise_weights(model: nn.Module, first: int, others: int) -> None:
    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    for index, layer in enumerate(layers):
        if getattr(layer, "weight_bits", None) is None:
            bits = first if index == 0 else others if isinstance(layer, nn.Conv2d) else 8
            k, s = weight_grid(layer.weight, bits)
            layer.weight.copy_(k * s.view(-1, *[1] * (k.dim() - 1)))


@pytest.mark.parametrize("bits", [1, 4])
def test_codes_agree_from_the_first_layer_to_the_answers(bits: int) -> None:
    """Undisturbed from pixels to logits: one more bit moves the answers far more."""
    model = network("wrn-10-1", bits, 8)
    x = pixels(32, seed=5)
    program = lower(model, SHAPE)
    with torch.no_grad():
        trained, coarser = model(x), dq.set_bits(model, bits + 1)(x)
    logits = run(program, x)[program.logits]
    assert (logits - trained).abs().mean() < 0.5 * (coarser - trained).abs().mean()


def test_images_may_be_pixels_or_floats() -> None:
    program = lower(network("wrn-10-1", 4), SHAPE)
    x = pixels()
    floats, codes = run(program, x), run(program, x.mul(255).round().to(torch.uint8))
    assert all(torch.equal(floats[name], codes[name]) for name in floats)


# ------------------------------------------------------------------------------- kinds of layers

CONVOLUTIONS: Mapping[str, nn.Conv2d] = {
    "with a bias": conv(8, 6),
    "grouped": conv(8, 12, groups=4, bias=False),
    "depthwise": conv(8, 8, groups=8),
    "dilated": conv(8, 6, dilation=2, padding=2),
    "strided": conv(8, 6, stride=2),
    "of uneven sides": conv(8, 6, stride=(1, 2), padding=(2, 0)),
    "long": nn.Conv2d(8, 6, (1, 5), dilation=(1, 2), padding=(0, 4)),
    "of few bits": QuantConv2d(8, 6, 3, padding=1, weight_bits=2),
}


@pytest.mark.parametrize("last", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
@pytest.mark.parametrize("norm", [False, True], ids=["alone", "batch norm"])
def test_every_kind_of_convolution(last: nn.Conv2d, norm: bool) -> None:
    torch.manual_seed(0)
    last.reset_parameters()
    model = nn.Sequential(
        conv(), nn.BatchNorm2d(8), dq.QuantReLU(4), last,
        nn.BatchNorm2d(last.out_channels) if norm else nn.Identity(), dq.QuantReLU(4, 1.0),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(last.out_channels, 4),
    )  # fmt: skip
    on_grid(lively(model, pixels()))
    op = faithful(model).convolutions[1]
    assert (op.layer, op.groups) == ("3", last.groups)
    padding = pair(last.padding) * 2
    assert (op.stride, op.padding, op.dilation) == (last.stride, padding, last.dilation)
    assert (op.weight.integers != 0).any()


def on_grid(model: nn.Module) -> nn.Module:
    """`model` with its float weights where `lower` will put them, in place."""
    quantise_weights(model, 7, 8)
    return model


def test_a_network_of_ones_own() -> None:
    """The guide's: convolutions, batch norms, quantisers, pooling, flattening, linear layers."""
    torch.manual_seed(0)
    model = nn.Sequential(
        conv(1, 8, bias=False), nn.BatchNorm2d(8), dq.QuantReLU(4),
        conv(8, 8, stride=2, bias=False), nn.BatchNorm2d(8), dq.QuantReLU(4),
        nn.MaxPool2d(3, 1, padding=1), nn.Dropout(0.1), nn.Flatten(),
        nn.Linear(8 * 4 * 4, 10), dq.QuantReLU(4), nn.Linear(10, 4, bias=False),
    )  # fmt: skip
    shape = (1, 8, 8)
    x = pixels(shape=shape)
    on_grid(lively(model, x))
    program = faithful(model, shape)
    assert [type(op).__name__ for op in program.ops] == [
        "Quantize", "Conv", "Conv", "MaxPool", "Call", "Linear", "Quantize", "Linear",
    ]  # fmt: skip
    with torch.no_grad():
        trained = model(x)
    assert (run(program, x)[program.logits] - trained).abs().max() < 0.2 * trained.std()


def test_functions_instead_of_layers() -> None:
    def forward(net: Any, x: Tensor) -> Tensor:
        x = net.act1(net.conv1(x))
        y = torch.add(net.act2(net.conv2(x)), x)
        y += x
        return net.second(torch.flatten(net.act3(y), 1))  # type: ignore[no-any-return]

    torch.manual_seed(0)
    model = Net(
        forward, conv1=conv(), conv2=conv(8, 8), act1=dq.QuantReLU(4), act2=dq.QuantReLU(4),
        act3=dq.QuantReLU(3), second=nn.Linear(8 * 64, 4),
    )  # fmt: skip
    program = faithful(on_grid(model), (3, 8, 8))
    x = pixels(shape=(3, 8, 8))
    with torch.no_grad():
        torch.testing.assert_close(run(program, x)[program.logits], model(x), atol=0.05, rtol=0)


def normed(gain: list[float], shift: list[float]) -> nn.Sequential:
    """One convolution of 4 channels with these gains and shifts of its batch norm."""
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(4)
    model = nn.Sequential(
        QuantConv2d(3, 4, 3, padding=1, bias=False, weight_bits=7), norm, dq.QuantReLU(4),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2),
    )  # fmt: skip
    with torch.no_grad():
        model(pixels())
        norm.weight.copy_(torch.tensor(gain))
        norm.bias.copy_(torch.tensor(shift))
    return model.eval()


def test_negative_gains_negate_integers() -> None:
    shift = [0.5, 1.0, 1.5, 2.0]
    up, down = normed([1.0] * 4, shift), normed([-1.0] * 4, shift)
    first, second = (faithful(m).convolutions[0].weight for m in (up, down))
    assert np.array_equal(first.integers, -second.integers)
    assert np.array_equal(first.scale, second.scale) and (first.scale > 0).all()


def test_a_gain_of_zero_leaves_the_shift_alone() -> None:
    model = normed([0.0, 0.0, 1e-14, 0.0], [2.7, -1.0, 0.4, 1e9])
    (op,) = faithful(model).convolutions
    assert (op.weight.integers == 0).all() and (op.weight.scale > 0).all()
    codes = run(lower(model, SHAPE), pixels())[op.name]
    step = 6 / 15
    expected = [round(2.7 / step), 0, round(0.4 / step), 15]
    assert all((codes[:, c] == code).all() for c, code in enumerate(expected))


@pytest.mark.parametrize("gain", [1e-3, 1e-6, 1e-9, 1e-11, 0.0])
def test_a_gain_near_zero_is_exact(gain: float) -> None:
    """Weight decay makes such channels: their sums matter less and less, their shift does not."""
    faithful(normed([gain, 1.0, -gain, 1.0], [2.5, 0.0, 0.3, 1.0]))


def test_a_bias_beyond_32_bits_saturates_or_gets_a_larger_unit() -> None:
    """1e9 is the highest code, come what may; 5.9 is over 2^31 units, and they decide."""
    model = normed([1e-3, 1.0, 1.0, -1e-3], [1e9, 0.0, 0.0, -1e9])
    program = faithful(model)
    codes = run(program, pixels())[program.convolutions[0].name]
    assert (codes[:, 0] == 15).all() and (codes[:, 3] == 0).all()
    model = normed([2e-4, 1.0, 1.0, -1e-6], [5.9, 0.0, 0.0, 3.1])
    snap_biases_(model, pixels(1))
    faithful(model)


def test_a_batch_norm_without_gains_or_statistics() -> None:
    torch.manual_seed(0)
    parts = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2))
    plain = nn.Sequential(conv(), nn.BatchNorm2d(8, affine=False), dq.QuantReLU(4), *parts)
    faithful(on_grid(lively(plain, pixels())))
    plain[1] = nn.BatchNorm2d(8, track_running_stats=False)
    refused(lambda: lower(plain, SHAPE), "layer '1': a batch norm without running statistics")


# -------------------------------------------------------------------------- sums and shared values


def joined(*alphas: tuple[float, float]) -> nn.Module:
    """A stream through convex sums of these coefficients, a new branch at each."""

    def forward(net: Any, x: Tensor) -> Tensor:
        stream = net.out(net.stem(x))
        for index in range(len(alphas)):
            branch = net.branch_outs[index](net.branches[index](net.acts[index](stream)))
            stream = net.joins[index](stream, branch)
        return net.fc(net.act(net.bn(stream)).mean((2, 3)))  # type: ignore[no-any-return]

    torch.manual_seed(0)
    count = len(alphas)
    model = Net(
        forward, stem=conv(), out=QuantBranch(), bn=nn.BatchNorm2d(8), act=dq.QuantReLU(7),
        branches=nn.ModuleList(conv(8, 8) for _ in range(count)),
        branch_outs=nn.ModuleList(QuantBranch() for _ in range(count)),
        acts=nn.ModuleList(dq.QuantReLU(7) for _ in range(count)),
        joins=nn.ModuleList(dq.ConvexSum() for _ in range(count)), fc=nn.Linear(8, 4),
    )  # fmt: skip
    lively(model, pixels())
    joins = (m for m in model.modules() if isinstance(m, dq.ConvexSum))
    with torch.no_grad():
        for join, alpha in zip(joins, alphas, strict=True):
            join.alpha.copy_(torch.tensor(alpha))
    model.train()(pixels())
    return on_grid(model.eval())


@pytest.mark.parametrize(
    "alphas",
    [
        [(0.5, 0.5)],
        [(0.3, 0.7), (0.6, 0.4), (0.9, 0.1)],
        [(1.0, 0.0), (0.25, 0.75)],
        [(0.0, 1.0), (0.25, 0.75)],
        [(0.5, 0.5), (0.0, 1.0)],
        [(0.5, 0.5), (1.0, 0.0)],
        [(0.5, 0.5), (5e-4, 1 - 5e-4), (0.5, 0.5)],
        [(0.5, 0.5), (0.01, 0.99), (0.01, 0.99), (0.01, 0.99)],
    ],
    ids=str,
)
def test_convex_coefficients(alphas: list[tuple[float, float]]) -> None:
    model = joined(*alphas)
    program = faithful(model)
    (affine,) = (op for op in program.ops if isinstance(op, Affine))
    assert np.isfinite(affine.scale).all()
    with torch.no_grad():
        trained = model(pixels())
    assert (run(program, pixels())[program.logits] - trained).abs().max() < 0.05 * trained.std()


def test_a_sum_of_nothing_is_refused() -> None:
    refused(lambda: lower(joined((0.0, 0.0)), SHAPE), "sum 'joins_1': all its coefficients are 0")


def test_what_several_layers_read_is_finished_once() -> None:
    """A convolution read by a quantiser and a sum; a batch norm read twice; codes read thrice."""

    def forward(net: Any, x: Tensor) -> Tensor:
        first = net.conv1(x)
        codes = net.act(first)
        normed = net.bn(net.conv2(codes) + net.conv3(codes))
        stream = first + net.act2(normed) + codes
        return net.fc(net.act3(net.bn2(stream) + normed).mean((2, 3)))  # type: ignore[no-any-return]

    torch.manual_seed(0)
    model = Net(
        forward, conv1=conv(), conv2=conv(8, 8), conv3=conv(8, 8), bn=nn.BatchNorm2d(8),
        bn2=nn.BatchNorm2d(8), act=dq.QuantReLU(4), act2=dq.QuantReLU(4), act3=dq.QuantReLU(4),
        fc=nn.Linear(8, 4),
    )  # fmt: skip
    on_grid(lively(model, pixels()))
    peaks = calibrate(model, pixels())
    assert sorted(peaks) == ["conv1", "conv2", "conv3"]
    program = faithful(model, peaks=peaks, streams=False)
    names = [op.name for op in program.ops]
    assert len(names) == len(set(names))
    assert sum(isinstance(op, Affine) for op in program.ops) == 2
    assert sum(isinstance(op, Conv) for op in program.ops) == 3


# ------------------------------------------------------------------------------------ calibration

CALIBRATED = {
    "wrn-10-1": ["stem", "blocks.0.conv2", "blocks.1.conv2", "blocks.1.shortcut", "blocks.2.conv2",
                 "blocks.2.shortcut"],
    "vgg-16x0.125": [],
    "resnet-18x0.125": [f"blocks.{i}.bn2" for i in range(8)]
    + [f"blocks.{i}.shortcut.1" for i in (2, 4, 6)],
}  # fmt: skip


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
def test_calibration_finds_the_largest_output_and_touches_nothing(
    name: str, training: bool
) -> None:
    model = network(name, 4, None, deployable=False)
    largest: dict[str, float] = {}

    def note(layer: str) -> Any:
        return lambda _, __, y: largest.__setitem__(layer, float(y.abs().max()))

    hooks = [model.get_submodule(n).register_forward_hook(note(n)) for n in CALIBRATED[name]]
    x = pixels(11, seed=9)
    with torch.no_grad():
        model(x)
    for hook in hooks:
        hook.remove()
    model.train(training)
    next(model.children()).train(not training)
    with left_alone(model):
        peaks = calibrate(model, x, batch_size=4)
    assert peaks == pytest.approx({n.replace(".", "_"): v for n, v in largest.items()}, rel=1e-5)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_deployable_network_needs_no_calibration(name: str) -> None:
    assert calibrate(network(name, 4), pixels()) == {}


def test_a_branch_of_zeros_has_a_range() -> None:
    """As weight decay leaves it where a convex coefficient is 0."""
    model = network("wrn-10-1", 4, None, deployable=False)
    with torch.no_grad():
        model.get_parameter("blocks.0.conv2.weight").zero_()
    program = lower(model, SHAPE, peaks=calibrate(model, pixels()))
    assert all(grid.scale > 0 for grid in program.grids.values())
    assert torch.isfinite(run(program, pixels())[program.logits]).all()


# ------------------------------------------------------------------------------------- what cannot


class Loops(nn.Module):
    """Decides by what it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.act, self.fc = conv(), dq.QuantReLU(4), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.conv(x))
        while y.sum() > 10:
            y = y / 2
        return self.fc(y.mean((2, 3)))  # type: ignore[no-any-return]


def chain(*layers: nn.Module, channels: int = 8) -> nn.Module:
    tail = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 4))
    return nn.Sequential(*layers, *tail)


def plain(name: str = "wrn-10-1", **options: Any) -> nn.Module:
    return build(ModelConfig(name, **options), num_classes=4, in_channels=3)


def too_wide() -> nn.Module:
    return dq.set_bits(network("wrn-10-1", 4, 8), 8)


def normed_input() -> nn.Module:
    return chain(nn.BatchNorm2d(3), conv(), dq.QuantReLU(4))


REFUSED: Mapping[str, tuple[Callable[[], nn.Module], str]] = {
    "tanh": (lambda: plain("vgg-16x0.125", bits=4, activation="tanh"),
             r"layer 'features\.2': a file has no form here of defquant\.tanh_round"),
    "feature squeezing": (lambda: plain(bits=4, squeeze=5), "cannot export "),
    "full precision": (lambda: plain("vgg-16x0.125"), "its activations have full precision"),
    "control flow": (Loops, "cannot follow Loops: it decides by the values"),
    "another activation": (lambda: chain(conv(), nn.ReLU6()), "activations have full precision"),
    "8 by 8 bits": (too_wide, r"layer 'blocks\.0\.conv1': products of 8-bit weights and codes "
                    "up to 255 saturate; at 8-bit activations weights have 7 bits"),
    "no batch seen": (lambda: plain(bits=4, deployable=True),
                      r"layer 'stem_out': its range is 0, as before training"),
    "no range": (lambda: plain(bits=4), r"layer 'stem' in integers: its output has no range"),
    "another softplus": (lambda: chain(conv(), dq.QuantReLU(4), nn.Softplus(2)),
                         "layer '2': softplus has no form in a file with beta=2"),
    "pooling to 3x3": (lambda: chain(conv(), dq.QuantReLU(4), nn.AdaptiveAvgPool2d(3)),
                       "layer '2': adaptive_avg_pool2d must divide height and width evenly"),
}  # fmt: skip


@pytest.mark.parametrize(("make", "message"), REFUSED.values(), ids=REFUSED)
def test_what_has_no_integer_form_is_refused_by_name(
    make: Callable[[], nn.Module], message: str
) -> None:
    with pytest.raises(dq.UserError, match=message) as error:
        graph(lower(make(), SHAPE, peaks={"0": 1.0}))
    assert "\n" not in str(error.value)


class Standardised(nn.Conv2d):
    """As timm's StdConv2d."""

    def forward(self, x: Tensor) -> Tensor:
        spread, mean = torch.std_mean(self.weight, (1, 2, 3), keepdim=True)
        return self._conv_forward(x, (self.weight - mean) / spread, self.bias)  # type: ignore[no-any-return]


class Attention(nn.Module):
    """Tokens of 8 channels; a class token in front, whose end is the answer."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        self.norm, self.act = nn.LayerNorm(8), dq.QuantReLU(4)
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x.flatten(2).transpose(1, 2)], 1)
        n, tokens, _ = x.shape
        parts = self.qkv(self.act(self.norm(x))).reshape(n, tokens, 3, 2, 4).permute(2, 0, 3, 1, 4)
        q, k, v = parts.unbind(0)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        x = x + mixed.transpose(1, 2).reshape(n, tokens, 8)
        return self.out(x[:, 0])  # type: ignore[no-any-return]


class Torchs(nn.Module):
    """torch's own attention, which lays images and heads in one dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.out = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        mixed, _ = self.mix(tokens, tokens, tokens, need_weights=False)
        return self.out(mixed.mean(1))  # type: ignore[no-any-return]


class Squeezed(nn.Module):
    """A squeeze-and-excitation of what it is given, halves swapped on the way."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(8, 2, 1), nn.Conv2d(2, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.up(nn.functional.silu(self.down(x.mean((2, 3), keepdim=True)))).sigmoid()
        one, other = (x * gate).chunk(2, 1)
        return torch.cat([other, one], 1)


def front() -> list[nn.Module]:
    return [conv(), nn.BatchNorm2d(8), dq.QuantReLU(4)]


SEEN: Mapping[str, tuple[Callable[[], nn.Module], tuple[str, ...]]] = {
    "a normalised input": (lambda: chain(nn.BatchNorm2d(3), *front()), ("1",)),
    "half the input": (lambda: chain(Times(0.5), *front()), ()),
    "layer norm": (lambda: chain(conv(), nn.LayerNorm([8, 16, 16]), dq.QuantReLU(4)), ()),
    "group norm": (lambda: chain(conv(), nn.GroupNorm(2, 8), nn.GELU(), dq.QuantReLU(4)), ()),
    "padding by name": (lambda: chain(conv(padding="same"), dq.QuantReLU(4)), ()),
    "made larger": (lambda: chain(
        *front(), nn.Upsample(scale_factor=2), nn.Upsample(scale_factor=1.5, mode="bilinear"),
        nn.Upsample((40, 9), mode="bilinear", align_corners=True), nn.Upsample((44, 16)), conv(8),
        dq.QuantReLU(4)), ("7",)),
    "a transposed convolution": (lambda: chain(
        *front(), nn.ConvTranspose2d(8, 8, 3, 2, 1, 1, groups=2), dq.QuantReLU(4)), ()),
    "circular padding": (
        lambda: chain(*front(), conv(8, padding_mode="circular"), dq.QuantReLU(4)), ("3",)),
    "uneven zeros": (lambda: chain(*front(), nn.ZeroPad2d((0, 1, 2, 1)), conv(8, padding=0),
                                   dq.QuantReLU(4)), ()),
    "a batch norm of a mean": (lambda: nn.Sequential(
        *front(), nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8, 4)), ()),
    "weights made on the way": (lambda: chain(*front(), Standardised(8, 8, 3), nn.BatchNorm2d(8),
                                              dq.QuantReLU(4)), ()),
    "squeeze and excitation": (
        lambda: chain(*front(), Squeezed(), *norm_act()), ("3.down", "3.up")),
    "attention": (lambda: nn.Sequential(*front(), nn.AvgPool2d(4), Attention()), ()),
    "signed activations": (lambda: chain(conv(), nn.GELU(), dq.QuantSigned(4), conv(8), *norm_act(),
                                         conv(8), dq.QuantSigned(3), nn.SiLU()), ()),
    "signed activations laid out anew": (lambda: nn.Sequential(
        conv(), nn.GELU(), dq.QuantSigned(4), nn.Flatten(), nn.Linear(2048, 4)), ()),
    "channels mixed, the largest of two": (lambda: nn.Sequential(
        conv(), nn.InstanceNorm2d(8, affine=True), dq.QuantReLU(4), nn.ChannelShuffle(2),
        nn.AdaptiveMaxPool2d((4, 2)), conv(8), nn.InstanceNorm2d(8), Both(8)), ("5",)),
    "pooled evenly": (lambda: nn.Sequential(*front(), nn.AdaptiveAvgPool2d((4, 2)), conv(8),
                                            nn.Flatten(), nn.Linear(64, 4)), ("4",)),
    "torch's own attention": (lambda: nn.Sequential(*front(), nn.AvgPool2d(4), Torchs()), ()),
    "slopes, gates and pixels": (
        lambda: chain(conv(), nn.PReLU(8), nn.GLU(1), Turned(), nn.PReLU(), nn.PixelShuffle(2),
                      nn.SELU(), conv(1), dq.QuantReLU(4)), ("7",)),
    "torch's own quantiser": (lambda: chain(conv(), Fake(), conv(8), dq.QuantReLU(4)), ()),
    "a layer called twice": (lambda: chain(*front(), *[conv(8, 8), dq.QuantReLU(4)] * 2), ()),
    "no linear layer": (lambda: nn.Sequential(*front(), conv(8, 4), nn.AdaptiveAvgPool2d(1),
                                              nn.Flatten()), ()),
}  # fmt: skip


def norm_act() -> list[nn.Module]:
    return [nn.BatchNorm2d(8), dq.QuantReLU(4)]


class Times(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


class Both(nn.Module):
    """The mean of two answers."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.pool, self.a, self.b = nn.AdaptiveMaxPool2d(1), nn.Linear(c, 4), nn.Linear(c, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(x).flatten(1)
        return torch.stack([self.a(x), self.b(x)], -1).mean(-1)


class Turned(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.normalize(x.mT).square()


class Fake(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.fake_quantize_per_tensor_affine(x, 0.02, 100, 0, 255)


@pytest.mark.parametrize(("make", "floats"), SEEN.values(), ids=SEEN)
def test_any_network_is_a_file_that_answers_as_it_does(
    make: Callable[[], nn.Module], floats: tuple[str, ...], tmp_path: Path
) -> None:
    """What has no integer form stays in floats, and is counted; `verify` reads the file."""
    torch.manual_seed(0)
    x = pixels()
    model = on_grid(lively(make(), x))
    program = lower(model, SHAPE, peaks=calibrate(model, x))
    assert program.float_convolutions == floats
    with torch.no_grad():
        wanted = model(x)
    path = tmp_path / "any.onnx"
    path.write_bytes(graph(program).SerializeToString())
    for logits in (run(program, x)[program.logits], OnnxModel(open_model(path))(x)):
        assert (logits - wanted).abs().max() < 0.15 * wanted.std()


def twice(net: Any, x: Tensor) -> Tensor:
    codes = net.act(net.conv(x))
    return net.fc(net.act(net.join(codes, codes)).mean((2, 3)))  # type: ignore[no-any-return]


def scaled_sum(net: Any, x: Tensor) -> Tensor:
    codes = net.act(net.conv(x))
    return net.fc(net.act(torch.add(codes, net.act(net.more(codes)), alpha=2)).mean((2, 3)))  # type: ignore[no-any-return]


MISUNDERSTOOD: Mapping[str, Callable[[Any, Tensor], Any]] = {
    "a mean of all": lambda net, x: net.fc(net.act(net.conv(x)).mean()),
    "a mean of channels": lambda net, x: net.fc(net.act(net.conv(x)).mean(1)),
    "a mean with its dimensions": lambda net, x: net.fc(net.act(net.conv(x)).mean((2, 3), True)),
    "flattening height and width": lambda net, x: net.flat_fc(net.flat(net.act(net.conv(x)))),
    "a linear layer over width": lambda net, x: net.wide(net.act(net.conv(x))),
    "two outputs": lambda net, x: (net.fc(net.act(net.conv(x)).mean((2, 3))), x),
    "a number added": lambda net, x: net.fc(net.act(net.act(net.conv(x)) + 1.0).mean((2, 3))),
    "a value joined with itself": twice,
    "a sum with a factor": scaled_sum,
    "no linear layer": lambda net, x: net.act(net.conv(x)).mean((2, 3)),
    "an activation at the end": lambda net, x: net.act(net.fc(net.act(net.conv(x)).mean((2, 3)))),
    "the images alone": lambda net, x: x,
    "pooling beyond the border": lambda net, x: net.fc(net.pool(net.act(net.conv(x))).mean((2, 3))),
}


@pytest.mark.parametrize("forward", MISUNDERSTOOD.values(), ids=MISUNDERSTOOD)
def test_what_is_not_understood_is_refused_in_one_line(forward: Callable[..., Any]) -> None:
    """Or is right: a network must never be exported as another one."""
    torch.manual_seed(0)
    model = Net(
        forward, conv=conv(), act=dq.QuantReLU(4), more=conv(8, 8), join=dq.ConvexSum(),
        flat=nn.Flatten(2), flat_fc=nn.Linear(81, 4), fc=nn.Linear(8, 4), wide=nn.Linear(9, 4),
        pool=nn.MaxPool2d(2, 2, padding=1, ceil_mode=True),
    )  # fmt: skip
    x = pixels(shape=(3, 9, 9))
    try:
        program = lower(on_grid(model), (3, 9, 9))
        file = graph(program)
    except dq.UserError as error:
        assert str(error).startswith("cannot ") and "\n" not in str(error)
        return
    with torch.no_grad():
        wanted = model(x)
    assert isinstance(wanted, Tensor)
    for d in deviations(model, program, x):
        assert d.largest <= 1, d
    reference = run(program, x)[program.logits]
    assert reference.shape == wanted.shape
    for logits in (reference, OnnxModel(file)(x)):
        assert (logits - wanted).abs().max() < 0.1 * wanted.std()


def test_a_linear_layer_of_8_bit_codes_has_weights_that_do_not_saturate() -> None:
    """Laid out anew on the way: onnxruntime multiplies the codes behind a Flatten, too."""
    layers = conv(), dq.QuantReLU(8), nn.MaxPool2d(4), nn.Flatten(), nn.Linear(128, 4)
    program = lower(nn.Sequential(*layers), SHAPE, peaks={"0": 1.0})
    assert [op.weight.bits for op in program.ops if isinstance(op, Conv | Linear)] == [7, 7]


@pytest.mark.parametrize("weight_bits", [0, 1, 9, 16])
def test_other_weight_bits_are_refused(weight_bits: int) -> None:
    model = network("wrn-10-1", 4, None)
    refused(lambda: lower(model, SHAPE, weight_bits=weight_bits), "weight bits")


def test_programs_are_made_anew_and_hold_no_tensor_of_the_model() -> None:
    model = network("wrn-10-1", 4)
    program = lower(model, SHAPE)
    before = [op.weight.integers.copy() for op in program.convolutions]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(-3)
    for op, integers in zip(program.convolutions, before, strict=True):
        assert np.array_equal(op.weight.integers, integers)
    assert isinstance(program.ops[0], Quantize) and program.shape == SHAPE
    sources = {op.name: index for index, op in enumerate(program.ops)}
    assert all(a < b for a, b in pairwise(sources.values()))
    assert len(sources) == len(program.ops)
