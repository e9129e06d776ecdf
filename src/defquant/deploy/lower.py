"""From a trained module to integers: follow its graph, fold what is affine into scales and bias."""

import operator
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, TypeAlias

import torch
from torch import fx, nn

from defquant.config import check_bits
from defquant.deploy.emit import Codes, Emitter, Scaled, Stream, Sums, Value
from defquant.deploy.folding import fold_batch_norm, integers
from defquant.deploy.program import Flatten, Grid, Linear, MaxPool, Mean, Program
from defquant.deploy.tracing import named, over_image, pair, sources, trace
from defquant.errors import UserError
from defquant.lipschitz import ConvexSum
from defquant.quantize import QuantBranch, QuantReLU

__all__ = ["follow", "lower"]


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
    return follow(model, {} if peaks is None else peaks, weight_bits).program(shape)


def follow(model: nn.Module, peaks: Mapping[str, float], weight_bits: int) -> Emitter:
    """One pass over the graph of `model`; arguments and errors as of `lower`."""
    out, values = Emitter(peaks, weight_bits), dict[fx.Node, Value]()
    for node in trace(model).nodes:
        if node.op == "placeholder":
            values[node] = Codes("pixels")
        elif node.op == "output":
            _check_end(out, node, values)
        else:
            value = _value(out, model, node, [values[n] for n in sources(node)])
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
    if name == "mean" and over_image(node):
        return _flattened(out, Mean, node, inputs)
    if name == "flatten" and (*node.args[1:], *node.kwargs.values()) == (1,):
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
    bias = torch.zeros(conv.out_channels) if conv.bias is None else conv.bias.detach()
    gain = torch.ones(conv.out_channels, dtype=torch.float64).numpy()
    shift = bias.double().cpu().numpy()
    home = None if conv.bias is None else conv
    return Sums(node, layer, conv, source.name, gain, shift, home)


def _batch_norm(out: Emitter, node: fx.Node, norm: nn.BatchNorm2d, inputs: list[Value]) -> Value:
    gain, shift = fold_batch_norm(norm, str(node.target))
    x = inputs[0]
    if isinstance(x, Sums):
        home = norm if norm.affine else None
        both = x.gain * gain, x.shift * gain + shift
        return replace(x, node=node, gain=both[0], shift=both[1], home=home)
    if isinstance(x, Scaled):
        return replace(x, node=node, gain=x.gain * gain, shift=x.shift * gain + shift)
    return Scaled(node, x, gain, shift)


def _quant_relu(out: Emitter, node: fx.Node, act: QuantReLU, inputs: list[Value]) -> Value:
    bits = check_bits(act.bits)
    if bits is None:
        raise UserError(
            f"cannot export layer {str(node.target)!r} in integers: its activations have full "
            "precision; train with --bits, or set_bits"
        )
    codes = out.onto(node, Grid(act.high / (2**bits - 1), 0, 2**bits - 1), inputs[0])
    out.activations[str(node.target)] = codes.name
    return codes


def _quant_branch(out: Emitter, node: fx.Node, branch: QuantBranch, inputs: list[Value]) -> Value:
    peak = float(branch.peak)
    if peak == 0:
        raise UserError(
            f"cannot export layer {str(node.target)!r}: its range is 0, as before training"
        )
    return out.onto(node, Grid(peak / 127, 128, 255), inputs[0])


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
    (QuantReLU, _quant_relu),
    (QuantBranch, _quant_branch),
    (ConvexSum, _convex),
    (nn.MaxPool2d, _max_pool),
    (nn.AdaptiveAvgPool2d, _mean),
    (nn.Flatten, _flatten),
    (nn.Linear, _linear),
    ((nn.Identity, nn.Dropout, nn.Dropout2d), _identity),
)
