"""From a trained module to integers: follow its graph, fold what is affine into scales and bias."""

import operator
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx, nn

from defquant.attacks.access import untouched
from defquant.deploy.emit import Codes, Emitter, Scaled, Stream, Unfinished, Value, named, pair
from defquant.deploy.program import Flatten, Linear, MaxPool, Mean, Program
from defquant.errors import UserError
from defquant.integers import Sums, fold_batch_norm, grid_of, integers
from defquant.lipschitz import ConvexSum
from defquant.quantize import QuantBranch, Quantizer, QuantReLU

__all__ = ["calibrate", "lower", "trace"]


def lower(
    model: nn.Module,
    shape: tuple[int, int, int],
    *,
    peaks: Mapping[str, float] | None = None,
    weight_bits: int = 8,
) -> Program:
    """The integers that `model` computes with when deployed.

    Batch norms and convex coefficients go into scales and biases, the integers stay those of
    training (negated where a batch norm's gain is negative).

    Args:
        model: in eval mode or not, made of convolutions, batch norms, `QuantReLU` with bits, sums,
            max-pooling, a global mean or flattening, and linear layers.
        shape: of one image, (c, h, w); the input lies in [0, 1].
        peaks: max|output| of each convolution whose output the model leaves unquantised, as
            `calibrate` measures it.
        weight_bits: of layers without `weight_bits` of their own: 8, 4 or 2.

    Raises:
        UserError: a layer that has no integer form, named.
    """
    if weight_bits not in (2, 4, 8):
        raise UserError(f"weight bits must be 8, 4 or 2; found {weight_bits!r}")
    return _follow(model, {} if peaks is None else peaks, weight_bits).program(shape)


def calibrate(model: nn.Module, images: Tensor, *, batch_size: int = 256) -> dict[str, float]:
    """max|output| over `images`, float in [0, 1], of each convolution that needs a range.

    Empty for a deployable network, which has learnt its ranges.
    """
    peaks = {node.name: 0.0 for node in _follow(model, None, 8).unranged}
    if peaks:
        with untouched(model), torch.no_grad():
            for part in images.split(batch_size):
                _Peaks(model, peaks).run(part)
    return peaks


class _Peaks(fx.Interpreter):
    """Runs the graph of a model and keeps the largest magnitude of some of its nodes."""

    def __init__(self, model: nn.Module, peaks: dict[str, float]) -> None:
        super().__init__(fx.GraphModule(model, trace(model)))
        self.peaks = peaks

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n.name in self.peaks:
            self.peaks[n.name] = max(self.peaks[n.name], float(result.abs().max()))
        return result


class _Tracer(fx.Tracer):
    """Sees through containers and our networks, not into layers."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        layers = Quantizer | QuantBranch | ConvexSum | nn.Conv2d | nn.Linear
        return isinstance(m, layers) or super().is_leaf_module(m, module_qualified_name)


def trace(model: nn.Module) -> fx.Graph:
    """The graph of the model's layers. Raises `UserError` where its forward has none."""
    try:
        return _Tracer().trace(model)
    except Exception as error:  # whatever the model's own code raises under tracing
        raise UserError(
            f"cannot export {type(model).__name__}: its forward cannot be followed ({error})"
        ) from None


def _follow(model: nn.Module, peaks: Mapping[str, float] | None, weight_bits: int) -> Emitter:
    """One pass over the graph of `model`; arguments and errors as of `lower` and `Emitter`."""
    out, values = Emitter(peaks, weight_bits), dict[fx.Node, Value]()
    for node in trace(model).nodes:
        if node.op == "placeholder":
            values[node] = Codes("pixels")
        elif node.op == "output":
            _check_end(out, node, values)
        else:  # a value that is taken twice is there twice
            inputs = [values[arg] for arg in node.args if isinstance(arg, fx.Node)]
            value = _value(out, model, node, inputs)
            shared = len(node.users) > 1 and not isinstance(value, Codes | Stream)
            values[node] = out.finished(value) if shared else value
    return out


def _check_end(out: Emitter, node: fx.Node, values: Mapping[fx.Node, Value]) -> None:
    end = values.get(node.args[0]) if isinstance(node.args[0], fx.Node) else None
    last = out.ops[-1]
    if not isinstance(last, Linear) or end != Stream(last.name):
        raise UserError("cannot export a network whose one output is not of a linear layer")


def _value(out: Emitter, model: nn.Module, node: fx.Node, inputs: list[Value]) -> Value:
    if node.op == "call_module":
        module = model.get_submodule(str(node.target))
        for kinds, make in _MODULES:
            if isinstance(module, kinds):
                return make(out, node, module, inputs)
        raise UserError(
            f"cannot export layer {str(node.target)!r}, a {type(module).__name__}: it has no "
            "integer form here"
        )
    name = getattr(node.target, "__name__", str(node.target))
    sums = (operator.add, operator.iadd, torch.add)
    if node.target in sums and len(inputs) == 2 and not node.kwargs:
        return out.add(node, [1.0, 1.0], inputs)
    given = (*node.args[1:], *node.kwargs.values())
    if name == "mean" and given in (((2, 3),), ([2, 3],), ((-2, -1),), ([-2, -1],)):
        return _flattened(out, Mean, node, inputs)
    if name == "flatten" and given == (1,):
        return _flattened(out, Flatten, node, inputs)
    raise UserError(f"cannot export the operation {name!r} ({node.name}): use a layer instead")


def _identity(out: Emitter, _: fx.Node, __: nn.Module, inputs: list[Value]) -> Value:
    return inputs[0]


def _conv(out: Emitter, node: fx.Node, conv: nn.Conv2d, inputs: list[Value]) -> Value:
    source, layer = out.finished(inputs[0]), str(node.target)
    if not isinstance(source, Codes) or source.name in out.flat:
        raise UserError(
            f"cannot export layer {layer!r} in integers: its input is not quantised; put a "
            "QuantReLU before it"
        )
    if isinstance(conv.padding, str) or conv.padding_mode != "zeros":
        raise UserError(f"cannot export layer {layer!r}: its padding must be numbers of zeros")
    return Unfinished(node, source.name, Sums.of(layer, conv, out.grids[source.name]))


def _batch_norm(out: Emitter, node: fx.Node, norm: nn.BatchNorm2d, inputs: list[Value]) -> Value:
    x = inputs[0]
    if isinstance(x, Unfinished):
        return replace(x, node=node, sums=x.sums.normed(norm, str(node.target)))
    gain, shift = fold_batch_norm(norm, str(node.target))
    if isinstance(x, Scaled):
        return replace(x, node=node, gain=x.gain * gain, shift=x.shift * gain + shift)
    return Scaled(node, x, gain, shift)


def _quantizer(
    out: Emitter, node: fx.Node, act: QuantReLU | QuantBranch, inputs: list[Value]
) -> Value:
    layer, grid = str(node.target), grid_of(act)
    if grid is None and isinstance(act, QuantReLU):
        raise UserError(
            f"cannot export layer {layer!r} in integers: its activations have full precision; "
            "train with --bits, or set_bits"
        )
    if grid is None:
        raise UserError(f"cannot export layer {layer!r}: its range is 0, as before training")
    codes = out.onto(node, grid, inputs[0])
    if isinstance(act, QuantReLU):
        out.activations[layer] = codes.name
    return codes


def _max_pool(out: Emitter, node: fx.Node, pool: nn.MaxPool2d, inputs: list[Value]) -> Value:
    x = out.finished(inputs[0])
    if not isinstance(x, Codes) or pool.dilation not in (1, (1, 1)):
        raise UserError(f"cannot export layer {str(node.target)!r}: it must pool codes")
    if pool.ceil_mode and pool.padding not in (0, (0, 0)):
        raise UserError(
            f"cannot export layer {str(node.target)!r}: ONNX pools beyond a padded border "
            "otherwise than torch; take padding or ceil_mode"
        )
    kernel, stride, padding = (pair(v) for v in (pool.kernel_size, pool.stride, pool.padding))
    out.grids[named(node)] = out.grids[x.name]
    out.ops.append(MaxPool(named(node), x.name, kernel, stride, padding, pool.ceil_mode))
    return Codes(named(node))


def _mean(out: Emitter, node: fx.Node, pool: nn.AdaptiveAvgPool2d, inputs: list[Value]) -> Value:
    if pool.output_size not in (1, (1, 1)):
        raise UserError(f"cannot export layer {str(node.target)!r}: its output must be 1x1")
    return _flattened(out, Mean, node, inputs)


def _flatten(out: Emitter, node: fx.Node, flatten: nn.Flatten, inputs: list[Value]) -> Value:
    if (flatten.start_dim, flatten.end_dim) != (1, -1):
        raise UserError(f"cannot export layer {str(node.target)!r}: it must flatten all")
    return _flattened(out, Flatten, node, inputs)


def _flattened(
    out: Emitter, kind: type[Mean] | type[Flatten], node: fx.Node, inputs: list[Value]
) -> Value:
    source = out.tensor(out.finished(inputs[0]))
    if source in out.flat:
        return inputs[0]
    return out.emit(kind(named(node), source), flat=True)


def _linear(out: Emitter, node: fx.Node, linear: nn.Linear, inputs: list[Value]) -> Value:
    source = out.tensor(out.finished(inputs[0]))
    if source not in out.flat:
        raise UserError(
            f"cannot export layer {str(node.target)!r}: its input must be (n, features)"
        )
    bits = getattr(linear, "weight_bits", None) or 8
    weight = integers(linear.weight, bits)
    bias = torch.zeros(linear.out_features) if linear.bias is None else linear.bias.detach()
    values = bias.float().cpu().numpy()
    return out.emit(Linear(named(node), source, str(node.target), weight, values), flat=True)


def _convex(out: Emitter, node: fx.Node, join: ConvexSum, inputs: list[Value]) -> Value:
    return out.add(node, join.alpha.tolist(), inputs)


_Make: TypeAlias = Callable[[Emitter, fx.Node, Any, list[Value]], Value]
_MODULES: tuple[tuple[type | tuple[type, ...], _Make], ...] = (
    (nn.Conv2d, _conv),
    (nn.BatchNorm2d, _batch_norm),
    ((QuantReLU, QuantBranch), _quantizer),
    (ConvexSum, _convex),
    (nn.MaxPool2d, _max_pool),
    (nn.AdaptiveAvgPool2d, _mean),
    (nn.Flatten, _flatten),
    (nn.Linear, _linear),
    ((nn.Identity, nn.Dropout, nn.Dropout2d), _identity),
)
