"""The integer reference: what a `Program` computes, in torch, slowly and without doubt."""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from defquant.deploy.program import (
    BATCH,
    Add,
    Affine,
    Call,
    Conv,
    Linear,
    MaxPool,
    Name,
    Op,
    Program,
)  # fmt: skip
from defquant.integers import Grid

__all__ = ["rounded", "run", "steps", "value"]

EXACT = 2**24  # below it float32 holds every whole number


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
    """torch's own operation."""

    def given(argument: Any) -> Any:
        if isinstance(argument, Name):
            return (
                len(tensors["image"])
                if argument == BATCH
                else _float(program, argument.value, tensors)
            )
        if isinstance(argument, tuple):
            return [given(part) for part in argument]
        return _tensor(argument) if isinstance(argument, np.ndarray) else argument

    space, name, overload = op.operation.split(".")
    torchs = getattr(getattr(getattr(torch.ops, space), name), overload)
    result: Tensor = torchs(*map(given, op.args), **{k: given(v) for k, v in op.kwargs})
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
