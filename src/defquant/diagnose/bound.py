"""An upper bound on the Lipschitz constant of a network, node by node along its graph."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from defquant.attacks import untouched
from defquant.diagnose.norms import (
    average_norm,
    batch_norm_scale,
    kernel_matrix,
    layer_norm,
    max_pool_norm,
)
from defquant.errors import UserError
from defquant.lipschitz import ConvexSum
from defquant.models.squeezing import squeeze
from defquant.quantize import Quantizer

__all__ = ["BatchNormCall", "LayerAudit", "Reach", "reach"]

_UNIT_MODULES = (
    Quantizer, nn.ReLU, nn.ReLU6, nn.Hardtanh, nn.Tanh, nn.Sigmoid, nn.Identity, nn.Flatten,
    nn.Dropout, nn.Dropout2d,
)  # fmt: skip
_UNIT = {
    "relu", "relu_", "relu6", "hardtanh", "clamp", "tanh", "sigmoid", "flatten", "reshape", "view",
    "contiguous", "permute", "transpose", "unsqueeze", "float", "neg",
}  # fmt: skip
_AVERAGES = {"mean", "avg_pool2d", "adaptive_avg_pool2d"}
_SHAPES = {"size", "getattr", "getitem", "dim"}


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
    """||f(a) - f(b)||_2 <= `bound` ||a - b||_2, and the calls that it was made of."""

    bound: float
    layers: tuple[LayerAudit, ...]
    batch_norms: tuple[BatchNormCall, ...]


class _Tracer(fx.Tracer):
    def __init__(self) -> None:
        super().__init__(autowrap_functions=(squeeze,))

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        known = (*_UNIT_MODULES, ConvexSum, nn.Conv2d, nn.Linear)
        return isinstance(m, known) or super().is_leaf_module(m, module_qualified_name)


class _Values(fx.Interpreter):
    """Keeps what every node gave, for its shape."""

    def run_node(self, n: fx.Node) -> Any:
        n.meta["value"] = super().run_node(n)
        return n.meta["value"]


def reach(model: nn.Module, x: Tensor) -> Reach:
    """Bound how far `model`, in eval mode, carries a change of its input (L2 to L2).

    With R(node) the bound from the images to a node: a layer multiplies R by its norm (a batch norm
    on a layer's output by that of the composed map), an activation, clamp or max-pooling without
    overlap by 1, an average over h w by 1/sqrt(h w). A sum has R(a) + R(b), thus 1 + branch for a
    residual one; a convex one |alpha_1| R(a) + |alpha_2| R(b). Quantisers count as their clamp: the
    bound is the straight-through surrogate's. `x` (1, c, h, w) gives the shapes.

    Raises:
        UserError: the graph cannot be traced, or a layer has no known constant; it is named.
    """
    graph = _traced(model)
    with untouched(model), torch.no_grad():
        _Values(model, graph=graph).run(x)
    walk = _Walk(model)
    for node in graph.nodes:
        walk.visit(node)
    return Reach(walk.end, tuple(walk.layers.values()), tuple(walk.batch_norms))


def _traced(model: nn.Module) -> fx.Graph:
    with untouched(model):
        try:
            return _Tracer().trace(model)
        except (fx.proxy.TraceError, TypeError, ValueError, RuntimeError) as error:
            line = str(error).split("\n")[0].rstrip(".")
            raise UserError(
                f"the audit follows a fixed graph; {type(model).__name__} has none ({line}): audit "
                "the part that torch.fx can trace"
            ) from None


class _Walk:
    def __init__(self, model: nn.Module) -> None:
        self.modules = dict(model.named_modules())
        self.reach: dict[fx.Node, float] = {}
        self.layers: dict[fx.Node, LayerAudit] = {}
        self.batch_norms: list[BatchNormCall] = []
        self.end = 0.0

    def visit(self, node: fx.Node) -> None:
        if node.op == "placeholder":
            self.reach[node] = float(not self.reach)  # further ones are settings, not images
        elif node.op == "get_attr":
            self.reach[node] = 0.0
        elif node.op == "output":
            if not isinstance(node.args[0], fx.Node):
                raise UserError("the audit needs a network that returns one tensor of logits")
            self.end = self.reach[node.args[0]]
        elif node.op == "call_module":
            self.reach[node] = self._module(node, self.modules[str(node.target)])
        else:
            self.reach[node] = self._function(node)

    def _module(self, node: fx.Node, module: nn.Module) -> float:
        sources = [arg for arg in node.args if isinstance(arg, fx.Node)]
        if isinstance(module, ConvexSum):
            shares = module.alpha.detach().abs().tolist()
            return math.fsum(a * self.reach[s] for a, s in zip(shares, sources, strict=True))
        if len(sources) != 1:
            raise _unknown(node, type(module).__name__)
        source, before = sources[0], self.reach[sources[0]]
        if isinstance(module, nn.Conv2d | nn.Linear):
            size, matrix = _size(source), kernel_matrix(module)
            norm = layer_norm(module, size)
            self.layers[node] = LayerAudit(
                str(node.target), size, *matrix, norm.value, None, norm.value, norm.upper
            )
            return norm.upper * before
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            return self._batch_norm(node, module, source)
        if isinstance(module, _UNIT_MODULES):
            return before
        if isinstance(module, nn.MaxPool2d):
            return max_pool_norm(module) * before
        if isinstance(module, nn.AvgPool2d | nn.AdaptiveAvgPool2d):
            return average_norm(module, _size(source)) * before
        raise _unknown(node, type(module).__name__)

    def _batch_norm(
        self, node: fx.Node, module: nn.BatchNorm1d | nn.BatchNorm2d, source: fx.Node
    ) -> float:
        scale = batch_norm_scale(module, str(node.target))
        self.batch_norms.append(BatchNormCall(str(node.target), scale.abs().max().item()))
        apart = self.batch_norms[-1].gain * self.reach[source]
        call = self.layers.get(source)
        if call is None:
            return apart
        layer = self.modules[str(source.target)]
        assert isinstance(layer, nn.Conv2d | nn.Linear)
        composed = layer_norm(layer, call.size, scale)
        if call.batch_norm is None:
            self.layers[source] = replace(
                call, batch_norm=str(node.target), gain=composed.value, upper=composed.upper
            )
        (before,) = (self.reach[arg] for arg in source.args if isinstance(arg, fx.Node))
        return min(composed.upper * before, apart)

    def _function(self, node: fx.Node) -> float:
        name = node.target if isinstance(node.target, str) else node.target.__name__
        reaches = [self.reach[arg] for arg in node.all_input_nodes]
        if node.target is squeeze:  # the upper median of four: each pixel is in up to four windows
            return reaches[0] * (2 if node.args[2] else 1)
        if name in _SHAPES and not isinstance(node.meta["value"], Tensor):
            return 0.0
        if name in ("add", "iadd", "sub") and not node.kwargs:
            return sum(self.reach[arg] for arg in node.args if isinstance(arg, fx.Node))
        if name in ("mul", "truediv", "div") and not node.kwargs:
            return self._product(node, name)
        if name == "cat":
            return math.hypot(*reaches)
        moving = [arg for arg in node.all_input_nodes if self.reach[arg]]
        if len(moving) == 1 and moving[0] is node.args[0]:
            if name in _UNIT:
                return self.reach[moving[0]]
            if name in _AVERAGES:
                return average_norm(_again(node), _size(moving[0])) * self.reach[moving[0]]
        raise _unknown(node, name)

    def _product(self, node: fx.Node, name: str) -> float:
        """A tensor times, or over, a constant: a normalisation in front of the network."""
        first, second = node.args[:2]
        if name == "mul" and not (isinstance(first, fx.Node) and self.reach[first]):
            first, second = second, first
        factor = second.meta["value"] if isinstance(second, fx.Node) else second
        fixed = not isinstance(second, fx.Node) or self.reach[second] == 0
        if not isinstance(first, fx.Node) or not fixed:
            raise _unknown(node, name)
        size = torch.as_tensor(factor, dtype=torch.float64).abs()
        gain = size.max() if name == "mul" else 1 / size.min()
        return float(gain) * self.reach[first]


def _size(node: fx.Node) -> tuple[int, ...]:
    return tuple(node.meta["value"].shape[1:])


def _again(node: fx.Node) -> Callable[[Tensor], Tensor]:
    """The node's operation as a function of its first argument."""
    if isinstance(node.target, str):
        method = node.target
        return lambda x: getattr(x, method)(*node.args[1:], **node.kwargs)
    function = node.target
    return lambda x: function(x, *node.args[1:], **node.kwargs)


def _unknown(node: fx.Node, kind: str) -> UserError:
    stack = list(node.meta.get("nn_module_stack", {}))
    where = str(node.target) if node.op == "call_module" else f"{node.name}, in {stack[-1]!r}"
    where = where if node.op == "call_module" or (stack and stack[-1]) else node.name
    return UserError(
        f"the audit knows no Lipschitz constant of the layer {where!r} ({kind}): replace it by one "
        "that it knows, or audit the part before it"
    )
