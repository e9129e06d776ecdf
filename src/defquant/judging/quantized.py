"""Operators on codes: whole numbers of a scale, summed exactly, rounded by a node's staircase."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from defquant.judging.operators import OPERATORS, average_pool, conv
from defquant.judging.shapes import Numbers, Step, along

__all__ = ["QUANTIZED", "ZERO"]


def real(x: Tensor, scale: Tensor, zero: Tensor | None, axis: int = 1) -> Tensor:
    """(x - zero) · scale, a tensor of codes in the reals."""
    return offset(x, zero, axis, scale.dtype) * along(scale, x, axis)


def offset(
    x: Tensor, zero: Tensor | None, axis: int = 1, dtype: torch.dtype = torch.float32
) -> Tensor:
    """x - zero, exactly, then in floats."""
    if not x.is_floating_point():
        x = x.to(torch.float64)
    if zero is not None:
        x = x - along(zero.to(x.dtype), x, axis)
    return x.to(dtype)


def widened(x: Tensor, w: Tensor, dims: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Codes and whole weights in a type that adds products of one byte and `w` over `dims` exactly.

    A sum of products of whole numbers is exact in float32 where that of their sizes is < 2^24.
    """
    if w.is_meta or 255 * float(w.detach().abs().sum(dims).max()) < 2**24:
        return x, w
    return x.double(), w.double()


def codes(s: Step, u: Tensor, zero: Numbers | None, axis: int = 0) -> Tensor:
    """clamp(round(u) + zero) in the range of the output's type; `u` itself for a raw step."""
    if s.raw:
        return u
    zeros, (low, high) = zero or [0], s.range
    steps: Tensor = s.staircase(u, low - max(zeros), high - min(zeros))
    if len(set(zeros)) == 1:
        return steps.add(zeros[0])
    return (steps + along(torch.tensor(zeros).to(u), u, axis)).clamp(low, high)


def quantize(s: Step, x: Tensor, scale: Tensor, zero: Numbers | None = None) -> Tensor:
    if s.get("joined"):
        return s.staircase(x)
    unblocked(s)
    axis = s.get("axis", 1)
    return codes(s, x / along(scale, x, axis), zero, axis)


def dequantize(s: Step, x: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
    unblocked(s)
    return x if s.get("joined") else real(x, scale, zero, s.get("axis", 1))


def unblocked(s: Step) -> None:
    if s.get("block_size", 0):
        raise ValueError("scales of blocks are not read")


def dynamic(s: Step, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Each image has the range that it has alone."""
    many = s.image and s.images > 1
    if many and len(x) != s.images:
        raise ValueError("images are not along its first axis, so that their ranges mix")
    with torch.no_grad():
        dims = tuple(range(1 if many else 0, x.ndim))
        low, high = (f(dims, True) for f in (x.clamp(max=0).amin, x.clamp(min=0).amax))
        scale = (high - low) / 255
        scale = torch.where(scale == 0, 1, scale)
        zero = (-low / scale).round().clamp(0, 255)
    return (s.staircase(x / scale, -255, 255) + zero).clamp(0, 255), scale, zero


def conv_sum(s: Step, x: Tensor, w: Tensor, *zeros: Tensor | None) -> Tensor:
    x_zero, w_zero = (*zeros, None, None)[:2]
    x, w = widened(offset(x, x_zero), offset(w, w_zero, 0), tuple(range(1, w.ndim)))
    return conv(s, x, w)


def matmul_sum(s: Step, a: Tensor, b: Tensor, *zeros: Tensor | None) -> Tensor:
    a_zero, b_zero = (*zeros, None, None)[:2]
    a, b = offset(a, a_zero, a.ndim - 2 if a.ndim > 1 else 0), offset(b, b_zero, b.ndim - 1)
    a, b = widened(a, b, (b.ndim - 2,))
    return a @ b


def scaled(sums: Tensor, scale: Tensor, axis: int) -> Tensor:
    return sums.float() * along(scale, sums, axis)


def qlinear_conv(
    s: Step, x: Tensor, x_scale: Tensor, x_zero: Tensor, w: Tensor, w_scale: Tensor, w_zero: Tensor,
    scale: Tensor, zero: Numbers, bias: Tensor | None = None,
) -> Tensor:  # fmt: skip
    sums = conv_sum(s, x, w, x_zero, w_zero)
    if bias is not None:
        sums = sums.double() + along(bias, sums, 1)
    return codes(s, scaled(sums, x_scale * w_scale / scale, 1), zero)


def qlinear_matmul(
    s: Step, a: Tensor, a_scale: Tensor, a_zero: Tensor, b: Tensor, b_scale: Tensor, b_zero: Tensor,
    scale: Tensor, zero: Numbers,
) -> Tensor:  # fmt: skip
    sums = matmul_sum(s, a, b, a_zero, b_zero)
    return codes(s, scaled(sums, a_scale * b_scale / scale, sums.ndim - 1), zero)


def qgemm(
    s: Step, a: Tensor, a_scale: Tensor, a_zero: Tensor, b: Tensor, b_scale: Tensor, b_zero: Tensor,
    bias: Tensor | None = None, scale: Tensor | None = None, zero: Numbers | None = None,
) -> Tensor:  # fmt: skip
    a, b = a.T if s.get("transA", 0) else a, b.T if s.get("transB", 0) else b
    sums = matmul_sum(s, a, b, a_zero, b_zero)
    sums = sums if bias is None else sums.double() + bias
    unit = s.get("alpha", 1.0) * a_scale * b_scale
    if scale is None:
        return scaled(sums, unit, 1)
    return codes(s, scaled(sums, unit / scale, 1), zero)


def qlinear_pair(f: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    def run(
        s: Step, a: Tensor, a_scale: Tensor, a_zero: Tensor | None, b: Tensor, b_scale: Tensor,
        b_zero: Tensor | None, scale: Tensor, zero: Numbers | None = None,
    ) -> Tensor:  # fmt: skip
        return codes(s, f(real(a, a_scale, a_zero), real(b, b_scale, b_zero)) / scale, zero)

    return run


def qlinear(f: Callable[[Step, Tensor], Tensor]) -> Callable[..., Tensor]:
    """`f` of the reals, as codes again."""

    def run(
        s: Step, x: Tensor, x_scale: Tensor, x_zero: Tensor | None, scale: Tensor,
        zero: Numbers | None = None,
    ) -> Tensor:  # fmt: skip
        last = bool(s.get("channels_last", 0))
        x = x.movedim(-1, 1) if last else x
        y = codes(s, f(s, real(x, x_scale, x_zero)) / scale, zero)
        return y.movedim(1, -1) if last else y

    return run


def qlinear_concat(s: Step, scale: Tensor, zero: Numbers, *parts: Tensor) -> Tensor:
    triples = zip(parts[::3], parts[1::3], parts[2::3], strict=True)
    return codes(s, torch.cat([real(*part) for part in triples], s.get("axis", 1)) / scale, zero)


def matmul_to_float(
    s: Step, a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, *rest: Tensor | None
) -> Tensor:
    a_zero, b_zero, bias = (*rest, None, None, None)[:3]
    sums = matmul_sum(s, a, b, a_zero, b_zero)
    y = scaled(sums, a_scale * b_scale, sums.ndim - 1)
    return y if bias is None else y + bias


def dynamic_matmul(
    s: Step, a: Tensor, b: Tensor, b_scale: Tensor, b_zero: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:  # fmt: skip
    a, scale, zero = dynamic(s, a)
    return matmul_to_float(s, a, b, scale, b_scale, zero, b_zero, bias)


QUANTIZED: dict[str, Callable[..., Any]] = {
    "ConvInteger": conv_sum, "DequantizeLinear": dequantize, "DynamicQuantizeLinear": dynamic,
    "DynamicQuantizeMatMul": dynamic_matmul, "MatMulInteger": matmul_sum,
    "MatMulIntegerToFloat": matmul_to_float, "QGemm": qgemm,
    "QLinearAdd": qlinear_pair(torch.add), "QLinearAveragePool": qlinear(average_pool),
    "QLinearConcat": qlinear_concat, "QLinearConv": qlinear_conv,
    "QLinearGlobalAveragePool": qlinear(OPERATORS["GlobalAveragePool"]),
    "QLinearLeakyRelu": qlinear(OPERATORS["LeakyRelu"]), "QLinearMatMul": qlinear_matmul,
    "QLinearMul": qlinear_pair(torch.mul), "QLinearSigmoid": qlinear(OPERATORS["Sigmoid"]),
    "QLinearSoftmax": qlinear(OPERATORS["Softmax"]), "QuantizeLinear": quantize,
}  # fmt: skip
ZERO = {
    "QGemm": 8, "QLinearAdd": 7, "QLinearAveragePool": 4, "QLinearConcat": 1, "QLinearConv": 7,
    "QLinearGlobalAveragePool": 4, "QLinearLeakyRelu": 4, "QLinearMatMul": 7, "QLinearMul": 7,
    "QLinearSigmoid": 4, "QLinearSoftmax": 4, "QuantizeLinear": 2,
}  # fmt: skip
"""Where the output's zero point stands, which tells its type; its scale stands before it."""
