"""Weights and residual branches on their grids, in training and in what training keeps."""

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from torch import Tensor, nn

import defquant as dq
from conftest import tiny_images
from defquant import checkpoint
from defquant.checkpoint import Checkpoint, Facts
from defquant.config import DataConfig, ModelConfig, TrainConfig
from defquant.lipschitz import OrthogonalPenalty
from defquant.models import build
from defquant.models.blocks import FirstConv
from defquant.quantize import QuantBranch
from defquant.runs import train_run
from defquant.typed import from_mapping
from defquant.weights import (
    QuantConv2d,
    QuantLinear,
    effective_weight,
    quantize_weight,
    weight_grid,
)

NETWORKS = ("wrn-10-1", "vgg-16x0.125", "resnet-18x0.125")
WEIGHTS = arrays.arrays(np.float32, (3, 7), elements=st.floats(-4, 4, width=32))
CONVOLUTIONS: Mapping[str, Mapping[str, object]] = {
    "plain": {},
    "strided, with a wide border": {"stride": 2, "padding": 2},
    "grouped": {"groups": 2, "bias": False},
    "dilated, circular": {"dilation": 2, "padding": 1, "padding_mode": "circular"},
}


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------------------- the grid of weights


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
    """Channels are powers of two times one row, so that each scale is exact, and one is zero."""
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
    assert torch.equal(weight_grid(-weight, bits)[0], -k)
    assert torch.equal(weight_grid(-weight, bits)[1], s)


def test_nothing_leaves_the_range_where_the_scale_has_one_digit() -> None:
    """A channel of the smallest numbers there are: its scale is one or two of them."""
    smallest = 2.0**-149
    weight = torch.tensor([[190 * smallest, -smallest], [100 * smallest, 0.0]])
    k, _ = weight_grid(weight, 8)
    assert k.abs().max() <= 127


def test_a_channel_knows_nothing_of_the_others() -> None:
    weight = random(4, 3, 3, 3)
    k, s = weight_grid(weight, 4)
    louder = weight.clone()
    louder[2] *= 32
    k_louder, s_louder = weight_grid(louder, 4)
    assert torch.equal(k, k_louder)
    assert torch.equal(s_louder, s * torch.tensor([1.0, 1.0, 32.0, 1.0]))


@pytest.mark.parametrize("bits", [2, 4, 7, 8])
def test_the_value_is_on_the_grid_bit_for_bit(bits: int) -> None:
    weight = random(6, 4, 3, 3).contiguous(memory_format=torch.channels_last)
    before = weight.clone()
    value = quantize_weight(weight, bits)
    k, s = weight_grid(weight, bits)
    assert np.array_equal(value.numpy(), k.numpy() * s.numpy().reshape(-1, 1, 1, 1))
    assert torch.equal(weight_grid(value, bits)[0], k)
    assert value.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(weight, before)
    assert quantize_weight(weight, None) is weight


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_gradient_is_that_of_the_identity(bits: int) -> None:
    weight, grad = random(5, 4, 3, 3).requires_grad_(), random(5, 4, 3, 3, seed=1)
    (found,) = torch.autograd.grad(quantize_weight(weight, bits), weight, grad)
    assert torch.equal(found, grad)


@pytest.mark.parametrize("bits", [-1, 0, 1, 9])
def test_other_weight_bits_are_refused_in_one_line(bits: int) -> None:
    with pytest.raises(dq.UserError, match=f"from 2 to 8; found {bits}") as error:
        weight_grid(torch.ones(1, 1), bits)
    assert "\n" not in str(error.value)


# ------------------------------------------------------------------------------------- the layers


@pytest.mark.parametrize("options", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
@pytest.mark.parametrize("bits", [None, 2, 8])
def test_a_convolution_is_torchs_with_the_quantised_weight(
    options: Mapping[str, object], bits: int | None
) -> None:
    torch.manual_seed(0)
    layer = QuantConv2d(4, 6, 3, weight_bits=bits, **options)
    plain = nn.Conv2d(4, 6, 3, **options)  # type: ignore[arg-type]
    plain.load_state_dict(layer.state_dict())  # the same names, the same shapes
    plain.weight.data = effective_weight(layer).detach()
    same_forward_and_backward(layer, plain, random(2, 4, 9, 8))


@pytest.mark.parametrize("bits", [None, 2, 8])
def test_a_linear_layer_is_torchs_with_the_quantised_weight(bits: int | None) -> None:
    torch.manual_seed(0)
    layer, plain = QuantLinear(7, 5, weight_bits=bits), nn.Linear(7, 5)
    plain.load_state_dict(layer.state_dict())
    plain.weight.data = quantize_weight(layer.weight, bits).detach()
    same_forward_and_backward(layer, plain, random(3, 7))


def same_forward_and_backward(layer: nn.Module, plain: nn.Module, x: Tensor) -> None:
    """The output, the gradient of x and, straight through, those of weight and bias."""
    outputs, grads = [], []
    for module in (layer, plain):
        mine = x.clone().requires_grad_()
        y = module(mine)
        outputs.append(y)
        grads.append(torch.autograd.grad(y, [mine, *module.parameters()], random(*y.shape, seed=2)))
    assert torch.equal(*outputs)
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def bits_of_layers(name: str, bits: int | None, weight_bits: int) -> list[int]:
    config = ModelConfig(name, bits=bits, weight_bits=weight_bits)
    model = build(config, num_classes=4, in_channels=3)
    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert isinstance(layers[0], FirstConv) and isinstance(layers[-1], QuantLinear)
    assert all(isinstance(m, QuantConv2d) for m in layers[:-1])
    return [m.weight_bits for m in layers]  # type: ignore[misc]


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("weight_bits", [8, 4, 2])
def test_the_first_layer_has_7_bits_the_last_8(name: str, weight_bits: int) -> None:
    for bits in (None, 1, 4, 7):
        first, *inner, last = bits_of_layers(name, bits, weight_bits)
        assert (first, set(inner), last) == (7, {weight_bits}, 8)


@pytest.mark.parametrize("name", NETWORKS)
def test_at_8_activation_bits_convolutions_have_7(name: str) -> None:
    """Else two products of a code and a weight overflow the 16 bits that AVX2 adds them in."""
    *convolutions, last = bits_of_layers(name, 8, 8)
    assert (set(convolutions), last) == ({7}, 8)


@pytest.mark.parametrize("name", NETWORKS)
def test_weight_bits_change_neither_the_state_nor_the_draws(name: str) -> None:
    plain, quantised = (
        build(ModelConfig(name, bits=4, weight_bits=w), num_classes=4, in_channels=3)
        for w in (None, 2)
    )
    state = plain.state_dict()
    assert state.keys() == quantised.state_dict().keys()
    assert all(torch.equal(v, state[k]) for k, v in quantised.state_dict().items())
    x = torch.rand(4, 3, 16, 16)
    assert not torch.equal(plain(x), quantised(x))


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


@pytest.mark.parametrize("target", ["identity", "parseval"])
@pytest.mark.parametrize("last", [False, True], ids=["rows", "channels last"])
@pytest.mark.parametrize("bits", [8, 2])
def test_the_penalty_is_that_of_the_quantised_weights(bits: int, last: bool, target: str) -> None:
    model = layers(bits, last)
    plain = on_grid(model, bits)
    penalty, truth = (OrthogonalPenalty(m, 0.3, target=target) for m in (model, plain))  # type: ignore[arg-type]
    value = truth.penalty()
    torch.autograd.backward(value)
    expected = [p.grad for p in plain.parameters() if p.grad is not None]
    assert len(expected) == 5

    torch.autograd.backward(penalty.penalty())
    torch.testing.assert_close(penalty.penalty(), value)
    torch.testing.assert_close([p.grad for p in model.parameters() if p.dim() > 1], expected)

    model.zero_grad()
    torch.testing.assert_close(penalty.add_grad_(), value.detach())
    torch.testing.assert_close([p.grad for p in model.parameters() if p.dim() > 1], expected)
    unquantised = OrthogonalPenalty(layers(None, last), 0.3, target=target)  # type: ignore[arg-type]
    assert not torch.isclose(unquantised.penalty(), value, rtol=1e-3 if bits == 2 else 1e-6)


@pytest.mark.parametrize("last", [False, True], ids=["rows", "channels last"])
def test_the_retraction_moves_the_float_weight_by_the_quantised_one(last: bool) -> None:
    """W <- W + beta (Q - QQ'Q), Q on the grid."""
    model = layers(4, last)
    plain = on_grid(model, 4)
    before = [p.detach().clone() for p in model.parameters() if p.dim() > 1]
    grids = [p.detach().clone() for p in plain.parameters() if p.dim() > 1]
    OrthogonalPenalty(plain, 0.2).retract_()
    OrthogonalPenalty(model, 0.2).retract_()
    moved = [p.detach() for p in plain.parameters() if p.dim() > 1]
    after = [p.detach() for p in model.parameters() if p.dim() > 1]
    expected = [w + m - q for w, m, q in zip(before, moved, grids, strict=True)]
    torch.testing.assert_close(after, expected)


# ---------------------------------------------------------------------------- branches on a grid


def branch(peak: float = 0.0) -> QuantBranch:
    module = QuantBranch().eval()
    module.peak.fill_(peak)
    return module


def test_codes_of_a_branch_are_the_closed_form() -> None:
    x = torch.tensor([-500.0, -128.4, -128, -127.5, -0.5, 0.0, 0.5, 1.5, 2.5, 126.5, 127.4, 500])
    codes = torch.tensor([-128.0, -128, -128, -128, 0, 0, 0, 2, 2, 126, 127, 127])
    for step in (1.0, 0.25, 2.0**-20):
        assert torch.equal(branch(127 * step)(x * step), codes * step)


def test_gradients_of_a_branch_end_with_its_range() -> None:
    x = torch.tensor([-129.0, -128.6, -128.4, -127.0, 0.0, 127.4, 127.6, 300.0]).requires_grad_()
    (grad,) = torch.autograd.grad(branch(127.0)(x), x, torch.full((8,), 3.0))
    assert grad.tolist() == [0.0, 0.0, 3.0, 3.0, 3.0, 3.0, 0.0, 0.0]


def test_before_the_first_batch_a_branch_passes_x() -> None:
    x = random(3, 4).requires_grad_()
    y = branch()(x)
    assert torch.equal(y, x)
    (grad,) = torch.autograd.grad(y, x, torch.full_like(x, 2.0))
    assert (grad == 2).all()
    training = QuantBranch().train()
    assert torch.equal(training(torch.zeros(5)), torch.zeros(5))  # no range yet, and no NaN
    assert training.peak == 0


def test_the_range_is_a_moving_average_in_training_alone() -> None:
    module = QuantBranch().train()
    seen = []
    for largest in (4.0, -8.0, 2.0):
        module(torch.tensor([0.5, largest, -1.0]))
        seen.append(float(module.peak))
    assert seen == pytest.approx([4.0, 4.4, 4.16])
    module.eval()
    module(torch.full((3,), 1e6))
    assert float(module.peak) == seen[-1]
    assert module.peak.shape == () and not module.peak.requires_grad


def test_the_first_batch_is_rounded_onto_its_own_range() -> None:
    x = random(1000)
    y = QuantBranch().train()(x)
    step = x.abs().max() / 127
    torch.testing.assert_close(y, (x / step).round() * step)
    assert 0 < (y - x).abs().max() <= 0.501 * step


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_rounded_in_float32(dtype: torch.dtype) -> None:
    x = random(100).to(dtype).requires_grad_()
    y = branch(2.0)(x)
    assert y.dtype == torch.float32
    assert torch.equal(y, branch(2.0)(x.float()))
    y.sum().backward()
    assert x.grad is not None and x.grad.dtype == dtype


@pytest.mark.parametrize(
    ("name", "branches"),
    # a stem, two blocks' ends and shortcuts, one plain block; none; eight ends, three shortcuts
    [("wrn-10-1", 1 + 3 + 2), ("vgg-16x0.125", 0), ("resnet-18x0.125", 8 + 3)],
)
def test_only_deployable_networks_have_ranges(name: str, branches: int) -> None:
    plain, deployable = (
        build(ModelConfig(name, bits=4, deployable=d), num_classes=4, in_channels=3)
        for d in (False, True)
    )
    extra = deployable.state_dict().keys() - plain.state_dict().keys()
    assert plain.state_dict().keys() <= deployable.state_dict().keys()
    assert len(extra) == branches and all(key.endswith(".peak") for key in extra)
    assert sum(isinstance(m, QuantBranch) for m in plain.modules()) == 0


def test_what_enters_the_residual_stream_is_on_the_grid() -> None:
    torch.manual_seed(0)
    model = dq.wide_resnet(10, 1, bits=4, deployable=True, convex=True, num_classes=4).train()
    off_grid = []

    def check(_: nn.Module, inputs: tuple[Tensor, ...], __: Tensor) -> None:
        off_grid.append(sum(len(x.unique()) > 256 for x in inputs))

    for module in model.modules():
        if isinstance(module, dq.ConvexSum):
            module.register_forward_hook(check)
    model(torch.rand(8, 3, 16, 16))
    assert off_grid == [0, 0, 0]  # all three blocks reshape or follow the stem


# ------------------------------------------------------------------------------------ whole runs

MODEL = ModelConfig("wrn-10-1", bits=4, convex=True, weight_bits=4, deployable=True)
TRAIN = TrainConfig(epochs=2, batch_size=32, lr=0.05, beta=0.05, device="cpu")


def test_a_stopped_run_resumes_to_the_same_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, save = DataConfig("digits", train_images=64), checkpoint.save

    def save_and_stop(folder: Path, content: Checkpoint) -> Path:
        save(folder, content)
        raise KeyboardInterrupt

    train_run(MODEL, data, TRAIN, tmp_path / "whole", show=False)
    monkeypatch.setattr(checkpoint, "save", save_and_stop)
    with pytest.raises(KeyboardInterrupt):
        train_run(MODEL, data, TRAIN, tmp_path / "stopped", show=False)
    monkeypatch.undo()
    halfway = checkpoint.load(tmp_path / "stopped")
    assert len(halfway.facts.history) == 1
    train_run(MODEL, data, TRAIN, tmp_path / "stopped", resume=True, show=False)

    whole, resumed = (checkpoint.load(tmp_path / name) for name in ("whole", "stopped"))
    assert whole.facts.model == MODEL
    assert whole.weights.keys() == resumed.weights.keys()
    assert all(torch.equal(v, resumed.weights[k]) for k, v in whole.weights.items())
    assert all(torch.equal(v, resumed.momentum[k]) for k, v in whole.momentum.items())
    peaks = [k for k in whole.weights if k.endswith(".peak")]
    assert len(peaks) == 6
    assert all(whole.weights[k] > 0 for k in peaks)
    assert any(not torch.equal(whole.weights[k], halfway.weights[k]) for k in peaks)
    network, _ = checkpoint.load_model(tmp_path / "stopped")
    assert all(torch.equal(network.state_dict()[k], whole.weights[k]) for k in peaks)


@pytest.mark.parametrize("training", [False, True])
def test_attacks_leave_the_ranges_alone(training: bool) -> None:
    model = build(MODEL, num_classes=4, in_channels=1).train()
    x, y = tiny_images(16).take(torch.arange(16))
    model(x)
    model.train(training)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    for attack in (dq.FGSM(0.5), dq.PGD(0.5, steps=2)):
        adversarial = attack(model, x, y)
        assert not torch.equal(adversarial, x)
    assert model.training is training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_weights_of_few_bits_learn() -> None:
    """Straight through 4-bit weights and 8-bit branches: the four corners in ten epochs."""
    model = build(MODEL, num_classes=4, in_channels=1)
    config = TrainConfig(epochs=10, batch_size=16, lr=0.05, device="cpu")
    history = dq.train(model, tiny_images(), config, test=tiny_images(seed=1))
    assert history[-1]["test_accuracy"] > 0.9


@pytest.mark.parametrize("weight_bits", [0, 1, 3, 7, 16, "8", True, -8])
def test_other_weight_bits_of_a_run_are_refused_in_one_line(weight_bits: object) -> None:
    with pytest.raises(dq.UserError, match="weight_bits must be (8, 4 or 2|a whole)") as error:
        from_mapping(ModelConfig, {"weight_bits": weight_bits})
    assert "\n" not in str(error.value) and repr(weight_bits) in str(error.value)


def test_runs_from_before_have_float_weights() -> None:
    config = from_mapping(ModelConfig, {"model": "wrn-10-1", "bits": 4})
    assert (config.weight_bits, config.deployable) == (None, False)


@pytest.mark.parametrize(
    ("model", "train", "method"),
    [
        ({"weight_bits": 8}, {}, "float + W8"),
        ({"bits": 4, "weight_bits": 4}, {}, "vanilla + W4"),
        ({"bits": 4, "deployable": True}, {}, "vanilla + deployable"),
        (
            {"bits": 4, "convex": True, "weight_bits": 8, "deployable": True, "squeeze": 5},
            {"beta": 0.1, "attack": "rfgsm"},
            "DQ + squeezing + W8 + deployable + RFGSM",
        ),
    ],
)
def test_methods_name_weights_and_branches(
    model: dict[str, object], train: dict[str, object], method: str
) -> None:
    facts = Facts(
        ModelConfig(**model), DataConfig(), TrainConfig(**train), 2, 1, ("a", "b"), "", ""  # type: ignore[arg-type]
    )  # fmt: skip
    assert facts.method == method


def test_a_network_of_any_precision_maps_images_to_finite_logits() -> None:
    for name in NETWORKS:
        for weight_bits in (8, 4, 2):
            config = ModelConfig(name, bits=2, weight_bits=weight_bits, deployable=True)
            model = build(config, num_classes=4, in_channels=3).train()
            x = torch.rand(2, 3, 16, 16, requires_grad=True)
            y = model(x)
            y.square().sum().backward()
            grads = [x.grad, *(p.grad for p in model.parameters())]
            assert y.shape == (2, 4)
            assert all(g is not None and math.isfinite(float(g.sum())) for g in grads)
