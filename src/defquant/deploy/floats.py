"""What stays in floats: each torch operation that a file may hold, and its ONNX operators."""

import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeAlias

import numpy as np

from defquant.captured import RESHAPES
from defquant.deploy.program import Call, Name
from defquant.errors import UserError

__all__ = ["KNOWN", "borders", "pair", "write"]


class Nodes(Protocol):
    """What is written into: each gives the name of its result in the file."""

    def node(self, kind: str, inputs: Sequence[str], output: str, **attributes: Any) -> str: ...
    def constant(self, value: Any) -> str: ...
    def real(self, name: str) -> str: ...


_Write: TypeAlias = "Callable[[Nodes, Call, Any], None]"
"""Writes one call, given a `_Given` of its arguments."""


class _Given:
    """The arguments of a call by position or name, tensors as names in the file."""

    def __init__(self, out: Nodes, call: Call) -> None:
        self.out, self.call = out, call
        self.kwargs = dict(call.kwargs)

    def tensor(self, index: int, name: str = "") -> str:
        return self.named(self.plain(index, name))

    def named(self, value: Any) -> str:
        if isinstance(value, Name):
            return self.out.real(value.value)
        return self.out.constant(np.asarray(value, np.float32))

    def plain(self, index: int, name: str = "", default: Any = None) -> Any:
        if index < len(self.call.args):
            return self.call.args[index]
        return self.kwargs.get(name, default)

    @property
    def rank(self) -> int:
        """Of the result."""
        return len(self.call.size)

    def dims(self, value: Any, rank: int | None = None) -> list[int]:
        """Not negative, sorted."""
        rank = rank or self.rank
        given = value if isinstance(value, tuple | list) else [value]
        return sorted(int(d) % rank for d in given)


def write(out: Nodes, call: Call) -> None:
    """The nodes of `call`, the last of which gives `call.name`.

    Raises `UserError` for arguments that the operators of a file do not have, by the layer's name.
    """
    try:
        _TABLE[call.operation.rpartition(".")[0]](out, call, _Given(out, call))
    except UserError:
        raise
    except (TypeError, ValueError, LookupError, AttributeError):  # arguments that no one foresaw
        raise _refused(call, "has arguments that a file does not have") from None


def _refused(call: Call, why: str) -> UserError:
    return UserError(f"cannot export layer {call.layer!r}: {call.kind} {why}")


def _plain(kind: str, **attributes: Any) -> _Write:
    """One operator of the same meaning, of the first argument."""
    return lambda out, call, given: _put(out, call, kind, [given.tensor(0)], **attributes)


def _put(out: Nodes, call: Call, kind: str, inputs: Sequence[str], **attributes: Any) -> None:
    out.node(kind, inputs, call.name, **attributes)


def _both(kind: str) -> _Write:
    def both(out: Nodes, call: Call, given: _Given) -> None:
        if given.kwargs.get("rounding_mode"):
            raise _refused(call, "must not round")
        second = given.tensor(1)
        alpha = given.plain(2, "alpha", 1)
        if alpha != 1:
            factor = out.constant(np.float32(alpha))
            second = out.node("Mul", [second, factor], f"{call.name}/alpha")
        _put(out, call, kind, [given.tensor(0), second])

    return both


def _clip(low: float | None, high: float | None) -> _Write:
    """Between fixed ends, or those that are given."""

    def clip(out: Nodes, call: Call, given: _Given) -> None:
        ends = [given.plain(1, "min", low), given.plain(2, "max", high)]
        names = [out.constant(np.float32(end)) if end is not None else "" for end in ends]
        _put(out, call, "Clip", [given.tensor(0), *names])

    return clip


def _global(out: Nodes, call: Call, given: _Given) -> None:
    if call.size[2:] != (1, 1):
        raise _refused(call, "must end in 1x1")
    _put(out, call, "GlobalAveragePool", [given.tensor(0)])


def _silu(out: Nodes, call: Call, given: _Given) -> None:
    x = given.tensor(0)
    _put(out, call, "Mul", [x, out.node("Sigmoid", [x], f"{call.name}/sigmoid")])


def _rsqrt(out: Nodes, call: Call, given: _Given) -> None:
    root = out.node("Sqrt", [given.tensor(0)], f"{call.name}/root")
    _put(out, call, "Reciprocal", [root])


def _gelu(out: Nodes, call: Call, given: _Given) -> None:
    kind = given.plain(1, "approximate", "none")
    _put(out, call, "Gelu", [given.tensor(0)], approximate=kind)


def _slope(kind: str, default: float) -> _Write:
    def slope(out: Nodes, call: Call, given: _Given) -> None:
        _put(out, call, kind, [given.tensor(0)], alpha=float(given.plain(1, "alpha", default)))

    return slope


def _softmax(kind: str) -> _Write:
    def softmax(out: Nodes, call: Call, given: _Given) -> None:
        (axis,) = given.dims(given.plain(1, "dim"))
        _put(out, call, kind, [given.tensor(0)], axis=axis)

    return softmax


def _reduce(kind: str) -> _Write:
    def reduce(out: Nodes, call: Call, given: _Given) -> None:
        keep, dims = bool(given.plain(2, "keepdim", False)), given.plain(1, "dim")
        count = len(dims) if isinstance(dims, tuple | list) else 1
        rank = given.rank + (0 if keep else count)
        axes = given.dims(dims, rank)
        if kind == "ReduceMean" and axes == [2, 3] and rank == 4:
            pooled = out.node("GlobalAveragePool", [given.tensor(0)],
                              call.name if keep else f"{call.name}/image")  # fmt: skip
            if not keep:
                _put(out, call, "Flatten", [pooled])
            return
        _put(out, call, kind, [given.tensor(0), out.constant(np.array(axes))], keepdims=int(keep))

    return reduce


def _reshape(out: Nodes, call: Call, given: _Given) -> None:
    """To the known size of the result; the batch is what is left."""
    size = out.constant(np.array(call.size))
    _put(out, call, "Reshape", [given.tensor(0), size])


def _permute(out: Nodes, call: Call, given: _Given) -> None:
    order = list(range(given.rank))
    if call.kind == "permute":
        order = [int(d) % given.rank for d in given.plain(1, "dims")]
    else:
        one, other = (int(given.plain(i, f"dim{i - 1}")) % given.rank for i in (1, 2))
        order[one], order[other] = other, one
    _put(out, call, "Transpose", [given.tensor(0)], perm=order)


def _cat(out: Nodes, call: Call, given: _Given) -> None:
    (axis,) = given.dims(given.plain(1, "dim", 0))
    _put(out, call, "Concat", [given.named(part) for part in given.plain(0)], axis=axis)


def _slice(out: Nodes, call: Call, given: _Given) -> None:
    (axis,) = given.dims(given.plain(1, "dim", 0))
    start, end = given.plain(2, "start") or 0, given.plain(3, "end")
    end = np.iinfo(np.int64).max if end is None else end
    ends = (np.array([v]) for v in (start, end, axis, given.plain(4, "step", 1)))
    _put(out, call, "Slice", [given.tensor(0), *map(out.constant, ends)])


def _select(out: Nodes, call: Call, given: _Given) -> None:
    (axis,) = given.dims(given.plain(1, "dim"), given.rank + 1)
    index = out.constant(np.array(given.plain(2, "index")))
    _put(out, call, "Gather", [given.tensor(0), index], axis=axis)


def _expand(out: Nodes, call: Call, given: _Given) -> None:
    """Of a constant over the images, or of dimensions of size 1."""
    if call.size[0] != -1:
        raise _refused(call, "must keep the images first")
    _put(out, call, "Expand", [given.tensor(0), _sized(out, call)])


def _sized(out: Nodes, call: Call) -> str:
    """The size of the result, whose first dimension is the images."""
    rest = out.constant(np.array(call.size[1:], np.int64))
    shape = out.node("Shape", ["image"], f"{call.name}/images", start=0, end=1)
    return out.node("Concat", [shape, rest], f"{call.name}/size", axis=0)


def _attention(out: Nodes, call: Call, given: _Given) -> None:
    """softmax(scale · q k') v, without a mask."""
    if given.plain(3, "attn_mask") is not None or given.plain(5, "is_causal"):
        raise _refused(call, "must not be masked")
    q, k, v = (given.tensor(i) for i in range(3))
    scale = given.plain(6, "scale") or 1 / math.sqrt(call.size[-1])
    order = [*range(given.rank - 2), given.rank - 1, given.rank - 2]
    turned = out.node("Transpose", [k], f"{call.name}/turned", perm=order)
    sums = out.node("MatMul", [q, turned], f"{call.name}/sums")
    scaled = out.node("Mul", [sums, out.constant(np.float32(scale))], f"{call.name}/scaled")
    shares = out.node("Softmax", [scaled], f"{call.name}/shares", axis=-1)
    _put(out, call, "MatMul", [shares, v])


def _layer_norm(out: Nodes, call: Call, given: _Given) -> None:
    shape = given.plain(1, "normalized_shape")
    weight, bias = given.plain(2, "weight"), given.plain(3, "bias")
    weight = np.ones(shape, np.float32) if weight is None else weight
    names = [given.named(v) for v in (weight, bias) if v is not None]
    _put(out, call, "LayerNormalization", [given.tensor(0), *names], axis=-len(shape),
         epsilon=float(given.plain(4, "eps", 1e-5)))  # fmt: skip


def _group_norm(out: Nodes, call: Call, given: _Given) -> None:
    channels = call.size[1]
    weight, bias = given.plain(2, "weight"), given.plain(3, "bias")
    weight = np.ones(channels, np.float32) if weight is None else weight
    bias = np.zeros(channels, np.float32) if bias is None else bias
    names = [given.named(v) for v in (weight, bias)]
    _put(out, call, "GroupNormalization", [given.tensor(0), *names],
         num_groups=int(given.plain(1)), epsilon=float(given.plain(4, "eps", 1e-5)))  # fmt: skip


def pair(value: Any) -> tuple[int, int]:
    """Of height and width, given as one number, as (one,) or as both."""
    values = value if isinstance(value, Sequence) else [value]
    return int(values[0]), int(values[-1])


def borders(padding: Any, kernel: Sequence[int], dilation: Sequence[int]) -> tuple[int, ...]:
    """(top, left, bottom, right) of a convolution's padding: numbers, `same` or `valid`."""
    if not isinstance(padding, str):
        return pair(padding) * 2
    same = padding == "same"
    total = [d * (k - 1) if same else 0 for d, k in zip(dilation, kernel, strict=True)]
    return (*(t // 2 for t in total), *(t - t // 2 for t in total))


def _max_pool(out: Nodes, call: Call, given: _Given) -> None:
    kernel = pair(given.plain(1))
    pads = pair(given.plain(3, "padding", 0))
    _put(out, call, "MaxPool", [given.tensor(0)], kernel_shape=kernel,
         strides=pair(given.plain(2, "stride") or kernel), pads=pads * 2,
         dilations=pair(given.plain(4, "dilation", 1)),
         ceil_mode=int(given.plain(5, "ceil_mode", False)))  # fmt: skip


def _average_pool(out: Nodes, call: Call, given: _Given) -> None:
    kernel = pair(given.plain(1))
    pads = pair(given.plain(3, "padding", 0))
    if given.plain(6, "divisor_override") is not None:
        raise _refused(call, "must divide by its window")
    _put(out, call, "AveragePool", [given.tensor(0)], kernel_shape=kernel,
         strides=pair(given.plain(2, "stride") or kernel), pads=pads * 2,
         ceil_mode=int(given.plain(4, "ceil_mode", False)),
         count_include_pad=int(given.plain(5, "count_include_pad", True)))  # fmt: skip


def _conv(out: Nodes, call: Call, given: _Given) -> None:
    weight = given.plain(1)
    stride, dilation = (pair(given.plain(i, n, 1)) for i, n in ((3, "stride"), (5, "dilation")))
    pads = borders(given.plain(4, "padding", 0), weight.shape[2:], dilation)
    bias = given.plain(2, "bias")
    names = [given.named(v) for v in (weight, bias) if v is not None]
    _put(out, call, "Conv", [given.tensor(0), *names], kernel_shape=weight.shape[2:],
         strides=stride, pads=pads, dilations=dilation,
         group=int(given.plain(6, "groups", 1)))  # fmt: skip


def _turned_conv(out: Nodes, call: Call, given: _Given) -> None:
    weight, bias = given.plain(1), given.plain(2, "bias")
    names = [given.named(v) for v in (weight, bias) if v is not None]
    stride, pads, more = (
        pair(given.plain(i, name, default))
        for i, name, default in ((3, "stride", 1), (4, "padding", 0), (5, "output_padding", 0))
    )
    _put(out, call, "ConvTranspose", [given.tensor(0), *names], kernel_shape=weight.shape[2:],
         strides=stride, pads=pads * 2, output_padding=more, group=int(given.plain(6, "groups", 1)),
         dilations=pair(given.plain(7, "dilation", 1)))  # fmt: skip


def _resize(out: Nodes, call: Call, given: _Given) -> None:
    """To the nearest pixel, or linear between pixels' centres or the outermost ones."""
    nearest = call.kind == "upsample_nearest2d"
    corners = not nearest and bool(given.plain(2, "align_corners"))
    factors = given.plain(2 if nearest else 3, "scale_factors")
    how = "asymmetric" if nearest else "align_corners" if corners else "half_pixel"
    if factors:
        ends = ["", out.constant(np.array([1, 1, *factors], np.float32))]
    else:
        ends = ["", "", _sized(out, call)]
    _put(out, call, "Resize", [given.tensor(0), *ends], nearest_mode="floor",
         mode="nearest" if nearest else "linear", coordinate_transformation_mode=how)  # fmt: skip


def _linear(out: Nodes, call: Call, given: _Given) -> None:
    weight, bias = given.plain(1), given.plain(2, "bias")
    product = out.node("MatMul", [given.tensor(0), out.constant(weight.T)], f"{call.name}/product")
    bias = np.zeros(len(weight), np.float32) if bias is None else bias
    _put(out, call, "Add", [product, given.named(bias)])


def _pad(out: Nodes, call: Call, given: _Given) -> None:
    mode = {"constant": "constant", "reflect": "reflect", "replicate": "edge", "circular": "wrap"}
    pairs = [int(v) for v in given.plain(1)]
    before, after = pairs[::2][::-1], pairs[1::2][::-1]
    free = [0] * (given.rank - len(before))
    pads = out.constant(np.array([*free, *before, *free, *after]))
    value = out.constant(np.float32(given.plain(3, "value") or 0))
    _put(out, call, "Pad", [given.tensor(0), pads, value],
         mode=mode[str(given.plain(2, "mode", "constant"))])  # fmt: skip


def _product(out: Nodes, call: Call, given: _Given) -> None:
    _put(out, call, "MatMul", [given.tensor(0), given.tensor(1)])


def _power(out: Nodes, call: Call, given: _Given) -> None:
    _put(out, call, "Pow", [given.tensor(0), given.tensor(1)])


_TABLE: dict[str, _Write] = {
    "aten.relu": _plain("Relu"), "aten.sigmoid": _plain("Sigmoid"), "aten.tanh": _plain("Tanh"),
    "aten.exp": _plain("Exp"), "aten.log": _plain("Log"), "aten.sqrt": _plain("Sqrt"),
    "aten.abs": _plain("Abs"), "aten.neg": _plain("Neg"), "aten.erf": _plain("Erf"),
    "aten.floor": _plain("Floor"), "aten.ceil": _plain("Ceil"), "aten.round": _plain("Round"),
    "aten.sign": _plain("Sign"), "aten.reciprocal": _plain("Reciprocal"),
    "aten.hardswish": _plain("HardSwish"), "aten.mish": _plain("Mish"),
    "aten.softplus": _plain("Softplus"), "aten.adaptive_avg_pool2d": _global,
    "aten.hardsigmoid": _plain("HardSigmoid", alpha=1 / 6, beta=0.5),
    "aten.silu": _silu, "aten.rsqrt": _rsqrt, "aten.gelu": _gelu, "aten.elu": _slope("Elu", 1.0),
    "aten.leaky_relu": _slope("LeakyRelu", 0.01), "aten.relu6": _clip(0, 6),
    "aten.hardtanh": _clip(-1, 1), "aten.clamp": _clip(None, None),
    "aten.clamp_min": _clip(None, None), "aten.add": _both("Add"), "aten.sub": _both("Sub"),
    "aten.mul": _both("Mul"), "aten.div": _both("Div"), "aten.maximum": _both("Max"),
    "aten.minimum": _both("Min"), "aten.pow": _power, "aten.softmax": _softmax("Softmax"),
    "aten.log_softmax": _softmax("LogSoftmax"), "aten.mean": _reduce("ReduceMean"),
    "aten.sum": _reduce("ReduceSum"), "aten.amax": _reduce("ReduceMax"),
    "aten.amin": _reduce("ReduceMin"), "aten.reshape": _reshape, "aten.permute": _permute,
    "aten.transpose": _permute, "aten.cat": _cat, "aten.slice": _slice, "aten.select": _select,
    "aten.expand": _expand, "aten.scaled_dot_product_attention": _attention,
    "aten.layer_norm": _layer_norm, "aten.group_norm": _group_norm, "aten.max_pool2d": _max_pool,
    "aten.avg_pool2d": _average_pool, "aten.conv2d": _conv, "aten.linear": _linear,
    "aten.conv_transpose2d": _turned_conv, "aten.upsample_nearest2d": _resize,
    "aten.upsample_bilinear2d": _resize,
    "aten.pad": _pad, "aten.matmul": _product, "aten.bmm": _product,
}  # fmt: skip

KNOWN = frozenset(_TABLE) | {f"aten.{kind}" for kind in RESHAPES}
"""What a file has a form of; `RESHAPES` are written as one operation, `aten.reshape.default`."""
