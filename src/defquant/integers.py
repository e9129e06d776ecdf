"""A layer in integers: its weight, batch norm and bias as whole numbers and scales."""

from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from defquant.attacks.access import untouched
from defquant.config import check_bits
from defquant.errors import UserError
from defquant.quantize import QuantReLU, QuantSigned
from defquant.rounding import signed_grid
from defquant.weights import weight_grid

__all__ = [
    "PIXELS", "Floats", "Floats64", "Grid", "Sums", "Weight", "as_double", "branch_grid", "finest",
    "fold_batch_norm", "grid_of", "integers", "multiple", "snap_biases_",
]  # fmt: skip

Floats: TypeAlias = NDArray[np.float32]
Floats64: TypeAlias = NDArray[np.float64]
_MOVES = nn.MaxPool2d | nn.Identity | nn.Dropout | nn.Dropout2d
PAIR = 2**15 - 1
"""AVX2 without VNNI adds two products of a code and a weight in 16 bits, saturating."""


@dataclass(frozen=True)
class Grid:
    """Values scale · (code - zero), code a whole number in [0, top], kept as uint8."""

    scale: float
    zero: int = 0
    top: int = 255

    @property
    def bits(self) -> int:
        """Of a code, packed."""
        return self.top.bit_length()


PIXELS = Grid(1 / 255)


def branch_grid(peak: float, bits: int = 8, least: float | None = None) -> Grid:
    """Of signed values up to `peak`, as `QuantSigned` has them."""
    zero, top = int(signed_grid(torch.tensor(peak), bits, least)[1]), 2**bits - 1
    return Grid(peak / (top - zero), zero, top)


def grid_of(module: nn.Module) -> Grid | None:
    """Of what a quantiser returns; None for one of full precision, or before its training."""
    if isinstance(module, QuantReLU) and (bits := check_bits(module.bits)) is not None:
        return Grid(module.high / (2**bits - 1), 0, 2**bits - 1)
    if isinstance(module, QuantSigned) and module.bits is not None and float(module.peak):
        return branch_grid(float(module.peak), module.bits, module.least)
    return None


@dataclass(frozen=True)
class Weight:
    """The weight scale[c] · integers[c] of output channel c.

    Attributes:
        integers: int8 (c_out, ...), all multiples of `multiple`.
        scale: float32 (c_out,), positive.
        bits: of integers / multiple, symmetric and narrow: 8, 7, 4 or 2.
        multiple: of the stored integers. A finer unit lets the bias, a whole number of units, be
            exact where few bits make coarse sums.
    """

    integers: NDArray[np.int8]
    scale: Floats
    bits: int
    multiple: int = 1


def multiple(bits: int, top: int) -> int:
    """The largest factor at which products of weights and codes never saturate; 0 for none."""
    return min(127, PAIR // (2 * top)) // ((1 << bits - 1) - 1)


def finest(top: int) -> int:
    """The most weight bits whose products with codes up to `top` never saturate: 8 or 7."""
    return 8 if multiple(8, top) else 7


def integers(weight: Tensor, bits: int, top: int = 127, layer: str = "") -> Weight:
    """`weight` on its training grid, times the largest whole number that fits beside the codes.

    Raises `UserError` for weights that would saturate.
    """
    k, s, times = _whole(weight, bits, top, layer)
    return Weight((k * times).astype(np.int8), (s / times).astype(np.float32), bits, times)


def _whole(
    weight: Tensor, bits: int, top: int, layer: str
) -> tuple[NDArray[np.int16], Floats64, int]:
    codes, scale = weight_grid(weight.detach().cpu(), bits)
    largest = multiple(bits, top)
    if largest < 1:
        raise UserError(
            f"cannot export layer {layer!r}: products of {bits}-bit weights and codes up to {top} "
            f"saturate; at 8-bit activations weights have {finest(top)} bits"
        )
    return codes.numpy().astype(np.int16), scale.double().numpy(), largest


def fold_batch_norm(
    weight: Tensor | None, bias: Tensor | None, mean: Tensor, var: Tensor, eps: float
) -> tuple[Floats64, Floats64]:
    """gain = gamma / sqrt(var + eps) and shift = beta - gain · mean, float64 (c,)."""
    gain = 1 / np.sqrt(as_double(var) + eps)
    gain = gain if weight is None else gain * as_double(weight)
    shift = -gain * as_double(mean)
    return gain, shift if bias is None else shift + as_double(bias)


def as_double(tensor: Tensor) -> Floats64:
    result: Floats64 = tensor.detach().to("cpu", torch.float64).numpy()
    return result


@dataclass(frozen=True)
class Sums:
    """gain · (a convolution of codes on `source`) + shift per channel, before it is given a grid.

    `kernel` is the float weight, (c_out, c_in / groups, k, k), which has a grid of `bits` where it
    was trained on one; `home` is the layer whose bias is added last.
    """

    layer: str
    kernel: Tensor
    bits: int | None
    source: Grid
    gain: Floats64
    shift: Floats64
    home: nn.Conv2d | nn.BatchNorm2d | None = None

    @staticmethod
    def of(
        layer: str, kernel: Tensor, bits: int | None, bias: Tensor | None, source: Grid
    ) -> "Sums":
        ones = np.ones(len(kernel))
        return Sums(
            layer, kernel, bits, source, ones, 0 * ones if bias is None else as_double(bias)
        )

    @staticmethod
    def alone(layer: str, channels: int, source: Grid) -> "Sums":
        """The codes themselves, each channel by itself: what a batch norm of codes reads."""
        return Sums.of(layer, torch.ones(channels, 1, 1, 1), finest(source.top), None, source)

    def scaled(self, gain: Floats64, shift: Floats64, home: Any = None) -> "Sums":
        return replace(self, gain=self.gain * gain, shift=self.shift * gain + shift, home=home)

    def weight(self, bits: int, grid: Grid) -> Weight:
        """`integers` of the convolution with the gain in their scale, for an output on `grid`.

        Where the gain is negative the channel's integers are negated, which a narrow range allows.
        Where all products together stay below 1e-3 of a step of the output, because the gain is
        near 0, they are 0 and the scale only carries the bias. Where the bias would not fit into 32
        bits, because the scale is tiny beside it, the channel's scale is enlarged until it does.
        """
        k, s, times = _whole(self.kernel, bits, self.source.top, self.layer)
        most = np.abs(k).reshape(len(k), -1).sum(1) * s * np.abs(self.gain)
        dead = most * self.source.top * self.source.scale < 1e-3 * grid.scale
        sign = np.where(dead, 0, np.sign(self.gain)).astype(np.int16)
        per_channel = (-1, *[1] * (k.ndim - 1))
        k = k * sign.reshape(per_channel)
        # 2^-16 of a step of the output is fine enough for a bias, and far from overflow
        bare = grid.scale / self.source.scale * 2**-16 * times
        s = np.where(dead, bare, s * np.abs(self.gain)) / times
        least = np.abs(self.shift) / (self.source.scale * 2.0**30)
        k = np.rint(k * (s / np.maximum(s, least)).reshape(per_channel)) * times
        return Weight(k.astype(np.int8), np.maximum(s, least).astype(np.float32), bits, times)

    def bias(self, weight: Weight, grid: Grid) -> NDArray[np.int32]:
        """`shift` in units of source.scale · weight.scale. `UserError` where it overflows."""
        units, overflows = self.units(weight, grid)
        if overflows.any():
            raise UserError(
                f"cannot export layer {self.layer!r}: a bias of {np.abs(self.shift).max():.3g} "
                "overflows its 32-bit integer"
            )
        return units

    def units(self, weight: Weight, grid: Grid) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        """`shift` in whole units, and where it is too large for one.

        Clipped where it saturates the code whatever the products sum to: there it is not too large.
        """
        unit = np.float64(self.source.scale) * weight.scale
        units = np.rint(self.shift / unit)
        sums = np.abs(weight.integers.astype(np.int64)).reshape(len(units), -1).sum(1)
        room = 2**31 - 1 - sums * self.source.top
        saturates = (room - sums * self.source.top) * unit > grid.scale * (grid.top + 1)
        return np.clip(units, -room, room).astype(np.int32), (np.abs(units) > room) & ~saturates


@torch.no_grad()
def snap_biases_(model: nn.Module, x: Tensor) -> None:
    """Move biases to whole numbers of the units in which the deployed network keeps them, in place.

    A unit is (scale of the codes) · (scale of the weight): a few thousandths of a step, so the move
    costs no accuracy, and the deployed network then rounds as `model` does. `x`, an image in [0, 1]
    (1, c, h, w), shows which layer reads which.

    Nothing moves in a network with a convolution of float weights, or with one that reads anything
    but codes (pixels, or what a `QuantReLU` with bits or a trained `QuantSigned` returns): it has
    no integer form. Nor does a bias that has no unit: one added in several calls has many, one
    beyond 32 bits, or beside products that saturate, none. Their export is refused by name.
    """
    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    if not layers or any(getattr(layer, "weight_bits", None) is None for layer in layers):
        return
    found = _watched(model, x)
    homes = [sums.home for sums, _ in found]
    for sums, grid in found:
        home, bits = sums.home, sums.bits
        if home is None or home.bias is None or homes.count(home) > 1:
            continue
        if bits and multiple(bits, sums.source.top):
            weight = sums.weight(bits, grid)
            units, overflows = sums.units(weight, grid)
            missing = units * (np.float64(sums.source.scale) * weight.scale) - sums.shift
            home.bias.add_(torch.from_numpy(np.where(overflows, 0.0, missing)).to(home.bias))


def _watched(model: nn.Module, x: Tensor) -> list[tuple[Sums, Grid]]:
    """The sums of each call of a convolution, and their grid; empty where one reads no codes.

    Values are known by their tensors. Sums that no quantiser reads have the range of an export that
    measures it; here any will do.
    """
    values: dict[int, Grid | Sums] = {id(x): PIXELS}
    ended, kept, whole = list[tuple[Sums, Grid]](), [x], True

    def hook(module: nn.Module, inputs: tuple[Any, ...], y: Any) -> None:
        nonlocal whole
        kept.append(y)  # so that no later tensor takes its id
        source = id(inputs[0] if inputs else None)
        read = values.get(source)
        made = _made(names[module], module, read)
        if made is False:
            whole = False
        elif made is not None:
            if isinstance(read, Sums):
                del values[source]
                ended.extend([(read, made)] if isinstance(made, Grid) else [])
            values[id(y)] = made

    names = {module: name for name, module in model.named_modules()}
    with ExitStack() as stack, untouched(model):
        for module in names:
            if not list(module.children()):
                stack.enter_context(module.register_forward_hook(hook))
        model(x)
    ended += [(sums, branch_grid(1.0)) for sums in values.values() if isinstance(sums, Sums)]
    return ended if whole else []


def _made(
    name: str, module: nn.Module, read: Grid | Sums | None
) -> Grid | Sums | Literal[False] | None:
    """What `module` makes of codes on a grid, of sums or of another value; False: no integers."""
    if (grid := grid_of(module)) is not None:
        return grid
    if isinstance(module, nn.Conv2d):
        if not isinstance(read, Grid):
            return False
        made = Sums.of(name, module.weight, getattr(module, "weight_bits", None), module.bias, read)
        return replace(made, home=None if module.bias is None else module)
    if isinstance(module, nn.BatchNorm2d) and read is not None:
        if module.running_var is None or module.running_mean is None:
            return False
        sums = Sums.alone(name, module.num_features, read) if isinstance(read, Grid) else read
        own = module.weight, module.bias, module.running_mean, module.running_var, module.eps
        return sums.scaled(*fold_batch_norm(*own), module if module.affine else None)
    return read if isinstance(module, _MOVES) else None
