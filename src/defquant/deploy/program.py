"""A network in integers, as plain data: codes on grids, and the few operations between them."""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from defquant.captured import MOVES
from defquant.integers import Floats, Grid, Weight

__all__ = [
    "BATCH", "Add", "Affine", "Call", "Conv", "Linear", "MaxPool", "Name", "Op", "Program",
    "Quantize", "sources",
]  # fmt: skip

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
