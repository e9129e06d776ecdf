"""From a captured network to integers: fold what is affine into scales and bias."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from defquant.captured import MOVES, Captured, arguments, border, capture, kind_of, operation
from defquant.deploy.emit import (
    Codes,
    Emitter,
    Make,
    Padded,
    Scaled,
    Stream,
    Unfinished,
    Value,
    Walk,
    named,
)  # fmt: skip
from defquant.deploy.floats import borders, pair
from defquant.deploy.program import Add, Linear, MaxPool, Program
from defquant.errors import UserError
from defquant.integers import (
    Floats64,
    Grid,
    Sums,
    as_double,
    finest,
    fold_batch_norm,
    grid_of,
    integers,
)

__all__ = ["calibrate", "captured", "lower"]


def captured(model: nn.Module | Captured, images: Tensor) -> Captured:
    """`capture` of a model that is not captured yet, for images of that shape."""
    return model if isinstance(model, Captured) else capture(model, images)


def lower(
    model: nn.Module | Captured,
    shape: tuple[int, int, int],
    *,
    peaks: Mapping[str, float] | None = None,
    weight_bits: int = 8,
) -> Program:
    """The integers that `model` computes with when deployed.

    Convolutions of codes are in integers: batch norms and convex coefficients go into scales and
    biases, the weights' integers stay those of training (negated where a gain is negative). What
    has no integer form, or reads what is not quantised, stays in floats: `Program.floats`.

    Args:
        model: any classifier that `capture` can follow.
        shape: of one image, (c, h, w); the input lies in [0, 1].
        peaks: max|output| of each convolution whose output the model leaves unquantised, as
            `calibrate` measures it.
        weight_bits: of layers without `weight_bits` of their own: 8, 4 or 2.

    Raises:
        UserError: what cannot be followed, or has no form in a file, by the name of its layer; a
            network without quantised activations.
    """
    if weight_bits not in (2, 4, 8):
        raise UserError(f"weight bits must be 8, 4 or 2; found {weight_bits!r}")
    seen = captured(model, torch.full((1, *shape), 0.5))
    out = _follow(seen, {} if peaks is None else peaks, weight_bits)
    return out.program(shape, int(seen.end.meta["val"].shape[1]))


def calibrate(
    model: nn.Module | Captured, images: Tensor, *, batch_size: int = 256
) -> dict[str, float]:
    """max|output| over `images`, float in [0, 1], of each convolution that needs a range.

    Empty for a deployable network, which has learnt its ranges.
    """
    seen = captured(model, images)
    peaks = dict.fromkeys(_follow(seen, None, 8).unranged, 0.0)

    def keep(node: fx.Node, value: Any) -> None:
        if node.name in peaks:
            peaks[node.name] = max(peaks[node.name], float(value.abs().max()))

    for part in images.split(batch_size) if peaks else ():
        seen.values(part, keep)
    return peaks


def _follow(seen: Captured, peaks: Mapping[str, float] | None, weight_bits: int) -> Emitter:
    """One pass over the program; arguments and errors as of `lower` and `Emitter`."""
    if not any(map(_rounds, seen.calls)):
        raise UserError(
            f"cannot export {seen.model} in integers: its activations have full precision; train "
            "with --bits, use set_bits, or prepare it"
        )
    walk = Walk(seen, Emitter(peaks, weight_bits), _KINDS)
    for node in seen.calls:
        walk.visit(node)
    out, end = walk.out, walk.values[seen.end]
    if out.ops[-1].name != out.tensor(end) or isinstance(end, Codes):  # the last op is the logits
        name = out.tensor(end)
        out.emit(Add(f"{name}/end", ((name, 1.0),)))
    return out


def _rounds(node: fx.Node) -> bool:
    """Whether it quantises an activation; a signed one may only end a branch."""
    if kind_of(node) == "signed_round":
        return any(map(_reads, node.users))
    return operation(node).startswith("defquant.")


def _reads(node: fx.Node) -> bool:
    """Whether a layer reads it, or what only moves its values."""
    moves = kind_of(node) in MOVES or kind_of(node) in ("cat", "max_pool2d", "pad")
    return kind_of(node) in ("conv2d", "linear") or (moves and any(map(_reads, node.users)))


_OPEN = (Unfinished, Scaled)
_SUMS = ("add", "sub", "rsub", "addcmul")


def _conv(walk: Walk, node: fx.Node, given: dict[str, Any]) -> Value | None:
    x, kernel = walk.value(given["input"]), given["weight"]
    edge = x.border if isinstance(x, Padded) else (0, 0, 0, 0)
    x = x.codes if isinstance(x, Padded) else x
    source = None if x is None else walk.out.finished(x)
    weight = walk.seen.constant(kernel)
    if source is None or source.name not in walk.out.grids or weight is None or weight.ndim != 4:
        return None
    dilation = pair(given["dilation"])
    own = borders(given["padding"], weight.shape[2:], dilation)
    top, left, bottom, right = (p + b for p, b in zip(own, edge, strict=True))
    ends = pair(given["stride"]), (top, left, bottom, right), dilation, int(given["groups"])
    held = walk.seen.constant(given["bias"])
    bias = np.zeros(len(weight)) if held is None else as_double(held)
    kept, bits = kernel.meta.get("float", weight), kernel.meta.get("bits")
    sums = Sums.of(node.meta["layer"], kept, bits, None, walk.out.grids[source.name])
    sums = sums.scaled(np.asarray(source.factor), bias)
    return Unfinished(named(node), source.name, sums, ends)


def _batch_norm(walk: Walk, node: fx.Node, given: dict[str, Any]) -> Value | None:
    names = ("weight", "bias", "running_mean", "running_var")
    weight, bias, mean, var = (walk.seen.constant(given[name]) for name in names)
    if mean is None or var is None or given["training"]:
        raise UserError(
            f"cannot export layer {node.meta['layer']!r}: a batch norm without running statistics"
        )
    folded = fold_batch_norm(weight, bias, mean, var, given["eps"])
    channels = (-1, *[1] * (node.meta["val"].ndim - 2))
    gain, shift = (v.reshape(channels) for v in folded)
    return _affine(walk, node, given["input"], gain, shift)


def _affine(
    walk: Walk, node: fx.Node, source: Any, gain: Floats64, shift: Floats64
) -> Value | None:
    """gain · x + shift per channel; numbers, too. None where it is neither."""
    rank, x = node.meta["val"].ndim, walk.value(source)
    if x is None or source.meta["val"].shape != node.meta["val"].shape:
        return None
    summed = any(kind_of(user) in _SUMS for user in node.users)  # a sum takes a factor for nothing
    if gain.size == 1 and not shift.any() and (summed or not isinstance(x, _OPEN)):
        x = walk.out.finished(x)
        return Stream(x.name, float(gain.reshape(())) * x.factor)
    channels = int(node.meta["val"].shape[1]) if rank > 1 else 0
    parts = [_by_channel(v, rank, channels) for v in (gain, shift)]
    if parts[0] is None or parts[1] is None:
        return None
    gain, shift = parts[0], parts[1]
    if isinstance(x, Unfinished):
        return replace(x, name=named(node), sums=x.sums.scaled(gain, shift))
    if isinstance(x, Scaled):
        return replace(x, name=named(node), gain=x.gain * gain, shift=x.shift * gain + shift)
    return Scaled(named(node), walk.out.finished(x), gain, shift, rank)


def _by_channel(value: Floats64, rank: int, channels: int) -> Floats64 | None:
    """`value`, broadcast against (n, c, ...), as (c,); None where it is no value of a channel."""
    if value.size == 1:
        return np.full(channels, float(value.reshape(())))
    if value.shape == (channels,) and rank == 2:
        return value
    wanted = (channels, *[1] * (rank - 2))
    return value.reshape(channels) if value.shape[-len(wanted) :] == wanted and (
        value.size == channels) else None  # fmt: skip


def _sum(walk: Walk, node: fx.Node, given: dict[str, Any]) -> Value | None:
    """add, sub, rsub: of two values, or of one and a constant."""
    alpha, terms = float(given.get("alpha", 1)), (given["self"], given["other"])
    factors = {"add": (1.0, alpha), "sub": (1.0, -alpha), "rsub": (-alpha, 1.0)}[kind_of(node)]
    fixed = [walk.floats(a) for a in terms]
    values = [walk.value(a) for a in terms]
    for one, other in ((0, 1), (1, 0)):
        constant = fixed[other]
        if constant is not None:
            gain, shift = np.asarray(factors[one]), factors[other] * constant
            return _affine(walk, node, terms[one], gain, shift)
    if any(v is None for v in values) or not _alike(node):
        return None
    return walk.out.add(named(node), list(factors), [v for v in values if v is not None])


def _alike(node: fx.Node) -> bool:
    """Whether nothing is broadcast."""
    return all(a.meta["val"].shape == node.meta["val"].shape for a in node.all_input_nodes)


def _times(walk: Walk, node: fx.Node, given: dict[str, Any]) -> Value | None:
    """mul, div: by a constant."""
    first, second = given["self"], given["other"]
    divides = kind_of(node) == "div"
    constant = walk.floats(second)
    if constant is None and not divides:
        first, second = second, first
        constant = walk.floats(second)
    if constant is None or given.get("rounding_mode"):
        return None
    gain = 1 / constant if divides else constant
    return _affine(walk, node, first, gain, np.zeros(()))


def _addcmul(walk: Walk, node: fx.Node, given: dict[str, Any]) -> Value | None:
    """a + number · x, as a convex sum is written."""
    one, other = given["tensor1"], given["tensor2"]
    factor = walk.floats(one)
    if factor is None:
        factor, other = walk.floats(other), one
    values = walk.value(given["self"]), walk.value(other)
    if factor is None or factor.size != 1 or None in values or given["value"] != 1:
        raise UserError(
            f"cannot export layer {node.meta['layer']!r}: addcmul without a number ({node.name})"
        )
    inputs = [v for v in values if v is not None]
    return walk.out.add(named(node), [1.0, float(factor.reshape(()))], inputs)


def _quantised(walk: Walk, node: fx.Node, given: dict[str, Any]) -> Value:
    """By one of this library's quantisers."""
    quantiser = walk.seen.quantiser(node)
    grid = None if quantiser is None else grid_of(quantiser)
    if grid is None:
        raise UserError(
            f"cannot export layer {node.meta['layer']!r}: its range is 0, as before training and "
            "where it saw zeros alone: train it, or leave out the layer in front that gives zeros"
        )
    return _onto(walk, node, given, grid)


def _affine_round(walk: Walk, node: fx.Node, given: dict[str, Any]) -> Value | None:
    """torch's own quantiser: scale, zero point, lowest and highest code."""
    known = [walk.floats(given[name]) for name in ("scale", "zero", "low", "high")]
    if any(v is None or v.size != 1 for v in known):
        return None
    scale, zero, low, high = (float(v.reshape(())) for v in known if v is not None)
    if high - low > 255:
        return None
    return _onto(walk, node, given, Grid(scale, int(zero - low), int(high - low)))


def _onto(walk: Walk, node: fx.Node, given: dict[str, Any], grid: Grid) -> Value:
    x = walk.value(given["x"])
    assert x is not None
    codes = walk.out.onto(named(node), grid, x)
    walk.out.activations.append(codes.name)
    return codes


def _pad(walk: Walk, node: fx.Node, given: dict[str, Any]) -> Value | None:
    """A border of zeros around codes that one convolution reads goes into it."""
    x, (reader, *_), ends = walk.value(given["self"]), node.users, border(node)
    if x is None or ends is None or kind_of(reader) != "conv2d":
        return None
    read, source = arguments(reader), walk.out.finished(x)
    fixed = read["input"] is node and walk.seen.constant(read["weight"]) is not None
    return Padded(source, ends) if fixed and isinstance(source, Codes) else None


def _max_pool(walk: Walk, node: fx.Node, given: dict[str, Any]) -> Value | None:
    x = walk.value(given["self"])
    source = None if x is None else walk.out.finished(x)
    kernel, stride, padding = (given[k] for k in ("kernel_size", "stride", "padding"))
    if given["ceil_mode"] and any(pair(padding)):
        raise UserError(
            f"cannot export layer {node.meta['layer']!r}: ONNX pools beyond a padded border "
            "otherwise than torch; take padding or ceil_mode"
        )
    if not isinstance(source, Codes) or pair(given["dilation"]) != (1, 1):
        return None
    name = named(node)
    walk.out.grids[name] = walk.out.grids[source.name]
    sizes = pair(kernel), pair(stride or kernel), pair(padding)
    walk.out.emit(MaxPool(name, source.name, *sizes, bool(given["ceil_mode"])))
    return Codes(name)


def _linear(walk: Walk, node: fx.Node, given: dict[str, Any]) -> Value | None:
    x, kernel = walk.value(given["input"]), given["weight"]
    weight = walk.seen.constant(kernel)
    if x is None or weight is None:
        return None
    top, kept = _top(walk, given["input"]), kernel.meta.get("float", weight)
    bits = kernel.meta.get("bits") or min(8, finest(top))
    held = walk.seen.constant(given["bias"])
    bias = torch.zeros(len(weight)) if held is None else held
    source, rank = walk.out.tensor(x), node.meta["val"].ndim
    made = integers(kept, bits, top, node.meta["layer"]), bias.detach().float().cpu().numpy()
    return walk.out.emit(Linear(named(node), source, node.meta["layer"], *made, rank))


def _top(walk: Walk, node: Any) -> int:
    """The highest code that a linear layer reads, laid out anew or not; 127 where it reads none.

    onnxruntime moves the dequantisation behind what only moves values, and multiplies codes.
    """
    while kind_of(node) in MOVES and node.all_input_nodes:
        node = node.all_input_nodes[0]
    grid = walk.out.grids.get(named(node)) if isinstance(node, fx.Node) else None
    return 127 if grid is None else grid.top


_KINDS: Mapping[str, Make] = {
    "aten.conv2d": _conv, "aten.batch_norm": _batch_norm, "aten.add": _sum, "aten.sub": _sum,
    "aten.rsub": _sum, "aten.mul": _times, "aten.div": _times, "aten.addcmul": _addcmul,
    "aten.neg": lambda walk, node, given: _affine(
        walk, node, given["self"], np.asarray(-1.0), np.zeros(())
    ),
    "aten.pad": _pad, "aten.max_pool2d": _max_pool, "aten.linear": _linear,
    "defquant.clip_round": _quantised, "defquant.signed_round": _quantised,
    "defquant.affine_round": _affine_round,
}  # fmt: skip
