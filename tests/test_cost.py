"""What a deployed network costs, against counts on paper, forward hooks and the reference."""

import json
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import defquant as dq
from conftest import refused
from defquant.deploy.cost import (
    REST,
    WARM_UP,
    as_float,
    latencies,
    latency,
    rows,
    shapes,
    static_cost,
)
from defquant.deploy.graph import graph
from defquant.deploy.lower import calibrate, lower
from defquant.deploy.program import (
    Add,
    Affine,
    Call,
    Conv,
    Linear,
    Name,
    Op,
    Program,
    Quantize,
    run,
)
from defquant.integers import PIXELS, Grid, Weight
from defquant.quantize import QuantBranch, Quantizer
from defquant.weights import QuantConv2d, QuantLinear

FOUR = Grid(6 / 15, 0, 15)


def weight(*shape: int, bits: int) -> Weight:
    return Weight(np.ones(shape, np.int8), np.ones(shape[0], np.float32), bits)


def conv(
    name: str,
    source: str,
    kernel: Weight,
    *,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int, int, int] = (0, 0, 0, 0),
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
) -> Conv:
    bias = np.zeros(len(kernel.integers), np.int32)
    return Conv(name, source, f"layer.{name}", kernel, bias, stride, padding, dilation, groups)


def linear(source: str, inputs: int) -> Linear:
    return Linear("fc", source, "fc", weight(10, inputs, bits=8), np.zeros(10, np.float32))


def flatten(name: str, source: str, size: int) -> Call:
    return Call(name, name, "aten.reshape.default", (Name(source), (-1, size)), (), (-1, size))


def program(
    *ops: Op, shape: tuple[int, int, int] = (2, 5, 5), grids: dict[str, Grid] | None = None
) -> Program:
    """`ops` behind the pixels; each convolution's codes have 4 bits."""
    codes = {op.name: FOUR for op in ops if isinstance(op, Conv | Quantize)}
    every: dict[str, Grid] = {"pixels": PIXELS, **codes, **(grids or {})}
    return Program((Quantize("pixels", "image"), *ops), every, shape, 10)


def card(built: Program) -> dict[str, Any]:
    return static_cost(built, file_bytes=300, float_file_bytes=1200)


def test_two_layers_on_paper() -> None:
    """3x3, 2 to 3 channels, 5x5 to 3x3 places; then 27 numbers to 10 classes."""
    first = conv("a", "pixels", weight(3, 2, 3, 3, bits=4))
    found = card(program(first, flatten("flat", "a", 27), linear("flat", 27)))
    conv_macs, conv_bops = 9 * 3 * 2 * 9, 9 * 3 * 2 * 9 * 4 * 8  # 486 MACs, 4 x 8 bits
    assert found == {
        "file_bytes": 300,
        "float_file_bytes": 1200,
        "file_ratio": 0.25,
        "weights": 54 + 270,
        "weight_bytes": 27 + 270,
        "float_weight_bytes": 4 * 324,
        "macs": conv_macs,
        "float_macs": 270,
        "bops": conv_bops + 270 * 1024,
        "float_bops": (486 + 270) * 1024,
        # 27 floats and 10 logits: more than 50 and 14 bytes of codes, or 14 (27) and 27 floats
        "peak_activation_bytes": 108 + 40,
        "uint8_peak_activation_bytes": 108 + 40,
        "float_peak_activation_bytes": 50 * 4 + 27 * 4,
        "layers": [
            {"layer": "layer.a", "macs": 486, "weight_bits": 4, "activation_bits": 8,
             "bops": conv_bops},
            {"layer": "fc", "macs": 270, "weight_bits": 32, "activation_bits": 32,
             "bops": 270 * 1024},
        ],
    }  # fmt: skip
    assert json.loads(json.dumps(found)) == found


def test_activation_bits_are_those_of_what_enters() -> None:
    kernel = weight(2, 2, 1, 1, bits=8)
    built = program(conv("a", "pixels", kernel), conv("b", "a", kernel))
    bits = [layer["activation_bits"] for layer in card(built)["layers"]]
    assert bits == [8, 4]


@pytest.mark.parametrize(("bits", "size"), [(8, 9), (7, 8), (4, 5), (2, 3)])
def test_packed_bytes_end_in_whole_ones(bits: int, size: int) -> None:
    found = card(program(conv("a", "pixels", weight(1, 1, 3, 3, bits=bits)), shape=(1, 3, 3)))
    assert found["weights"] == 9
    assert found["weight_bytes"] == size


def test_groups_stride_padding_and_dilation() -> None:
    """Depthwise, 6 channels: 9 MACs for each of 6 x 4 x 3 outputs."""
    kernel = weight(6, 1, 3, 3, bits=8)
    op = conv("a", "pixels", kernel, stride=(2, 3), padding=(1, 2, 1, 2), dilation=(1, 2), groups=6)
    built = program(op, shape=(6, 7, 9))
    assert shapes(built)["a"] == (1, 6, 4, 3)
    assert card(built)["macs"] == 9 * 6 * 4 * 3


def test_a_residual_lives_until_its_sum() -> None:
    """Places: 4 x 4, 8 channels. The stream, 128 floats, waits while the branch is computed."""
    kernel = weight(8, 8, 1, 1, bits=8)
    ops = (
        conv("stem", "pixels", weight(8, 1, 1, 1, bits=8)),  # 16 bytes of pixels, 64 of codes
        Add("stream", (("stem", 1.0),)),  # 64 + 512
        Quantize("act", "stream"),  # 512 + 64
        conv("a", "act", kernel),  # 512 + 64 + 64
        conv("b", "a", kernel),  # the same: `act` is dead
        Add("sum", (("stream", 1.0), ("b", 0.5))),  # 512 + 64 + 512: the most
        Quantize("out", "sum"),
    )
    built = program(*ops, shape=(1, 4, 4))
    found = card(built)
    assert found["peak_activation_bytes"] == 512 + 64 + 512
    assert found["uint8_peak_activation_bytes"] == 512 + 128 + 512
    assert found["float_peak_activation_bytes"] == 3 * 512
    without = program(*ops[:5], shape=(1, 4, 4))  # nobody waits for the stream
    assert card(without)["peak_activation_bytes"] == 512 + 64
    wide = program(*ops[:4], conv("b", "stem", kernel), shape=(1, 4, 4))
    assert card(wide)["float_peak_activation_bytes"] == 3 * 512  # `stem` waits, too


def test_the_branch_can_be_the_peak() -> None:
    """64 channels of 4-bit codes, 512 bytes, beside a stream of one channel of floats, 64."""
    ops = (
        Add("stream", (("pixels", 1.0),)),
        Quantize("act", "stream"),
        conv("a", "act", weight(64, 1, 1, 1, bits=8)),
        conv("b", "a", weight(64, 64, 1, 1, bits=8)),
        conv("c", "b", weight(1, 64, 1, 1, bits=8)),
        Add("sum", (("stream", 1.0), ("c", 1.0))),
    )
    assert card(program(*ops, shape=(1, 4, 4)))["peak_activation_bytes"] == 64 + 512 + 512


def test_a_batch_norm_in_floats_is_counted() -> None:
    ones = np.ones(2, np.float32)
    found = card(program(Affine("bn", "pixels", ones, ones)))
    assert (found["macs"], found["float_macs"], found["bops"]) == (0, 50, 50 * 1024)


class Tokens(nn.Module):
    """torch's attention, images in the second dimension, of what a transposed convolution gives."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.act = nn.Conv2d(3, 8, 4, 4), dq.QuantReLU(4)
        self.up = nn.ConvTranspose2d(8, 8, 2, 2, groups=2)
        self.mix, self.fc = nn.MultiheadAttention(8, 2), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.up(self.act(self.conv(x))).flatten(2).permute(2, 0, 1)
        return self.fc(self.mix(x, x, x, need_weights=False)[0].mean(0))  # type: ignore[no-any-return]


def test_matrix_products_and_all_weights_in_floats_are_counted() -> None:
    """64 tokens of 8: each with each, for the shares and with them."""
    found = card(lower(Tokens().eval(), (3, 16, 16)))
    up, attention = 8 * 16 * 4 * 4, 2 * 64 * 64 * 8
    linear = 64 * 8 * 24 + 64 * 8 * 8 + 8 * 4
    assert (found["macs"], found["float_macs"]) == (8 * 16 * 48, up + attention + linear)
    layers = 8 * 24 + 8 * 8 + 8 * 4
    assert found["weights"] == 8 * 48 + 8 * 4 * 4 + layers
    assert found["weight_bytes"] == 8 * 48 * 7 // 8 + 4 * 8 * 4 * 4 + layers  # 7, 32 and 8 bits
    assert found["peak_activation_bytes"] >= 2 * 64 * 24 * 4


FEW: dict[str, Any] = {"bits": 4, "weight_bits": 4}
MODELS: dict[str, Callable[[], nn.Module]] = {
    "wrn": lambda: dq.wide_resnet(10, 1, deployable=True, **FEW),
    "wrn, calibrated": lambda: dq.wide_resnet(10, 1, convex=True, **FEW),
    "vgg": lambda: dq.vgg16(width=0.125, **FEW),
    "resnet": lambda: dq.resnet18(width=0.125, convex=True, deployable=True, **FEW),
}


def lowered(model: nn.Module, side: int = 16) -> Program:
    images = torch.rand(4, 3, side, side, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        model.train()(images)
    model.eval()
    return lower(model, (3, side, side), peaks=calibrate(model, images))


def hooked_macs(model: nn.Module, side: int) -> tuple[int, int]:
    """Outputs times inputs of each, by what torch computes: convolutions, linear layers."""
    counts = {nn.Conv2d: 0, nn.Linear: 0}

    def count(layer: nn.Module, _: object, y: torch.Tensor) -> None:
        kind = nn.Conv2d if isinstance(layer, nn.Conv2d) else nn.Linear
        counts[kind] += y.numel() * layer.weight[0].numel()  # type: ignore[index]

    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    handles = [layer.register_forward_hook(count) for layer in layers]
    with torch.no_grad():
        model.eval()(torch.zeros(1, 3, side, side))
    for handle in handles:
        handle.remove()
    return counts[nn.Conv2d], counts[nn.Linear]


@pytest.mark.parametrize(("name", "side"), [("wrn", 16), *((name, 15) for name in MODELS)])
def test_networks_against_hooks_and_the_reference(name: str, side: int) -> None:
    model = MODELS[name]()
    built = lowered(model, side)
    tensors = run(built, torch.zeros(1, 3, side, side))
    found = card(built)
    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    convolutions, rest = hooked_macs(model, side)
    norms = sum(tensors[op.name].numel() for op in built.ops if isinstance(op, Affine))
    assert (found["macs"], found["float_macs"]) == (convolutions, rest + norms)
    assert (norms > 0) == name.startswith("wrn")
    assert found["weights"] == sum(layer.weight.numel() for layer in layers)
    assert len(found["layers"]) >= len(layers)
    assert found["bops"] == sum(layer["bops"] for layer in found["layers"])


def test_convex_sums_cost_nothing() -> None:
    """The paper's promise: DQ beside vanilla at equal bits, the same hardware cost."""
    cards = []
    for convex in (False, True):
        built = lowered(dq.wide_resnet(16, 1, convex=convex, deployable=True, **FEW))
        cards.append(card(built))
    assert cards[0] == cards[1]


def test_wrn_28_10_has_the_known_size() -> None:
    """36.5 M parameters and 5.2 G multiply-adds (Zagoruyko & Komodakis 2016)."""
    model = dq.wide_resnet(28, 10, bits=4, deployable=True)
    for module in model.modules():
        if isinstance(module, QuantBranch):
            module.peak.fill_(1.0)
    found = card(lower(model, (3, 32, 32)))
    assert found["weights"] == pytest.approx(36.5e6, rel=2e-3)
    assert found["macs"] == pytest.approx(5.2e9, rel=0.02)


def test_latency_takes_turns_and_finds_the_median() -> None:
    made: list[str] = []

    def call(name: str, seconds: float) -> None:
        made.append(name)
        time.sleep(seconds)

    lengths = {"slow": 0.03, "fast": 0.005, "none": 0.0}
    calls = {name: partial(call, name, seconds) for name, seconds in lengths.items()}
    found = latency(calls, repeats=12)
    rounds = [made[i : i + 3] for i in range(0, len(made), 3)]
    assert len(rounds) == WARM_UP + 12
    assert all(sorted(turn) == sorted(calls) for turn in rounds)
    assert {turn[0] for turn in rounds[WARM_UP:]} == set(calls)
    assert len({tuple(turn) for turn in rounds}) > 3  # no call has always the same neighbour
    assert found["slow"]["low_ms"] >= 30 > found["fast"]["low_ms"] >= 5 > REST * 1e3 / 5
    assert found["none"]["median_ms"] < 2  # the rest is not counted
    for mine in found.values():
        assert mine["low_ms"] <= mine["median_ms"] <= mine["high_ms"]


def test_latency_is_a_median_without_the_warm_up() -> None:
    """Two of seven calls are slow, and all that warm up: neither moves the median."""
    turns = iter([0.05] * WARM_UP + [0.0, 0.04, 0.0, 0.0, 0.04, 0.0, 0.0])
    found = latency({"a": lambda: time.sleep(next(turns))}, repeats=7)["a"]
    assert found["median_ms"] < 15
    assert found["high_ms"] > 15 > found["low_ms"]
    refused(lambda: latency({"a": lambda: None}, repeats=0), "repeats must be 1 or more; found 0")


def test_the_float_copy_rounds_nothing_and_the_model_is_untouched() -> None:
    model = dq.wide_resnet(10, 1, bits=2, weight_bits=4, convex=True, deployable=True)
    images = torch.rand(4, 3, 8, 8)
    with torch.no_grad():
        model.train()(images)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    network = as_float(model)
    assert not any(isinstance(module, QuantBranch) for module in network.modules())
    twin = dq.wide_resnet(10, 1, convex=True)
    twin.load_state_dict({k: v for k, v in before.items() if not k.endswith("peak")})
    with torch.no_grad():
        torch.testing.assert_close(network(images), twin.eval()(images), rtol=1e-4, atol=1e-5)
        assert not torch.allclose(network(images), model.eval()(images), atol=1e-2)
    assert {m.bits for m in model.modules() if isinstance(m, Quantizer)} == {2, 8}
    assert {m.weight_bits for m in model.modules() if isinstance(m, QuantConv2d)} == {4, 7}
    assert {m.weight_bits for m in model.modules() if isinstance(m, QuantLinear)} == {8}
    assert any(isinstance(module, QuantBranch) for module in model.modules())
    assert all(torch.equal(before[name], v) for name, v in model.state_dict().items())


def test_latencies_of_a_small_network_and_its_card() -> None:
    model = dq.wide_resnet(10, 1, deployable=True, **FEW)
    built = lowered(model, 8)
    model.train()
    integer, single = graph(built, input_type="uint8"), graph(built, integers=False)
    torch.set_num_threads(2)
    found = latencies(model, integer, single, (3, 8, 8), batches=(1, 2), repeats=2, threads=1)
    assert torch.get_num_threads() == 2
    assert model.training
    assert (found["threads"], found["repeats"]) == (1, 2)
    assert list(found["batches"]) == ["1", "2"]
    for times in found["batches"].values():
        assert set(times) == {"torch", "onnxruntime", "integer"}
        assert all(t["median_ms"] > 0 for t in times.values())
    assert json.loads(json.dumps(found)) == found


def test_rows_say_sizes_ratios_and_what_few_bits_do_not_do() -> None:
    built = lowered(dq.wide_resnet(10, 1, deployable=True, **FEW))
    found = static_cost(built, file_bytes=130_000, float_file_bytes=1_300_000)
    lines = rows(found)
    assert "130.0 kB     1.30 MB   0.100" in lines[1]
    assert "Fewer than 8 bits run at the speed of 8 on CPUs" in lines[-1]
    assert not any("ms" in line.split() for line in lines)
    times = {
        name: {"median_ms": ms, "low_ms": ms - 1, "high_ms": ms + 1}
        for name, ms in (("torch", 44.4), ("onnxruntime", 22.2), ("integer", 11.1))
    }
    latency_card = {"threads": 2, "repeats": 9, "batches": {"1": times, "32": times}}
    shown = rows({**found, "latency": latency_card})
    torch_row = next(line for line in shown if line.startswith("PyTorch"))
    assert torch_row.split()[2:7] == ["44.4", "43.4", "to", "45.4", "4.00"]
    table = shown[-6:-2]
    assert len({len(line) for line in table}) == 1, table
    assert "2 threads, n = 9 in turn" in shown
