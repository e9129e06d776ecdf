"""Activations onto a grid, and the straight-through gradient; weights are in `weights.py`."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from defquant.config import Activation, check_bits
from defquant.errors import UserError

__all__ = [
    "QuantBranch", "QuantReLU", "QuantTanh", "Quantizer", "Rounded", "activation", "fake_quantize",
    "full_precision", "set_bits",
]  # fmt: skip


whole = False
"""Whether quantisers appear as one operation each (`torch.ops.defquant`), as `capture` sets it."""


def full_precision(x: Tensor) -> Tensor:
    """`x` in float32, or in float64 where it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class _FakeQuantize(torch.autograd.Function):
    """Forward on the grid, backward of relu6; keeps one byte per element."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, levels: int, high: float) -> Tensor:
        if ctx.needs_input_grad[0]:
            # hardtanh's backward zeroes x outside (0, high); as bytes, because on a CPU comparing
            # floats and multiplying by bools both cost several times a pass over memory.
            inside = torch.ops.aten.hardtanh_backward(x, x, 0.0, high)
            ctx.save_for_backward(inside.to(torch.bool).view(torch.uint8))
        step = high / levels
        return x.div(step).round_().clamp_(0, levels).mul_(step)

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> tuple[Tensor, None, None]:
        (inside,) = ctx.saved_tensors
        return inside.to(grad[0].dtype).mul_(grad[0]), None, None


@torch.library.custom_op("defquant::clip_round", mutates_args=())
def _clip_round(x: Tensor, bits: int, high: float) -> Tensor:
    step = high / (2**bits - 1)
    return x.div(step).round_().clamp_(0, 2**bits - 1).mul_(step)


@torch.library.custom_op("defquant::tanh_round", mutates_args=())
def _tanh_round(x: Tensor, bits: int) -> Tensor:
    levels = 2**bits - 1
    return torch.tanh(x).add_(1).mul_(levels / 2).round_().mul_(2 / levels).sub_(1)


@torch.library.custom_op("defquant::signed_round", mutates_args=())
def _signed_round(x: Tensor, peak: Tensor) -> Tensor:
    step = peak.to(x.dtype) / 127
    rounded = x.div(step).round_().clamp_(-128, 127).mul_(step)
    return torch.where(step > 0, rounded, x)


for _operation in (_clip_round, _tanh_round, _signed_round):
    _operation.register_fake(lambda x, *_: torch.empty_like(x))


def fake_quantize(x: Tensor, bits: int | None, high: float = 6.0) -> Tensor:
    r"""Clamp `x` to [0, high] and round it to one of 2^bits values.

    Q(x) = Δ · round(clamp(x, 0, high) / Δ),  Δ = high / (2^bits - 1),  ties to even
    (as ONNX QuantizeLinear). The gradient is exactly that of clamp(x, 0, high) (ReLU6 for
    high = 6): y = r + stop_gradient(Q(r) - r), r = relu6(x) (section 2.1 of the paper).

    Args:
        x: any shape, floating point; half precisions are quantised in float32.
        bits: 1 to 8, or None for no rounding (the clamp alone).
        high: upper end of the range, positive.

    Returns:
        The shape of `x`; float32, or float64 for float64. For the backward pass one byte per
        element is kept.

    Raises:
        UserError: `bits` is no whole number from 1 to 8.

    >>> fake_quantize(torch.tensor([-1.0, 2.9, 3.1, 7.0]), bits=1)
    tensor([0., 0., 6., 6.])
    """
    check_bits(bits)
    x = full_precision(x)
    if bits is None:
        return nn.functional.hardtanh(x, 0.0, high)
    if whole:
        return _clip_round(x, bits, high)  # type: ignore[no-any-return]
    quantized: Tensor = _FakeQuantize.apply(x, 2**bits - 1, high)  # type: ignore[no-untyped-call]
    return quantized


class Quantizer(nn.Module):
    """An activation function whose output is rounded to `bits` bits, or not at all (None).

    It holds no parameters and no buffers, so that the state dict of a network does not depend
    on its bits.
    """

    def __init__(self, bits: int | None = None) -> None:
        super().__init__()
        self.bits = check_bits(bits)


class QuantReLU(Quantizer):
    """`fake_quantize` as a module: BN -> QuantReLU -> conv (Figure 2 of the paper)."""

    def __init__(self, bits: int | None = None, high: float = 6.0) -> None:
        super().__init__(bits)
        if not (math.isfinite(high) and high > 0):
            raise UserError(f"high, the end of the range [0, high], must be positive; found {high}")
        self.high = float(high)

    def forward(self, x: Tensor) -> Tensor:
        return fake_quantize(x, self.bits, self.high)

    def extra_repr(self) -> str:
        return f"bits={self.bits}, high={self.high:g}"


class QuantTanh(Quantizer):
    r"""Tanh-based quantiser of Rakin et al. 2018 (Appendix A.1), which masks gradients.

    t = tanh(x),  Q(x) = 2 · round(n (t + 1)/2) / n - 1,  n = 2^bits - 1; straight-through, so
    that the gradient is that of tanh. Output in [-1, 1]; `bits=None` is tanh.
    """

    def forward(self, x: Tensor) -> Tensor:
        x = full_precision(x)
        if whole and self.bits is not None:
            return _tanh_round(x, self.bits)  # type: ignore[no-any-return]
        t = torch.tanh(x)
        if self.bits is None:
            return t
        levels = 2**self.bits - 1
        with torch.no_grad():
            error = (t + 1).mul_(levels / 2).round_().mul_(2 / levels).sub_(1).sub_(t)
        return t + error

    def extra_repr(self) -> str:
        return f"bits={self.bits}"


class Rounded(torch.autograd.Function):
    """`rounded` forward, the gradient of the identity backward, zeroed where `inside` is 0."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rounded: Tensor, inside: Tensor | None) -> Tensor:
        ctx.save_for_backward(inside)
        return rounded

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> tuple[Tensor, None, None]:
        (inside,) = ctx.saved_tensors
        return grad[0] if inside is None else grad[0] * inside.to(grad[0].dtype), None, None


class QuantBranch(nn.Module):
    r"""A signed 8-bit grid for the output of a convolution that enters a residual stream.

    Q(x) = s · clamp(round(x / s), -128, 127),  s = peak / 127; straight-through inside the range,
    no gradient outside it. With it every convolution ends in integers and runs in integers when
    deployed (uint8 codes with zero point 128). `peak`, a buffer, is a moving average of the
    batches' max|x|, taken in training mode; 0 before the first batch, when x passes unrounded.
    """

    MOMENTUM = 0.1

    def __init__(self) -> None:
        super().__init__()
        self.peak: Tensor
        self.register_buffer("peak", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        x = full_precision(x)
        if whole:
            return _signed_round(x, self.peak)  # type: ignore[no-any-return]
        if self.training:
            with torch.no_grad():
                now = torch.linalg.vector_norm(x, math.inf).to(self.peak)
                first = self.peak == 0
                self.peak.copy_(torch.where(first, now, torch.lerp(self.peak, now, self.MOMENTUM)))
        with torch.no_grad():
            step = self.peak.to(x.dtype) / 127
            codes = x.div(step).round_()
            inside = (codes >= -128) & (codes <= 127)
            rounded = torch.where(step > 0, codes.clamp_(-128, 127).mul_(step), x)
            inside |= step == 0
        return Rounded.apply(x, rounded, inside)  # type: ignore[no-untyped-call,no-any-return]


def activation(kind: Activation, bits: int | None, high: float) -> Quantizer:
    """The quantised activation function that `ModelConfig.activation` names."""
    return QuantReLU(bits, high) if kind == "relu" else QuantTanh(bits)


def set_bits(model: nn.Module, bits: int | None) -> nn.Module:
    """Change every activation quantiser of `model` to `bits` (None: full precision), in place.

    Returns `model`. Raises `UserError` for bits outside 1 to 8 or a model without quantisers.
    """
    quantizers = [module for module in model.modules() if isinstance(module, Quantizer)]
    if not quantizers:
        raise UserError(f"{type(model).__name__} has no activation quantiser to set")
    for quantizer in quantizers:
        quantizer.bits = check_bits(bits)
    return model
