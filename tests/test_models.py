import pytest
import torch
from torch import nn

import defquant as dq
from defquant.config import ModelConfig
from defquant.lipschitz import ConvexSum
from defquant.models import build
from defquant.quantize import Quantizer, QuantTanh


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def test_parameter_counts_are_the_published_ones() -> None:
    assert count(dq.wide_resnet(28, 10)) == 36_479_194  # 36.5 M, Zagoruyko & Komodakis, Table 4
    assert count(dq.wide_resnet(16, 4)) == 2_748_890  # 2.7 M
    assert round(count(dq.vgg16()) / 1e6, 1) == 14.7
    assert round(count(dq.resnet18()) / 1e6, 1) == 11.2


@pytest.mark.parametrize("name", ["wrn-10-1", "wrn-16-1", "vgg-16x0.1", "resnet-18x0.1"])
@pytest.mark.parametrize("size", [8, 11, 32])
def test_any_input_size_from_8_up(name: str, size: int) -> None:
    for convex in (False, True):
        config = ModelConfig(name, bits=4, convex=convex)
        model = build(config, num_classes=7, in_channels=1).eval()
        assert model(torch.rand(2, 1, size, size)).shape == (2, 7)


@pytest.mark.parametrize(
    ("name", "quantisers", "sums"),
    # one quantiser per ReLU6: WRN two per block and the last; VGG 13; ResNet-18 the stem and 2 x 8
    [("wrn-10-1", 7, 3), ("wrn-28-10", 25, 12), ("vgg-16x0.1", 13, 0), ("resnet-18x0.1", 17, 8)],
)
def test_quantisers_and_sums(name: str, quantisers: int, sums: int) -> None:
    with torch.device("meta"):
        model = build(
            ModelConfig(name, bits=3, high=1.0, convex=True), num_classes=10, in_channels=3
        )
    found = [m for m in model.modules() if isinstance(m, Quantizer)]
    assert len(found) == quantisers
    assert all(q.bits == 3 for q in found)
    assert sum(isinstance(m, ConvexSum) for m in model.modules()) == sums


def test_every_convolution_but_the_stem_reads_the_grid() -> None:
    """BN -> ReLU6 -> Q -> conv: shortcut convolutions, too, take the quantised activation."""
    model = dq.wide_resnet(16, 2, bits=2).eval()
    off_grid: list[str] = []

    def check(name: str) -> object:
        def hook(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            codes = inputs[0] / 2.0
            if not torch.equal(codes, codes.round()):
                off_grid.append(name)

        return hook

    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_pre_hook(check(name))  # type: ignore[arg-type]
    model(torch.rand(2, 3, 16, 16))
    assert off_grid == ["stem"]


def test_tanh_activation_and_state_dict_independent_of_bits() -> None:
    model = build(ModelConfig(activation="tanh", bits=2), num_classes=10, in_channels=3)
    assert sum(isinstance(m, QuantTanh) for m in model.modules()) == 7
    other = build(ModelConfig(bits=None), num_classes=10, in_channels=3)
    assert model.state_dict().keys() == other.state_dict().keys()


def test_weights_come_from_the_seed_alone() -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = build(ModelConfig(), num_classes=10, in_channels=3, seed=5)
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(2)
    second = build(ModelConfig(), num_classes=10, in_channels=3, seed=5)
    other = build(ModelConfig(), num_classes=10, in_channels=3, seed=6)
    pairs = zip(first.parameters(), second.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert not torch.equal(next(first.parameters()), next(other.parameters()))


@pytest.mark.parametrize(
    "name", ["wrn-11-1", "wrn-4-1", "wrn-10", "wrn-10-0", "vgg-19", "", "resnet"]
)
def test_unknown_networks_are_refused(name: str) -> None:
    with pytest.raises(dq.UserError) as error:
        build(ModelConfig(name), num_classes=10, in_channels=3)
    assert "\n" not in str(error.value)
