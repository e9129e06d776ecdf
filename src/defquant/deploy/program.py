"""A network in integers, as plain data: codes on grids, and the few operations between them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from defquant.integers import Floats, Grid, Weight

__all__ = [
    "Add", "Affine", "Conv", "Flatten", "Linear", "MaxPool", "Mean", "Op", "Program", "Quantize",
]  # fmt: skip


@dataclass(frozen=True)
class Quantize:
    """Codes of `source`, a float tensor or `image`, the input in [0, 1]: rounded and clipped."""

    name: str
    source: str


@dataclass(frozen=True)
class Conv:
    """Convolution of codes in integers, scaled and rounded onto the grid of `name`.

    `bias` is int32 in units of (scale of the source) · weight.scale.
    """

    name: str
    source: str
    layer: str
    weight: Weight
    bias: NDArray[np.int32]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int


@dataclass(frozen=True)
class Add:
    """Sum of factor · tensor, as floats; the factor of codes goes into their scale."""

    name: str
    terms: tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class Affine:
    """scale[c] · x + bias[c] per channel of (n, c, ...), as floats."""

    name: str
    source: str
    scale: Floats
    bias: Floats


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
class Mean:
    """Over height and width, as floats: (n, c, h, w) -> (n, c)."""

    name: str
    source: str


@dataclass(frozen=True)
class Flatten:
    """(n, c, h, w) -> (n, c·h·w), as floats."""

    name: str
    source: str


@dataclass(frozen=True)
class Linear:
    """A linear layer in floats, its weight kept as integers."""

    name: str
    source: str
    layer: str
    weight: Weight
    bias: Floats


Op: TypeAlias = Quantize | Conv | Add | Affine | MaxPool | Mean | Flatten | Linear


@dataclass(frozen=True)
class Program:
    """Operations in order; the last one gives the logits.

    Attributes:
        ops: each names its result.
        grids: of every tensor of codes, by name; other tensors are floats.
        shape: of one image, (c, h, w).
        activations: the codes of each `QuantReLU`, by the layer's path in the network.
    """

    ops: tuple[Op, ...]
    grids: Mapping[str, Grid]
    shape: tuple[int, int, int]
    activations: Mapping[str, str] = field(default_factory=dict)

    @property
    def convolutions(self) -> tuple[Conv, ...]:
        return tuple(op for op in self.ops if isinstance(op, Conv))

    @property
    def logits(self) -> str:
        return self.ops[-1].name
