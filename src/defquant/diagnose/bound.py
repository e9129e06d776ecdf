"""An upper bound on the Lipschitz constant of a captured program, operation by operation."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from defquant.captured import MOVES, Captured, arguments, kind_of
from defquant.errors import UserError
from defquant.lipschitz import (
    ROUNDING,
    Norm,
    average_norm,
    kernel_matrix,
    matrix_norm,
    max_pool_norm,
    operator_norm,
)

__all__ = ["BatchNormCall", "LayerAudit", "Reach", "layer_input", "reach"]

_SLOPES: dict[str, Any] = dict.fromkeys((
    "relu", "relu6", "hardtanh", "clamp", "clamp_min", "clamp_max", "tanh", "softplus", "softsign",
    "log_sigmoid", "tanhshrink", "softshrink", "celu", "abs", "neg", "sin", "cos", "atan", "round",
    "fake_quantize_per_tensor_affine", "fake_quantize_per_channel_affine",
    "clip_round", "tanh_round", "signed_round",
    "amax", "amin", "max", "min", "split", "split_with_sizes", "chunk", "unbind", "tensor_split",
    "getitem", "masked_fill",
), 1.0) | {
    "sigmoid": 1 / 4, "hardsigmoid": 1 / 6, "hardswish": 3 / 2, "silu": 1.09984, "gelu": 1.129,
    "mish": 1.0885, "selu": 1.7581, "median_2x2": 2.0,
    "leaky_relu": lambda given: max(1.0, abs(given["negative_slope"])),
    "elu": lambda given: abs(given["scale"]) * max(1.0, abs(given["alpha"] * given["input_scale"])),
    "max_pool2d": lambda given: max_pool_norm(
        *(given[name] for name in ("kernel_size", "stride", "dilation"))
    ),
    "adaptive_max_pool2d": lambda given: math.sqrt(math.prod(
        1 if n % o == 0 else math.ceil(o / n) + 1
        for n, o in zip(given["self"].meta["val"].shape[-2:], given["output_size"], strict=True)
    )),
}  # fmt: skip
"""How far they carry one moving tensor, by their arguments; rounding counts as the identity.

The upper median of four: each pixel is in up to four windows.
"""
_SPREADS = MOVES | {
    "index", "im2col", "mean", "sum", "cumsum", "avg_pool1d", "avg_pool2d", "avg_pool3d",
    "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "upsample_bilinear2d",
    "pad", "constant_pad_nd", "to", "_to_copy",
}  # fmt: skip
"""Linear maps with no negative entry."""
_LINEAR = {"matmul", "mm", "addmm", "bmm", "mv", "einsum", "upsample_bicubic2d"}
"""Linear in each tensor that they take."""
_LAYERS = {"matmul": ("self", "other"), "mm": ("self", "mat2")} | dict.fromkeys((
    "linear", "conv1d", "conv2d", "conv3d", "convolution", "conv_transpose1d", "conv_transpose2d",
    "conv_transpose3d",
), ("input", "weight"))  # fmt: skip
"""Layers, and which of their arguments are the input and the weight."""


@dataclass(frozen=True)
class LayerAudit:
    """One call of a convolution or linear layer.

    Attributes:
        layer: its name.
        size: of its input, (c, h, w) or (c,).
        matrix_norm: largest singular value of the weight read as c_out x (c_in k k).
        matrix_least: the smallest.
        residual: ||Gram - I||_F on the smaller Gram (Eq. 8, reduced); 0 for an orthonormal kernel.
        norm: of the true map on inputs of that size: up to 3 for an orthonormal 3x3 kernel.
        batch_norm: the batch norm that takes the layer's output as it is, if any.
        gain: norm of the layer and that batch norm as one map; `norm` without one.
        upper: what the network's bound counts for it: `gain` is approached from below.
    """

    layer: str
    size: tuple[int, ...]
    matrix_norm: float
    matrix_least: float
    residual: float
    norm: float
    batch_norm: str | None
    gain: float
    upper: float


@dataclass(frozen=True)
class BatchNormCall:
    """A batch norm in eval mode; `gain` is max |gamma / sqrt(var + eps)|."""

    name: str
    gain: float


@dataclass(frozen=True)
class Reach:
    """||f(a) - f(b)||_2 <= `bound` ||a - b||_2, and the calls that it was made of.

    Without a bound it is None, and `unbounded` says why: "no bound: softmax in blocks.3.attn".
    """

    bound: float | None
    unbounded: str
    layers: tuple[LayerAudit, ...]
    batch_norms: tuple[BatchNormCall, ...]


def reach(program: Captured, x: Tensor) -> Reach:
    """Bound how far `program` carries a change of its input (L2 to L2).

    With R(node) the bound from the images to a node: a layer multiplies R by its norm (a batch norm
    on a layer's output by that of the composed map), an activation by its largest slope, a
    max-pooling by the root of how many windows share a pixel, an average over h w by 1/sqrt(h w).
    A sum has R(a) + R(b), thus 1 + branch for a residual one; a convex one |alpha_1| R(a) +
    |alpha_2| R(b). Quantisers count as their clamp, other rounding as the identity: the bound is
    the straight-through surrogate's. `x` (1, c, h, w) gives the shapes.

    Raises:
        UserError: a weight or a factor that is not finite; it is named.
    """
    walk = _Walk(program, x)
    for node in program.calls:
        walk.visit(node)
    bound = walk.reach[program.end] * (1 + ROUNDING)
    finite = math.isfinite(bound)
    why = "" if finite else _why(walk.unbounded)
    layers, norms = tuple(walk.layers.values()), tuple(walk.batch_norms)
    return Reach(bound if finite else None, why, layers, norms)


def layer_input(program: Captured, node: fx.Node) -> fx.Node | None:
    """What a convolution or linear layer of constant weights is given; None for other nodes."""
    if (ends := _LAYERS.get(kind_of(node))) is None:
        return None
    source, weight = (arguments(node)[name] for name in ends)
    found: fx.Node | None = source if program.constant(weight) is not None else None
    return found


def _why(places: list[str]) -> str:
    if not places:
        return "no bound: the product of the norms is beyond every number"
    more = f", and {len(places) - 1} more" if len(places) > 1 else ""
    return f"no bound: {places[0]}{more}"


class _NoBound(Exception):  # noqa: N818 -- no error: a finding
    """What an operation does that no constant bounds."""


class _Walk:
    """R of each node: 0 where the images do not count, infinity where nothing bounds it."""

    def __init__(self, program: Captured, x: Tensor) -> None:
        self.value: dict[Any, Any] = {}  # of each node, for one image
        self.reach: dict[fx.Node, float] = {}
        self.layers: dict[fx.Node, LayerAudit] = {}
        self.maps: dict[fx.Node, tuple[fx.Node, list[fx.Node], Tensor]] = {}
        self.batch_norms: list[BatchNormCall] = []
        self.unbounded: list[str] = []
        for node in program.nodes[:-1]:
            self.reach[node] = float(node.op == "placeholder")
            self.value[node] = program.constant(node)
        program.values(x, self.value.__setitem__)

    def visit(self, node: fx.Node) -> None:
        name = kind_of(node)
        if not self._moving(node) or not isinstance(self.value[node], Tensor | tuple | list):
            return  # the images, or their number, do not count
        try:
            self.reach[node] = self._carried(node, name)
        except (_NoBound, RuntimeError, TypeError, LookupError) as error:
            found = isinstance(error, _NoBound)  # else no rule fits
            why = f"{name} {error}".strip() if found else name
            layer = str(node.meta["layer"])
            alone = layer.rstrip("_0123456789") == name  # called in no layer
            self.unbounded.append(why if alone else f"{why} in {layer}")
            self.reach[node] = math.inf

    def _carried(self, node: fx.Node, name: str) -> float:
        given, value = arguments(node), self.value[node]
        if isinstance(value, Tensor):
            if not value.is_floating_point():
                raise _NoBound
            if all(isinstance(side, int) for side in node.meta["val"].shape):
                raise _NoBound("over the batch")
        if name in _LAYERS and (found := self._layer(node, name, given)) is not None:
            return found
        if (rule := getattr(self, f"op_{name}", None)) is not None:
            return float(rule(node, given))
        if name in ("maximum", "minimum") or (name in ("max", "min") and "other" in given):
            return self._either(node, given)
        source = self._only(node)
        if name in _SLOPES:
            slope = _SLOPES[name]
            slope = slope(given) if callable(slope) else slope * self._copies(source, node)
            return _times(slope, self.reach[source])
        again, value = partial(self._again, node, source), self.value[source]
        if name in _SPREADS:
            return _times(average_norm(again, value.shape), self.reach[source])
        if name in _LINEAR:
            norm = operator_norm(again, tuple(value.shape), value)
            return _times(norm.upper, self.reach[source])
        raise _NoBound

    # ---------------------------------------------------------------- layers

    def _layer(self, node: fx.Node, name: str, given: dict[str, Any]) -> float | None:
        """R behind a layer; None where a matrix product is none."""
        key, weight = _LAYERS[name]
        source, weight = given[key], given[weight]
        if name in _LINEAR and (self._is_moving(weight) or self.value[weight].ndim != 2):
            return None
        if self._is_moving(weight) or self._is_moving(given.get("bias")):
            raise _NoBound("by weights that move")
        W = self._constant(weight)
        W = W.mT if name in _LINEAR else W
        pads: list[fx.Node] = []  # in front of a convolution, part of its map
        while kind_of(source) in ("pad", "constant_pad_nd") and len(source.users) == 1:
            pads.insert(0, source)
            source = source.all_input_nodes[0]
        self.maps[node] = source, pads, W
        norm, size = self._norm(node), tuple(self.value[source].shape[1:])
        matrix = kernel_matrix(W, given.get("groups", 1))
        self.layers[node] = LayerAudit(
            node.meta["layer"], size, *matrix, norm.value, None, norm.value, norm.upper
        )
        return _times(norm.upper, self.reach[source])

    def _norm(self, layer: fx.Node, scale: Tensor | None = None) -> Norm:
        """Of a layer, each of its outputs times `scale`; the padding before it is part of it."""
        source, pads, W = self.maps[layer]
        if W.ndim == 2:
            return matrix_norm(W if scale is None else W * scale.view(-1, 1))
        factor = None if scale is None else scale.view(-1, *[1] * (W.ndim - 2))

        def called(v: Tensor) -> Tensor:
            for pad in pads:
                v = self._called(pad, {"self": v, "value": 0.0})
            out = self._called(layer, {"input": v, "weight": W, "bias": None})
            return out if factor is None else out * factor

        return operator_norm(called, tuple(self.value[source].shape), W)

    def _called(self, node: fx.Node, changed: dict[str, Any]) -> Tensor:
        known = fx.node.map_arg(arguments(node), self.value.__getitem__)
        out: Tensor = node.target(**known | changed)  # type: ignore[operator]
        return out

    def op_batch_norm(self, node: fx.Node, given: dict[str, Any]) -> float:
        source, layer = given["input"], node.meta["layer"]
        if given["training"] or given["running_var"] is None:
            raise _NoBound("by its own batch")
        scale = (self._constant(given["running_var"]) + given["eps"]).rsqrt()
        if given["weight"] is not None:
            scale = scale * self._constant(given["weight"])
        self.batch_norms.append(BatchNormCall(layer, scale.abs().max().item()))
        apart = _times(self.batch_norms[-1].gain, self.reach[source])
        call = self.layers.get(source)
        if call is None or (self.maps[source][2].ndim == 2 and self.value[source].ndim > 2):
            return apart
        composed = self._norm(source, scale)
        if call.batch_norm is None:
            self.layers[source] = replace(
                call, batch_norm=layer, gain=composed.value, upper=composed.upper
            )
        return min(_times(composed.upper, self.reach[self.maps[source][0]]), apart)

    # ------------------------------------------------- other operations, by name

    def op_add(self, node: fx.Node, given: dict[str, Any], sign: int = 1) -> float:
        other = given["other"], sign * given.get("alpha", 1)
        return self._total(node, [(given["self"], 1.0), other])

    def op_sub(self, node: fx.Node, given: dict[str, Any]) -> float:
        return self.op_add(node, given, -1)

    def op_rsub(self, node: fx.Node, given: dict[str, Any]) -> float:
        return self._total(node, [(given["self"], -given["alpha"]), (given["other"], 1.0)])

    def op_mul(self, node: fx.Node, given: dict[str, Any]) -> float:
        return self._total(node, [self._product(node, given["self"], given["other"])])

    def op_div(self, node: fx.Node, given: dict[str, Any]) -> float:
        if given.get("rounding_mode"):
            raise _NoBound("with rounding")
        least = self._constant(given["other"]).abs().min().item()
        return self._total(node, [(given["self"], 1 / least if least else math.inf)])

    def op_addcmul(self, node: fx.Node, given: dict[str, Any]) -> float:
        moving, size = self._product(node, given["tensor1"], given["tensor2"])
        return self._total(node, [(given["self"], 1.0), (moving, size * abs(given["value"]))])

    def op_lerp(self, node: fx.Node, given: dict[str, Any]) -> float:
        w = self._constant(given["weight"])
        ends = [(given["self"], (1 - w).abs().max().item()), (given["end"], w.abs().max().item())]
        return self._total(node, ends)

    def _product(self, node: fx.Node, a: Any, b: Any) -> tuple[Any, float]:
        """The factor that moves, and the largest size of the other."""
        if self._is_moving(a) and self._is_moving(b):
            raise _NoBound("of two moving tensors")
        a, b = (b, a) if self._is_moving(b) else (a, b)
        return a, self._constant(b).abs().max().item()

    def _total(self, node: fx.Node, terms: Iterable[tuple[Any, float]]) -> float:
        weights: dict[fx.Node, float] = {}
        for term, weight in terms:
            if self._is_moving(term):
                weights[term] = weights.get(term, 0.0) + weight
        return math.fsum(
            _times(abs(weight) * self._copies(term, node), self.reach[term])
            for term, weight in weights.items()
        )

    def op_cat(self, node: fx.Node, given: dict[str, Any]) -> float:
        return math.hypot(*(self.reach[part] for part in given["tensors"]))

    op_stack = op_cat

    def op_where(self, node: fx.Node, given: dict[str, Any]) -> float:
        if self._is_moving(given["condition"]):
            raise _NoBound("by what moves")
        return self._either(node, given)

    def _either(self, node: fx.Node, given: dict[str, Any]) -> float:
        moving = [part for part in (given["self"], given["other"]) if self._is_moving(part)]
        return math.hypot(*(_times(self._copies(m, node), self.reach[m]) for m in moving))

    def op_prelu(self, node: fx.Node, given: dict[str, Any]) -> float:
        slope = self._constant(given["weight"]).abs().max().item()
        return _times(max(1.0, slope), self.reach[given["self"]])

    # ------------------------------------------------------------------ helpers

    def _is_moving(self, argument: Any) -> bool:
        return isinstance(argument, fx.Node) and self.reach[argument] != 0

    def _moving(self, node: fx.Node) -> list[fx.Node]:
        """The inputs that the image reaches, as often as they are named."""
        inputs: list[fx.Node] = []
        fx.node.map_arg((node.args, node.kwargs), inputs.append)
        return [one for one in inputs if self._is_moving(one)]

    def _only(self, node: fx.Node) -> fx.Node:
        moving = self._moving(node)
        if len(moving) > 1:
            number = "two" if len(moving) == 2 else len(moving)
            raise _NoBound(f"of {number} moving tensors")
        return moving[0]

    def _constant(self, argument: Any) -> Tensor:
        """What does not move, and is no number of one type; `UserError` where it is not finite."""
        if self._is_moving(argument):
            raise _NoBound("by what moves")
        value = self.value[argument] if isinstance(argument, fx.Node) else argument
        tensor = torch.as_tensor(value)
        if not bool(tensor.isfinite().all()):
            name = argument.meta.get("name", argument.name) if isinstance(argument, fx.Node) else ""
            raise UserError(f"the audit needs finite weights; {name!r} holds NaN or infinity")
        return tensor if tensor.is_floating_point() and tensor.ndim else tensor.double()

    def _again(self, node: fx.Node, source: fx.Node, v: Tensor) -> Tensor:
        """The operation as a linear map of `source`."""

        def at(v: Tensor) -> Any:
            def put(n: fx.Node) -> Any:
                return v if n is source else self.value[n]

            args = fx.node.map_arg(node.args, put)
            return node.target(*args, **node.kwargs)  # type: ignore[operator]

        out: Tensor = at(v) - at(torch.zeros_like(v))
        return out

    def _copies(self, source: fx.Node, node: fx.Node) -> float:
        """The root of how often broadcasting shows each entry of `source`."""
        before, after = self.value[source], self.value[node]
        if not (isinstance(before, Tensor) and isinstance(after, Tensor) and before.numel()):
            return 1.0
        return math.sqrt(max(1.0, after.numel() / before.numel()))


def _times(a: float, b: float) -> float:
    """The product, where 0 times infinity is 0."""
    return a * b if a and b else 0.0
