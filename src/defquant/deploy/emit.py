"""Values on their way to integer operations: kept unfinished until what follows is known."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor, fx, nn

from defquant.deploy.folding import bias_integers, finest, integers
from defquant.deploy.program import PIXELS, Add, Affine, Conv, Floats64, Grid, Op, Program, Quantize
from defquant.deploy.tracing import named, pair
from defquant.errors import UserError

__all__ = ["Codes", "Emitter", "Scaled", "Stream", "Sums", "Value"]


@dataclass(frozen=True)
class Codes:
    name: str


@dataclass(frozen=True)
class Stream:
    """factor · (the float tensor `name`)."""

    name: str
    factor: float = 1.0


@dataclass(frozen=True)
class Sums:
    """gain · (a convolution of the codes `source`) + shift, before it is given a grid.

    `home` is the layer whose bias is added last.
    """

    node: fx.Node
    layer: str
    conv: nn.Conv2d
    source: str
    gain: Floats64
    shift: Floats64
    home: nn.Conv2d | nn.BatchNorm2d | None


@dataclass(frozen=True)
class Scaled:
    """gain · x + shift per channel, before it is quantised."""

    node: fx.Node
    x: Codes | Stream
    gain: Floats64
    shift: Floats64


Value: TypeAlias = Codes | Stream | Sums | Scaled


class Emitter:
    """Writes the operations of a `Program`, in order.

    Attributes:
        peaks: max|output| of convolutions whose output gets a grid of its own.
        weight_bits: of layers without `weight_bits` of their own.
        ops, grids: the operations so far, and the grids of their codes by name.
        missing: for each layer whose bias was rounded, what the rounded one has more.
        flat: tensors (n, c), among those of (n, c, h, w).
        activations: of each activation function, the name of its codes.
    """

    def __init__(self, peaks: Mapping[str, float], weight_bits: int) -> None:
        self.peaks, self.weight_bits = peaks, weight_bits
        self.ops: list[Op] = [Quantize("pixels", "image")]
        self.grids = {"pixels": PIXELS}
        self.missing: list[tuple[nn.Conv2d | nn.BatchNorm2d, Tensor]] = []
        self.flat: set[str] = set()
        self.activations: dict[str, str] = {}

    def program(self, shape: tuple[int, int, int]) -> Program:
        """What the last operation needs: a branch whose coefficient is 0 is left out."""
        needed, ops = {self.ops[-1].name}, []
        for op in reversed(self.ops):
            if op.name in needed:
                ops.append(op)
                needed |= {name for name, _ in op.terms} if isinstance(op, Add) else {op.source}
        grids = {name: grid for name, grid in self.grids.items() if name in needed}
        seen = {layer: name for layer, name in self.activations.items() if name in needed}
        return Program(tuple(reversed(ops)), grids, shape, seen)

    def emit(self, op: Op, *, flat: bool = False) -> Stream:
        """`op` written once; `flat` says that its output is (n, c)."""
        if all(op.name != known.name for known in self.ops):
            self.ops.append(op)
        if flat:
            self.flat.add(op.name)
        return Stream(op.name)

    def onto(self, node: fx.Node, grid: Grid, value: Value) -> Codes:
        """`value` rounded onto `grid`: the end of a convolution, or an operation of its own."""
        name = named(node)
        self.grids[name] = grid
        if isinstance(value, Sums):
            self._finish_conv(name, value)
        else:
            source = self.tensor(self.finished(value))
            self.ops.append(Quantize(name, source))
            if source in self.flat:
                self.flat.add(name)
        return Codes(name)

    def finished(self, value: Value) -> Codes | Stream:
        """As a tensor: sums of products rounded to their own range, affine maps written out."""
        if isinstance(value, Sums):
            if value.node.name not in self.peaks:
                raise UserError(
                    f"cannot export layer {value.layer!r} in integers: its output has no range; "
                    "calibrate, or train with --deployable"
                )
            peak = self.peaks[value.node.name] or 1.0  # of a branch of zeros any will do
            return self.onto(value.node, Grid(peak / 127, 128, 255), value)
        if isinstance(value, Scaled):
            factor = value.x.factor if isinstance(value.x, Stream) else 1.0
            scale, bias = (value.gain * factor).astype("f4"), value.shift.astype("f4")
            return self.emit(Affine(named(value.node), value.x.name, scale, bias))
        return value

    def _finish_conv(self, name: str, sums: Sums) -> None:
        conv, source, grid = sums.conv, self.grids[sums.source], self.grids[name]
        bits = getattr(conv, "weight_bits", None) or min(self.weight_bits, finest(source.top))
        weight = integers(conv.weight, bits, sums.gain, source, grid, sums.layer)
        bias = bias_integers(weight, sums.shift, source, grid, sums.layer)
        if sums.home is not None:
            unit = np.float64(source.scale) * weight.scale
            self.missing.append((sums.home, torch.from_numpy(bias * unit - sums.shift)))
        stride, padding, dilation = (pair(v) for v in (conv.stride, conv.padding, conv.dilation))
        self.ops.append(
            Conv(
                name, sums.source, sums.layer, weight, bias, stride, padding, dilation, conv.groups
            )
        )

    def tensor(self, value: Codes | Stream) -> str:
        """Its name, after a multiplication where a factor is left."""
        if isinstance(value, Stream) and value.factor != 1:
            return self.emit(Add(f"{value.name}/scaled", ((value.name, value.factor),))).name
        return value.name

    def add(self, node: fx.Node, factors: list[float], inputs: list[Value]) -> Value:
        """The sum in units of its first stream, whose factor is passed on and costs nothing."""
        terms: list[tuple[str, float]] = []
        unit = 1.0
        for factor, value in zip(factors, inputs, strict=True):
            x = self.finished(value)
            if isinstance(x, Stream):
                factor *= x.factor
                unit = factor if unit == 1 and abs(factor) > 1e-3 else unit
            if factor:
                terms.append((x.name, factor))
        if not terms:
            raise UserError(f"cannot export the sum {node.name!r}: all its coefficients are 0")
        if any(name in self.flat for name, _ in terms):
            raise UserError(f"cannot export the sum {node.name!r}: it must be of images")
        self.emit(Add(named(node), tuple((name, factor / unit) for name, factor in terms)))
        return Stream(named(node), unit)
