"""Any network as a quantised copy: the same function at full precision, and it trains."""

import copy
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import defquant as dq
from conftest import refused
from defquant.attacks.surrogates import SoftRound
from defquant.captured import capture
from defquant.deploy.lower import lower
from defquant.lipschitz import ConvexSum
from defquant.quantize import QuantBranch, Quantizer, QuantReLU
from defquant.weights import FirstConv, QuantConv2d, quantize_weight

PIXELS = torch.randint(256, (12, 3, 8, 8), generator=torch.Generator().manual_seed(0))
DATA = dq.Dataset(PIXELS.byte(), torch.arange(12) % 4, tuple("abcd"), "noise")
X = PIXELS / 255

RANGES = (".peak", "._extra_state")


class Net(nn.Module):
    """Parts by name, and what they do."""

    def __init__(self, forward: Callable[[Any, Tensor], Tensor], **parts: nn.Module) -> None:
        super().__init__()
        self.function = forward
        for name, part in parts.items():
            self.add_module(name, part)
        self.fc = nn.Linear(8, 4)
        self.register_buffer("mean", torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        y = self.function(self, x)
        return self.fc(y.mean((2, 3)) if y.ndim == 4 else y)  # type: ignore[no-any-return]


def conv(c_in: int = 8, c_out: int = 8, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(c_in, c_out, 3, padding=1, **options)


def norm() -> nn.BatchNorm2d:
    return nn.BatchNorm2d(8)


class StdConv(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        w = self.weight
        w = (w - w.mean((1, 2, 3), keepdim=True)) / w.std((1, 2, 3), keepdim=True)
        return self._conv_forward(x, w, self.bias)  # type: ignore[no-any-return]


def residual(net: Any, x: Tensor) -> Tensor:
    x = net.act(net.bn(net.stem(x)))
    y = net.bn2(net.conv2(net.act(net.bn1(net.conv1(x)))))
    y += x
    return net.act(y)  # type: ignore[no-any-return]


def attention(net: Any, x: Tensor) -> Tensor:
    t = net.patch(x).flatten(2).transpose(1, 2)
    z = net.norm1(t)
    t = t + net.attn(z, z, z, need_weights=False)[0]
    t = t + net.fc2(functional.gelu(net.fc1(net.norm2(t))))
    return net.drop(t).mean(1)  # type: ignore[no-any-return]


def gates(net: Any, x: Tensor) -> Tensor:
    x = net.act(net.bn(net.stem(x)))
    gate = torch.sigmoid(net.up(torch.relu(net.down(functional.adaptive_avg_pool2d(x, 1)))))
    return functional.hardswish(net.last(x * gate))


def shuffled(net: Any, x: Tensor) -> Tensor:
    """As ShuffleNet: half of the channels, and both mixed."""
    half, other = functional.silu(net.stem(x)).chunk(2, dim=1)
    y = torch.cat((half, net.a(other).relu()), 1)
    y = y.view(-1, 2, 4, 8, 8).transpose(1, 2).reshape(-1, 8, 8, 8)
    return net.last(functional.max_pool2d(net.b(y).relu(), 2))  # type: ignore[no-any-return]


def borders(net: Any, x: Tensor) -> Tensor:
    """Of other values than 0, and read twice; and a pooling with gaps: no file does it to codes."""
    x = functional.max_pool2d(net.a(net.stem(x).relu()).relu(), 2, 1, dilation=2)
    x = functional.pad(net.c(net.b(x).relu()).relu(), (1, 0, 1, 0))
    return net.last(x) + net.d(x)  # type: ignore[no-any-return]


MODELS: dict[str, Callable[[], nn.Module]] = {
    "borders": lambda: Net(
        borders, stem=conv(3), a=conv(), b=conv(), c=conv(padding_mode="reflect"), d=conv(),
        last=conv(),
    ),
    "modules": lambda: nn.Sequential(
        conv(3), norm(), nn.ReLU(), nn.MaxPool2d(2), conv(), nn.ReLU6(), nn.Dropout(0.5),
        nn.Flatten(), nn.Linear(128, 4),
    ),
    "functions": lambda: Net(
        lambda n, x: n.b(functional.max_pool2d(n.a(x).relu(), 2)).clamp(0, 4), a=conv(3), b=conv()
    ),
    "residual": lambda: Net(
        residual, stem=conv(3), bn=norm(), conv1=conv(groups=8, bias=False), bn1=norm(),
        conv2=conv(groups=2), bn2=norm(), act=nn.ReLU(inplace=True),
    ),
    "gates": lambda: Net(
        gates, stem=conv(3), bn=norm(), act=nn.SiLU(), down=nn.Conv2d(8, 2, 1),
        up=nn.Conv2d(2, 8, 1), last=conv(),
    ),
    "attention": lambda: Net(
        attention, patch=nn.Conv2d(3, 8, 4, 4), norm1=nn.LayerNorm(8), norm2=nn.LayerNorm(8),
        attn=nn.MultiheadAttention(8, 2, batch_first=True), fc1=nn.Linear(8, 16),
        fc2=nn.Linear(16, 8), drop=nn.Dropout(0.1),
    ),
    "normalised, own convolution": lambda: Net(
        lambda n, x: n.b(n.a((x - n.mean) / 0.25).relu()), a=conv(3), b=StdConv(8, 8, 3)
    ),
    "shuffled": lambda: Net(shuffled, stem=conv(3), a=conv(4, 4), b=conv(), last=conv()),
    "quantised": lambda: dq.wide_resnet(
        10, 1, bits=2, weight_bits=4, deployable=True, num_classes=4
    ),
}  # fmt: skip
every_model = pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    model = make().train()
    with torch.no_grad():
        model(X)  # batch norms have seen images
    return model.eval()


@every_model
def test_at_full_precision_it_answers_as_the_model(make: Callable[[], nn.Module]) -> None:
    model = seeded(make)
    prepared = dq.prepare(model, X, bits=None)
    if any(isinstance(m, Quantizer) for m in model.modules()):
        dq.set_bits(model, None)
    torch.testing.assert_close(prepared(X), model(X), atol=1e-5, rtol=1e-4)
    own, theirs = set(prepared.state_dict()), set(model.state_dict())
    assert all(
        name.endswith(RANGES) or ".plain." in name or "in_proj" in name for name in own - theirs
    )
    assert not {n for n in theirs - own if "in_proj" not in n and not n.startswith(("b.", "mean"))}


@every_model
def test_every_layer_reads_the_codes_that_the_account_says(make: Callable[[], nn.Module]) -> None:
    prepared = dq.prepare(seeded(make), X, bits=3, weight_bits=4)
    values, firsts = [], []

    def look(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        values.append(len(inputs[0].unique()))
        firsts.append(type(module) is FirstConv)

    layers = [m for m in prepared.modules() if getattr(m, "weight_bits", None)]
    hooks = [layer.register_forward_pre_hook(look) for layer in layers]
    prepared(X)
    for hook in hooks:
        hook.remove()
    lines = [p for p in prepared.account.parts if p.kind in ("convolution", "linear")]
    said = [int(line.how.split("reads ")[1][0]) for line in lines]
    assert all(seen <= 2**bits for seen, bits in zip(values, said, strict=True))
    assert firsts == [True, *[False] * (len(layers) - 1)] and said[0] == 8 and 3 in said
    assert all(line.integers for line in lines)
    program = capture(prepared, X)  # what audit and export read
    torch.testing.assert_close(program.values(X), prepared(X))
    assert not lower(program, (3, 8, 8)).float_convolutions


@every_model
def test_it_trains_copies_and_saves(make: Callable[[], nn.Module]) -> None:
    prepared = dq.prepare(seeded(make), X, bits=4, weight_bits=8)
    twin = copy.deepcopy(prepared)
    dq.train(twin, DATA, dq.TrainConfig(epochs=1, batch_size=12, lr=0.01, beta=1e-3))
    moved = {n for n, p in twin.named_parameters() if not torch.equal(p, prepared.get_parameter(n))}
    assert moved == {name for name, _ in prepared.named_parameters()}
    assert not torch.equal(twin(X), prepared(X))
    prepared.load_state_dict(twin.state_dict())
    assert torch.equal(twin(X), prepared(X)) and twin.account == prepared.account
    means = [t for name, t in prepared.named_buffers() if name.endswith("running_mean")]
    before = [mean.clone() for mean in means]
    torch.manual_seed(0)
    first = prepared.train()(X)
    assert means or "own" in str(make) or not torch.equal(first, prepared(X))
    assert not any(torch.equal(a, b) for a, b in zip(before, means, strict=True))


@every_model
def test_the_attacks_know_every_quantiser(make: Callable[[], nn.Module]) -> None:
    prepared = dq.prepare(seeded(make), X, bits=4, weight_bits=8).eval()
    quantisers = [m for m in prepared.modules() if isinstance(m, Quantizer)]
    rates = [SoftRound()._derivative(m, torch.linspace(-1, 1, 5)) for m in quantisers]
    assert rates and all(rate is not None and bool(rate.isfinite().all()) for rate in rates)
    y = prepared(X).argmax(1)
    attacked = dq.Adaptive(8 / 255, steps=1)(prepared, X, y)
    assert float((attacked - X).abs().max()) <= 8 / 255 + 1e-6


def parts(prepared: Any) -> dict[str, str]:
    return {part.layer: f"{part.kind}: {part.how}" for part in prepared.account.parts}


def test_the_account() -> None:
    model = seeded(MODELS["normalised, own convolution"])
    model.add_module("aux", nn.Linear(8, 4))
    prepared = dq.prepare(model, DATA, bits=8, weight_bits=8)
    said = parts(prepared)
    assert said["a"] == (
        "convolution: weights of 7 bits; reads 8-bit codes; first layer; "
        "8 bits would not fit beside these"
    )
    assert said["b.plain"].endswith("a plain weight now, computed from b.weight")
    assert said["relu"].startswith("QuantReLU: 8 bits, [0, ")
    assert said["a_in"].startswith("QuantBranch: 8 bits, peak ")
    assert said["aux"] == "Linear: left out: no part of what the network computes in eval mode"
    text = str(prepared.account)
    assert "3 of 3 convolutions and linear layers in integers; ranges calibrated on 12 im" in text
    assert said.keys() >= {"sub", "div", "fc", "fc_in"}


def test_ranges() -> None:
    """Given, a layer's own, or measured: behind untrained batch norms by the batch."""
    six = parts(dq.prepare(seeded(MODELS["modules"]), X, bits=4, ranges=6.0))
    assert (six["2"], six["5"]) == ("QuantReLU: 4 bits, [0, 6]",) * 2
    small = nn.Sequential(conv(3), norm(), nn.ReLU(), conv(), nn.Flatten(), nn.Linear(512, 4))
    small.get_parameter("0.weight").data *= 0.05
    small.get_parameter("0.bias").data *= 0
    prepared = dq.prepare(small, X)
    (act,) = (m for m in prepared.modules() if isinstance(m, QuantReLU))
    assert 2 < act.high < 6
    state = small.state_dict()
    now = prepared.state_dict()
    assert all(torch.equal(tensor, now[name]) for name, tensor in state.items())


def test_convex_sums_and_set_bits() -> None:
    model = seeded(MODELS["residual"])
    prepared = dq.prepare(model, X, bits=2, weight_bits=4, convex=True)
    assert sum(isinstance(m, ConvexSum) for m in prepared.modules()) == 1
    assert isinstance(prepared.get_submodule("add"), ConvexSum)
    two = prepared(X)
    dq.set_bits(prepared, None)
    assert all(m.bits is None for m in prepared.modules() if isinstance(m, Quantizer))
    assert torch.equal(dq.set_bits(prepared, 2)(X), two)
    assert {m.bits for m in prepared.modules() if isinstance(m, QuantBranch)} == {8}


def mixed(net: Any, x: Tensor) -> Tensor:
    with torch.autocast("cpu", enabled=False), torch.no_grad():
        return net.b(net.a(x).relu()) * net.gain.weight.reshape(-1, 1, 1)  # type: ignore[no-any-return]


def test_wrappers_precisions_and_names() -> None:
    """What holds a network, or is in its forward, changes neither function nor names."""
    net = seeded(lambda: Net(mixed, a=conv(3), b=conv(), gain=nn.Linear(8, 1, bias=False)))
    wanted = dq.prepare(net, X, bits=3, weight_bits=8)
    assert set(net.state_dict()) - {"mean"} < set(wanted.state_dict())
    compiled: Any = torch.compile(net, backend="eager")
    for held in (nn.DataParallel(net), compiled, copy.deepcopy(net).double()):
        found = dq.prepare(held, X, bits=3, weight_bits=8)
        assert found.state_dict().keys() == wanted.state_dict().keys()
        torch.testing.assert_close(found(X), wanted(X))
    odd = nn.Sequential(OrderedDict(graph=conv(3), code=nn.ReLU(), meta=nn.Flatten()))
    odd.add_module("account", nn.Linear(512, 4))
    assert {"graph_", "account_"} < parts(dq.prepare(odd, X)).keys()


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["gates", "residual"])
def test_it_runs_in_half_precision(name: str, kind: torch.dtype) -> None:
    """Grids are computed in float32; what attacks and exports is given images of its type."""
    net = dq.prepare(seeded(MODELS[name]), X, bits=4, weight_bits=8, convex=True).to(kind)
    x = X.to(kind).requires_grad_()
    logits = net.train()(x)
    logits.square().sum().backward()
    assert logits.dtype == kind
    assert all(p.grad is not None and p.grad.isfinite().all() for p in (x, *net.parameters()))
    for layer in net.modules():
        if isinstance(layer, QuantConv2d):
            exact = quantize_weight(layer.weight.float(), layer.weight_bits)
            assert torch.equal(quantize_weight(layer.weight, layer.weight_bits), exact.to(kind))
    twin = copy.deepcopy(net).float().eval()
    torch.testing.assert_close(net.eval()(X.to(kind)).float(), twin(X), rtol=0.1, atol=0.1)
    assert dq.robust_accuracy(net, DATA, dq.Adaptive(1 / 255, steps=1)).total == 12
    assert dq.audit(net, DATA).lower == pytest.approx(dq.audit(twin, DATA).lower, rel=0.5)
    with pytest.raises(dq.UserError, match=f"training needs float32 weights; found {kind}"):
        dq.train(net, DATA, dq.TrainConfig(epochs=1))


def test_what_was_trained_loads_into_another_copy() -> None:
    """Measured ranges, too: they are part of the state dict."""
    one, other = (
        dq.prepare(MODELS["functions"](), X[i : i + 6], bits=4, weight_bits=8) for i in (0, 6)
    )
    other.load_state_dict(one.state_dict())
    assert torch.equal(one.eval()(X), other.eval()(X))


def test_one_parameter_for_what_is_shared() -> None:
    net = Net(
        lambda n, x: functional.relu(n.b(functional.relu(n.b(functional.relu(n.a(x)))))),
        a=conv(3),
        b=conv(),
    )
    prepared = dq.prepare(seeded(lambda: net), X)
    assert {n for n in prepared.state_dict() if not n.endswith(RANGES)} == {*net.state_dict()} - {
        "mean"
    }
    assert len(list(prepared.parameters())) == len(list(net.parameters()))


BROKEN: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], str]] = {
    "nothing": (lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 4)), {}, "nothing to quantise"),
    "bits": (MODELS["modules"], {"bits": 9}, "bits must be a whole number from 1 to 8"),
    "one signed bit": (MODELS["gates"], {"bits": 1}, "2 bits at least; found 1"),
    "weight bits": (MODELS["modules"], {"weight_bits": 5}, "weight_bits must be 8, 4 or 2"),
    "ranges": (MODELS["modules"], {"ranges": -1.0}, "ranges must be"),
    "images": (
        MODELS["modules"],
        {"example": PIXELS.float()},
        r"images must lie in \[0, 1\]; found \[0, 255\]: divide by 255",
    ),
}


@pytest.mark.parametrize(("make", "options", "message"), BROKEN.values(), ids=BROKEN)
def test_mistakes_are_one_line(make: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(dq.UserError, match=message) as error:
        dq.prepare(make(), **{"example": X, **options})
    assert "\n" not in str(error.value)


def test_images_come_as_data_as_pairs_and_alone(tmp_path: Path) -> None:
    """To prepare, export and compare: the same network, file and numbers."""
    seen = []
    for images in (X, PIXELS.byte(), DATA, (X, DATA.labels), (PIXELS.byte().numpy(), DATA.labels)):
        model, state = seeded(MODELS["modules"]), torch.get_rng_state()
        net = dq.prepare(model, images).eval()
        assert torch.equal(torch.get_rng_state(), state)  # nothing is drawn
        program, file = dq.export_onnx(net, tmp_path / "net.onnx", images)
        seen.append((net.state_dict(), file, dq.parity(net, program, file, images)))
    for weights, file, found in seen[1:]:
        assert all(torch.equal(weights[name], value) for name, value in seen[0][0].items())
        assert (file, found) == seen[0][1:]


def test_weights_that_are_not_finite_are_named() -> None:
    """Also those that no answer shows: a ReLU hides -inf."""
    model = seeded(MODELS["modules"])
    model.get_parameter("0.bias").data[0] = -torch.inf
    refused(lambda: dq.prepare(model, X), "'0.bias' is not finite")
