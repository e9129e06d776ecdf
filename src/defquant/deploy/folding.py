"""Weights, batch norms and biases as integers and scales."""

import numpy as np
import torch
from torch import Tensor, nn

from defquant.deploy.program import Floats64, Grid, Weight
from defquant.errors import UserError
from defquant.weights import weight_grid

__all__ = ["bias_integers", "finest", "fold_batch_norm", "integers"]

PAIR = 2**15 - 1
"""AVX2 without VNNI adds two products of a code and a weight in 16 bits, saturating."""


def finest(top: int) -> int:
    """The most weight bits whose products with codes up to `top` never saturate: 8 or 7."""
    return 8 if 2 * 127 * top <= PAIR else 7


def fold_batch_norm(norm: nn.BatchNorm2d, layer: str) -> tuple[Floats64, Floats64]:
    """gain = gamma / sqrt(var + eps) and shift = beta - gain · mean, float64 (c,)."""
    if norm.running_mean is None or norm.running_var is None:
        raise UserError(f"cannot export layer {layer!r}: a batch norm without running statistics")
    mean, var = _double(norm.running_mean), _double(norm.running_var)
    gain = 1 / np.sqrt(var + norm.eps)
    if norm.affine:
        return gain * _double(norm.weight), _double(norm.bias) - gain * _double(norm.weight) * mean
    return gain, -gain * mean


def integers(
    weight: Tensor,
    bits: int,
    gain: Floats64 | None = None,
    source: Grid | None = None,
    grid: Grid | None = None,
    layer: str = "",
) -> Weight:
    """`weight` on its training grid, times the largest whole number that fits, and `gain` in scale.

    Where the gain is negative the channel's integers are negated, which a narrow range allows.
    Where all products together stay below 1e-3 of a step of the output, because the gain is near 0,
    they are 0 and the scale only carries the bias. `UserError` for weights that would saturate.
    """
    top = 127 if source is None else source.top
    codes, scale = weight_grid(weight.detach().cpu(), bits)
    largest = 2 ** (bits - 1) - 1
    multiple = min(127, PAIR // (2 * top)) // largest
    if multiple < 1:
        raise UserError(
            f"cannot export layer {layer!r}: products of {bits}-bit weights and codes up to {top} "
            f"saturate; at 8-bit activations weights have {finest(top)} bits"
        )
    k, s = codes.numpy().astype(np.int16), scale.double().numpy()
    if gain is not None and source is not None and grid is not None:
        most = np.abs(k).reshape(len(k), -1).sum(1) * s * np.abs(gain) * top * source.scale
        dead = most < 1e-3 * grid.scale
        shape = (-1, *[1] * (k.ndim - 1))
        k = k * np.where(dead, 0, np.sign(gain)).astype(np.int16).reshape(shape)
        # 2^-16 of a step of the output is fine enough for a bias, and far from overflow
        s = np.where(dead, grid.scale / source.scale * 2**-16 * multiple, s * np.abs(gain))
    scaled = (s / multiple).astype(np.float32)
    return Weight((k * multiple).astype(np.int8), scaled, bits, multiple)


def bias_integers(
    weight: Weight, shift: Floats64, source: Grid, grid: Grid, layer: str
) -> "np.ndarray[tuple[int, ...], np.dtype[np.int32]]":
    """`shift` in units of source.scale · weight.scale, rounded, as int32.

    A bias too large for that is clipped where it saturates the code whatever the products sum to.
    `UserError` where it does not.
    """
    unit = np.float64(source.scale) * weight.scale.astype(np.float64)
    units = np.rint(shift / unit)
    sums = np.abs(weight.integers.astype(np.int64)).reshape(len(units), -1).sum(1) * source.top
    room = 2**31 - 1 - sums
    saturates = (room - sums) * unit > grid.scale * (grid.top + 1)
    if ((np.abs(units) > room) & ~saturates).any():
        raise UserError(
            f"cannot export layer {layer!r}: a bias of {np.abs(shift).max():.3g} overflows its "
            "32-bit integer"
        )
    return np.clip(units, -room, room).astype(np.int32)


def _double(tensor: Tensor) -> Floats64:
    result: Floats64 = tensor.detach().to("cpu", torch.float64).numpy()
    return result
