"""What stays in floats: each torch operation that a file may hold, and its ONNX operators."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

import numpy as np

from defquant.captured import RESHAPES
from defquant.deploy.program import Call, Name
from defquant.errors import UserError

__all__ = ["KNOWN", "borders", "pair", "write"]

_TOLD = {"cudnn_enable", "cudnn_enabled", "dtype", "implicit", "output_size", "shape", "size"}
"""Arguments that a file need not have: the result's size is known, and its type is float32."""


class Nodes(Protocol):
    """What is written into: each gives the name of its result in the file."""

    def node(self, kind: str, inputs: Sequence[str], output: str, **attributes: Any) -> str: ...
    def constant(self, value: Any) -> str: ...
    def real(self, name: str) -> str: ...
    def apart(self, source: str, output: str) -> str: ...


class _Writing:
    """One call on its way into a file: its arguments, by the names that torch has for them."""

    def __init__(self, out: Nodes, call: Call) -> None:
        self.out, self.call = out, call
        schema = call.torchs._schema.arguments
        self.usual = {a.name: a.default_value for a in schema}
        self.first = schema[0].name
        given = dict(zip(self.usual, call.args, strict=False)) | dict(call.kwargs)
        self.given, self.unread = self.usual | given, set(given) - _TOLD

    def __getitem__(self, name: str) -> Any:
        self.unread.discard(name)
        return self.given[name]

    @property
    def x(self) -> str:
        return self.tensor(self[self.first])

    def tensor(self, value: Any) -> str:
        """The name in the file of an argument that is a tensor or a number."""
        if isinstance(value, Name):
            return self.out.real(value.value)
        return self.out.constant(np.asarray(value, np.float32))

    def ints(self, *values: Any) -> str:
        return self.out.constant(np.array(values, np.int64))

    def number(self, value: Any) -> str:
        return self.out.constant(np.float32(value))

    def put(self, kind: str, *inputs: str, **attributes: Any) -> None:
        """The node that gives the result."""
        self.out.node(kind, inputs, self.call.name, **attributes)

    def apart(self, kind: str, *inputs: str, **attributes: Any) -> None:
        """`put`, and what onnxruntime must not merge with the roundings around it."""
        self.out.apart(self.node(kind, "alone", *inputs, **attributes), self.call.name)

    def node(self, kind: str, suffix: str, *inputs: str, **attributes: Any) -> str:
        return self.out.node(kind, inputs, f"{self.call.name}/{suffix}", **attributes)

    @property
    def rank(self) -> int:
        """Of the result."""
        return len(self.call.size)

    def dims(self, name: str, rank: int | None = None) -> list[int]:
        """Not negative, sorted."""
        value = self[name]
        given = value if isinstance(value, tuple | list) else [value]
        return sorted(int(d) % (rank or self.rank) for d in given)

    def refused(self, why: str) -> UserError:
        return UserError(f"cannot export layer {self.call.layer!r}: {self.call.kind} {why}")


def write(out: Nodes, call: Call) -> None:
    """The nodes of `call`, the last of which gives `call.name`.

    Raises `UserError` for arguments that the operators of a file do not have, by the layer's name.
    """
    writing = _Writing(out, call)
    try:
        _TABLE[call.operation.rpartition(".")[0]](writing)
    except UserError:
        raise
    except (TypeError, ValueError, LookupError, AttributeError):  # arguments that no one foresaw
        raise writing.refused("has arguments that a file does not have") from None
    for name in sorted(writing.unread):
        value, usual = writing.given[name], writing.usual[name]
        if isinstance(value, Name | np.ndarray) or value != usual:
            shown = value if isinstance(value, bool | int | float | str) else "..."
            raise writing.refused(f"has no form in a file with {name}={shown}")


_Write = Callable[[_Writing], None]


def _plain(kind: str, *read: str, **attributes: Any) -> _Write:
    """One operator of the same meaning, of the first argument; `read` it has by the same name."""

    def plain(c: _Writing) -> None:
        own = {name: c[name] if isinstance(c[name], str) else float(c[name]) for name in read}
        c.put(kind, c.x, **own, **attributes)

    return plain


def _both(kind: str, second: str = "other") -> _Write:
    def both(c: _Writing) -> None:
        other, alpha = c.tensor(c[second]), c["alpha"] if "alpha" in c.given else 1
        if alpha != 1:
            factor = c.number(alpha)
            other = c.node("Mul", "alpha", other, factor)
        c.put(kind, c.x, other)

    return both


def _clip(c: _Writing, low: str = "min", high: str = "max") -> None:
    ends = (c[end] if end in c.given else None for end in (low, high))
    names = [c.number(end) if end is not None else "" for end in ends]
    c.put("Clip", c.x, *names)


def _stack(c: _Writing) -> None:
    (axis,) = c.dims("dim")
    size = c.ints(*(1 if d == axis else n for d, n in enumerate(c.call.size)))
    parts = enumerate(map(c.tensor, c["tensors"]))
    c.put("Concat", *[c.node("Reshape", str(i), x, size) for i, x in parts], axis=axis)


def _shuffle(c: _Writing) -> None:
    """As if the channels, laid out as (groups, rest), were turned."""
    n, channels, *sides = c.call.size
    parts = c.ints(n, c["groups"], channels // c["groups"], *sides)
    order = [0, 2, 1, *range(3, c.rank + 1)]
    turned = c.node("Transpose", "turned", c.node("Reshape", "parts", c.x, parts), perm=order)
    c.put("Reshape", turned, c.ints(*c.call.size))


def _instance_norm(c: _Writing) -> None:
    """Each image by its own statistics; they do not move where they are not kept."""
    c.unread.discard("momentum")
    if not c["use_input_stats"]:
        raise c.refused("must use each image's own statistics")
    named = (c[name] for name in ("weight", "bias"))
    ends = [
        np.full(c.call.size[1], i) if v is None else v for i, v in zip((1, 0), named, strict=True)
    ]
    c.put("InstanceNormalization", c.x, *map(c.tensor, ends), epsilon=c["eps"])


def _global(c: _Writing) -> None:
    if c.call.size[2:] != (1, 1):
        raise c.refused("must divide height and width evenly")
    c.put("GlobalAveragePool", c.x)


def _softmax(kind: str) -> _Write:
    return lambda c: c.apart(kind, c.x, axis=c.dims("dim")[0])


def _reduce(kind: str) -> _Write:
    def reduce(c: _Writing) -> None:
        keep, dims = bool(c["keepdim"]), c["dim"]
        count = len(dims) if isinstance(dims, tuple | list) else 1
        rank = c.rank + (0 if keep else count)
        axes = c.dims("dim", rank)
        if kind != "ReduceMean" or axes != [2, 3] or rank != 4:
            c.put(kind, c.x, c.ints(*axes), keepdims=int(keep))
        elif keep:
            c.put("GlobalAveragePool", c.x)
        else:
            c.put("Flatten", c.node("GlobalAveragePool", "image", c.x))

    return reduce


def _norm(c: _Writing) -> None:
    if c["ord"] != 2:
        raise c.refused("must be of order 2")
    _reduce("ReduceL2")(c)


def _swapped(rank: int, one: int = -2, other: int = -1) -> list[int]:
    """All dimensions, two of them in each other's place."""
    order = list(range(rank))
    order[one], order[other] = order[other], order[one]
    return order


def _prelu(c: _Writing) -> None:
    """A slope for each channel, or one for all."""
    c.put("PRelu", c.x, c.tensor(np.reshape(c["weight"], (-1, *[1] * (c.rank - 2)))))


def _glu(c: _Writing) -> None:
    (axis,) = c.dims("dim")
    half = c.call.size[axis]
    ends = {"values": (0, half), "gates": (half, 2 * half)}
    values, gates = (c.node("Slice", n, c.x, *map(c.ints, (*e, axis))) for n, e in ends.items())
    c.put("Mul", values, c.node("Sigmoid", "shares", gates))


def _slice(c: _Writing) -> None:
    (axis,) = c.dims("dim")
    start, end, step = c["start"] or 0, c["end"], c["step"]
    end = np.iinfo(np.int64).max if end is None else end
    c.put("Slice", c.x, *map(c.ints, (start, end, axis, step)))


def _select(c: _Writing) -> None:
    (axis,) = c.dims("dim", c.rank + 1)
    index = c.out.constant(np.array(c["index"]))
    c.put("Gather", c.x, index, axis=axis)


def _expand(c: _Writing) -> None:
    """Of a constant over the images, or of dimensions of size 1; as another's, its size is ours."""
    c.unread.discard("other")
    if c.call.size[0] != -1:
        raise c.refused("must keep the images first")
    c.put("Expand", c.x, _sized(c))


def _sized(c: _Writing) -> str:
    """The size of the result, whose first dimension is the images."""
    rest = c.ints(*c.call.size[1:])
    return c.node("Concat", "size", c.node("Shape", "images", "image", start=0, end=1), rest,
                  axis=0)  # fmt: skip


def _attention(c: _Writing) -> None:
    """softmax(scale · q k') v, without a mask."""
    q, k, v = (c.tensor(c[name]) for name in ("query", "key", "value"))
    scale = c["scale"] or 1 / math.sqrt(c.call.size[-1])
    sums = c.node("MatMul", "sums", q, c.node("Transpose", "turned", k, perm=_swapped(c.rank)))
    scaled = c.node("Mul", "scaled", sums, c.number(scale))
    c.put("MatMul", c.node("Softmax", "shares", scaled, axis=-1), v)


def _layer_norm(c: _Writing) -> None:
    shape, weight, bias = c["normalized_shape"], c["weight"], c["bias"]
    weight = np.ones(shape, np.float32) if weight is None else weight
    names = [c.tensor(v) for v in (weight, bias) if v is not None]
    c.put("LayerNormalization", c.x, *names, axis=-len(shape), epsilon=c["eps"])


def _group_norm(c: _Writing) -> None:
    weight, bias = c["weight"], c["bias"]
    weight = np.ones(c.call.size[1]) if weight is None else weight
    bias = np.zeros(c.call.size[1]) if bias is None else bias
    names = [c.tensor(v) for v in (weight, bias)]
    c.put("GroupNormalization", c.x, *names, num_groups=c["num_groups"], epsilon=c["eps"])


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


def _pool(kind: str, *flags: str) -> _Write:
    """`flags` are arguments that the operator has by the same name, as whole numbers."""

    def pool(c: _Writing) -> None:
        kernel = pair(c["kernel_size"])
        more: dict[str, Any] = {name: int(c[name]) for name in flags}
        if kind == "MaxPool":
            more["dilations"] = pair(c["dilation"])
        put = c.apart if kind == "AveragePool" and c["ceil_mode"] else c.put
        put(kind, c.x, kernel_shape=kernel, strides=pair(c["stride"] or kernel),
            pads=pair(c["padding"]) * 2, **more)  # fmt: skip

    return pool


def _conv(c: _Writing, kind: str = "Conv") -> None:
    weight, bias, dilation = c["weight"], c["bias"], pair(c["dilation"])
    names = [c.tensor(v) for v in (weight, bias) if v is not None]
    turned = {"output_padding": pair(c["output_padding"])} if kind == "ConvTranspose" else {}
    c.apart(kind, c.x, *names, kernel_shape=weight.shape[2:], strides=pair(c["stride"]),
            pads=borders(c["padding"], weight.shape[2:], dilation), dilations=dilation,
            group=c["groups"], **turned)  # fmt: skip


def _resize(c: _Writing, nearest: bool = False) -> None:
    """To the nearest pixel, or linear between pixels' centres or the outermost ones."""
    corners = not nearest and bool(c["align_corners"])
    how = "asymmetric" if nearest else "align_corners" if corners else "half_pixel"
    factors = c["scale_factors"]
    ends = [c.out.constant(np.array([1, 1, *factors], "f4"))] if factors else ["", _sized(c)]
    c.put("Resize", c.x, "", *ends, nearest_mode="floor", mode="nearest" if nearest else "linear",
          coordinate_transformation_mode=how)  # fmt: skip


def _linear(c: _Writing) -> None:
    weight, bias = c["weight"], c["bias"]
    product = c.node("MatMul", "product", c.x, c.out.constant(weight.T))
    c.put("Add", product, c.tensor(np.zeros(len(weight)) if bias is None else bias))


def _pad(c: _Writing) -> None:
    modes = {"constant": "constant", "reflect": "reflect", "replicate": "edge", "circular": "wrap"}
    before, after = c["pad"][::2][::-1], c["pad"][1::2][::-1]
    free = [0] * (c.rank - len(before))
    ends = c.ints(*free, *before, *free, *after), c.number(c["value"] or 0)
    c.put("Pad", c.x, *ends, mode=modes[c["mode"]])


_NAMED: dict[str, _Write] = {
    "relu": _plain("Relu"), "sigmoid": _plain("Sigmoid"), "tanh": _plain("Tanh"),
    "exp": _plain("Exp"), "log": _plain("Log"), "sqrt": _plain("Sqrt"), "abs": _plain("Abs"),
    "neg": _plain("Neg"), "erf": _plain("Erf"), "floor": _plain("Floor"), "ceil": _plain("Ceil"),
    "round": _plain("Round"), "sign": _plain("Sign"), "reciprocal": _plain("Reciprocal"),
    "hardswish": _plain("HardSwish"), "mish": _plain("Mish"), "softplus": _plain("Softplus"),
    "hardsigmoid": _plain("HardSigmoid", alpha=1 / 6, beta=0.5),
    "gelu": _plain("Gelu", "approximate"), "elu": _plain("Elu", "alpha"),
    "silu": lambda c: c.put("Mul", c.x, c.node("Sigmoid", "sigmoid", c.x)),
    "rsqrt": lambda c: c.put("Reciprocal", c.node("Sqrt", "root", c.x)),
    "leaky_relu": lambda c: c.put("LeakyRelu", c.x, alpha=float(c["negative_slope"])),
    "relu6": lambda c: c.put("Clip", c.x, c.number(0), c.number(6)),
    "hardtanh": partial(_clip, low="min_val", high="max_val"), "clamp": _clip, "clamp_min": _clip,
    "adaptive_avg_pool2d": _global, "max_pool2d": _pool("MaxPool", "ceil_mode"),
    "avg_pool2d": _pool("AveragePool", "ceil_mode", "count_include_pad"),
    "add": _both("Add"), "sub": _both("Sub"), "mul": _both("Mul"), "div": _both("Div"),
    "maximum": _both("Max"), "minimum": _both("Min"), "matmul": _both("MatMul"),
    "bmm": _both("MatMul", "mat2"), "pow": _both("Pow", "exponent"),
    "softmax": _softmax("Softmax"), "log_softmax": _softmax("LogSoftmax"),
    "mean": _reduce("ReduceMean"), "sum": _reduce("ReduceSum"), "amax": _reduce("ReduceMax"),
    "linalg_vector_norm": _norm, "square": lambda c: c.put("Mul", c.x, c.x),
    "amin": _reduce("ReduceMin"), "reshape": lambda c: c.put("Reshape", c.x, c.ints(*c.call.size)),
    "permute": lambda c: c.put("Transpose", c.x, perm=[d % c.rank for d in c["dims"]]),
    "mT": lambda c: c.put("Transpose", c.x, perm=_swapped(c.rank)), "prelu": _prelu, "glu": _glu,
    "selu": _plain("Selu"),
    "pixel_shuffle": lambda c: c.put("DepthToSpace", c.x, blocksize=c["upscale_factor"],
                                     mode="CRD"),
    "transpose": lambda c: c.put("Transpose", c.x, perm=_swapped(c.rank, c["dim0"], c["dim1"])),
    "stack": _stack, "channel_shuffle": _shuffle, "instance_norm": _instance_norm,
    "cat": lambda c: c.put("Concat", *map(c.tensor, c["tensors"]), axis=c.dims("dim")[0]),
    "slice": _slice, "select": _select, "expand": _expand,
    "expand_as": _expand,
    "scaled_dot_product_attention": _attention, "layer_norm": _layer_norm,
    "group_norm": _group_norm, "conv2d": _conv, "linear": _linear, "pad": _pad,
    "conv_transpose2d": partial(_conv, kind="ConvTranspose"),
    "upsample_nearest2d": partial(_resize, nearest=True), "upsample_bilinear2d": _resize,
}  # fmt: skip
_TABLE = {f"aten.{name}": how for name, how in _NAMED.items()}

KNOWN = frozenset(_TABLE) | {f"aten.{kind}" for kind in RESHAPES}
"""What a file has a form of; `RESHAPES` are written as one operation, `aten.reshape.default`."""
