"""What each operator of ONNX computes, on torch tensors and with gradients.

Whole numbers that hang on the image are floats here, so that gradients pass. Every rounding is a
`Staircase` of its node. The operators on codes of a scale are in `quantized.py`.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial, reduce
from typing import Any

import torch
from onnx import TensorProto
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from defquant.judging.shapes import SHAPES, Numbers, Step, along, bounded, padded

__all__ = ["NUMBERS", "OPERATORS", "average_pool", "conv"]

_HALVES = {TensorProto.FLOAT16: torch.float16, TensorProto.BFLOAT16: torch.bfloat16}
_WHOLES = {
    TensorProto.UINT8: torch.uint8, TensorProto.INT8: torch.int8, TensorProto.INT16: torch.int16,
    TensorProto.UINT16: torch.int32, TensorProto.INT32: torch.int32, TensorProto.INT64: torch.int64,
    TensorProto.UINT32: torch.int64, TensorProto.UINT64: torch.int64,
}  # fmt: skip


# convolutions and pools


def window(s: Step, x: Tensor, kernel: Sequence[int]) -> tuple[list[int], ...]:
    """Strides, dilations, and the padding before and after, of each axis."""
    n = len(kernel)
    strides, dilations = list(s.get("strides", [1] * n)), list(s.get("dilations", [1] * n))
    pads = list(s.get("pads", [0] * (2 * n)))
    auto = s.get("auto_pad", "NOTSET")
    if auto in ("SAME_UPPER", "SAME_LOWER"):
        pads = [0] * (2 * n)
        for i, size in enumerate(x.shape[2:]):
            reach = dilations[i] * (kernel[i] - 1) + 1
            total = max((math.ceil(size / strides[i]) - 1) * strides[i] + reach - size, 0)
            small, large = total // 2, total - total // 2
            pads[i], pads[n + i] = (small, large) if auto == "SAME_UPPER" else (large, small)
    elif auto == "VALID":
        pads = [0] * (2 * n)
    return strides, dilations, pads[:n], pads[n:]


def conv(s: Step, x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
    strides, dilations, before, after = window(s, x, w.shape[2:])
    if before != after:
        x, before = padded(x, before, after), [0] * len(before)
    run: Any = (F.conv1d, F.conv2d, F.conv3d)[x.ndim - 3]
    result: Tensor = run(x, w, b, strides, before, dilations, s.get("group", 1))
    return result


def conv_transpose(s: Step, x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
    n = w.ndim - 2
    strides, dilations, before, after = window(s, x, w.shape[2:])
    extra = list(s.get("output_padding", [0] * n))
    if s.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID") or s.get("output_shape"):
        raise ValueError("auto_pad and output_shape are not read")
    run: Any = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[n - 1]
    full = run(x, w, None, strides, 0, 0, s.get("group", 1), dilations)
    bounded(full[0].numel())
    full = padded(full, [-p for p in before], [e - p for e, p in zip(extra, after, strict=True)])
    return full if b is None else full + along(b, full, 1)


def ceiled(s: Step, x: Tensor, kernel: Sequence[int], grid: tuple[list[int], ...]) -> list[int]:
    """How much further `ceil_mode` lets the last windows reach."""
    strides, dilations, before, after = grid
    beyond = []
    for i, k in enumerate(kernel):
        room = x.shape[2 + i] + before[i] + after[i] - dilations[i] * (k - 1) - 1
        last = -(-room // strides[i])
        if last * strides[i] >= x.shape[2 + i] + before[i]:  # it would begin in the padding
            last -= 1
        beyond.append(max(last * strides[i] - room, 0) if s.get("ceil_mode", 0) else 0)
    return beyond


def max_pool(s: Step, x: Tensor) -> Tensor:
    kernel = s.get("kernel_shape")
    grid = strides, dilations, before, after = window(s, x, kernel)
    reach = [a + e for a, e in zip(after, ceiled(s, x, kernel, grid), strict=True)]
    run: Any = (F.max_pool1d, F.max_pool2d, F.max_pool3d)[x.ndim - 3]
    result: Tensor = run(padded(x, before, reach, -math.inf), kernel, strides, 0, dilations)
    return result


def average_pool(s: Step, x: Tensor) -> Tensor:
    kernel = s.get("kernel_shape")
    grid = strides, dilations, before, after = window(s, x, kernel)
    if any(d != 1 for d in dilations):
        raise ValueError("dilations are not read")
    reach = ceiled(s, x, kernel, grid)
    run: Any = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[x.ndim - 3]
    ones = x.new_ones(1, 1, *x.shape[2:])
    ones = padded(ones, before, after, float(s.get("count_include_pad", 0)))
    x, nothing = padded(padded(x, before, after), [0] * len(reach), reach), [0] * len(reach)
    share = run(padded(ones, nothing, reach), kernel, strides)
    mean: Tensor = run(x, kernel, strides) / share
    return mean


def over_space(s: Step, x: Tensor, f: Callable[[Tensor, list[int], bool], Tensor]) -> Tensor:
    return f(x, list(range(2, x.ndim)), True)


# numbers


def cast(s: Step, x: Tensor, like: Tensor | None = None) -> Tensor:
    to = s.get("to", TensorProto.FLOAT)
    if like is not None:
        if not like.is_floating_point():
            raise ValueError("a cast to the type of whole numbers is not read")
        return x.to(like.dtype)
    if to in _HALVES:
        return x.to(_HALVES[to]).float()
    if to in (TensorProto.FLOAT, TensorProto.DOUBLE):
        return x.to(torch.float32 if to == TensorProto.FLOAT else torch.float64)
    if to == TensorProto.BOOL:
        return x != 0
    if to not in _WHOLES:
        raise ValueError(f"type {to} is not read")
    if not s.image:
        return x.to(_WHOLES[to])
    if s.whole or x.dtype == torch.bool:
        return x.float() if x.dtype == torch.bool else x
    return s.staircase(x, rounding=torch.trunc)


def divide(s: Step, x: Tensor, y: Tensor) -> Tensor:
    if s.whole:
        raise ValueError("a division of whole numbers that hang on the image is not read")
    whole = not (x.is_floating_point() or y.is_floating_point())
    return torch.div(x, y, rounding_mode="trunc" if whole else None)


def clip(s: Step, x: Tensor, low: Numbers | None = None, high: Numbers | None = None) -> Tensor:
    ends = (low or [s.get("min")])[0], (high or [s.get("max")])[0]
    return x if ends == (None, None) else x.clamp(*ends)


def sign(s: Step, x: Tensor) -> Tensor:
    """2 · [x > 0] - 1 with the gradient of hardtanh; 0 at 0."""
    if not s.image:
        return x.sign()
    return torch.where(x == 0, x, 2 * s.staircase((x + 1) / 2, 0, 1) - 1)


def gemm(s: Step, a: Tensor, b: Tensor, c: Tensor | None = None) -> Tensor:
    a, b = a.mT if s.get("transA", 0) else a, b.mT if s.get("transB", 0) else b
    product: Tensor = s.get("alpha", 1.0) * (a @ b)
    return product if c is None else product + s.get("beta", 1.0) * c


def softmax(s: Step, x: Tensor, f: Callable[..., Tensor] = torch.softmax) -> Tensor:
    if s.version >= 13:
        return f(x, s.get("axis", -1))
    axis = s.get("axis", 1) % x.ndim
    return f(x.reshape(*x.shape[:axis], -1), axis).reshape(x.shape)


def batch_norm(s: Step, x: Tensor, w: Tensor, b: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    if s.get("training_mode", 0) or not s.get("spatial", 1):
        raise ValueError("training_mode and spatial=0 are not read")
    return F.batch_norm(x, mean, var, w, b, eps=s.get("epsilon", 1e-5))


def layer_norm(s: Step, x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
    axis = s.get("axis", -1) % x.ndim
    y = F.layer_norm(x, x.shape[axis:], eps=s.get("epsilon", 1e-5)) * w
    return y if b is None else y + b


def skip_layer_norm(s: Step, x: Tensor, skip: Tensor, *wb: Tensor | None) -> tuple[Tensor, ...]:
    """Its fourth output is the sum; the second and third serve training."""
    w, b, bias = (*wb, None, None)[:3]
    x = x + skip if bias is None else x + skip + bias
    y = F.layer_norm(x, x.shape[-1:], w, b, s.get("epsilon", 1e-12))
    return y, y, y, x


def instance_norm(s: Step, x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    y = F.layer_norm(x, x.shape[2:], eps=s.get("epsilon", 1e-5))
    return y * along(w, x, 1) + along(b, x, 1)


def group_norm(s: Step, x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    groups, channels = s.get("num_groups"), x.shape[1]
    if s.version < 21:
        w, b = (v.repeat_interleave(channels // groups) for v in (w, b))
    y = F.group_norm(x, groups, eps=s.get("epsilon", 1e-5))
    return y * along(w, x, 1) + along(b, x, 1)


Reduce = Callable[[Tensor, tuple[int, ...], bool], Tensor]


def reduced(f: Reduce, s: Step, x: Tensor, axes: Numbers | None = None) -> Tensor:
    axes = s.get("axes", axes)
    if not axes and s.get("noop_with_empty_axes", 0):
        return x
    return f(x, tuple(axes or range(x.ndim)), bool(s.get("keepdims", 1)))


def gelu(s: Step, x: Tensor, b: Tensor | None = None) -> Tensor:
    how = "tanh" if s.kind == "FastGelu" else s.get("approximate", "none")
    return F.gelu(x if b is None else x + b, approximate=how)


def dropout(
    s: Step, x: Tensor, ratio: Numbers | None = None, draws: Numbers | None = None
) -> Tensor:
    if any(draws or ()) and any(ratio or [0.5]):
        raise ValueError("it is in training mode and draws: export the network in eval mode")
    return x


def product(x: Tensor, dims: tuple[int, ...], keep: bool) -> Tensor:
    kept = reduce(lambda y, axis: y.prod(axis, True), dims, x)
    return kept if keep else kept.squeeze(dims)


UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    "Abs": torch.abs, "Cos": torch.cos, "Erf": torch.erf, "Exp": torch.exp,
    "HardSwish": F.hardswish, "Identity": lambda x: x, "Log": torch.log, "Mish": F.mish,
    "Neg": torch.neg, "Not": torch.logical_not, "Reciprocal": torch.reciprocal, "Relu": torch.relu,
    "Sigmoid": torch.sigmoid, "Sin": torch.sin, "Softplus": F.softplus, "Softsign": F.softsign,
    "Sqrt": torch.sqrt, "Tanh": torch.tanh,
}  # fmt: skip
BINARY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "And": torch.logical_and, "Equal": torch.eq, "Greater": torch.gt, "GreaterOrEqual": torch.ge,
    "Less": torch.lt, "LessOrEqual": torch.le, "MatMul": torch.matmul, "Mul": torch.mul,
    "Or": torch.logical_or, "Pow": torch.pow, "Sub": torch.sub,
}  # fmt: skip
MANY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "Add": torch.add, "Max": torch.maximum, "Mean": torch.add, "Min": torch.minimum,
    "Sum": torch.add,
}  # fmt: skip
ACTIVATIONS: dict[str, Callable[[Step, Tensor], Tensor]] = {
    "Celu": lambda s, x: F.celu(x, s.get("alpha", 1.0)),
    "Elu": lambda s, x: F.elu(x, s.get("alpha", 1.0)),
    "HardSigmoid": lambda s, x: (s.get("alpha", 0.2) * x + s.get("beta", 0.5)).clamp(0, 1),
    "LRN": lambda s, x: F.local_response_norm(
        x, s.get("size"), s.get("alpha", 1e-4), s.get("beta", 0.75), s.get("bias", 1.0)
    ),
    "LeakyRelu": lambda s, x: F.leaky_relu(x, s.get("alpha", 0.01)),
    "QuickGelu": lambda s, x: x * torch.sigmoid(s.get("alpha", 1.702) * x),
    "Selu": lambda s, x: s.get("gamma", 1.0507009873554805)
    * F.elu(x, s.get("alpha", 1.6732632423543772)),
    "ThresholdedRelu": lambda s, x: torch.where(x > s.get("alpha", 1.0), x, 0.0),
}  # fmt: skip
"""Of one tensor and the node's attributes."""
REDUCED: dict[str, Reduce] = {
    "ReduceL1": lambda x, d, k: x.abs().sum(d, k),
    "ReduceL2": lambda x, d, k: x.square().sum(d, k).sqrt(),
    "ReduceLogSumExp": torch.logsumexp,
    "ReduceMax": torch.amax, "ReduceMean": torch.mean, "ReduceMin": torch.amin,
    "ReduceProd": product,
    "ReduceSum": torch.sum, "ReduceSumSquare": lambda x, d, k: x.square().sum(d, k),
}  # fmt: skip


def many(s: Step, *x: Tensor) -> Tensor:
    total = reduce(MANY[s.kind], x)
    return total / len(x) if s.kind == "Mean" else total


def fused(f: Callable[..., Tensor], s: Step, *x: Tensor | None) -> Tensor:
    """What onnxruntime makes of a layer, a sum and an activation function."""
    *inputs, added = (*x, None, None)[:4] if s.kind == "FusedConv" else (*x, None)
    y = f(s, *inputs)
    y = y if added is None else y + added
    kind, numbers = s.get("activation", "Identity"), s.get("activation_params", [])
    if kind in UNARY:
        return UNARY[kind](y)
    names = {"Clip": ("min", "max"), "HardSigmoid": ("alpha", "beta"), "LeakyRelu": ("alpha",)}
    inner = replace(s, kind=kind, attributes=dict(zip(names[kind], numbers, strict=True)))
    result: Tensor = OPERATORS[kind](inner, y)
    return result


OPERATORS: dict[str, Callable[..., Any]] = {
    **{name: lambda s, x, *_, f=f: f(x) for name, f in UNARY.items()},
    **{name: lambda s, x, y, f=f: f(x, y) for name, f in BINARY.items()},
    **{name: partial(reduced, f) for name, f in REDUCED.items()},
    **dict.fromkeys(MANY, many), **ACTIVATIONS, **SHAPES,
    "ArgMax": lambda s, x: x.argmax(s.get("axis", 0), bool(s.get("keepdims", 1))),
    "AveragePool": average_pool, "BatchNormalization": batch_norm,
    "BiasGelu": gelu, "Cast": cast, "CastLike": cast, "Clip": clip,
    "Ceil": lambda s, x: s.staircase(x, rounding=torch.ceil), "Conv": conv,
    "ConvTranspose": conv_transpose, "Div": divide, "Dropout": dropout,
    "Einsum": lambda s, x, y: torch.einsum(s.get("equation"), x, y), "FastGelu": gelu,
    "Floor": lambda s, x: s.staircase(x, rounding=torch.floor),
    "FusedConv": partial(fused, conv), "FusedGemm": partial(fused, gemm),
    "FusedMatMul": gemm, "Gelu": gelu, "Gemm": gemm,
    "GlobalAveragePool": partial(over_space, f=torch.mean),
    "GlobalMaxPool": partial(over_space, f=torch.amax), "GroupNormalization": group_norm,
    "InstanceNormalization": instance_norm, "LayerNormalization": layer_norm,
    "LogSoftmax": partial(softmax, f=torch.log_softmax),
    "LpNormalization": lambda s, x: F.normalize(x, s.get("p", 2), s.get("axis", -1), eps=0),
    "MaxPool": max_pool,
    "Mod": lambda s, x, y: (torch.fmod if s.get("fmod", 0) else torch.remainder)(x, y),
    "PRelu": lambda s, x, slope: torch.where(x < 0, slope * x, x),
    "Round": lambda s, x: s.staircase(x), "Sign": sign,
    "SkipLayerNormalization": skip_layer_norm, "Softmax": softmax,
    "Where": lambda s, c, x, y: torch.where(c, x, y),
}  # fmt: skip
NUMBERS: dict[str, tuple[int, ...]] = {
    "Clip": (1, 2), "ConstantOfShape": (0,), "Dropout": (1, 2), "Expand": (1,), "Pad": (1, 2, 3),
    "Range": (0, 1, 2), "Reshape": (1,), "Resize": (1, 2, 3), "Slice": (1, 2, 3, 4),
    "Split": (1,), "Squeeze": (1,), "Tile": (1,), "Unsqueeze": (1,), "Upsample": (1,),
    **dict.fromkeys(REDUCED, (1,)),
}  # fmt: skip
"""Inputs that an operator takes as a list of numbers: a size must not hang on what is computed."""
