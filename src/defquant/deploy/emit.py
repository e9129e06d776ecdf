"""Values on their way to integer operations: kept unfinished until what follows is known."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import fx

from defquant.deploy.program import Add, Affine, Conv, Op, Program, Quantize
from defquant.errors import UserError
from defquant.integers import PIXELS, Floats64, Grid, Sums, branch_grid, finest

__all__ = ["Codes", "Emitter", "Scaled", "Stream", "Unfinished", "Value", "named", "pair"]


@dataclass(frozen=True)
class Codes:
    name: str


@dataclass(frozen=True)
class Stream:
    """factor · (the float tensor `name`)."""

    name: str
    factor: float = 1.0


@dataclass(frozen=True)
class Unfinished:
    """`sums` of a convolution of the codes `source`."""

    node: fx.Node
    source: str
    sums: Sums


@dataclass(frozen=True)
class Scaled:
    """gain · x + shift per channel, before it is quantised."""

    node: fx.Node
    x: Codes | Stream
    gain: Floats64
    shift: Floats64


Value: TypeAlias = Codes | Stream | Unfinished | Scaled


class Emitter:
    """Writes the operations of a `Program`, in order.

    Attributes:
        peaks: max|output| of convolutions whose output gets a grid of its own; None where any range
            will do, as `unranged`, the nodes that need one, is all that is asked.
        weight_bits: of layers without `weight_bits` of their own.
        ops, grids: the operations so far, and the grids of their codes by name.
        flat: tensors (n, c), among those of (n, c, h, w).
        activations: of each activation function, the name of its codes.
    """

    def __init__(self, peaks: Mapping[str, float] | None, weight_bits: int) -> None:
        self.peaks, self.weight_bits = peaks, weight_bits
        self.unranged: list[fx.Node] = []
        self.ops: list[Op] = [Quantize("pixels", "image")]
        self.grids = {"pixels": PIXELS}
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
        if isinstance(value, Unfinished):
            self._finish_conv(name, value)
        else:
            source = self.tensor(self.finished(value))
            self.ops.append(Quantize(name, source))
            if source in self.flat:
                self.flat.add(name)
        return Codes(name)

    def finished(self, value: Value) -> Codes | Stream:
        """As a tensor: sums of products rounded to their own range, affine maps written out."""
        if isinstance(value, Unfinished):
            return self.onto(value.node, branch_grid(self._peak(value)), value)
        if isinstance(value, Scaled):
            factor = value.x.factor if isinstance(value.x, Stream) else 1.0
            scale, bias = (value.gain * factor).astype("f4"), value.shift.astype("f4")
            return self.emit(Affine(named(value.node), value.x.name, scale, bias))
        return value

    def _peak(self, value: Unfinished) -> float:
        self.unranged.append(value.node)
        if self.peaks is not None and value.node.name not in self.peaks:
            raise UserError(
                f"cannot export layer {value.sums.layer!r} in integers: its output has no range; "
                "calibrate, or train with --deployable"
            )
        return (self.peaks or {}).get(value.node.name) or 1.0  # of a branch of zeros any will do

    def _finish_conv(self, name: str, value: Unfinished) -> None:
        sums, grid = value.sums, self.grids[name]
        conv, most = sums.conv, min(self.weight_bits, finest(sums.source.top))
        weight = sums.weight(getattr(conv, "weight_bits", None) or most, grid)
        bias = sums.bias(weight, grid)
        stride, padding, dilation = (pair(v) for v in (conv.stride, conv.padding, conv.dilation))
        ends = stride, padding, dilation, conv.groups
        self.ops.append(Conv(name, value.source, sums.layer, weight, bias, *ends))

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


def named(node: fx.Node) -> str:
    """The name of a node's result, which the ends of a `Program` leave free."""
    return f"layer.{node.name}" if node.name in ("image", "pixels", "logits") else node.name


def pair(value: Any) -> tuple[int, int]:
    return (int(value), int(value)) if isinstance(value, int) else (int(value[0]), int(value[1]))
