"""The networks: their sizes, what is quantised in them and where, in which precision they run."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import defquant as dq
from conftest import alike, refused
from defquant.config import ModelConfig
from defquant.lipschitz import ConvexSum
from defquant.models import build
from defquant.quantize import QuantBranch, Quantizer, QuantTanh
from defquant.weights import FirstConv, QuantConv2d, QuantLinear

FIRST = {"wrn-10-1": "stem", "vgg-16x0.125": "features.0", "resnet-18x0.125": "stem.0"}
every_network = pytest.mark.parametrize("name", FIRST)


def network(name: str = "wrn-10-1", channels: int = 3, seed: int = 0, **options: Any) -> nn.Module:
    return build(ModelConfig(name, **options), num_classes=4, in_channels=channels, seed=seed)


def count(model: nn.Module, kind: type[nn.Module]) -> int:
    return sum(isinstance(module, kind) for module in model.modules())


def test_parameter_counts_are_the_published_ones() -> None:
    with torch.device("meta"):
        models = dq.wide_resnet(28, 10), dq.wide_resnet(16, 4), dq.vgg16(), dq.resnet18()
    counts = [sum(p.numel() for p in model.parameters()) for model in models]
    assert counts[:2] == [36_479_194, 2_748_890]  # Zagoruyko & Komodakis, Table 4: 36.5, 2.7 M
    assert [round(n / 1e6, 1) for n in counts[2:]] == [14.7, 11.2]


@pytest.mark.parametrize("name", ["wrn-10-1", "wrn-16-1", "vgg-16x0.1", "resnet-18x0.1"])
@pytest.mark.parametrize("size", [8, 11, 32])
def test_any_input_size_from_8_up(name: str, size: int) -> None:
    for convex in (False, True):
        model = network(name, 1, bits=4, convex=convex).eval()
        assert model(torch.rand(2, 1, size, size)).shape == (2, 4)


@pytest.mark.parametrize(
    ("name", "quantisers", "sums", "branches"),
    # one quantiser per ReLU6: WRN two per block and the last; VGG 13; ResNet-18 the stem and 2 x 8;
    # branches: the stem, blocks' ends and shortcuts, so that what enters a sum is on a grid
    [("wrn-10-1", 7, 3, 6), ("wrn-28-10", 25, 12, 16), ("vgg-16x0.1", 13, 0, 0),
     ("resnet-18x0.1", 17, 8, 11)],
)  # fmt: skip
def test_quantisers_and_sums(name: str, quantisers: int, sums: int, branches: int) -> None:
    with torch.device("meta"):
        plain, model = (
            network(name, bits=3, high=1.0, convex=True, deployable=deployable)
            for deployable in (False, True)
        )
    assert (count(plain, Quantizer), count(plain, ConvexSum)) == (quantisers, sums)
    assert all(q.bits == 3 for q in plain.modules() if isinstance(q, Quantizer))
    assert (count(plain, QuantBranch), count(model, QuantBranch)) == (0, branches)
    extra = model.state_dict().keys() - plain.state_dict().keys()
    assert plain.state_dict().keys() <= model.state_dict().keys()
    assert len(extra) == branches and all(key.endswith(".peak") for key in extra)


def test_every_convolution_but_the_stem_reads_the_grid() -> None:
    """BN -> ReLU6 -> Q -> conv: shortcut convolutions, too, take the quantised activation."""
    model = dq.wide_resnet(10, 1, bits=2, deployable=True, convex=True)
    values: dict[str, int] = {}

    def seen(name: str) -> Any:
        return lambda _, inputs: values.update({name: max(len(x.unique()) for x in inputs)})

    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d | ConvexSum):
            module.register_forward_pre_hook(seen(name))
    model(torch.rand(8, 3, 16, 16))
    assert values.pop("stem") > 256
    for name, different in values.items():  # in each block, as it reshapes or follows the stem
        assert different <= (256 if name.endswith("join") else 4), name


def test_tanh_activation_and_state_dict_independent_of_bits() -> None:
    model = network(activation="tanh", bits=2)
    assert count(model, QuantTanh) == 7
    assert model.state_dict().keys() == network().state_dict().keys()


def test_weights_come_from_the_seed_alone() -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = network(seed=5).state_dict()
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(2)
    assert alike(first, network(seed=5).state_dict())
    assert not torch.equal(first["stem.weight"], network(seed=6).state_dict()["stem.weight"])


@pytest.mark.parametrize(
    "name", ["wrn-11-1", "wrn-4-1", "wrn-10", "wrn-10-0", "vgg-19", "", "resnet"]
)
def test_unknown_networks_are_refused(name: str) -> None:
    refused(lambda: network(name))


# ------------------------------------------------------------------------------ weights of few bits


@every_network
def test_the_first_layer_has_7_bits_the_last_8(name: str) -> None:
    """At 8 and 8 bits all convolutions have 7.

    Else two products of a code and a weight overflow the 16 bits that AVX2 adds them in.
    """
    for bits in (None, 1, 4, 7, 8):
        for weight_bits in (8, 4, 2):
            model = network(name, bits=bits, weight_bits=weight_bits)
            layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
            assert isinstance(layers[0], FirstConv) and isinstance(layers[-1], QuantLinear)
            assert all(isinstance(m, QuantConv2d) for m in layers[:-1])
            first, *inner, last = (m.weight_bits for m in layers)
            assert [first, last] == [7, 8]
            assert set(inner) == {7 if (bits, weight_bits) == (8, 8) else weight_bits}


@every_network
@pytest.mark.parametrize("weight_bits", [8, 4, 2])
def test_weight_bits_change_neither_the_state_nor_the_draws(name: str, weight_bits: int) -> None:
    """And images of any precision become finite logits with finite gradients."""
    plain, quantised = (network(name, bits=4, weight_bits=w) for w in (None, weight_bits))
    assert alike(plain.state_dict(), quantised.state_dict())
    x = torch.rand(2, 3, 16, 16, requires_grad=True)
    assert not torch.equal(plain(x), quantised(x))
    model = network(name, bits=2, weight_bits=weight_bits, deployable=True).train()
    grads = torch.autograd.grad(model(x).square().sum(), [x, *model.parameters()])
    assert all(g.sum().isfinite() for g in grads)


# --------------------------------------------------------------------------------------- autocast


@every_network
def test_the_first_convolution_alone_stays_in_float32(name: str) -> None:
    """Bit for bit, and so do its gradients."""
    model = network(name, 1, bits=4, convex=True).eval()
    stem, x = model.get_submodule(FIRST[name]), torch.rand(3, 1, 8, 8, requires_grad=True)
    assert isinstance(stem, FirstConv)
    outputs: list[Tensor] = []
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda *seen: outputs.append(seen[2]))
    found = []
    for enabled in (False, True):
        outputs.clear()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            model(x)
        first = outputs[0]
        found.append([first, *torch.autograd.grad(first.square().sum(), [x, stem.weight])])
    assert all(map(torch.equal, *found))
    assert {y.dtype for y in outputs[1:]} == {torch.bfloat16}


def test_it_is_a_plain_convolution_otherwise() -> None:
    ours, plain = (kind(3, 5, 3, padding=1, bias=False) for kind in (FirstConv, nn.Conv2d))
    plain.load_state_dict(ours.state_dict())
    x = torch.rand(2, 3, 9, 9)
    assert torch.equal(ours(x), plain(x))
    assert ours.double()(x.double()).dtype == torch.float64
    with torch.autocast("cpu", torch.bfloat16):
        assert ours.float()(x.bfloat16()).dtype == torch.float32
    assert ours.to("meta")(x.to("meta")).shape == (2, 5, 9, 9)
    for name, first in FIRST.items():
        assert next(iter(network(name).state_dict())) == f"{first}.weight"
