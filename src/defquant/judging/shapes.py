"""A node of the graph, and the operators that move numbers without changing them."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from defquant.quantize import Staircase

__all__ = ["MOST", "SHAPES", "Numbers", "Step", "along", "bounded", "padded"]

Numbers = list[Any]
MOST = 1 << 24
"""Numbers of a tensor, for an image."""


@dataclass
class Step:
    """A node of the graph.

    Attributes:
        version: of the operator set that it is written in.
        range: the whole numbers that its output's type holds.
        image: an input hangs on the image, and `whole`: those that do are whole numbers.
        raw: the output is what it would round, in units of its scale: logits before a quantiser.
        batch: images of a call, as a file fixes it in a Reshape, and `images`, as they are now.
        known: values of inputs that are constants and that must be numbers, by position.
    """

    kind: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: dict[str, Any]
    version: int
    range: tuple[int, int] = (0, 255)
    image: bool = False
    whole: bool = False
    raw: bool = False
    batch: int | None = None
    images: int = 0
    known: dict[int, Numbers] = field(default_factory=dict)
    stairs: Staircase | None = None

    def get(self, name: str, default: Any = None) -> Any:
        return self.attributes.get(name, default)

    def staircase(
        self, u: Tensor, low: float = -math.inf, high: float = math.inf,
        rounding: Callable[[Tensor], Tensor] = torch.round,
    ) -> Tensor:  # fmt: skip
        """`u` rounded by this node's module, the one hook of the surrogates."""
        if self.stairs is None:
            self.stairs = Staircase(low, high, rounding)
        rounded: Tensor = self.stairs(u)
        return rounded


def along(value: Tensor, x: Tensor, axis: int) -> Tensor:
    """A vector, to be broadcast along `axis` of `x`; a scalar as it is."""
    if value.ndim > 1 and value.shape != x.shape[: value.ndim]:
        return value
    if value.numel() == 1 and value.ndim < 2:
        return value.reshape(())
    shape = [1] * x.ndim
    shape[axis] = value.numel()
    return value.reshape(shape) if value.ndim == 1 else value


def padded(x: Tensor, before: Sequence[int], after: Sequence[int], value: float = 0) -> Tensor:
    """Its last axes padded, or cut where a number is negative."""
    pads = [p for pair in zip(reversed(before), reversed(after), strict=True) for p in pair]
    if not any(pads):
        return x
    sizes = zip(x.shape[-len(before) :], before, after, strict=True)
    bounded(math.prod(x.shape[1 : -len(before)]) * math.prod(map(sum, sizes)))
    return F.pad(x, pads, value=value)


def reshape(s: Step, x: Tensor, shape: Numbers) -> Tensor:
    shape = list(shape)
    if s.batch and s.images and 1 in s.known and shape[0] > 0 and not shape[0] * s.images % s.batch:
        shape[0] = shape[0] * s.images // s.batch
    kept = 0 if s.get("allowzero", 0) else len(shape)
    return x.reshape([x.shape[i] if n == 0 and i < kept else n for i, n in enumerate(shape)])


def flatten(s: Step, x: Tensor) -> Tensor:
    axis = s.get("axis", 1)
    return x.reshape(math.prod(x.shape[: axis if axis >= 0 else axis + x.ndim]), -1)


def squeeze(s: Step, x: Tensor, axes: Numbers | None = None) -> Tensor:
    axes = s.get("axes", axes)
    return x.squeeze() if axes is None else x.squeeze(tuple(axes))


def unsqueeze(s: Step, x: Tensor, axes: Numbers | None = None) -> Tensor:
    found: Numbers = s.get("axes", axes)
    rank = x.ndim + len(found)
    for axis in sorted(a % rank for a in found):
        x = x.unsqueeze(axis)
    return x


def split(s: Step, x: Tensor, sizes: Numbers | None = None) -> tuple[Tensor, ...]:
    axis, sizes = s.get("axis", 0), s.get("split", sizes)
    found: tuple[Tensor, ...] = x.split(sizes or -(-x.shape[axis] // len(s.outputs)), axis)
    return found


def cut(s: Step, x: Tensor, *given: Numbers | None) -> Tensor:
    starts, ends, axes, steps = (*given, None, None, None, None)[:4]
    begins: Numbers = s.get("starts", starts)
    along_axes: Numbers = s.get("axes", axes) or list(range(len(begins)))
    each = zip(begins, s.get("ends", ends), along_axes, steps or [1] * len(begins), strict=True)
    for start, end, axis, step in each:
        if step > 0:
            index: list[slice] = [slice(None)] * x.ndim
            index[axis] = slice(start, end, step)
            x = x[tuple(index)]
        else:
            kept = torch.arange(*slice(start, end, step).indices(x.shape[axis]), device=x.device)
            x = x.index_select(axis, kept)
    return x


def gather(s: Step, x: Tensor, index: Tensor) -> Tensor:
    axis = s.get("axis", 0) % x.ndim
    flat = index.reshape(-1).long()
    chosen = x.index_select(axis, torch.where(flat < 0, flat + x.shape[axis], flat))
    return chosen.reshape([*x.shape[:axis], *index.shape, *x.shape[axis + 1 :]])


def pad(s: Step, x: Tensor, *given: Numbers | None) -> Tensor:
    pads, value, axes = (*given, None, None, None)[:3]
    sizes: Numbers = s.get("pads", pads)
    mode = s.get("mode", "constant")
    before, after = [0] * x.ndim, [0] * x.ndim
    for i, axis in enumerate(axes or range(x.ndim)):
        before[axis], after[axis] = sizes[i], sizes[len(sizes) // 2 + i]
    if mode == "constant":
        return padded(x, before, after, (value or [s.get("value", 0.0)])[0])
    for axis, ends in enumerate(zip(before, after, strict=True)):
        if any(ends):
            bounded(x.shape[axis] + max(ends))
            index = np.pad(np.arange(x.shape[axis]), ends, mode=mode)
            x = x.index_select(axis, torch.from_numpy(index).to(x.device))
    return x


def bounded(size: float) -> int:
    """`size`, of an axis or of a tensor for one image, if it can be borne."""
    if not 0 <= size <= MOST:
        raise ValueError(f"it makes {size:.3g} numbers")
    return int(size)


def filled(s: Step, shape: Numbers) -> Tensor:
    value = s.get("value", torch.zeros(1))
    result: Tensor = value.reshape(()).expand(shape)  # takes no memory
    return result


def counted(s: Step, start: Numbers, end: Numbers, step: Numbers) -> Tensor:
    bounded((end[0] - start[0]) / step[0])
    return torch.arange(start[0], end[0], step[0])


def blocks(s: Step, x: Tensor) -> Tensor:
    n, (c, h, w) = s.get("blocksize"), x.shape[1:]
    if s.get("mode", "DCR") == "DCR":
        y = x.reshape(-1, n, n, c // n**2, h, w).permute(0, 3, 4, 1, 5, 2)
    else:
        y = x.reshape(-1, c // n**2, n, n, h, w).permute(0, 1, 4, 2, 5, 3)
    return y.reshape(-1, c // n**2, h * n, w * n)


def resize(s: Step, x: Tensor, *given: Numbers | None) -> Tensor:
    scales, sizes = given[-1] if s.version < 11 and given else s.get("scales"), None
    if s.version >= 11:
        _, scales, sizes = (*given, None, None, None)[:3]
    refused = [s.get("antialias", 0), s.get("keep_aspect_ratio_policy", "stretch") != "stretch"]
    if any(refused) or s.get("mode", "nearest") not in ("nearest", "linear"):
        raise ValueError("cubic, antialias and keep_aspect_ratio_policy are not read")
    numbers: Numbers = sizes or scales or []
    for i, axis in enumerate(s.get("axes") or range(len(numbers))):
        n = x.shape[axis]
        m = bounded(sizes[i] if sizes else math.floor(n * numbers[i]))
        if m != n or (not sizes and numbers[i] != 1):
            x = resample(s, x, axis, m, m / n if sizes else numbers[i])
            bounded(x[0].numel())
    if s.whole and s.get("mode", "nearest") == "linear":
        return s.staircase(x, rounding=torch.trunc)  # as onnxruntime has codes between codes
    return x


def resample(s: Step, x: Tensor, axis: int, m: int, scale: float) -> Tensor:
    n, i = x.shape[axis], torch.arange(m, dtype=torch.float32)
    how = s.get("coordinate_transformation_mode", "half_pixel" if s.version >= 11 else "asymmetric")
    if how == "asymmetric":
        at = i / scale
    elif how == "align_corners":
        at = i * (n - 1) / max(m - 1, 1)
    elif how == "half_pixel" or (how == "pytorch_half_pixel" and m > 1):
        at = (i + 0.5) / scale - 0.5
    elif how == "pytorch_half_pixel":
        at = i * 0
    else:
        raise ValueError(f"{how} is not read")
    if s.get("mode", "nearest") == "linear":
        at = at.clamp(0, n - 1)
        low = at.floor()
        share = along((at - low).to(x), x, axis)
        first, second = low.long().to(x.device), low.add(1).clamp(max=n - 1).long().to(x.device)
        return torch.lerp(x.index_select(axis, first), x.index_select(axis, second), share)
    old = torch.floor if scale >= 1 else torch.ceil
    nearest: dict[str, Callable[[Tensor], Tensor]] = {
        "round_prefer_floor": lambda a: (a - 0.5).ceil() if s.version >= 11 else old(a),
        "round_prefer_ceil": lambda a: (a + 0.5).floor(),
        "floor": torch.floor, "ceil": torch.ceil,
    }  # fmt: skip
    index = nearest[s.get("nearest_mode", "round_prefer_floor")](at).clamp(0, n - 1).long()
    return x.index_select(axis, index.to(x.device))


SHAPES: dict[str, Callable[..., Any]] = {
    "Concat": lambda s, *x: torch.cat(x, s.get("axis", 1)), "ConstantOfShape": filled,
    "DepthToSpace": blocks, "Expand": lambda s, x, n: x.expand(torch.broadcast_shapes(x.shape, n)),
    "Flatten": flatten, "Gather": gather, "Pad": pad, "Range": counted, "Reshape": reshape,
    "Resize": resize,
    "Shape": lambda s, x: torch.tensor(x.shape[s.get("start", 0) : s.get("end")]).long(),
    "Size": lambda s, x: torch.tensor(x.numel()), "Slice": cut, "Split": split,
    "Squeeze": squeeze, "Tile": lambda s, x, n: x.repeat(n),
    "Transpose": lambda s, x: x.permute(s.get("perm", list(range(x.ndim))[::-1])),
    "Unsqueeze": unsqueeze, "Upsample": resize,
}  # fmt: skip
