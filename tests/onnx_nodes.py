"""Small ONNX files: operators in a row, networks, and one staircase written in many ways."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

RNG = np.random.default_rng(0)
MICROSOFT = "com.microsoft"
Node = tuple[str, list[Any], dict[str, Any]]


def draw(*shape: int) -> NDArray[np.float32]:
    return RNG.standard_normal(shape).astype(np.float32)


def whole(low: int, high: int, *shape: int, kind: Any = np.int8) -> NDArray[Any]:
    return RNG.integers(low, high + 1, shape).astype(kind)


def f(value: float | list[float]) -> NDArray[np.float32]:
    return np.array(value, np.float32)


def u8(value: int) -> NDArray[np.uint8]:
    return np.array(value, np.uint8)


def i8(value: int) -> NDArray[np.int8]:
    return np.array(value, np.int8)


def ints(*values: int) -> NDArray[np.int64]:
    return np.array(values, np.int64)


def built(
    nodes: list[Node], shape: tuple[Any, ...], path: Path, *, opset: int = 21, of: int = 1
) -> Path:
    """A file of the nodes in a row: `...` is the node before, at first the input `x`."""
    made, constants, last = [], [], "x"
    for i, (kind, inputs, attributes) in enumerate(nodes):
        names = []
        for j, value in enumerate(inputs):
            if isinstance(value, np.ndarray):
                constants.append(numpy_helper.from_array(value, f"c{i}_{j}"))
                names.append(f"c{i}_{j}")
            else:
                names.append(last if value is ... else value)
        attributes = dict(attributes)
        outputs = attributes.pop("outputs", [f"y{i}"])
        made.append(helper.make_node(kind, names, outputs, **attributes))
        last = outputs[0]
    end = helper.make_empty_tensor_value_info(last)
    start = helper.make_tensor_value_info("x", of, shape)
    graph = helper.make_graph(made, "g", [start], [end], constants)
    sets = [helper.make_opsetid("", opset), helper.make_opsetid(MICROSOFT, 1)]
    path.write_bytes(
        helper.make_model(graph, opset_imports=sets, ir_version=10).SerializeToString()
    )
    return path


def network(path: Path, batch: Any = "n") -> Path:
    """Convolutions, a sum of two branches, pools and a softmax."""

    def conv(*shape: int) -> NDArray[Any]:
        return np.asarray(draw(*shape) / np.sqrt(np.prod(shape[1:])), np.float32)

    nodes: list[Node] = [
        ("Conv", [..., conv(8, 3, 3, 3), draw(8) / 5], {"pads": [1] * 4}),
        ("Relu", [...], {"outputs": ["a"]}),
        ("Conv", [..., conv(8, 8, 3, 3), draw(8) / 5], {"pads": [1] * 4}), ("Add", [..., "a"], {}),
        ("Relu", [...], {}), ("MaxPool", [...], {"kernel_shape": [2, 2], "strides": [2, 2]}),
        ("Conv", [..., conv(16, 8, 3, 3), draw(16) / 5], {}), ("Sigmoid", [...], {}),
        ("GlobalAveragePool", [...], {}), ("Flatten", [...], {}),
        ("Gemm", [..., 20 * conv(5, 16), draw(5)], {"transB": 1}), ("Softmax", [...], {}),
    ]  # fmt: skip
    return built(nodes, (batch, 3, 8, 8), path, opset=17)


UNARY = """Abs Ceil Celu Cos Elu Erf Exp Flatten Floor Gelu GlobalAveragePool GlobalMaxPool
HardSigmoid HardSwish Identity LeakyRelu LogSoftmax Mish Neg Relu Round Selu Sigmoid Sign Sin
Softmax Softplus Softsign Tanh ThresholdedRelu"""
BINARY = "Add Div Max Mean Min Mul PRelu Sub Sum"
REDUCED = """ReduceL1 ReduceL2 ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum
ReduceSumSquare"""
IMAGE, ROWS = (2, 6, 7, 5), (2, 12)
Q = (f(0.03), u8(120))
MS: dict[str, Any] = {"domain": MICROSOFT}
AS_QLINEAR: dict[str, dict[str, Any]] = {
    "QLinearSigmoid": {}, "QLinearLeakyRelu": {"alpha": 0.2},
    "QLinearGlobalAveragePool": {"channels_last": 0},
    "QLinearAveragePool": {"kernel_shape": [3, 2], "pads": [1, 0, 0, 1]},
}  # fmt: skip
FLOATS: dict[str, tuple[tuple[int, ...], list[Node]]] = {
    **{kind: (IMAGE, [(kind, [...], {})]) for kind in UNARY.split()},
    **{f"{kind} of numbers": (IMAGE, [(kind, [..., draw(6, 1, 1)], {})])
       for kind in BINARY.split()},
    **{f"{kind} of axes": (IMAGE, [(kind, [..., ints(1, 3)], {"keepdims": 0})])
       for kind in REDUCED.split()},
    "roots": (ROWS, [("Abs", [...], {}), ("Sqrt", [...], {}), ("Add", [..., f(1)], {}),
                     ("Log", [...], {}), ("Pow", [..., f(2)], {}), ("Add", [..., f(1)], {}),
                     ("Reciprocal", [...], {})]),
    "Clip": (ROWS, [("Clip", [..., f(-0.5), f(0.7)], {})]),
    "Clip, one end": (ROWS, [("Clip", [..., "", f(0.7)], {})]),
    "Gelu tanh": (ROWS, [("Gelu", [...], {"approximate": "tanh"})]),
    "BiasGelu": (ROWS, [("BiasGelu", [..., draw(12)], MS)]),
    "QuickGelu": (ROWS, [("QuickGelu", [...], MS)]),
    "FusedMatMul": (ROWS, [("FusedMatMul", [..., draw(5, 12)],
                            {"domain": MICROSOFT, "transB": 1, "alpha": 0.5})]),
    "FusedConv": (IMAGE, [("FusedConv", [..., draw(4, 6, 3, 3), draw(4)],
                           {"domain": MICROSOFT, "activation": "LeakyRelu",
                            "activation_params": [0.3]})]),
    "Gemm": (ROWS, [("Gemm", [..., draw(5, 12), draw(5)],
                     {"transB": 1, "alpha": 0.5, "beta": 2.0})]),
    "MatMul": (IMAGE, [("MatMul", [..., draw(5, 9)], {})]),
    "Einsum": (ROWS, [("Einsum", [..., draw(12, 3)], {"equation": "ij,jk->ik"})]),
    "grouped Conv": (IMAGE, [("Conv", [..., draw(4, 3, 3, 3), draw(4)], {"group": 2})]),
    "Conv of lines": ((2, 6, 9), [("Conv", [..., draw(4, 6, 3)], {"pads": [2, 0]})]),
    "ConvTranspose": (IMAGE, [("ConvTranspose", [..., draw(6, 4, 3, 3), draw(4)],
                               {"strides": [2, 3], "pads": [1, 0, 0, 1],
                                "output_padding": [1, 2]})]),
    "BatchNormalization": (IMAGE, [("BatchNormalization",
                                    [..., draw(6), draw(6), draw(6), draw(6) ** 2], {})]),
    "InstanceNormalization": (IMAGE, [("InstanceNormalization", [..., draw(6), draw(6)], {})]),
    "LayerNormalization": (IMAGE, [("LayerNormalization", [..., draw(7, 5), draw(7, 5)],
                                    {"axis": -2})]),
    "SkipLayerNormalization": ((2, 7, 5), [("Relu", [...], {}), ("SkipLayerNormalization", [
        ..., "x", draw(5), draw(5), draw(5)], MS | {"outputs": ["a", "", "", "b"]}),
        ("Mul", ["a", "b"], {})]),
    "GroupNormalization": (IMAGE, [("GroupNormalization", [..., draw(6), draw(6)],
                                    {"num_groups": 3})]),
    "LRN": (IMAGE, [("LRN", [...], {"size": 3, "alpha": 0.5})]),
    "LpNormalization": (IMAGE, [("LpNormalization", [...], {"axis": 1})]),
    "shapes": (IMAGE, [("Unsqueeze", [..., ints(1, -1)], {}), ("Squeeze", [..., ints(1)], {}),
                       ("Reshape", [..., ints(0, -1, 5)], {}),
                       ("Transpose", [...], {"perm": [0, 2, 1]}),
                       ("Expand", [..., ints(5, 1)], {}), ("Tile", [..., ints(1, 1, 2)], {})]),
    "a size that is computed": (IMAGE, [
        ("Shape", ["x"], {"end": 1}), ("Concat", [..., ints(-1)], {"axis": 0}),
        ("Reshape", ["x", ...], {})]),
    "cut": (IMAGE, [("Slice", [..., ints(-1, 1), ints(-100, 4), ints(1, 2), ints(-2, 1)], {}),
                    ("Gather", [..., ints(2, -1, 0)], {"axis": -1}),
                    ("Split", [..., ints(1, 2)], {"axis": 1, "outputs": ["a", "b"]}),
                    ("Concat", ["b", "a", "b"], {"axis": 1})]),
    "Pad": (IMAGE, [("Pad", [..., ints(0, 0, 1, 2, 0, 0, 0, -1), f(3)], {})]),
    "Pad reflect": (IMAGE, [("Pad", [..., ints(1, 2, 2, 0), "", ints(2, 3)],
                             {"mode": "reflect"})]),
    "Pad edge": (IMAGE, [("Pad", [..., ints(1, 3), "", ints(3)], {"mode": "edge"})]),
    "DepthToSpace": ((2, 8, 3, 2), [("DepthToSpace", [...], {"blocksize": 2})]),
    "DepthToSpace CRD": ((2, 8, 3, 2), [("DepthToSpace", [...], {"blocksize": 2, "mode": "CRD"})]),
    "Where": (ROWS, [("Greater", [..., f(0)], {}), ("Where", [..., "x", f(-2)], {})]),
    "Cast": (ROWS, [("Cast", [...], {"to": TensorProto.INT32}),
                    ("Cast", [...], {"to": TensorProto.FLOAT})]),
    "half": (ROWS, [("Cast", [...], {"to": TensorProto.FLOAT16}), ("CastLike", [..., "x"], {})]),
    "ConstantOfShape": (ROWS, [
        ("ConstantOfShape", [ints(12)], {"value": numpy_helper.from_array(np.ones(1, np.float32))}),
        ("Add", ["x", ...], {})]),
    **{f"Resize {mode} {how} {near} {size}": (IMAGE, [
        ("Resize", [..., "", *(["", ints(*size)] if isinstance(size, tuple) else [f([size] * 2)])],
         {"mode": mode, "coordinate_transformation_mode": how, "nearest_mode": near,
          "axes": [2, 3]})])
       for mode, how, near, size in (
        ("nearest", "asymmetric", "floor", 2.0), ("nearest", "half_pixel", "ceil", 1.7),
        ("nearest", "half_pixel", "round_prefer_floor", 0.6),
        ("nearest", "align_corners", "round_prefer_ceil", (4, 9)),
        ("linear", "half_pixel", "floor", 2.0), ("linear", "align_corners", "floor", (4, 9)),
        ("linear", "pytorch_half_pixel", "floor", (1, 9)), ("linear", "asymmetric", "floor", 0.6))},
}  # fmt: skip
CODES: dict[str, tuple[tuple[int, ...], list[Node]]] = {
    "QuantizeLinear": (IMAGE, []),
    "per channel": (IMAGE, [
        ("DequantizeLinear", [..., *Q], {}),
        ("QuantizeLinear", [..., abs(draw(6)) / 50 + f(0.01), whole(-9, 9, 6)], {"axis": 1})]),
    "16 bits": (ROWS, [("DequantizeLinear", [..., *Q], {}),
                       ("QuantizeLinear", [..., f(1e-3), np.array(7, np.int16)], {})]),
    "QLinearConv": (IMAGE, [("QLinearConv", [
        ..., *Q, whole(-127, 127, 4, 6, 3, 3), abs(draw(4)) / 100, whole(0, 0, 4), f(0.3), u8(99),
        whole(-5000, 5000, 4, kind=np.int32)], {"pads": [1, 0, 1, 1]})]),
    "QLinearMatMul": (ROWS, [("QLinearMatMul", [
        ..., *Q, whole(-127, 127, 12, 5), abs(draw(5)) / 100, whole(0, 0, 5), f(0.3), u8(99)],
        {})]),
    "QGemm": (ROWS, [("QGemm", [
        ..., *Q, whole(-127, 127, 5, 12), f(0.01), i8(0), whole(-999, 999, 5, kind=np.int32),
        f(0.2), u8(100)], {"transB": 1, "domain": MICROSOFT})]),
    "QGemm to floats": (ROWS, [("QGemm", [
        ..., *Q, whole(-127, 127, 5, 12), f(0.01), i8(0), whole(-999, 999, 5, kind=np.int32)],
        {"transB": 1, "domain": MICROSOFT})]),
    "QLinearAdd": (IMAGE, [("QLinearAdd", [
        ..., *Q, whole(0, 255, 6, 7, 5, kind=np.uint8), f(0.02), u8(99), f(0.05), u8(101)],
        MS)]),
    "QLinearMul": (IMAGE, [("QLinearMul", [
        ..., *Q, whole(0, 255, 6, 7, 5, kind=np.uint8), f(0.02), u8(99), f(0.05), u8(101)],
        MS)]),
    "QLinearConcat": (IMAGE, [("QLinearConcat", [
        f(0.05), u8(101), ..., *Q, whole(0, 255, 2, 1, 7, 5, kind=np.uint8), f(0.02), u8(99)],
        {"axis": 1, "domain": MICROSOFT})]),
    **{kind: (IMAGE, [(kind, [..., *Q, f(0.0117), u8(90)], {**AS_QLINEAR[kind], **MS})])
       for kind in AS_QLINEAR},
    "QLinearSoftmax": (ROWS, [("QLinearSoftmax", [..., *Q, f(1 / 256), u8(0)],
                               {"domain": MICROSOFT, "opset": 13, "axis": -1})]),
    "Resize of codes": (IMAGE, [("Resize", [..., "", f([1, 1, 2, 1.7])], {"mode": "linear"})]),
    "on codes": (IMAGE, [("MaxPool", [...], {"kernel_shape": [2, 2]}),
                         ("Clip", [..., u8(110), u8(140)], {}),
                         ("Transpose", [...], {"perm": [0, 2, 3, 1]})]),
    "ConvInteger": (IMAGE, [
        ("ConvInteger", [..., whole(-127, 127, 4, 6, 3, 3), u8(120)], {}),
        ("Cast", [...], {"to": TensorProto.FLOAT})]),
    "MatMulInteger": (IMAGE, [
        ("MatMulInteger", [..., whole(-127, 127, 5, 4), u8(120), whole(-3, 3, 4)], {}),
        ("Cast", [...], {"to": TensorProto.FLOAT})]),
    "sums beyond float32": (ROWS, [
        ("MatMulInteger", [..., whole(0, 127, 12, 4), u8(0)], {}), ("Cast", [...], {"to": 1})]),
}  # fmt: skip


OLD: list[tuple[int, list[Node]]] = [
    (7, [("Upsample", [...], {"scales": [1.0, 1.0, 2.0, 3.0]})]),
    (9, [("Upsample", [..., np.array([1, 1, 2, 1.5], np.float32)], {"mode": "linear"})]),
    (10, [("Resize", [..., np.array([1, 1, 0.6, 2], np.float32)], {}),
          ("Slice", [..., ints(1), ints(4), ints(3)], {})]),
    (9, [("Slice", [...], {"starts": [1], "ends": [4], "axes": [3]}),
         ("Pad", [...], {"pads": [0, 0, 1, 0, 0, 0, 0, 2], "value": 2.0}),
         ("Clip", [...], {"min": -0.5, "max": 0.7}), ("Softmax", [...], {})]),
    (11, [("ReduceMean", [...], {"axes": [2]}), ("Squeeze", [...], {"axes": [2]}),
          ("Unsqueeze", [...], {"axes": [1]}), ("LogSoftmax", [...], {"axis": 2}),
          ("Split", [...], {"axis": 3, "split": [2, 3], "outputs": ["a", "b"]})]),
    (18, [("GroupNormalization", [..., draw(3), draw(3)], {"num_groups": 3})]),
]  # fmt: skip
HALF, STEP = f(0.5), f(2)
WAYS: dict[str, list[Node]] = {
    "QDQ": [("QuantizeLinear", [..., STEP, u8(0)], {}), ("Clip", [..., u8(0), u8(3)], {}),
            ("DequantizeLinear", [..., STEP, u8(0)], {})],
    "round": [("Clip", [..., f(0), f(6)], {}), ("Div", [..., STEP], {}), ("Round", [...], {}),
              ("Mul", [..., STEP], {})],
    "clip after it": [("Mul", [..., HALF], {}), ("Round", [...], {}),
                      ("Clip", [..., f(0), f(3)], {}), ("Mul", [..., STEP], {})],
    "comparisons": [("Mul", [..., HALF], {}), ("Round", [...], {"outputs": ["r"]}),
                    ("Greater", [..., f(3)], {}), ("Where", [..., f(3), "r"], {"outputs": ["h"]}),
                    ("Less", [..., f(0)], {}), ("Where", [..., f(0), "h"], {}),
                    ("Mul", [..., STEP], {})],
    "floor": [("Clip", [..., f(0), f(6)], {}), ("Mul", [HALF, ...], {}), ("Add", [HALF, ...], {}),
              ("Floor", [...], {}), ("Mul", [STEP, ...], {})],
    "cast": [("Relu", [...], {}), ("Mul", [..., HALF], {}), ("Add", [..., HALF], {}),
             ("Min", [..., f(3.5)], {}), ("Cast", [...], {"to": TensorProto.UINT8}),
             ("Cast", [...], {"to": TensorProto.FLOAT}), ("Mul", [..., STEP], {})],
    "detached": [("Clip", [..., f(0), f(6)], {"outputs": ["r"]}), ("Mul", [..., HALF], {}),
                 ("Round", [...], {}), ("Mul", [..., STEP], {}), ("Sub", [..., "r"], {}),
                 ("Add", ["r", ...], {})],
}  # fmt: skip
