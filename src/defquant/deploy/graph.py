"""A `Program` as an ONNX graph: QuantizeLinear, DequantizeLinear and float operations between.

Runtimes fuse DequantizeLinear -> Conv -> QuantizeLinear into one integer convolution. What keeps
onnxruntime from leaving some in float, measured with 1.32: codes of fewer than 8 bits are clipped
after QuantizeLinear, as uint8, never before it; every convolution ends in a QuantizeLinear; weights
of 4 and 2 bits are unpacked by a table into int8, which the runtime folds when it loads the file.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from defquant.deploy import floats
from defquant.deploy.program import Add, Affine, Conv, Linear, MaxPool, Op, Program, Quantize
from defquant.errors import UserError, shown
from defquant.integers import Floats, Weight

__all__ = ["METADATA", "OPERATORS", "OPSET", "Input", "Writer", "graph", "packed", "unpacked"]

OPSET = 21
OPERATORS = {
    "Abs", "Add", "AveragePool", "BatchNormalization", "Cast", "Ceil", "Clip", "Concat", "Conv",
    "ConvTranspose", "DepthToSpace", "DequantizeLinear", "Div", "Elu", "Erf", "Exp", "Expand",
    "Flatten", "Floor", "Gather", "Gelu", "Gemm", "GlobalAveragePool", "GroupNormalization",
    "HardSigmoid", "HardSwish", "Identity", "InstanceNormalization", "LayerNormalization",
    "LeakyRelu", "Log", "LogSoftmax", "MatMul", "Max", "MaxPool", "Min", "Mish", "Mul", "Neg",
    "PRelu", "Pad", "Pow",
    "QuantizeLinear", "Reciprocal", "ReduceL2", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceSum",
    "Relu", "Reshape", "Resize", "Round", "Selu", "Shape", "Sigmoid", "Sign", "Slice", "Softmax",
    "Softplus", "Sqrt", "Sub", "Tanh", "Transpose",
}  # fmt: skip
"""All that `graph` writes."""
METADATA = "defquant"
Input = Literal["float", "uint8"]


def graph(
    program: Program,
    *,
    input_type: Input = "float",
    integers: bool = True,
    facts: Mapping[str, Any] | None = None,
) -> onnx.ModelProto:
    """The model: `image` (batch, c, h, w), float in [0, 1] or uint8, to `logits` (batch, classes).

    With `integers=False` the same network in float32, clipped but not rounded: what it would cost
    without quantisation. `facts` are kept as JSON under `METADATA`.
    """
    writer = Writer(program, integers)
    for op in program.ops:
        writer.add(op, input_type)
    kind = TensorProto.FLOAT if input_type == "float" or not integers else TensorProto.UINT8
    image = helper.make_tensor_value_info("image", kind, ["batch", *program.shape])
    ends: list[str | int] = ["batch", program.classes]
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ends)
    writer.nodes[-1].output[0] = "logits"
    body = helper.make_graph(
        writer.nodes, "defquant", [image], [logits], initializer=writer.constants
    )
    model = helper.make_model(
        body,
        opset_imports=[helper.make_opsetid("", OPSET)],
        producer_name="defquant",
        ir_version=10,
    )
    helper.set_model_props(model, {METADATA: json.dumps(facts or {})})
    try:
        onnx.checker.check_model(model, full_check=True)
    except Exception as error:  # the checker's and shape inference's own
        raise UserError(f"cannot export: {shown(str(error), 200)}") from None
    return model


class Writer:
    """Nodes and constants, in order; each constant once."""

    def __init__(self, program: Program, integers: bool) -> None:
        self.program, self.integers = program, integers
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self.known: dict[tuple[str, bytes, tuple[int, ...]], str] = {}
        self.floats: dict[tuple[str, float], str] = {}

    def add(self, op: Op, input_type: Input) -> None:
        if isinstance(op, Quantize) and op.source == "image":
            if not self.integers or input_type == "uint8":
                self.node("Identity", ["image"], op.name)
            else:
                self.codes(op.name, "image")
        elif isinstance(op, Quantize):
            self.codes(op.name, self.real(op.source))
        elif isinstance(op, Conv):
            self.convolution(op)
        elif isinstance(op, MaxPool):
            self.node(
                "MaxPool", [op.source], op.name, kernel_shape=op.kernel, strides=op.stride,
                pads=[*op.padding, *op.padding], ceil_mode=int(op.ceil),
            )  # fmt: skip
        elif isinstance(op, Add):
            terms = [self.real(name, factor) for name, factor in op.terms]
            # onnxruntime makes one rounding of two with nothing, or an Identity, between them
            alone = "Max" if op.terms[0][0] in self.program.grids else "Identity"
            self.node("Add" if len(terms) > 1 else alone, terms, op.name)
        elif isinstance(op, Affine):
            self.affine(op.name, op.source, op.scale, op.bias)
        elif isinstance(op, Linear):
            self.linear(op)
        else:
            floats.write(self, op)

    def affine(self, name: str, source: str, scale: Floats, bias: Floats) -> str:
        zeros = np.zeros_like(bias)
        values = (scale, bias, zeros, zeros + 1)  # one pass where Mul and Add take two
        inputs = [self.real(source), *map(self.constant, values)]
        return self.node("BatchNormalization", inputs, name, epsilon=0.0)

    def linear(self, op: Linear) -> str:
        source, bias = self.real(op.source), self.constant(op.bias)
        if op.rank == 2:
            end = op is self.program.ops[-1]
            sums = op.name if end else f"{op.name}/sums"
            self.node("Gemm", [source, self.weight(op), bias], sums, transB=1)
            return sums if end else self.apart(sums, op.name)
        turned = self.node("Transpose", [self.weight(op)], f"{op.name}/turned", perm=(1, 0))
        product = self.node("MatMul", [source, turned], f"{op.name}/product")
        return self.node("Add", [product, bias], op.name)

    def convolution(self, op: Conv) -> None:
        unit = np.float32(self.program.grids[op.source].scale) * op.weight.scale
        if self.integers:
            bias = self.node(
                "DequantizeLinear",
                [self.constant(op.bias, f"{op.layer}.bias"), self.constant(unit)],
                f"{op.name}/bias", axis=0,
            )  # fmt: skip
        else:
            floats = (op.bias * unit.astype(np.float64)).astype(np.float32)
            if op.alone:  # as a float network has it
                gain = op.weight.integers.ravel() * op.weight.scale
                self.codes(op.name, self.affine(f"{op.name}/sums", op.source, gain, floats))
                return
            bias = self.constant(floats)
        inputs = [self.real(op.source), self.weight(op), bias]
        sums = self.node(
            "Conv", inputs, f"{op.name}/sums", kernel_shape=op.weight.integers.shape[2:],
            strides=op.stride, pads=op.padding, dilations=op.dilation,
            group=op.groups,
        )  # fmt: skip
        self.codes(op.name, sums)

    def codes(self, name: str, source: str) -> None:
        """`source` rounded and clipped onto the grid of `name`."""
        grid = self.program.grids[name]
        if not self.integers:
            if grid.zero:
                self.node("Identity", [source], name)
            else:
                ends = [self.constant(np.float32(v)) for v in (0, grid.scale * grid.top)]
                self.node("Clip", [source, *ends], name)
            return
        scale, zero = self.constant(np.float32(grid.scale)), self.constant(np.uint8(grid.zero))
        clipped = grid.top < 255
        whole = f"{name}/whole" if clipped else name
        self.node("QuantizeLinear", [source, scale, zero], whole)
        if clipped:
            ends = [self.constant(np.uint8(0)), self.constant(np.uint8(grid.top))]
            self.node("Clip", [whole, *ends], name)

    def real(self, name: str, factor: float = 1.0) -> str:
        """factor · the tensor, in floats; one dequantisation for all that need the same."""
        if (name, factor) in self.floats:
            return self.floats[name, factor]
        grid = self.program.grids.get(name)
        suffix = f"/real{len(self.floats)}"
        if grid is not None and self.integers:
            values = np.float32(grid.scale * factor), np.uint8(grid.zero)
            constants = [self.constant(np.asarray(value)) for value in values]
            result = self.node("DequantizeLinear", [name, *constants], name + suffix)
        elif factor == 1:
            result = name
        else:
            result = self.node("Mul", [name, self.constant(np.float32(factor))], name + suffix)
        self.floats[name, factor] = result
        return result

    def apart(self, source: str, output: str) -> str:
        """`source` again, without the rounding that follows beside what made it.

        Between two roundings onnxruntime gives a float convolution int8 weights of its own, of one
        scale for all channels, and a linear layer a bias in whole units of its products; an average
        over windows beyond the border is divided by the whole window, and a softmax looked up.
        """
        return self.node("Max" if self.integers else "Identity", [source], output)

    def weight(self, op: Conv | Linear) -> str:
        layer, weight = op.layer, op.weight
        shape = weight.integers.shape
        scales = weight.scale.reshape(-1, *[1] * (len(shape) - 1))
        if not self.integers:
            return self.constant(weight.integers * scales, f"{layer}.weight")
        if weight.bits > 4:
            stored = self.constant(weight.integers, f"{layer}.weight")
        else:
            stored = self.unpack(op.name, layer, weight)
        return self.node(
            "DequantizeLinear", [stored, self.constant(weight.scale)], f"{op.name}/weight", axis=0
        )

    def unpack(self, name: str, layer: str, weight: Weight) -> str:
        """Nodes from packed bytes to int8: each byte is looked up, then the padding cut off."""
        fields = packed(weight)
        table = self.constant(_table(weight.bits, weight.multiple))
        indices = self.node(
            "Cast",
            [self.constant(fields, f"{layer}.weight")],
            f"{name}/bytes",
            to=TensorProto.INT32,
        )
        rows = self.node("Gather", [table, indices], f"{name}/rows")
        flat = self.node("Reshape", [rows, self.constant(np.array([-1]))], f"{name}/flat")
        if weight.integers.size != fields.size * (8 // weight.bits):
            ends = [self.constant(np.array([v])) for v in (0, weight.integers.size)]
            flat = self.node("Slice", [flat, *ends], f"{name}/cut")
        shape = self.constant(np.array(weight.integers.shape))
        return self.node("Reshape", [flat, shape], f"{name}/integers")

    def node(self, kind: str, inputs: Sequence[str], output: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(kind, inputs, [output], **attributes))
        return output

    def constant(self, value: "NDArray[Any] | np.generic", name: str | None = None) -> str:
        array = np.asarray(value)
        key = (str(array.dtype), array.tobytes(), array.shape)
        if key not in self.known:
            free = name is not None and name not in self.known.values()
            self.known[key] = str(name) if free else f"#{len(self.known)}"
            self.constants.append(numpy_helper.from_array(array, self.known[key]))
        return self.known[key]


def packed(weight: Weight) -> NDArray[np.uint8]:
    """integers / multiple as two's complement fields of 4 or 2 bits, the first one lowest."""
    per_byte = 8 // weight.bits
    fields = (weight.integers // weight.multiple).astype(np.uint8).ravel() & (2**weight.bits - 1)
    fields = np.pad(fields, (0, -fields.size % per_byte)).reshape(-1, per_byte)
    shifts = np.arange(per_byte, dtype=np.uint8) * weight.bits
    result: NDArray[np.uint8] = np.bitwise_or.reduce(fields << shifts, axis=1).astype(np.uint8)
    return result


def _table(bits: int, multiple: int) -> NDArray[np.int8]:
    """The int8 weights in each of the 256 bytes, (256, 8 / bits)."""
    shifts = np.arange(8 // bits) * bits
    fields = (np.arange(256)[:, None] >> shifts) & (2**bits - 1)
    signed = np.where(fields >= 2 ** (bits - 1), fields - 2**bits, fields)
    # the most negative field does not occur in a narrow range, and its multiple may not fit
    result: NDArray[np.int8] = (np.maximum(signed, 1 - 2 ** (bits - 1)) * multiple).astype(np.int8)
    return result


def unpacked(fields: NDArray[np.uint8], bits: int, multiple: int, size: int) -> NDArray[np.int8]:
    """The inverse of `packed`, flat: what the nodes of the file compute."""
    return _table(bits, multiple)[fields].ravel()[:size]
