"""Weights onto a grid: per channel, symmetric, narrow range, straight-through."""

from typing import Any

import torch
from torch import Tensor, nn

from defquant.errors import UserError
from defquant.rounding import WHOLE, autocasts, full_precision, whole_operation

__all__ = [
    "FirstConv", "QuantConv2d", "QuantLinear", "effective_weight", "quantize_weight", "weight_grid",
]  # fmt: skip


def weight_grid(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    r"""Integers and scales of a weight: W_c ≈ s_c · k_c, symmetric, narrow range, per channel.

    s_c = max|W_c| / q,  k_c = round(W_c / s_c) in [-q, q],  q = 2^(bits-1) - 1: 127, 7, 1 for 8, 4
    and 2 bits. A channel of zeros, or of less than
    float32 can scale, has s_c = 1. Nothing saturates, and -k is on the grid, too.

    Args:
        weight: (c_out, ...), float.
        bits: 2 to 8.

    Returns:
        k, float32 or float64 of the shape of `weight` (whole numbers), and s, (c_out,), both
        without gradient.

    Raises:
        UserError: other bits.
    """
    if not 2 <= bits <= 8:
        raise UserError(f"weight bits must be a whole number from 2 to 8; found {bits!r}")
    weight = full_precision(weight.detach())
    with torch.no_grad():
        scale = weight.flatten(1).abs().amax(1).float() / (2 ** (bits - 1) - 1)
        scale = torch.where(scale > torch.finfo(torch.float32).tiny, scale, 1.0)
        return weight.div(_per_channel(scale, weight)).round_(), scale


def _on_grid(weight: Tensor, bits: int) -> Tensor:
    integers, scale = weight_grid(weight, bits)
    return integers.mul_(_per_channel(scale, integers)).to(weight.dtype)


@whole_operation
def _weight_round(weight: Tensor, bits: int) -> Tensor:
    return _on_grid(weight, bits)


def quantize_weight(weight: Tensor, bits: int | None) -> Tensor:
    """`weight` on the grid of `weight_grid`, with the gradient of the identity; None: as it is.

    >>> quantize_weight(torch.tensor([[1.0, 0.4], [0.2, -0.1]]), bits=2)
    tensor([[1.0000, 0.0000],
            [0.2000, 0.0000]])
    """
    if bits is None:
        return weight
    if WHOLE.on:
        return _weight_round(weight, bits)  # type: ignore[no-any-return]
    return _on_grid(weight, bits) + (weight - weight.detach())


def _per_channel(scale: Tensor, weight: Tensor) -> Tensor:
    return scale.to(weight.dtype).view(-1, *[1] * (weight.dim() - 1))


class QuantConv2d(nn.Conv2d):
    """`nn.Conv2d` whose weight is quantised to `weight_bits` bits, or not at all (None).

    Parameters and state dict are those of `nn.Conv2d`: the float weight, which training moves.
    """

    def __init__(self, *args: Any, weight_bits: int | None = None, **options: Any) -> None:
        super().__init__(*args, **options)
        self.weight_bits = weight_bits

    def forward(self, x: Tensor) -> Tensor:
        weight = quantize_weight(self.weight, self.weight_bits)
        return self._conv_forward(x, weight, self.bias)  # type: ignore[no-any-return]


class FirstConv(QuantConv2d):
    """The convolution of the pixels: in float32 under autocast, too.

    bfloat16 rounds pixels near 1 to 1/256, the size of an attack's step.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not autocasts(x):
            return super().forward(x)
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.to(self.weight.dtype))


class QuantLinear(nn.Linear):
    """`nn.Linear` in the same way."""

    def __init__(self, *args: Any, weight_bits: int | None = None, **options: Any) -> None:
        super().__init__(*args, **options)
        self.weight_bits = weight_bits

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, quantize_weight(self.weight, self.weight_bits), self.bias)


def effective_weight(layer: nn.Conv2d | nn.Linear) -> Tensor:
    """The weight that `layer` computes with: quantised where it has `weight_bits`."""
    return quantize_weight(layer.weight, getattr(layer, "weight_bits", None))
