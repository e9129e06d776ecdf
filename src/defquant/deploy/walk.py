"""A captured network node by node: the values so far, and what has no integer form in floats."""

import operator
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, fx

from defquant.captured import RESHAPES, Captured, kind_of, operation
from defquant.deploy.emit import Codes, Emitter, Padded, Stream, Value
from defquant.deploy.floats import KNOWN
from defquant.deploy.program import BATCH, Call, Name
from defquant.errors import UserError
from defquant.integers import Floats64, as_double

__all__ = ["Make", "Walk", "named"]

Make: TypeAlias = Callable[["Walk", fx.Node], Value | None]
"""The value of a node, or None where it is one of floats."""


class Walk:
    """Values of the nodes so far. A value that several read is finished at once."""

    def __init__(self, seen: Captured, out: Emitter, kinds: Mapping[str, Make]) -> None:
        self.seen, self.out, self.kinds = seen, out, kinds
        (image,) = (node for node in seen.nodes if node.op == "placeholder")
        self.values: dict[fx.Node, Value] = {image: Codes("pixels")}
        self.batch = image.meta["val"].shape[0].node.expr

    def visit(self, node: fx.Node) -> None:
        if not isinstance(node.meta["val"], Tensor):
            return  # a size, or several tensors: whoever reads it knows
        make = self.kinds.get(operation(node).rpartition(".")[0])
        value = make(self, node) if make else None
        value = self.call(node) if value is None else value
        shared = len(node.users) > 1 and not isinstance(value, Codes | Stream)
        self.values[node] = self.real(value) if shared else value

    def real(self, value: Value) -> Codes | Stream:
        """Finished; a border of zeros, which only a convolution takes, is written as one."""
        if not isinstance(value, Padded):
            return self.out.finished(value)
        raise AssertionError("a border has one reader, the convolution")

    def value(self, argument: Any) -> Value | None:
        return self.values.get(argument) if isinstance(argument, fx.Node) else None

    def floats(self, argument: Any) -> Floats64 | None:
        """A number or a constant tensor; None for what the images reach."""
        if isinstance(argument, int | float):
            return np.asarray(float(argument))
        tensor = self.seen.constant(argument)
        return None if tensor is None else as_double(tensor)

    def call(self, node: fx.Node) -> Stream:
        """`node` in floats."""
        name = operation(node)
        if name.rpartition(".")[0] not in KNOWN and node.target is not operator.getitem:
            raise UserError(
                f"cannot export layer {node.meta['layer']!r}: a file has no form here of "
                f"{name.removeprefix('aten.')} ({node.name})"
            )
        size = self._size(node)
        args: tuple[Any, ...] = ()
        kwargs: dict[str, Any] = {}
        if kind_of(node) in RESHAPES:  # all are written as this one
            name, args = "aten.reshape.default", (self._plain(node.args[0]), size)
        elif node.target is operator.getitem:
            name, args, kwargs = self._part(node)
        elif kind_of(node) == "adaptive_avg_pool2d" and (step := _even(node)):
            name, args = "aten.avg_pool2d.default", (self._plain(node.args[0]), step)
        else:
            args, kwargs = (self._plain(a) for a in (node.args, node.kwargs))
        given = tuple(sorted(kwargs.items()))
        return self.out.emit(Call(named(node), node.meta["layer"], name, args, given, size))

    def _size(self, node: fx.Node) -> tuple[int, ...]:
        """Of the result, -1 for the dimension that the images are in, alone or with others."""
        free = [d for d in node.meta["val"].shape if isinstance(d, torch.SymInt)]
        if len(free) != 1:
            raise UserError(
                f"cannot export layer {node.meta['layer']!r}: one dimension must hold the images "
                f"({node.name})"
            )
        return tuple(-1 if isinstance(d, torch.SymInt) else d for d in node.meta["val"].shape)

    def _part(self, node: fx.Node) -> tuple[str, tuple[Any, ...], dict[str, Any]]:
        """One of the tensors that a split, chunk or unbind gives, as a slice of its source."""
        many, index = node.args
        assert isinstance(many, fx.Node) and isinstance(index, int)
        kind, source = kind_of(many), many.args[0]
        if kind not in ("chunk", "split", "split_with_sizes", "unbind"):
            raise UserError(
                f"cannot export layer {node.meta['layer']!r}: a file has no form here of "
                f"{operation(many) or many.name}"
            )
        dims = [*many.args[1:], *many.kwargs.values()]
        if kind == "unbind":
            return "aten.select.int", (self._plain(source), dims[0] if dims else 0, index), {}
        dim = dims[1] if len(dims) > 1 else 0
        lengths = [part.shape[dim] for part in many.meta["val"]]
        start = int(sum(lengths[:index]))
        ends = start, start + lengths[index]
        return "aten.slice.Tensor", (self._plain(source), dim, *ends), {}

    def _plain(self, argument: Any) -> Any:
        """Arguments of a `Call`: names, arrays and plain values."""
        if isinstance(argument, fx.Node):
            if not isinstance(argument.meta["val"], Tensor):
                return self._plain(argument.meta["val"])
            tensor = self.seen.constant(argument)
            if tensor is not None:
                return tensor.detach().numpy()
            return Name(self.out.tensor(self.real(self.values[argument])))
        if isinstance(argument, tuple | list):
            return tuple(self._plain(part) for part in argument)
        if isinstance(argument, dict):
            return {key: self._plain(value) for key, value in argument.items()}
        if isinstance(argument, torch.SymInt):
            if argument.node.expr != self.batch:
                raise UserError("cannot export a network that computes sizes from how many images")
            return BATCH
        return argument


def _even(node: fx.Node) -> tuple[int, ...]:
    """The windows of an adaptive pooling, where all are alike and there are several; else none."""
    before, after = (n.meta["val"].shape[-2:] for n in (node.all_input_nodes[0], node))
    alike = all(a % b == 0 for a, b in zip(before, after, strict=True)) and after != (1, 1)
    return tuple(a // b for a, b in zip(before, after, strict=True)) if alike else ()


def named(node: fx.Node) -> str:
    """The name of a node's result, which the ends of a `Program` leave free."""
    return f"layer.{node.name}" if node.name in ("image", "pixels", "logits") else node.name
