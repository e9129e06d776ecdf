"""Anyone's ONNX file as a twin: operators and networks against onnxruntime; hostile files."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnxruntime.quantization import (
    CalibrationDataReader,
    QuantFormat,
    quantize_dynamic,
    quantize_static,
)
from torch import nn

from conftest import tiny_images
from defquant.attacks.surrogates import EOT, ClipFree, FloatTwin, SoftRound
from defquant.errors import UserError
from defquant.judging.contract import RANGES, Contract, File, find_contract, given_contract
from defquant.judging.opening import has_gradient
from defquant.judging.suspects import suspect
from defquant.judging.twin import Twin, read_onnx
from defquant.quantize import QuantReLU
from onnx_nodes import CODES, FLOATS, IMAGE, OLD, WAYS, Node, Q, built, draw, f, ints, network

RNG = np.random.default_rng(1)


def told(path: Path, x: NDArray[Any]) -> NDArray[Any]:
    """What onnxruntime answers."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(str(path), options)
    (answer,) = session.run(None, {"x": x})
    return np.asarray(answer).reshape(len(x), -1)


def agree(path: Path, x: NDArray[Any], image: Any = None) -> Twin:
    twin = read_onnx(path, image)
    with torch.no_grad():
        mine = twin.answers(torch.from_numpy(x)).numpy()
    theirs = told(path, x)
    if theirs.dtype == np.float32:
        np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-5)
    else:
        off = np.abs(mine.astype(np.float64) - theirs)
        assert off.max() <= 1, off.max()
        assert (off > 0).mean() < 0.01
    return twin


@pytest.mark.parametrize("name", FLOATS)
def test_an_operator_on_floats(name: str, tmp_path: Path) -> None:
    shape, nodes = FLOATS[name]
    agree(built(nodes, ("n", *shape[1:]), tmp_path / "m.onnx"), 2 * draw(*shape))


@pytest.mark.parametrize("name", CODES)
def test_an_operator_on_codes(name: str, tmp_path: Path) -> None:
    shape, nodes = CODES[name]
    first: list[Node] = [("QuantizeLinear", [..., *Q], {})]
    agree(built(first + nodes, ("n", *shape[1:]), tmp_path / "m.onnx"), 2 * draw(*shape))


@pytest.mark.parametrize(("opset", "nodes"), OLD)
def test_an_operator_as_it_was(opset: int, nodes: list[Node], tmp_path: Path) -> None:
    agree(built(nodes, ("n", *IMAGE[1:]), tmp_path / "m.onnx", opset=opset), draw(*IMAGE))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_windows(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Convolutions and pools of any stride, padding, dilation and rounding of their sizes."""
    kind = data.draw(st.sampled_from(["Conv", "MaxPool", "AveragePool"]))
    pair = st.tuples(*[st.integers(1, 3)] * 2).map(list)
    more: dict[str, Any] = {"strides": data.draw(pair), "kernel_shape": data.draw(pair)}
    if kind != "Conv":  # onnxruntime finds a negative padding otherwise
        more["strides"] = list(map(min, more["strides"], more["kernel_shape"]))
    auto = data.draw(st.sampled_from(["NOTSET", "SAME_UPPER", "SAME_LOWER", "VALID"]))
    if auto == "NOTSET":
        k = more["kernel_shape"]
        more["pads"] = [data.draw(st.integers(0, n - 1)) for n in k + k]
    else:
        more["auto_pad"] = auto
    if kind != "AveragePool" and auto == "NOTSET":
        more["dilations"] = [data.draw(st.integers(1, 2)) for _ in range(2)]
    if kind != "Conv" and auto == "NOTSET":
        more["ceil_mode"] = data.draw(st.integers(0, 1))
    if kind == "AveragePool":
        more["count_include_pad"] = data.draw(st.integers(0, 1))
    inputs = [..., draw(4, 6, *more["kernel_shape"])] if kind == "Conv" else [...]
    path = tmp_path_factory.getbasetemp() / "window.onnx"
    agree(built([(kind, inputs, more)], ("n", *IMAGE[1:]), path, opset=22), draw(*IMAGE))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("surrogate", [EOT(1), SoftRound(), ClipFree(), FloatTwin()])
def test_a_staircase_has_the_gradient_of_ours(way: str, surrogate: Any, tmp_path: Path) -> None:
    """Answers and gradients are those of the same network with a 2-bit `QuantReLU`."""
    if way == "detached" and surrogate == ClipFree():
        return  # its clip stands outside the rounding, too
    w, v, x = draw(8, 12), draw(3, 8), torch.from_numpy(2 * draw(16, 12))
    layers: list[Node] = [("Gemm", [..., w], {"transB": 1}), *WAYS[way]]
    layers += [("Gemm", [..., v], {"transB": 1})]
    twin = agree(built(layers, ("n", 12), tmp_path / "m.onnx"), x.numpy())
    first, second = nn.Linear(12, 8, bias=False), nn.Linear(8, 3, bias=False)
    with torch.no_grad():
        first.weight.copy_(torch.from_numpy(w)), second.weight.copy_(torch.from_numpy(v))
    ours = nn.Sequential(first, QuantReLU(2), second)
    found = []
    for model in (ours, twin):
        start = x.clone().requires_grad_()
        with surrogate(model) as (forward,):
            answer = forward(start)
        found.append((answer, *torch.autograd.grad((answer * torch.arange(3)).sum(), start)))
    torch.testing.assert_close(found[1][0], found[0][0])
    grads = [grad.flatten() for _, grad in found]
    assert torch.cosine_similarity(grads[0], grads[1], 0) > 0.9999


class Reader(CalibrationDataReader):  # type: ignore[misc]
    def __init__(self) -> None:
        self.left = iter([{"x": RNG.random((16, 3, 8, 8), np.float32)}])

    def get_next(self) -> Any:
        return next(self.left, None)


def quantized(how: str, folder: Path) -> Path:
    source, target = network(folder / "float.onnx"), folder / "m.onnx"
    if how == "dynamic":
        quantize_dynamic(source, target)
    elif how != "float":
        form = QuantFormat.QDQ if "QDQ" in how else QuantFormat.QOperator
        quantize_static(source, target, Reader(), quant_format=form, per_channel="channel" in how)
    return source if how == "float" else target


FORMS = ["float", "QDQ", "QDQ per channel", "QOperator", "QOperator per channel", "dynamic"]


@pytest.mark.parametrize("how", FORMS)
def test_a_network_as_onnxruntime_quantises_it(how: str, tmp_path: Path) -> None:
    file = File(quantized(how, tmp_path))
    x = torch.rand(200, 3, 8, 8)
    with torch.no_grad():
        mine, theirs, logits = file.twin.answers(x), file.answers(x), file.twin(x)
    assert (mine.argmax(1) == theirs.argmax(1)).float().mean() >= 0.99
    assert float((mine - theirs).abs().mean()) < (1e-6 if how == "float" else 2e-3)
    assert float((logits.softmax(1) - mine).abs().mean()) < 0.01
    assert "Softmax" in " ".join(file.twin.ending)
    assert file.twin.alone == (how == "dynamic")
    assert (len(file.twin.stairs) > 0) == (how != "float")
    start = x[:4].clone().requires_grad_()
    for surrogate in (EOT(1), SoftRound(), FloatTwin()):
        with surrogate(file.twin) as (forward,):
            (grad,) = torch.autograd.grad(forward(start).square().sum(), start)
        assert (grad.flatten(1).norm(dim=1) > 1e-3).all()


def test_a_batch_that_the_file_fixes(tmp_path: Path) -> None:
    """One image at a time or three: the twin takes any number, onnxruntime is filled up."""
    x = torch.rand(7, 3, 8, 8)
    for batch in (1, 3):
        file = File(network(tmp_path / "m.onnx", batch))
        assert (file.twin.port.batch, file.twin.rows) == (batch, None)
        torch.testing.assert_close(file.twin.answers(x), file.answers(x))
    fixed: list[Node] = [("Reshape", [..., ints(1, 6, -1)], {}), ("Flatten", [...], {})]
    tied: list[Node] = [*fixed, ("Concat", [..., draw(1, 5)], {"axis": 1})]
    for nodes, rows in ((fixed, None), (tied, 1)):
        file = File(built(nodes, (1, *IMAGE[1:]), tmp_path / "m.onnx"))
        assert file.twin.rows == rows
        x = torch.from_numpy(draw(3, *IMAGE[1:]))
        torch.testing.assert_close(file.twin.answers(x), file.answers(x))
    turned: list[Node] = [
        ("Reshape", [..., ints(0, 4, 3)], {}), ("Transpose", [...], {"perm": [1, 0, 2]}),
        ("DynamicQuantizeLinear", [...], {"outputs": ["a", "b", "c"]}),
        ("DequantizeLinear", [..., "b", "c"], {}), ("Transpose", [...], {"perm": [1, 0, 2]}),
    ]  # fmt: skip
    file = File(built(turned, ("n", 12), tmp_path / "m.onnx"))
    x = torch.from_numpy(draw(5, 12))
    torch.testing.assert_close(file.twin.answers(x), file.answers(x))
    assert file.twin.rows == 1
    mixed = File(built([("Softmax", [...], {"axis": 0})], ("n", 12), tmp_path / "m.onnx"))
    assert mixed.twin.alone
    assert bool((mixed.answers(torch.rand(4, 12)) == 1).all())


def test_functions_are_inlined(tmp_path: Path) -> None:
    text = """<ir_version: 10, opset_import: ["" : 21, "own" : 1]>
    g (float[n, 12] x) => (float[n, k] y) { a = own.twice <by = 3.0> (x)  y = own.twice (a) }
    <domain: "own", opset_import: ["" : 21, "own" : 1]>
    twice <by: float = 2.0> (x) => (y) { b = own.scaled <by: float = @by> (x)  y = Relu(b) }
    <domain: "own", opset_import: ["" : 21]>
    scaled <by> (x) => (y) { c = Constant <value_float: float = @by> ()  y = Mul (c, x) }"""
    path = tmp_path / "m.onnx"
    path.write_bytes(onnx.parser.parse_model(text).SerializeToString())
    agree(path, draw(2, 12))


def scene(path: Path, layout: str, affine: str, kind: int, bgr: bool) -> Any:
    """A file that finds the nearest of four pictures, if fed rightly; images near them, labels."""
    pictures = RNG.integers(0, 256, (4, 3, 8, 8)) * np.array([0.3, 0.6, 0.8, 1]).reshape(4, 1, 1, 1)
    labels = RNG.integers(0, 4, 240)
    images = (pictures[labels] + RNG.normal(0, 60, (240, 3, 8, 8))).clip(0, 255).astype(np.uint8)
    shift, divide = (np.array(v, np.float32).reshape(-1, 1, 1) for v in RANGES[affine])
    near = (pictures[:, ::-1] if bgr else pictures).reshape(4, -1).astype(np.float32)
    nodes: list[Node] = [("Cast", [...], {"to": 1})] if kind != 1 else []
    if layout == "NHWC":
        nodes.append(("Transpose", [...], {"perm": [0, 3, 1, 2]}))
    nodes += [("Mul", [..., divide], {}), ("Add", [..., shift], {}), ("Flatten", [...], {}),
              ("Gemm", [..., near, -(near**2).sum(1) / 2], {"transB": 1})]  # fmt: skip
    shape = ("n", 3, 8, 8) if layout == "NCHW" else ("n", 8, 8, 3)
    file = File(built(nodes, shape, path, of=kind))
    return file, torch.from_numpy(images), torch.from_numpy(labels)


@pytest.mark.parametrize(("layout", "affine", "kind", "bgr"), [
    ("NCHW", "0..1", 1, False), ("NHWC", "-1..1", 1, False), ("NCHW", "-128..127", 3, True),
    ("NHWC", "0..255", 2, False), ("NCHW", "ImageNet's mean and std", 1, False),
])  # fmt: skip
def test_the_contract_is_found(
    layout: str, affine: str, kind: int, bgr: bool, tmp_path: Path
) -> None:
    file, images, labels = scene(tmp_path / "m.onnx", layout, affine, kind, bgr)
    found = find_contract(file, images, labels)
    contract = found.contract
    assert (contract.layout, contract.bgr, contract.order) == (layout, bgr, None)
    assert contract.range == affine
    assert found.score.correct == 240
    order = torch.tensor([2, 0, 3, 1])
    moved = find_contract(file, images, order[labels])
    assert moved.contract.order == (1, 3, 0, 2)
    assert torch.equal(file.predict(images, moved.contract), order[labels])
    front = file.model(moved.contract)
    assert torch.equal(front(images / 255).argmax(1), order[labels])
    again = find_contract(file, images, labels, **given_contract(str(contract)))
    assert again.contract == contract
    with pytest.raises(UserError, match="guesses, however it is fed"):
        find_contract(file, images, labels[torch.randperm(240)])
    some = torch.rand(240, generator=torch.Generator().manual_seed(0)) < 0.75
    with pytest.raises(UserError, match="guesses, however it is fed"):
        find_contract(file, images, torch.where(some, labels.roll(1), order[labels]))  # 44 %
    with pytest.raises(UserError, match="the images are 3 x 9 x 9"):
        find_contract(file, torch.zeros(4, 3, 9, 9, dtype=torch.uint8), labels[:4])
    with pytest.raises(UserError, match="4 outputs and the data 5 classes"):
        find_contract(file, images, labels, classes=5)


QUADRANTS = nn.functional.avg_pool2d(torch.eye(64).view(64, 1, 8, 8), 4).flatten(1).T.numpy()
READ: dict[str, tuple[tuple[Any, ...], list[Node], list[Node]]] = {
    "a class": (("n", 1, 8, 8), [], [("ArgMax", [...], {"axis": 1})]),
    "a class, flat": (("n", 1, 8, 8), [], [("ArgMax", [...], {"axis": 1, "keepdims": 0}),
                                           ("Cast", [...], {"to": 6})]),
    "no channel": (("n", 8, 8), [], []),
    "a table of 256 values, which runs on no others": (("n", 1, 8, 8), [
        ("Mul", [..., f(255)], {}), ("Round", [...], {}), ("Cast", [...], {"to": 7}),
        ("Gather", [np.linspace(0, 1, 256, dtype=np.float32), ...], {}),
    ], []),
}  # fmt: skip


@pytest.mark.parametrize("name", READ)
def test_a_file_with_such_an_end_is_read(name: str, tmp_path: Path) -> None:
    (shape, begin, end), data = READ[name], tiny_images(128)
    nodes: list[Node] = [("Flatten", [...], {}), ("Gemm", [..., 20 * QUADRANTS], {"transB": 1})]
    file = File(built([*begin, *nodes, *end], shape, tmp_path / "m.onnx"))
    found = find_contract(file, data.images, data.labels)
    assert torch.equal(file.predict(data.images, found.contract), data.labels)
    assert torch.equal(file.model(found.contract)(data.images / 255).argmax(1), data.labels)


@pytest.mark.parametrize("name", ["looked up", "asked", "modulo"])
def test_a_node_that_hides_a_rounding_is_named(name: str, tmp_path: Path) -> None:
    first: dict[str, list[Node]] = {
        "looked up": READ["a table of 256 values, which runs on no others"][1],
        "asked": [
            ("Sub", [..., f(0.5)], {}),
            ("Relu", [...], {}),
            ("Cast", [...], {"to": 9}),
            ("Cast", [...], {"to": 1}),
        ],
        "modulo": [("Mod", [..., f(0.25)], {"fmod": 1}), ("Sub", ["x", ...], {})],
    }
    last: list[Node] = [("Flatten", [...], {}), ("Gemm", [..., 20 * QUADRANTS], {"transB": 1})]
    path, data = built(first[name] + last, ("n", 1, 8, 8), tmp_path / "m.onnx"), tiny_images(128)
    seen = suspect(path, data, fed="0..1")
    assert len(seen.closed) == 1 and has_gradient(seen.model, data.images[:2] / 255)


def test_nan_is_no_answer(tmp_path: Path) -> None:
    file = File(built([("Sqrt", [...], {}), ("Flatten", [...], {})], ("n", 1, 1, 2),
                      tmp_path / "m.onnx"))  # fmt: skip
    pixels = torch.tensor([[0, 255], [200, 255]], dtype=torch.uint8).view(2, 1, 1, 2)
    way = Contract("-128..127", (128.0,), (1.0,))
    assert file.predict(pixels, way).tolist() == [-1, 1]


@pytest.mark.parametrize(("scale", "range_"), [(10 / 120, "0..255"), (255 * 10 / 120, "0..1")])
def test_among_ways_that_answer_alike_the_likeliest(
    scale: float, range_: str, tmp_path: Path
) -> None:
    """A linear file without biases is right however bright; its losses are not the same."""
    data = tiny_images(128)
    weight = np.float32(scale) * QUADRANTS
    nodes: list[Node] = [("Flatten", [...], {}), ("Gemm", [..., weight], {"transB": 1})]
    file = File(built(nodes, ("n", 1, 8, 8), tmp_path / "m.onnx"))
    found = find_contract(file, data.images, data.labels)
    assert found.contract.range == range_
    assert "--input decides" in str(found)
    own = find_contract(file, data.images, data.labels, **given_contract("mean 0.4 std 0.2, NCHW"))
    assert (own.contract.shift, own.contract.divide) == ((102.0,), (51.0,))
    for text, message in (
        ("0..2", "an input is one of"), ("mean 1 std 1 1", "as many"), ("mean 1 std 1.1.", "number")
    ):  # fmt: skip
        with pytest.raises(UserError, match=message):
            given_contract(text)


def saved(path: Path, text: str) -> Path:
    model = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 21, "own" : 1]> {text}')
    path.write_bytes(model.SerializeToString())
    return path


BEGIN = "g (float[n, 12] x) => (float[n, k] y)"
DEEP = "".join(
    f"""<domain: "own", opset_import: ["" : 21, "own" : 1]>
    f{i} (x) => (y) {{ a = own.f{i + 1} (x) y = own.f{i + 1} (a) }}"""
    for i in range(15)
)
LAST = """<domain: "own", opset_import: ["" : 21]> f15 (x) => (y) { y = Relu (x) }"""
HOSTILE = {
    "unknown": (BEGIN + "{ y = NonMaxSuppression (x) }", r"'y' \(NonM.*: the operator NonMaxSu"),
    "a strange domain": (BEGIN + "{ y = own.Relu (x) }", "operator Relu of own is not read"),
    "a loop": (BEGIN + "{ y = Loop <body = b (int64 i, bool c) => (bool d) { d = Not (c) }> (x) }",
               "operator Loop is not read"),
    "a circle": (BEGIN + "{ a = Relu (b) b = Relu (a) y = Add (a, x) }", "'a' .*needs 'b', which"),
    "a missing output": (BEGIN + "{ z = Relu (x) }", "no node makes its output 'y'"),
    "no image in it": (BEGIN + "<float[1, 2] c = {1, 2}> { y = Relu (c) }", "does not hang on its"),
    "two images": ("g (float[n, 12] x, float[n, 12] z) => (float[n, 12] y) { y = Add (x, z) }",
                   "one tensor of images; found 2: x, z"),
    "texts": ("g (string[n, 12] x) => (string[n, 12] y) { y = Identity (x) }", "found type 8"),
    "a shape that does not fit": (BEGIN + "<float[5, 2] w> { y = MatMul (x, w) }".replace(
        "w>", "w = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10}>"), r"'y' \(MatMul\): .* must have same"),
    "a huge constant": (BEGIN + """<int64[3] s = {90000, 90000, 90000}>
        { c = ConstantOfShape (s) y = Add (x, c) }""", "needs too much"),
    "huge numbers of copies": (BEGIN + "<int64[2] s = {1, 1000000000}> { y = Tile (x, s) }",
                               "needs too much"),
    "a huge product": (BEGIN + """<int64[3] t = {0, 12, 1}, int64[3] s = {1, 12, 4096}>
        { a = Reshape (x, t) b = Expand (a, s) c = Transpose <perm = [0, 2, 1]> (b)
          """ + "".join(f"d{i} = MatMul (c, b) e{i} = MatMul (d{i}, d{i}) " for i in range(5)) + """
          y = Relu (e4) }""", "'e3' .MatMul.: the file needs too much"),
    "a huge window": (BEGIN + """<int64[4] s = {0, 1, 12, 1}> { a = Reshape (x, s) y = AveragePool
        <kernel_shape = [1, 1], pads = [0, 90000000, 0, 0], strides = [1, 90000001]> (a) }""",
        "'y' .AveragePool.: it makes 1.08e.09 numbers"),
    "a wide padding": (BEGIN + "<int64[4] s = {0, 0, 0, 900000000}> { y = Pad (x, s) }", "1.8e.09"),
    "nested functions": (BEGIN + "{ y = own.f0 (x) } " + DEEP + LAST, "more than 20,000 nodes"),
    "a function of itself": (BEGIN + """{ y = own.f (x) }
        <domain: "own", opset_import: ["own" : 1]> f (x) => (y) { y = own.f (x) }""", "16 deep"),
    "sizes from the image": (BEGIN + "{ a = Cast <to = 7> (x) y = Reshape (x, a) }",
                             "its input 1 hangs on the image"),
    "an old set": (BEGIN + "{ y = Relu (x) }", "operator sets 7 to"),
    "draws": (BEGIN + "<float r = {0.5}, bool t = {1}> { y = Dropout (x, r, t) }", "training mode"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_one_line(name: str, tmp_path: Path) -> None:
    text, words = HOSTILE[name]
    path = saved(tmp_path / "m.onnx", text)
    if name == "an old set":
        model = onnx.load(path)
        model.opset_import[0].version = 6
        path.write_bytes(model.SerializeToString())
    with pytest.raises(UserError, match=words) as error:
        read_onnx(path)
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400


def test_constants_that_are_not_there(tmp_path: Path) -> None:
    path = built([("Add", [..., draw(12)], {})], ("n", 12), tmp_path / "m.onnx")
    whole = path.read_bytes()
    for cut in range(0, len(whole), 7):
        path.write_bytes(whole[:cut])
        with pytest.raises(UserError):
            read_onnx(path)
    path.write_bytes(b"")
    with pytest.raises(UserError, match="it has no nodes"):
        read_onnx(path)
    model = onnx.load_model_from_string(whole)
    (constant,) = model.graph.initializer

    def raises(words: str, **fields: Any) -> None:
        for key, value in fields.items():
            if isinstance(value, list):
                constant.ClearField(key)
                getattr(constant, key).extend(value)
            else:
                setattr(constant, key, value)
        path.write_bytes(model.SerializeToString())
        with pytest.raises(UserError, match=words):
            read_onnx(path)

    raises("more than 268,435,456 numbers", dims=[2**40, 2**40])
    raises("reshape", dims=[2**27])
    raises("constants of type", dims=[12], data_type=onnx.TensorProto.FLOAT8E4M3FN)
    raises("constants of type 99", data_type=99)
    entry = onnx.StringStringEntryProto(key="location", value="../secret")
    (tmp_path.parent / "secret").write_bytes(bytes(48))
    raises("'../secret', outside its folder", data_type=1, external_data=[entry],
           data_location=onnx.TensorProto.EXTERNAL)  # fmt: skip
    (tmp_path / "link").symlink_to(tmp_path.parent / "secret")
    raises(
        "outside its folder",
        external_data=[onnx.StringStringEntryProto(key="location", value="link")],
    )
    (tmp_path / "near").write_bytes(draw(12).tobytes())
    constant.external_data[0].value = "near"
    constant.ClearField("raw_data")
    path.write_bytes(model.SerializeToString())
    agree(path, draw(2, 12))
