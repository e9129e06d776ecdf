"""A network in integers, as plain data: codes on grids, and the few operations between them.

`run` is the integer reference: what a `Program` computes, in torch, slowly and without doubt.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from defquant.captured import MOVES
from defquant.integers import Floats, Grid, Weight

__all__ = [
    "BATCH", "Add", "Affine", "Call", "Conv", "Linear", "MaxPool", "Name", "Op", "Program",
    "Quantize", "rounded", "run", "sources", "steps", "value",
]  # fmt: skip

EXACT = 2**24  # below it float32 holds every whole number
_CHEAP = MOVES | {"adaptive_avg_pool2d", "cat", "mean"}
"""Operations without arithmetic worth the name."""


@dataclass(frozen=True)
class Quantize:
    """Codes of `source`, a float tensor or `image`, the input in [0, 1]: rounded and clipped."""

    name: str
    source: str


@dataclass(frozen=True)
class Conv:
    """Convolution of codes in integers, scaled and rounded onto the grid of `name`.

    `bias` is int32 in units of (scale of the source) · weight.scale; `padding` is (top, left,
    bottom, right), of zeros.
    """

    name: str
    source: str
    layer: str
    weight: Weight
    bias: NDArray[np.int32]
    stride: tuple[int, int]
    padding: tuple[int, int, int, int]
    dilation: tuple[int, int]
    groups: int

    @property
    def alone(self) -> bool:
        """Whether each result comes of one code: a batch norm, say."""
        ends = self.stride, self.padding, self.dilation
        same = ends == ((1, 1), (0, 0, 0, 0), (1, 1)) and self.weight.integers[0].size == 1
        return same and self.groups == len(self.weight.integers)


@dataclass(frozen=True)
class Add:
    """Sum of factor · tensor, as floats; the factor of codes goes into their scale."""

    name: str
    terms: tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class Affine:
    """scale[c] · x + bias[c] per channel of (n, c, ...), `rank` dimensions in all, as floats."""

    name: str
    source: str
    scale: Floats
    bias: Floats
    rank: int = 4


@dataclass(frozen=True)
class MaxPool:
    """Of codes, onto the same grid."""

    name: str
    source: str
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    ceil: bool


@dataclass(frozen=True)
class Linear:
    """A linear layer of the last of `rank` dimensions in floats, its weight kept as integers."""

    name: str
    source: str
    layer: str
    weight: Weight
    bias: Floats
    rank: int = 2


@dataclass(frozen=True)
class Name:
    """A tensor of the program, among the arguments of a `Call`; `BATCH` is how many images."""

    value: str


BATCH = Name("#batch")


@dataclass(frozen=True)
class Call:
    """What has no integer form: a torch operation in floats, as `deploy.floats` knows it.

    Attributes:
        operation: its name in torch, `aten.softmax.int`.
        args: its arguments: plain values, arrays, and `Name`s of tensors.
        kwargs: those given by name.
        size: of the result, -1 for the batch.
    """

    name: str
    layer: str
    operation: str
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...]
    size: tuple[int, ...]

    @property
    def kind(self) -> str:
        return self.operation.split(".")[1]

    @property
    def torchs(self) -> Any:
        """torch's own operation."""
        space, name, overload = self.operation.split(".")
        return getattr(getattr(getattr(torch.ops, space), name), overload)


Op: TypeAlias = Quantize | Conv | Add | Affine | MaxPool | Linear | Call


def sources(op: Op) -> tuple[str, ...]:
    """The tensors that an operation reads."""
    if isinstance(op, Add):
        return tuple(name for name, _ in op.terms)
    if isinstance(op, Call):
        return tuple(_names((op.args, op.kwargs)))
    return (op.source,)


def _names(argument: Any) -> Iterator[str]:
    if isinstance(argument, Name) and argument != BATCH:
        yield argument.value
    elif isinstance(argument, tuple | list):
        for part in argument:
            yield from _names(part)


@dataclass(frozen=True)
class Program:
    """Operations in order; the last one gives the logits.

    Attributes:
        ops: each names its result.
        grids: of every tensor of codes, by name; other tensors are floats.
        shape: of one image, (c, h, w).
        classes: how many logits.
        activations: the codes that the network itself quantises, each as often as it does.
    """

    ops: tuple[Op, ...]
    grids: Mapping[str, Grid]
    shape: tuple[int, int, int]
    classes: int
    activations: tuple[str, ...] = ()

    @property
    def floats(self) -> dict[str, int]:
        """How often each operation stays in floats, the cheap ones (shapes, pooling) aside."""
        kinds = Counter(op.kind for op in self.ops if isinstance(op, Call))
        return {kind: count for kind, count in kinds.items() if kind not in _CHEAP}

    @property
    def float_convolutions(self) -> tuple[str, ...]:
        """Layers whose convolution stays in floats, as what it reads is not quantised."""
        return tuple(op.layer for op in self.ops if isinstance(op, Call) and op.kind == "conv2d")

    @property
    def convolutions(self) -> tuple[Conv, ...]:
        return tuple(op for op in self.ops if isinstance(op, Conv))

    @property
    def logits(self) -> str:
        return self.ops[-1].name


@torch.no_grad()
def run(program: Program, images: Tensor) -> dict[str, Tensor]:
    """Every tensor of the program by name: codes as uint8, other values as float32.

    Sums are exact whole numbers (float32 below 2^24, else float64); then, as onnxruntime does it,
    one float32 multiplier a channel, rint (ties to even), zero point, clip.

    `images`: uint8 (n, c, h, w), or float in [0, 1], which the first operation rounds to pixels.
    """
    image = images.float() / 255 if images.dtype == torch.uint8 else images.float()
    tensors = {"image": image}
    for op in program.ops:
        tensors[op.name] = value(program, op, tensors)
    return tensors


def value(program: Program, op: Op, tensors: dict[str, Tensor]) -> Tensor:
    """The result of one operation on tensors by name."""
    if op.name in program.grids:
        return rounded(program.grids[op.name], steps(program, op, tensors))
    if isinstance(op, Add):
        first, *others = (_float(program, name, tensors, factor) for name, factor in op.terms)
        return sum(others, first)
    if isinstance(op, Call):
        return _called(program, op, tensors)
    x = _float(program, op.source, tensors)
    if isinstance(op, Affine):
        shape = (-1, *[1] * (x.dim() - 2))
        return x * _tensor(op.scale).view(shape) + _tensor(op.bias).view(shape)
    if isinstance(op, Linear):
        weight = _tensor(op.weight.integers).float() * _tensor(op.weight.scale)[:, None]
        return F.linear(x, weight, _tensor(op.bias))
    raise TypeError(f"{op.name} has codes and no grid")


def _called(program: Program, op: Call, tensors: dict[str, Tensor]) -> Tensor:
    def given(argument: Any) -> Any:
        if isinstance(argument, Name):
            count, name = len(tensors["image"]), argument.value
            return count if argument == BATCH else _float(program, name, tensors)
        if isinstance(argument, tuple):
            return [given(part) for part in argument]
        return _tensor(argument) if isinstance(argument, np.ndarray) else argument

    kwargs = {name: given(value) for name, value in op.kwargs}
    result: Tensor = op.torchs(*map(given, op.args), **kwargs)
    return result


def steps(program: Program, op: Op, tensors: dict[str, Tensor]) -> Tensor:
    """What an operation that ends in codes gives before rounding, in steps of its grid."""
    grid = program.grids[op.name]
    if isinstance(op, MaxPool):
        codes = tensors[op.source].float()  # whole numbers below 256 are exact
        pooled = F.max_pool2d(codes, op.kernel, op.stride, op.padding, ceil_mode=op.ceil)
        return pooled - grid.zero
    if not isinstance(op, Conv):
        assert not isinstance(op, Add | Call)
        return _float(program, op.source, tensors) / _float32(grid.scale)
    source = program.grids[op.source]
    multiplier = _float32(source.scale) * _tensor(op.weight.scale) / _float32(grid.scale)
    return _sums(op, source, tensors[op.source]) * multiplier.view(-1, 1, 1)


def rounded(grid: Grid, steps: Tensor) -> Tensor:
    """Codes of values given in steps: rint (ties to even), zero point, clip; uint8."""
    return steps.round().add(grid.zero).clamp(0, grid.top).to(torch.uint8)


def _sums(op: Conv, source: Grid, codes: Tensor) -> Tensor:
    """The exact whole sums of a convolution with its bias, as float32."""
    largest = source.top * int(np.abs(op.weight.integers.astype(np.int64)).sum((1, 2, 3)).max())
    kind = torch.float32 if largest + int(np.abs(op.bias).max()) < EXACT else torch.float64
    top, left, bottom, right = op.padding
    x = F.pad(codes.to(kind) - source.zero, (left, right, top, bottom))
    weight, bias = _tensor(op.weight.integers).to(kind), _tensor(op.bias).to(kind)
    sums = F.conv2d(x, weight, bias, op.stride, 0, op.dilation, op.groups)
    return sums.float()


def _float(program: Program, name: str, tensors: dict[str, Tensor], factor: float = 1.0) -> Tensor:
    x, grid = tensors[name], program.grids.get(name)
    if grid is None:
        return x if factor == 1 else x * _float32(factor)
    return (x.float() - grid.zero) * _float32(grid.scale * factor)


def _float32(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float32)


def _tensor(array: "np.ndarray[tuple[int, ...], np.dtype[np.generic]]") -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array))
