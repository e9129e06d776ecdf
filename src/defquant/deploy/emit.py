"""Values on their way to integer operations: kept unfinished until what follows is known.

`Walk` follows a captured network node by node; what has no integer form it writes in floats.
"""

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

import numpy as np
import torch
from torch import Tensor, fx

from defquant.captured import RESHAPES, Captured, arguments, kind_of, operation
from defquant.deploy.floats import KNOWN
from defquant.deploy.program import (
    BATCH,
    Add,
    Affine,
    Call,
    Conv,
    Name,
    Op,
    Program,
    Quantize,
    sources,
)  # fmt: skip
from defquant.errors import UserError
from defquant.integers import PIXELS, Floats64, Grid, Sums, as_double, branch_grid, finest

__all__ = [
    "Codes", "Emitter", "Make", "Padded", "Scaled", "Stream", "Unfinished", "Value", "Walk",
    "named",
]  # fmt: skip


@dataclass(frozen=True)
class Codes:
    name: str
    factor: ClassVar[float] = 1.0


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
        gain = value.gain * value.x.factor
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
            scale, bias = (value.gain * value.x.factor).astype("f4"), value.shift.astype("f4")
            return self.emit(Affine(value.name, value.x.name, scale, bias, value.rank))
        assert not isinstance(value, Padded), "a border has one reader, the convolution"
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


Make: TypeAlias = Callable[["Walk", fx.Node, dict[str, Any]], Value | None]
"""The value of a node, of its arguments by name, or None where it is one of floats."""


class Walk:
    """Values of the nodes so far. A value that several read is finished at once."""

    def __init__(self, seen: Captured, out: Emitter, kinds: Mapping[str, Make]) -> None:
        self.seen, self.out, self.kinds = seen, out, kinds
        (image,) = (node for node in seen.nodes if node.op == "placeholder")
        self.values: dict[fx.Node, Value] = {image: Codes("pixels")}
        self.batch = image.meta["val"].shape[0].node.expr

    def visit(self, node: fx.Node) -> None:
        if not isinstance(node.meta["val"], Tensor):
            return  # a size, or several tensors: whoever reads it knows
        make = self.kinds.get(operation(node).rpartition(".")[0])
        value = make(self, node, arguments(node)) if make else None
        value = self.call(node) if value is None else value
        shared = len(node.users) > 1 and not isinstance(value, Codes | Stream)
        self.values[node] = self.out.finished(value) if shared else value

    def value(self, argument: Any) -> Value | None:
        return self.values.get(argument) if isinstance(argument, fx.Node) else None

    def floats(self, argument: Any) -> Floats64 | None:
        """A number or a constant tensor; None for what the images reach."""
        if isinstance(argument, int | float):
            return np.asarray(float(argument))
        tensor = self.seen.constant(argument)
        return None if tensor is None else as_double(tensor)

    def call(self, node: fx.Node) -> Stream:
        """`node` in floats."""
        name = operation(node)
        if name.rpartition(".")[0] not in KNOWN and node.target is not operator.getitem:
            raise UserError(
                f"cannot export layer {node.meta['layer']!r}: a file has no form here of "
                f"{name.removeprefix('aten.')} ({node.name})"
            )
        size = self._size(node)
        args: tuple[Any, ...] = ()
        kwargs: dict[str, Any] = {}
        if kind_of(node) in RESHAPES:  # all are written as this one
            name, args = "aten.reshape.default", (self._plain(node.args[0]), size)
        elif node.target is operator.getitem:
            name, args, kwargs = self._part(node)
        elif kind_of(node) == "adaptive_avg_pool2d" and (step := _even(node.args[0], node)):
            name, args = "aten.avg_pool2d.default", (self._plain(node.args[0]), step)
        else:
            args, kwargs = (self._plain(a) for a in (node.args, node.kwargs))
        given = tuple(sorted(kwargs.items()))
        return self.out.emit(Call(named(node), node.meta["layer"], name, args, given, size))

    def _size(self, node: fx.Node) -> tuple[int, ...]:
        """Of the result, -1 for the dimension that the images are in, alone or with others."""
        free = [d for d in node.meta["val"].shape if isinstance(d, torch.SymInt)]
        if len(free) != 1:
            raise UserError(
                f"cannot export layer {node.meta['layer']!r}: one dimension must hold the images "
                f"({node.name})"
            )
        return tuple(-1 if isinstance(d, torch.SymInt) else d for d in node.meta["val"].shape)

    def _part(self, node: fx.Node) -> tuple[str, tuple[Any, ...], dict[str, Any]]:
        """One of the tensors that a split, chunk or unbind gives, as a slice of its source."""
        many, index = node.args
        assert isinstance(many, fx.Node) and isinstance(index, int)
        kind, source = kind_of(many), many.args[0]
        if kind == "adaptive_max_pool2d" and not index and (step := _even(source, node, least=0)):
            return "aten.max_pool2d.default", (self._plain(source), step), {}
        if kind not in ("chunk", "split", "split_with_sizes", "unbind"):
            raise UserError(
                f"cannot export layer {many.meta['layer']!r}: a file has no form here of "
                f"{operation(many) or many.name}"
            )
        dims = [*many.args[1:], *many.kwargs.values()]
        if kind == "unbind":
            return "aten.select.int", (self._plain(source), dims[0] if dims else 0, index), {}
        dim = dims[1] if len(dims) > 1 else 0
        lengths = [part.shape[dim] for part in many.meta["val"]]
        start = int(sum(lengths[:index]))
        ends = start, start + lengths[index]
        return "aten.slice.Tensor", (self._plain(source), dim, *ends), {}

    def _plain(self, argument: Any) -> Any:
        """Arguments of a `Call`: names, arrays and plain values."""
        if isinstance(argument, fx.Node):
            if not isinstance(argument.meta["val"], Tensor):
                return self._plain(argument.meta["val"])
            tensor = self.seen.constant(argument)
            if tensor is not None:
                return tensor.detach().numpy()
            return Name(self.out.tensor(self.values[argument]))
        if isinstance(argument, tuple | list):
            return tuple(self._plain(part) for part in argument)
        if isinstance(argument, dict):
            return {key: self._plain(value) for key, value in argument.items()}
        if isinstance(argument, torch.SymInt):
            if argument.node.expr != self.batch:
                raise UserError("cannot export a network that computes sizes from how many images")
            return BATCH
        return argument


def _even(source: Any, node: fx.Node, least: int = 1) -> tuple[int, ...]:
    """The windows of an adaptive pooling, where all are alike and more than `least`; else none."""
    before, after = (n.meta["val"].shape[-2:] for n in (source, node))
    alike = all(a % b == 0 for a, b in zip(before, after, strict=True)) and after.numel() > least
    return tuple(a // b for a, b in zip(before, after, strict=True)) if alike else ()


def named(node: fx.Node) -> str:
    """The name of a node's result, which the ends of a `Program` leave free."""
    return f"layer.{node.name}" if node.name in ("image", "pixels", "logits") else node.name
