"""From a trained module to integers: follow its graph, fold what is affine into scales and bias."""

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, fx, nn

from defquant.config import check_bits
from defquant.deploy.folding import bias_integers, finest, fold_batch_norm, integers
from defquant.deploy.program import (
    PIXELS,
    Add,
    Affine,
    Conv,
    Flatten,
    Floats64,
    Grid,
    Linear,
    MaxPool,
    Mean,
    Op,
    Program,
    Quantize,
)
from defquant.deploy.tracing import named, over_image, pair, sources, trace
from defquant.errors import UserError
from defquant.lipschitz import ConvexSum
from defquant.quantize import QuantBranch, QuantReLU

__all__ = ["Lowering", "lower"]


@dataclass(frozen=True)
class _Codes:
    name: str


@dataclass(frozen=True)
class _Stream:
    """factor · (the float tensor `name`)."""

    name: str
    factor: float = 1.0


@dataclass(frozen=True)
class _Sums:
    """gain · (a convolution of the codes `source`) + shift, before it is given a grid.

    `home` is the layer whose bias is added last.
    """

    node: fx.Node
    layer: str
    conv: nn.Conv2d
    source: str
    gain: Floats64
    shift: Floats64
    home: nn.Conv2d | nn.BatchNorm2d | None


@dataclass(frozen=True)
class _Scaled:
    """gain · x + shift per channel, before it is quantised."""

    node: fx.Node
    x: _Codes | _Stream
    gain: Floats64
    shift: Floats64


_Value: TypeAlias = _Codes | _Stream | _Sums | _Scaled


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
    return Lowering(model, {} if peaks is None else peaks, weight_bits).program(shape)


class Lowering:
    """One pass over the graph; values are kept unfinished until what follows is known.

    `missing` lists, for each layer whose bias was rounded, what the rounded one has more.
    """

    def __init__(self, model: nn.Module, peaks: Mapping[str, float], weight_bits: int) -> None:
        self.model, self.peaks, self.weight_bits = model, peaks, weight_bits
        self.graph = trace(model)
        self.ops: list[Op] = [Quantize("pixels", "image")]
        self.grids = {"pixels": PIXELS}
        self.missing: list[tuple[nn.Conv2d | nn.BatchNorm2d, Tensor]] = []
        self.flat: set[str] = set()  # tensors (n, c) among those of (n, c, h, w)
        self.activations: dict[str, str] = {}

    def program(self, shape: tuple[int, int, int]) -> Program:
        values: dict[fx.Node, _Value] = {}
        for node in self.graph.nodes:
            if node.op == "placeholder":
                values[node] = _Codes("pixels")
            elif node.op == "output":
                self._check_end(node, values)
                return self._pruned(shape)
            else:
                value = self._value(node, [values[n] for n in sources(node)])
                shared = len(node.users) > 1 and not isinstance(value, _Codes | _Stream)
                values[node] = self._finished(value) if shared else value
        raise AssertionError("a graph has an output")

    def _pruned(self, shape: tuple[int, int, int]) -> Program:
        """What the last operation needs: a branch whose coefficient is 0 is left out."""
        needed, ops = {self.ops[-1].name}, []
        for op in reversed(self.ops):
            if op.name in needed:
                ops.append(op)
                needed |= {name for name, _ in op.terms} if isinstance(op, Add) else {op.source}
        grids = {name: grid for name, grid in self.grids.items() if name in needed}
        seen = {layer: name for layer, name in self.activations.items() if name in needed}
        return Program(tuple(reversed(ops)), grids, shape, seen)

    def _check_end(self, node: fx.Node, values: Mapping[fx.Node, _Value]) -> None:
        end = values.get(node.args[0]) if isinstance(node.args[0], fx.Node) else None
        last = self.ops[-1]
        if not isinstance(last, Linear) or end != _Stream(last.name):
            raise UserError("cannot export a network whose one output is not of a linear layer")

    def _value(self, node: fx.Node, inputs: list[_Value]) -> _Value:
        if node.op == "call_module":
            module = self.model.get_submodule(str(node.target))
            for kinds, make in _MODULES:
                if isinstance(module, kinds):
                    return make(self, node, module, inputs)
            raise UserError(
                f"cannot export layer {str(node.target)!r}, a {type(module).__name__}: it has no "
                "integer form here"
            )
        name = getattr(node.target, "__name__", str(node.target))
        sums = (operator.add, operator.iadd, torch.add)
        if node.target in sums and len(inputs) == 2 and not node.kwargs:
            return self._sum(node, [1.0, 1.0], inputs)
        if name == "mean" and over_image(node):
            return self._flattened(Mean, node, inputs)
        if name == "flatten" and (*node.args[1:], *node.kwargs.values()) == (1,):
            return self._flattened(Flatten, node, inputs)
        raise UserError(f"cannot export the operation {name!r} ({node.name}): use a layer instead")

    def _identity(self, _: fx.Node, __: nn.Module, inputs: list[_Value]) -> _Value:
        return inputs[0]

    def _conv(self, node: fx.Node, conv: nn.Conv2d, inputs: list[_Value]) -> _Value:
        source, layer = self._finished(inputs[0]), str(node.target)
        if not isinstance(source, _Codes) or source.name in self.flat:
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
        return _Sums(node, layer, conv, source.name, gain, shift, home)

    def _batch_norm(self, node: fx.Node, norm: nn.BatchNorm2d, inputs: list[_Value]) -> _Value:
        gain, shift = fold_batch_norm(norm, str(node.target))
        x = inputs[0]
        if isinstance(x, _Sums):
            home = norm if norm.affine else None
            both = x.gain * gain, x.shift * gain + shift
            return replace(x, node=node, gain=both[0], shift=both[1], home=home)
        if isinstance(x, _Scaled):
            return replace(x, node=node, gain=x.gain * gain, shift=x.shift * gain + shift)
        return _Scaled(node, x, gain, shift)

    def _quant_relu(self, node: fx.Node, act: QuantReLU, inputs: list[_Value]) -> _Value:
        bits = check_bits(act.bits)
        if bits is None:
            raise UserError(
                f"cannot export layer {str(node.target)!r} in integers: its activations have full "
                "precision; train with --bits, or set_bits"
            )
        codes = self._onto(node, Grid(act.high / (2**bits - 1), 0, 2**bits - 1), inputs[0])
        self.activations[str(node.target)] = codes.name
        return codes

    def _quant_branch(self, node: fx.Node, branch: QuantBranch, inputs: list[_Value]) -> _Value:
        peak = float(branch.peak)
        if peak == 0:
            raise UserError(
                f"cannot export layer {str(node.target)!r}: its range is 0, as before training"
            )
        return self._onto(node, Grid(peak / 127, 128, 255), inputs[0])

    def _max_pool(self, node: fx.Node, pool: nn.MaxPool2d, inputs: list[_Value]) -> _Value:
        x = self._finished(inputs[0])
        if not isinstance(x, _Codes) or pool.dilation not in (1, (1, 1)):
            raise UserError(f"cannot export layer {str(node.target)!r}: it must pool codes")
        if pool.ceil_mode and pool.padding not in (0, (0, 0)):
            raise UserError(
                f"cannot export layer {str(node.target)!r}: ONNX pools beyond a padded border "
                "otherwise than torch; take padding or ceil_mode"
            )
        kernel, stride, padding = (pair(v) for v in (pool.kernel_size, pool.stride, pool.padding))
        self.grids[named(node)] = self.grids[x.name]
        self.ops.append(MaxPool(named(node), x.name, kernel, stride, padding, pool.ceil_mode))
        return _Codes(named(node))

    def _mean(self, node: fx.Node, pool: nn.AdaptiveAvgPool2d, inputs: list[_Value]) -> _Value:
        if pool.output_size not in (1, (1, 1)):
            raise UserError(f"cannot export layer {str(node.target)!r}: its output must be 1x1")
        return self._flattened(Mean, node, inputs)

    def _flatten(self, node: fx.Node, flatten: nn.Flatten, inputs: list[_Value]) -> _Value:
        if (flatten.start_dim, flatten.end_dim) != (1, -1):
            raise UserError(f"cannot export layer {str(node.target)!r}: it must flatten all")
        return self._flattened(Flatten, node, inputs)

    def _flattened(
        self, kind: type[Mean] | type[Flatten], node: fx.Node, inputs: list[_Value]
    ) -> _Value:
        source = self._tensor(self._finished(inputs[0]))
        if source in self.flat:
            return inputs[0]
        return self._emit(kind(named(node), source), flat=True)

    def _linear(self, node: fx.Node, linear: nn.Linear, inputs: list[_Value]) -> _Value:
        source = self._tensor(self._finished(inputs[0]))
        if source not in self.flat:
            raise UserError(
                f"cannot export layer {str(node.target)!r}: its input must be (n, features)"
            )
        bits = getattr(linear, "weight_bits", None) or 8
        weight = integers(linear.weight, bits)
        bias = torch.zeros(linear.out_features) if linear.bias is None else linear.bias.detach()
        values = bias.float().cpu().numpy()
        return self._emit(Linear(named(node), source, str(node.target), weight, values), flat=True)

    def _convex(self, node: fx.Node, join: ConvexSum, inputs: list[_Value]) -> _Value:
        return self._sum(node, join.alpha.tolist(), inputs)

    def _sum(self, node: fx.Node, factors: list[float], inputs: list[_Value]) -> _Value:
        """The sum in units of its first stream, whose factor is passed on and costs nothing."""
        terms: list[tuple[str, float]] = []
        unit = 1.0
        for factor, value in zip(factors, inputs, strict=True):
            x = self._finished(value)
            if isinstance(x, _Stream):
                factor *= x.factor
                unit = factor if unit == 1 and abs(factor) > 1e-3 else unit
            if factor:
                terms.append((x.name, factor))
        if not terms:
            raise UserError(f"cannot export the sum {node.name!r}: all its coefficients are 0")
        if any(name in self.flat for name, _ in terms):
            raise UserError(f"cannot export the sum {node.name!r}: it must be of images")
        self._emit(Add(named(node), tuple((name, factor / unit) for name, factor in terms)))
        return _Stream(named(node), unit)

    def _onto(self, node: fx.Node, grid: Grid, value: _Value) -> _Codes:
        """`value` rounded onto `grid`: the end of a convolution, or an operation of its own."""
        name = named(node)
        self.grids[name] = grid
        if isinstance(value, _Sums):
            self._finish_conv(name, value)
        else:
            source = self._tensor(self._finished(value))
            self.ops.append(Quantize(name, source))
            if source in self.flat:
                self.flat.add(name)
        return _Codes(name)

    def _finished(self, value: _Value) -> _Codes | _Stream:
        if isinstance(value, _Sums):
            if value.node.name not in self.peaks:
                raise UserError(
                    f"cannot export layer {value.layer!r} in integers: its output has no range; "
                    "calibrate, or train with --deployable"
                )
            peak = self.peaks[value.node.name] or 1.0  # of a branch of zeros any will do
            return self._onto(value.node, Grid(peak / 127, 128, 255), value)
        if isinstance(value, _Scaled):
            factor = value.x.factor if isinstance(value.x, _Stream) else 1.0
            scale, bias = (value.gain * factor).astype("f4"), value.shift.astype("f4")
            return self._emit(Affine(named(value.node), value.x.name, scale, bias))
        return value

    def _finish_conv(self, name: str, sums: _Sums) -> None:
        conv, source, grid = sums.conv, self.grids[sums.source], self.grids[name]
        bits = getattr(conv, "weight_bits", None) or min(self.weight_bits, finest(source.top))
        weight = integers(conv.weight, bits, sums.gain, source, grid, sums.layer)
        bias = bias_integers(weight, sums.shift, source, grid, sums.layer)
        if sums.home is not None:
            unit = np.float64(source.scale) * weight.scale
            self.missing.append((sums.home, torch.from_numpy(bias * unit - sums.shift)))
        stride, padding, dilation = (pair(v) for v in (conv.stride, conv.padding, conv.dilation))
        self.ops.append(
            Conv(
                name, sums.source, sums.layer, weight, bias, stride, padding, dilation, conv.groups
            )
        )

    def _tensor(self, value: _Codes | _Stream) -> str:
        """Its name, after a multiplication where a factor is left."""
        if isinstance(value, _Stream) and value.factor != 1:
            return self._emit(Add(f"{value.name}/scaled", ((value.name, value.factor),))).name
        return value.name

    def _emit(self, op: Op, *, flat: bool = False) -> _Stream:
        if all(op.name != known.name for known in self.ops):
            self.ops.append(op)
        if flat:
            self.flat.add(op.name)
        return _Stream(op.name)


_Make: TypeAlias = Callable[[Lowering, fx.Node, Any, list[_Value]], _Value]
_MODULES: tuple[tuple[type | tuple[type, ...], _Make], ...] = (
    (nn.Conv2d, Lowering._conv),
    (nn.BatchNorm2d, Lowering._batch_norm),
    (QuantReLU, Lowering._quant_relu),
    (QuantBranch, Lowering._quant_branch),
    (ConvexSum, Lowering._convex),
    (nn.MaxPool2d, Lowering._max_pool),
    (nn.AdaptiveAvgPool2d, Lowering._mean),
    (nn.Flatten, Lowering._flatten),
    (nn.Linear, Lowering._linear),
    ((nn.Identity, nn.Dropout, nn.Dropout2d), Lowering._identity),
)
