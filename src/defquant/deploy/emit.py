"""Values on their way to integer operations: kept unfinished until what follows is known."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from defquant.deploy.program import Add, Affine, Conv, Op, Program, Quantize, sources
from defquant.errors import UserError
from defquant.integers import PIXELS, Floats64, Grid, Sums, branch_grid, finest

__all__ = ["Codes", "Emitter", "Padded", "Scaled", "Stream", "Unfinished", "Value"]


@dataclass(frozen=True)
class Codes:
    name: str


@dataclass(frozen=True)
class Padded:
    """Codes with a border of zeros, (top, left, bottom, right), for the convolution behind."""

    codes: Codes
    border: tuple[int, int, int, int]


@dataclass(frozen=True)
class Stream:
    """factor · (the float tensor, or the codes, `name`)."""

    name: str
    factor: float = 1.0


@dataclass(frozen=True)
class Unfinished:
    """`sums` of a convolution of the codes `source`; stride, padding, dilation and groups."""

    name: str
    source: str
    sums: Sums
    ends: tuple[tuple[int, int], tuple[int, int, int, int], tuple[int, int], int]


@dataclass(frozen=True)
class Scaled:
    """gain · x + shift per channel of `rank` dimensions, before it is quantised."""

    name: str
    x: Codes | Stream
    gain: Floats64
    shift: Floats64
    rank: int


Value: TypeAlias = Codes | Padded | Stream | Unfinished | Scaled


class Emitter:
    """Writes the operations of a `Program`, in order.

    Attributes:
        peaks: max|output| of convolutions whose output gets a grid of its own; None where any range
            will do, as `unranged`, the values that need one, is all that is asked.
        weight_bits: of layers without `weight_bits` of their own.
        ops, grids: the operations so far, and the grids of their codes by name.
        activations: the names of the codes that the network itself quantises.
    """

    def __init__(self, peaks: Mapping[str, float] | None, weight_bits: int) -> None:
        self.peaks, self.weight_bits = peaks, weight_bits
        self.unranged: list[str] = []
        self.ops: list[Op] = [Quantize("pixels", "image")]
        self.known = {"pixels"}
        self.grids = {"pixels": PIXELS}
        self.activations: list[str] = []

    def program(self, shape: tuple[int, int, int], classes: int) -> Program:
        """What the last operation needs: a branch whose coefficient is 0 is left out."""
        needed, ops = {self.ops[-1].name}, []
        for op in reversed(self.ops):
            if op.name in needed:
                ops.append(op)
                needed |= set(sources(op))
        grids = {name: grid for name, grid in self.grids.items() if name in needed}
        seen = tuple(name for name in self.activations if name in needed)
        return Program(tuple(reversed(ops)), grids, shape, classes, seen)

    def emit(self, op: Op) -> Stream:
        """`op` written once."""
        if op.name not in self.known:
            self.ops.append(op)
            self.known.add(op.name)
        return Stream(op.name)

    def onto(self, name: str, grid: Grid, value: Value) -> Codes:
        """`value` rounded onto `grid`: the end of a convolution, or an operation of its own."""
        if name not in self.known:
            self.grids[name] = grid
            value = self._of_codes(value, grid)
            self.emit(self._conv(name, value) if isinstance(value, Unfinished)
                      else Quantize(name, self.tensor(value)))  # fmt: skip
        return Codes(name)

    def _of_codes(self, value: Value, grid: Grid) -> Value:
        """An affine map of codes as a convolution of 1x1 within each channel, in integers.

        Only where training put its bias on whole units (`integers.snap_biases_`): these are coarse,
        and what training did not see is not rounded.
        """
        if not isinstance(value, Scaled) or value.rank != 4 or value.x.name not in self.grids:
            return value
        channels, source = len(value.gain), self.grids[value.x.name]
        gain = value.gain * (value.x.factor if isinstance(value.x, Stream) else 1.0)
        sums = Sums.alone(value.name, channels, source).scaled(gain, value.shift)
        weight = sums.weight(finest(source.top), grid)
        unit = np.float64(source.scale) * weight.scale
        if np.abs(sums.units(weight, grid)[0] * unit - sums.shift).max() > 1e-4 * grid.scale:
            return value
        ends = (1, 1), (0, 0, 0, 0), (1, 1), channels
        return Unfinished(value.name, value.x.name, sums, ends)

    def finished(self, value: Value) -> Codes | Stream:
        """As a tensor: sums of products rounded to their own range, affine maps written out."""
        if isinstance(value, Unfinished):
            return self.onto(value.name, branch_grid(self._peak(value)), value)
        if isinstance(value, Scaled):
            factor = value.x.factor if isinstance(value.x, Stream) else 1.0
            scale, bias = (value.gain * factor).astype("f4"), value.shift.astype("f4")
            return self.emit(Affine(value.name, value.x.name, scale, bias, value.rank))
        assert not isinstance(value, Padded)
        return value

    def _peak(self, value: Unfinished) -> float:
        self.unranged.append(value.name)
        if self.peaks is not None and value.name not in self.peaks:
            raise UserError(
                f"cannot export layer {value.sums.layer!r} in integers: its output has no range; "
                "calibrate, or train with --deployable"
            )
        return (self.peaks or {}).get(value.name) or 1.0  # of a branch of zeros any will do

    def _conv(self, name: str, value: Unfinished) -> Conv:
        sums, grid = value.sums, self.grids[name]
        weight = sums.weight(sums.bits or min(self.weight_bits, finest(sums.source.top)), grid)
        bias = sums.bias(weight, grid)
        return Conv(name, value.source, sums.layer, weight, bias, *value.ends)

    def tensor(self, value: Value) -> str:
        """Its name, after a multiplication where a factor is left."""
        x = self.finished(value)
        if isinstance(x, Stream) and x.factor != 1:
            return self.emit(Add(f"{x.name}/times{x.factor!r}", ((x.name, x.factor),))).name
        return x.name

    def add(self, name: str, factors: list[float], inputs: list[Value]) -> Value:
        """The sum in units of its first stream, whose factor is passed on and costs nothing."""
        terms: dict[str, float] = {}
        unit = 1.0
        for factor, value in zip(factors, inputs, strict=True):
            x = self.finished(value)
            if isinstance(x, Stream):
                factor *= x.factor
                stream = x.name not in self.grids
                unit = factor if stream and unit == 1 and abs(factor) > 1e-3 else unit
            terms[x.name] = terms.get(x.name, 0.0) + factor
        kept = tuple((source, factor / unit) for source, factor in terms.items() if factor)
        if not kept:
            raise UserError(f"cannot export the sum {name!r}: all its coefficients are 0")
        self.emit(Add(name, kept))
        return Stream(name, unit)
