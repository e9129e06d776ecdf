"""The ONNX file computes the integer reference, code for code, and in integers."""

import os
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import helper
from torch import Tensor, nn

import defquant as dq
from conftest import refused
from defquant.deploy.graph import METADATA, graph, packed, unpacked
from defquant.deploy.lower import calibrate, lower
from defquant.deploy.parity import _openvino
from defquant.deploy.program import (
    Call,
    Conv,
    Linear,
    Name,
    Program,
    Quantize,
    rounded,
    run,
    steps,
    value,
)
from defquant.deploy.runtime import (
    OnnxModel,
    facts_of,
    integer_convolutions,
    open_model,
    session,
    tensors,
)
from defquant.integers import PIXELS, Grid, Weight, snap_biases_
from test_lower import CONVOLUTIONS, NETWORKS, SHAPE, Net, conv, network, on_grid, pixels

PRECISIONS = [(1, 8), (2, 2), (4, 4), (7, 8), (8, 8)]  # of activations and weights


@cache
def lowered(name: str = "wrn-10-1", bits: int = 4, weight_bits: int = 8) -> Program:
    rounded_sums = name.endswith("rounded")  # and biases as training leaves them
    model = network(name.split()[0], bits, weight_bits, round_sums=rounded_sums)
    if rounded_sums:
        snap_biases_(model, pixels(1))
    return lower(model, SHAPE)


def exported(
    name: str = "wrn-10-1", bits: int = 4, weight_bits: int = 8, **options: Any
) -> tuple[Program, onnx.ModelProto]:
    """A network's program and its file."""
    program = lowered(name, bits, weight_bits)
    return program, graph(program, **options)


def codes_of(program: Program) -> list[str]:
    return [op.name for op in program.ops if op.name in program.grids]


def same(program: Program, file: onnx.ModelProto, atol: float = 1e-5) -> None:
    """onnxruntime gives the reference's logits, all convolutions in integers."""
    x, count = pixels(seed=7, shape=program.shape), len(program.convolutions)
    logits = run(program, x)[program.logits]
    torch.testing.assert_close(OnnxModel(file)(x), logits, rtol=0, atol=atol)
    assert integer_convolutions(file) == (count, count)


def kinds(model: onnx.ModelProto) -> set[str]:
    return {node.op_type for node in model.graph.node}


def optimised(model: onnx.ModelProto, folder: Path) -> onnx.ModelProto:
    session(model, saved=folder / "optimised.onnx")
    return onnx.load(folder / "optimised.onnx")


# ---------------------------------------------------------------------------------- packed weights


def weights(size: int, bits: int, multiple: int, seed: int) -> Weight:
    most = 2 ** (bits - 1) - 1
    codes = np.random.default_rng(seed).integers(-most, most + 1, (1, size))
    return Weight((codes * multiple).astype(np.int8), np.ones(1, np.float32), bits, multiple)


@settings(deadline=None, max_examples=60)
@given(
    bits=st.sampled_from([4, 2]), size=st.integers(1, 70), seed=st.integers(0, 99),
    coarse=st.booleans(),
)  # fmt: skip
def test_packed_weights_come_back(bits: int, size: int, seed: int, coarse: bool) -> None:
    most = 2 ** (bits - 1) - 1
    weight = weights(size, bits, 127 // most if coarse else 1, seed)
    fields = packed(weight)
    assert fields.dtype == np.uint8
    assert fields.size == -(-size * bits // 8)
    back = unpacked(fields, bits, weight.multiple, size)
    assert back.dtype == np.int8
    assert np.array_equal(back, weight.integers.ravel())


def test_fields_are_twos_complement_from_the_lowest_bits() -> None:
    one = np.ones(1, np.float32)
    four = Weight(np.array([[18, -18, -126, 126, 0]], np.int8), one, 4, 18)
    assert packed(four).tolist() == [0xF1, 0x79, 0x00]
    two = Weight(np.array([[127, -127, 0, 127, -127]], np.int8), one, 2, 127)
    assert packed(two).tolist() == [0b01_00_11_01, 0b11]


@settings(deadline=None, max_examples=12)
@given(bits=st.sampled_from([4, 2]), channels=st.integers(1, 7), seed=st.integers(0, 99))
def test_the_file_unpacks_what_was_packed(bits: int, channels: int, seed: int) -> None:
    """The nodes themselves, run one by one: Gather from the table, Slice, Reshape."""
    weight = weights(3 * channels * 9, bits, 9, seed)
    weight = Weight(weight.integers.reshape(3, channels, 3, 3), np.ones(3, "f4"), bits, 9)
    program = one_convolution(weight, channels)
    (found,) = tensors(
        graph(program), ["codes/integers"], np.zeros((1, channels, 4, 4), "f4"), optimise=False
    ).values()
    assert np.array_equal(found, weight.integers)


def one_convolution(weight: Weight, channels: int, *, scale: float = 0.05) -> Program:
    """Pixels, a convolution to codes of 8 bits with zero point 128, their mean, a linear layer."""
    c_out = len(weight.integers)
    bias = np.arange(c_out, dtype=np.int32) * 100 - 150
    last = Weight(np.eye(c_out, dtype=np.int8), np.ones(c_out, np.float32), 8)
    ops = (
        Quantize("pixels", "image"),
        Conv("codes", "pixels", "conv", weight, bias, (1, 1), (1, 1, 1, 1), (1, 1), 1),
        Call("mean", "", "aten.mean.dim", (Name("codes"), (2, 3)), (), (-1, c_out)),
        Linear("out", "mean", "fc", last, np.zeros(c_out, np.float32)),
    )
    grids = {"pixels": PIXELS, "codes": Grid(scale, 128, 255)}
    return Program(ops, grids, (channels, 4, 4), c_out)


# ------------------------------------------------------------------ code for code, and in integers


@pytest.mark.parametrize(("bits", "weight_bits"), PRECISIONS)
@pytest.mark.parametrize("name", ["wrn-10-1", "vgg-16x0.125"])
def test_onnxruntime_computes_the_reference(name: str, bits: int, weight_bits: int) -> None:
    """From the pixels to the last codes all are the same; logits differ by float32 sums alone."""
    program, file = exported(name, bits, weight_bits)
    x = pixels(seed=7)
    reference = run(program, x)
    found = tensors(file, [*codes_of(program), "logits"], x.numpy())
    for code in codes_of(program):
        assert found[code].dtype == np.uint8
        assert np.array_equal(found[code], reference[code].numpy()), code
    np.testing.assert_allclose(found["logits"], reference[program.logits], rtol=0, atol=1e-5)
    assert integer_convolutions(file) == (NETWORKS[name], NETWORKS[name])


@pytest.mark.parametrize(("bits", "weight_bits"), PRECISIONS)
@pytest.mark.parametrize(
    ("name", "wanted", "convolutions"),
    [("wrn-10-1 rounded", 3, 13), ("resnet-18x0.125", 8, 20)],
)
def test_onnxruntime_adds_codes_in_another_order_near_ties(
    name: str, wanted: int, convolutions: int, bits: int, weight_bits: int, tmp_path: Path
) -> None:
    """Sums end in codes, and onnxruntime fuses them into QLinearAdd: nothing is left in floats.

    Given onnxruntime's own codes, each convolution is the reference's code for code, and each sum
    is, too, or lies so near a tie that the order of float32 operations decides for one step.
    """
    program, file = exported(name, bits, weight_bits)
    x = pixels(seed=7)
    found = tensors(file, codes_of(program), x.numpy())
    known: dict[str, Tensor] = {"image": x}
    sums = 0
    for op in program.ops:
        if op.name not in program.grids:
            known[op.name] = value(program, op, known)
            continue
        grid, exact = program.grids[op.name], steps(program, op, known)
        codes, mine = torch.from_numpy(found[op.name]), rounded(grid, exact)
        if isinstance(op, Quantize) and op.name != "pixels":
            sums += 1
            apart = codes.int() - mine.int()
            assert apart.abs().max() <= 1
            tie = (exact - exact.floor() - 0.5).abs()
            assert (tie[apart != 0] < 1e-4).all()
        else:
            assert torch.equal(codes, mine), op.name
        known[op.name] = codes
    made = [node.op_type for node in optimised(file, tmp_path).graph.node]
    assert sums == made.count("QLinearAdd") == wanted
    assert not {"Add", "BatchNormalization"}.intersection(made)
    assert integer_convolutions(file) == (convolutions, convolutions)


POOLS: Mapping[str, nn.MaxPool2d] = {
    "pool 2": nn.MaxPool2d(2), "pool 3, 2": nn.MaxPool2d(3, 2, padding=1),
    "pool 2, ceil": nn.MaxPool2d(2, ceil_mode=True), "pool 1x3": nn.MaxPool2d((1, 3), (2, 1)),
}  # fmt: skip


@pytest.mark.parametrize("layer", [*CONVOLUTIONS.values(), *POOLS.values()],
                         ids=[*CONVOLUTIONS, *POOLS])  # fmt: skip
def test_every_kind_of_layer_is_written(layer: nn.Module) -> None:
    torch.manual_seed(0)
    channels = 8
    if isinstance(layer, nn.Conv2d):
        layer.reset_parameters()  # it was made when the tests were collected, from any seed
        channels = layer.out_channels
    model = nn.Sequential(
        conv(), dq.QuantReLU(4, 1.0), layer, dq.QuantReLU(4, 1.0), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(channels, 4),
    )  # fmt: skip
    shape = (3, 15, 17)
    program, x = lower(model.eval(), shape), pixels(shape=shape)
    file, reference = graph(program), run(program, x)
    found = tensors(file, codes_of(program), x.numpy())
    assert all(np.array_equal(found[name], reference[name].numpy()) for name in found)
    assert len(reference[codes_of(program)[-1]].unique()) > 3
    count = len(program.convolutions)
    assert integer_convolutions(file) == (count, count)


KEPT: Mapping[str, Callable[[], list[nn.Module]]] = {
    "a transposed convolution": lambda: [nn.ConvTranspose2d(8, 8, 2, 2)],
    "behind a dilated pool": lambda: [nn.MaxPool2d(2, 1, dilation=2), nn.Conv2d(8, 8, 3)],
    "a linear layer": lambda: [nn.MaxPool2d(16), nn.Flatten(), nn.Linear(8, 8)],
    "averages beyond the border": lambda: [nn.AvgPool2d(3, 2, ceil_mode=True)],
    "softmax": lambda: [nn.Softmax(1)],
}


@pytest.mark.parametrize("make", KEPT.values(), ids=KEPT)
def test_what_stays_in_float_is_not_merged_with_the_roundings_around_it(
    make: Callable[[], Any],
) -> None:
    """onnxruntime would quantise weights and biases, with one scale, or one of 1."""
    torch.manual_seed(0)
    middle = make()
    with torch.no_grad():
        for weight in (p for layer in middle for p in layer.parameters() if p.ndim > 1):
            weight[1::4] *= 1e-4
            weight[::2] = 0
    model = nn.Sequential(conv(), dq.QuantReLU(4, 1.0), *middle, dq.QuantReLU(8, 1.0), nn.Flatten())
    program, x = lower(model.eval(), SHAPE), pixels()
    assert dq.parity(model, program, graph(program), x).mismatches == 0


@pytest.mark.parametrize("name", ["wrn-10-1", "resnet-18x0.125"])
def test_calibrated_plain_sums_run_in_integers_too(name: str) -> None:
    model = network(name, 4, None, deployable=False, convex=False)
    program = lower(model, SHAPE, peaks=calibrate(model, pixels()), weight_bits=4)
    same(program, graph(program), atol=1e-3)
    assert len(program.convolutions) == NETWORKS[name]


def test_any_number_of_images() -> None:
    _, file = exported()
    model, x = OnnxModel(file), pixels(9)
    whole = model(x)
    for n in (1, 4, 9):
        torch.testing.assert_close(model(x[:n]), whole[:n], rtol=0, atol=1e-5)
    assert whole.shape == (9, 4)
    assert model(x[:0]).shape == (0, 4)
    image, logits = file.graph.input[0], file.graph.output[0]
    assert [(d.dim_param or d.dim_value) for d in image.type.tensor_type.shape.dim] == [
        "batch", *SHAPE,
    ]  # fmt: skip
    assert (image.name, logits.name) == ("image", "logits")
    assert [(v.domain, v.version) for v in file.opset_import] == [("", 21)]


def test_pixels_and_floats_are_one_input() -> None:
    program, floats = exported()
    codes = graph(program, input_type="uint8")
    x = pixels()
    assert codes.graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.UINT8
    assert torch.equal(OnnxModel(codes)(x), OnnxModel(floats)(x))
    assert integer_convolutions(codes) == (9, 9)
    whole, names = x.mul(255).round().to(torch.uint8).numpy(), codes_of(program)
    found, wanted = tensors(codes, names, whole), tensors(floats, names, x.numpy())
    assert all(np.array_equal(found[name], wanted[name]) for name in names)


def test_floats_are_rounded_to_pixels_and_clipped() -> None:
    program, file = exported()
    x = torch.tensor([-3.0, 0.4 / 255, 0.6 / 255, 0.501, 254.4 / 255, 1.0, 7.0, 0.0])
    image = x.repeat(96).view(1, 3, 16, 16)
    (codes,) = tensors(file, ["pixels"], image.numpy()).values()
    assert codes.ravel()[:8].tolist() == [0, 0, 1, 128, 254, 255, 255, 0]
    assert np.array_equal(codes, run(program, image)["pixels"].numpy())


def test_without_optimisations_it_is_the_same_up_to_ties() -> None:
    """In floats, with other orders of sums: few codes differ, by one step, and the answers hold."""
    program, file = exported()
    x, names = pixels(32, seed=7), codes_of(program)
    fast, plain = (tensors(file, names, x.numpy(), optimise=o) for o in (True, False))
    for name in names:
        apart = np.abs(fast[name].astype(int) - plain[name])
        assert (apart > 0).mean() < 2e-3, name
    a, b = OnnxModel(file)(x), OnnxModel(file, optimise=False)(x)
    assert (a - b).abs().max() < 0.1 * a.std()
    assert (a.argmax(1) == b.argmax(1)).float().mean() >= 31 / 32


def test_openvino_gives_the_same_answers() -> None:
    pytest.importorskip("openvino")
    _, file = exported()
    x = pixels(64, seed=7)
    second = _openvino(file, x)
    if second is None and "ONEDNN_MAX_CPU_ISA" in os.environ:
        pytest.skip("OpenVINO's kernels are forbidden by ONEDNN_MAX_CPU_ISA")
    assert second is not None
    first = OnnxModel(file)(x)
    assert (first.argmax(1) == second.argmax(1)).float().mean() >= 62 / 64
    assert (first - second).abs().max() < 0.5 * first.std()
    rounding = _openvino(file, x, sums=True)
    assert rounding is not None
    assert (first - rounding).abs().mean() < 0.3 * (first - second).abs().mean()


# ------------------------------------------------------------------------------- silent floats


def clip_before_rounding(file: onnx.ModelProto) -> onnx.ModelProto:
    """Conv -> Clip -> QuantizeLinear for the first Conv -> QuantizeLinear -> Clip of the file."""
    copy = onnx.ModelProto()
    copy.CopyFrom(file)
    nodes = list(copy.graph.node)
    sums = next(n for n in nodes if n.op_type == "Conv")
    quantise = next(n for n in nodes if sums.output[0] in n.input)
    clip = next(n for n in nodes if n.op_type == "Clip" and quantise.output[0] in n.input)
    constants = {c.name: onnx.numpy_helper.to_array(c) for c in copy.graph.initializer}
    high = float(constants[quantise.input[1]]) * int(constants[clip.input[2]])
    for name, number in (("low", 0.0), ("high", high)):
        constant = onnx.numpy_helper.from_array(np.array(number, np.float32), name)
        copy.graph.initializer.append(constant)
    before = helper.make_node("Clip", [sums.output[0], "low", "high"], ["clipped"])
    after = helper.make_node("QuantizeLinear", ["clipped", *quantise.input[1:]], [clip.output[0]])
    index = nodes.index(quantise)
    nodes[index : index + 1] = [before, after]
    nodes.remove(clip)
    worse = with_nodes(copy, nodes)
    onnx.checker.check_model(worse, full_check=True)
    return worse


def with_nodes(file: onnx.ModelProto, nodes: list[onnx.NodeProto]) -> onnx.ModelProto:
    copy = onnx.ModelProto()
    copy.CopyFrom(file)
    del copy.graph.node[:]
    copy.graph.node.extend(nodes)
    return copy


def test_a_convolution_in_floats_is_counted_as_one() -> None:
    _, file = exported("vgg-16x0.125", 4, 8)
    assert integer_convolutions(file) == (13, 13)
    worse = clip_before_rounding(file)
    assert integer_convolutions(worse) == (12, 13)
    x = pixels()
    assert (OnnxModel(worse)(x) - OnnxModel(file)(x)).abs().max() < 1e-3  # and nobody would notice


def test_a_branch_without_a_grid_is_counted_as_float() -> None:
    """The last rounding of a residual branch taken out: its convolution ends in floats."""
    program, file = exported()
    name = next(op.name for op in program.convolutions if op.layer == "blocks.0.conv2")
    (sums,) = (n for n in file.graph.node if name in n.output)
    for node in list(file.graph.node):
        if list(node.input[:1]) == [name]:
            file.graph.node.append(helper.make_node("Identity", [sums.input[0]], [node.output[0]]))
            file.graph.node.remove(node)
    file.graph.node.remove(sums)
    assert integer_convolutions(with_nodes(file, in_order(file))) == (8, 9)


def in_order(file: onnx.ModelProto) -> list[onnx.NodeProto]:
    known = {"image", "", *(c.name for c in file.graph.initializer)}
    waiting, ordered = list(file.graph.node), []
    while waiting:
        node = next(n for n in waiting if known.issuperset(n.input))
        waiting.remove(node)
        ordered.append(node)
        known.update(node.output)
    return ordered


@pytest.mark.parametrize("weight_bits", [8, 2])
@pytest.mark.parametrize("name", NETWORKS)
def test_the_float_twin_has_the_same_layers_and_no_codes(
    name: str, weight_bits: int, tmp_path: Path
) -> None:
    """What the network would cost in float32: its convolutions on the same weights and biases."""
    model = network(name, 8, weight_bits)
    twin = graph(lower(model, SHAPE), integers=False)
    assert not kinds(twin) & {"QuantizeLinear", "DequantizeLinear", "Gather"}
    integer, convolutions = integer_convolutions(twin)  # batch norms of its own count, too
    assert integer == 0 and convolutions >= NETWORKS[name]
    assert sum(node.op_type == "Conv" for node in twin.graph.node) == NETWORKS[name]
    assert not any("QLinear" in kind for kind in kinds(optimised(twin, tmp_path)))
    x = pixels()
    dq.set_bits(model, None)
    for branch in (m for m in model.modules() if type(m).__name__ == "QuantBranch"):
        branch.forward = nn.Identity()
    with torch.no_grad():
        unrounded = model(x)
    error = (OnnxModel(twin)(x) - unrounded).abs().max()
    assert error < 0.05 * unrounded.std()  # biases are rounded


# ----------------------------------------------------------------------------------------- size


def test_files_are_as_small_as_their_weights() -> None:
    """WRN-16-4: 2.7 million weights; the rest of the file is small beside them."""
    sizes = {}
    for weight_bits in (8, 4, 2):
        torch.manual_seed(0)
        model = dq.wide_resnet(16, 4, bits=4, weight_bits=weight_bits, deployable=True).train()
        with torch.no_grad():
            model(torch.rand(2, 3, 8, 8))
        program = lower(model, (3, 32, 32))
        sizes[weight_bits] = graph(program).ByteSize()
        if weight_bits == 8:
            whole = graph(program, integers=False).ByteSize()
    assert whole == pytest.approx(4 * 2_748_890, rel=0.02)
    assert sizes[8] < 0.265 * whole
    assert sizes[4] < 0.135 * whole
    assert sizes[2] < 0.075 * whole


# -------------------------------------------------------------------------------------- saturation


@pytest.mark.parametrize("scale", [0.05, 40.0])
def test_a_first_layer_of_7_bits_never_saturates(scale: float) -> None:
    """Pairs of products of 255 and 63 stay below 2^15; of 255 and 127 they would not."""
    generator = np.random.default_rng(0)
    integers = generator.choice([-63, 63], (16, 3, 3, 3)).astype(np.int8)
    integers[0], integers[1] = 63, -63
    weight = Weight(integers, np.full(16, 0.01, np.float32), 7)
    program = one_convolution(weight, 3, scale=scale * 0.01)
    file = graph(program)
    x = torch.ones(8, 3, 4, 4)
    x[4:] = torch.from_numpy(generator.choice([0.0, 1.0], (4, 3, 4, 4))).float()
    assert integer_convolutions(file) == (1, 1)
    (codes,) = tensors(file, ["codes"], x.numpy()).values()
    reference = run(program, x)["codes"]
    assert np.array_equal(codes, reference.numpy())
    assert len(reference.unique()) > 3


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize(("bits", "weight_bits"), [(8, 8), (8, 4), (8, 2), (7, 8)])
def test_no_pair_of_products_leaves_16_bits(name: str, bits: int, weight_bits: int) -> None:
    program = lowered(name, bits, weight_bits)
    for op in program.convolutions:
        largest = int(np.abs(op.weight.integers.astype(int)).max())
        assert 2 * largest * program.grids[op.source].top <= 2**15 - 1, op.layer


# ------------------------------------------------------------------------------ networks of others


@pytest.mark.parametrize(
    "names",
    [
        ["conv1", "act1", "conv2", "act2", "fc"],
        ["c0", "c1", "c2", "c3", "c4"],
        ["image", "pixels", "c10", "logits", "fc"],
        ["conv", "image", "conv_sums", "conv_bias", "logits"],
    ],
    ids=" ".join,
)
def test_layers_may_have_any_names(names: list[str]) -> None:
    def forward(net: Any, x: Tensor) -> Tensor:
        for name in names[:-1]:
            x = getattr(net, name)(x)
        return getattr(net, names[-1])(x.mean((2, 3)))  # type: ignore[no-any-return]

    torch.manual_seed(0)
    layers = (conv(), dq.QuantReLU(4), conv(8, 8), dq.QuantReLU(4), nn.Linear(8, 4))
    model = Net(forward, **dict(zip(names, layers, strict=True)))
    program = lower(on_grid(model.eval()), SHAPE)
    same(program, graph(program))
    assert len(program.convolutions) == 2


@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.parametrize("alpha", [(1.0, 0.0), (0.0, 1.0), (0.4, 0.6)])
def test_coefficients_of_0_and_1_leave_all_convolutions_in_integers(
    alpha: tuple[float, float], rounded: bool
) -> None:
    """A branch that counts for nothing may be left out; what is there runs in integers."""
    model = network("wrn-10-1", 4, 8, round_sums=rounded)
    for join in (m for m in model.modules() if isinstance(m, dq.ConvexSum)):
        with torch.no_grad():
            join.alpha.copy_(torch.tensor(alpha))
    program = lower(model, SHAPE)
    same(program, graph(program))
    assert len(program.convolutions) == 9 or 0 in alpha


# ------------------------------------------------------------------------------------- bad files


def saved(folder: Path, facts: Mapping[str, Any] | None = None) -> Path:
    _, file = exported(facts={"format": 1, "classes": ["a", "ü"]} if facts is None else facts)
    path = folder / "model.onnx"
    onnx.save(file, path)
    return path


def foreign() -> onnx.ModelProto:
    node = helper.make_node("Relu", ["x"], ["y"])
    ends = [helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, ["n", 3]) for n in ("x", "y")]
    body = helper.make_graph([node], "theirs", ends[:1], ends[1:])
    return helper.make_model(body, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def test_a_file_keeps_its_facts(tmp_path: Path) -> None:
    path = saved(tmp_path)
    model = open_model(path)
    assert facts_of(model, path) == {"format": 1, "classes": ["a", "ü"]}
    x = pixels()
    assert torch.equal(OnnxModel(path)(x), OnnxModel(model)(x))
    assert integer_convolutions(path) == (9, 9)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.01, 0.5, 0.9, 0.9999])
def test_a_cut_file_is_refused(tmp_path: Path, share: float) -> None:
    path = saved(tmp_path)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    refused(lambda: open_model(path), "not a whole ONNX model")
    refused(lambda: OnnxModel(path), "onnxruntime cannot run")


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    refused(lambda: open_model(path), "no file")
    refused(lambda: OnnxModel(path), "onnxruntime cannot run")
    refused(lambda: open_model(tmp_path), "not a whole ONNX model")
    for content in (b"\x80\x04pickle", b"PK\x03\x04", b"\n" * 100, b"\xff" * 1000):
        path.write_bytes(content)
        refused(lambda: open_model(path), "not a whole ONNX model")
    node = helper.make_node("NoSuchThing", ["x"], ["y"])
    model = foreign()
    model.graph.node[0].CopyFrom(node)
    path.write_bytes(model.SerializeToString())
    refused(lambda: open_model(path), "was not made by `defquant export`: it has 'NoSuchThing'")
    refused(lambda: session(model), "onnxruntime cannot run the model")


@pytest.mark.parametrize("text", [None, "", "no json", "[1]", "{}", '"format"', "{\n"])
def test_a_model_of_others_has_no_facts(tmp_path: Path, text: str | None) -> None:
    model, path = foreign(), tmp_path / "model.onnx"
    if text is not None:
        helper.set_model_props(model, {METADATA: text})
    refused(lambda: facts_of(model, path), "was not made by `defquant export`")
    assert integer_convolutions(model) == (0, 0)


@pytest.mark.parametrize("input_type", ["float", "uint8"])
@pytest.mark.parametrize(
    "shape", [(2, 3, 8, 8), (2, 1, 16, 16), (3, 16, 16), (2, 3, 16), (2, 3, 16, 16, 1), (2,), ()]
)
def test_other_shapes_are_refused(shape: tuple[int, ...], input_type: Any) -> None:
    model = OnnxModel(graph(lowered(), input_type=input_type))
    wanted = f"takes images [3, 16, 16]; found {list(shape[1:])}"
    refused(lambda: model(torch.zeros(shape)), wanted)


def test_attacks_without_gradients_take_the_file_as_a_module() -> None:
    model = OnnxModel(graph(lowered()))
    x, y = pixels(), torch.arange(8) % 4
    before: NDArray[Any] = x.numpy().copy()
    score = dq.accuracy(model, (x, y))
    assert 0 <= score.accuracy <= 1
    assert not list(model.parameters()) and not model.training
    assert model(x).dtype == torch.float32 and not model(x).requires_grad
    channels_last = x.contiguous(memory_format=torch.channels_last)
    assert torch.equal(model(channels_last), model(x))
    assert torch.equal(model(x.double()), model(x))
    assert np.array_equal(before, x.numpy())
