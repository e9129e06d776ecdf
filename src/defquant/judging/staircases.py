"""Staircases found and opened: whatever rounds in a torch program becomes a `Staircase` module.

Each rounding, however it is written, is put as clamp(round(u), low, high) of an affine u, and what
a detach trick adds and takes away is cancelled. `opening` takes the clips into the range. So one
function, written in any way, has one backward pass.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from defquant.captured import MOVES, Captured, kind_of, operation
from defquant.errors import UserError
from defquant.quantize import Staircase

__all__ = ["CASTS", "CLIPS", "LINEAR", "Rewriting"]

CLIPS = {"relu", "relu6", "hardtanh", "clamp", "clamp_min", "clamp_max", "maximum", "minimum"}
LINEAR = {"add", "sub", "mul", "div", "neg"}
CASTS = {"to", "_to_copy"}
aten = torch.ops.aten
_SIGN = 2.0  # width of a sign's cell: its gradient is usually clipped to [-1, 1]
_NEAR = 1e-3  # of a step: what rounding may do to it
_ROUNDS = {"round": torch.round, "floor": torch.floor, "ceil": torch.ceil, "trunc": torch.trunc}
_TURNED = {"gt": "lt", "ge": "le", "lt": "gt", "le": "ge"}
_LIES = CASTS | MOVES  # where values lie, and as which type


def _dtype(node: fx.Node) -> torch.dtype | None:
    """What the model's own tensor has; in the twin, whole numbers of the image are floats."""
    found = node.meta.get("val")
    return found.dtype if isinstance(found, Tensor) else None


class Rewriting:
    """Rewrites a captured program in place. `found`: the staircases in it, and their layers."""

    def __init__(self, captured: Captured, images: Tensor) -> None:
        self.captured, self.root, self.graph = captured, captured.module, captured.module.graph
        self.count = 0
        self.found: dict[fx.Node, str] = {}
        self.switches: set[fx.Node] = set()  # comparisons that became 0 or 1
        self.spread: dict[fx.Node, float] = {}
        self.near: dict[fx.Node, Tensor] = {}  # thresholds by what is compared with them
        captured.values(images, self._spreads)

    def _spreads(self, node: fx.Node, value: Any) -> None:
        compared = any(kind_of(user) in _TURNED for user in node.users) and kind_of(node)
        if compared and isinstance(value, Tensor) and value.is_floating_point():
            self.spread[node] = float(value.std())

    def module(self, clips: "Callable[[Rewriting, fx.Node], None]") -> fx.GraphModule:
        """The twin: the same program with staircases as modules, of which `clips` takes those."""
        for node in list(self.graph.nodes):
            self._spelled(node)
        self._cancel()
        self.graph.eliminate_dead_code()
        self.found = {node: layer for node, layer in self.found.items() if node.users}
        for node in self.found:
            clips(self, node)
        self.graph.eliminate_dead_code()
        self.graph.lint()
        return fx.GraphModule(self.root, self.graph, f"{self.captured.model}Twin").eval()

    # nodes

    def call(self, name: str, *args: Any) -> fx.Node:
        made = self.graph.call_function(getattr(aten, name).Tensor, args)
        made.meta = dict(self.at.meta)
        return made

    def part(self, module: nn.Module, u: Any) -> fx.Node:
        layer = str(self.at.meta.get("layer") or self.at.name)
        self.count += 1
        key = f"opened_{self.count}_{layer.replace('.', '_')}"
        self.root.add_submodule(key, module)
        made = self.graph.call_module(key, (u,))
        made.meta, self.found[made] = dict(self.at.meta), layer
        return made

    def stairs(self, u: Any, how: Callable[[Tensor], Tensor], *ends: float) -> fx.Node:
        low, high = ends or (-math.inf, math.inf)
        return self.part(Staircase(low, high, how), u)

    def value(self, argument: Any) -> Any:
        """The number or tensor of a constant, one number where all are the same; else None."""
        found = self.captured.constant(argument) if isinstance(argument, fx.Node) else argument
        if isinstance(found, Tensor) and found.numel() and (found == found.flatten()[0]).all():
            return found.flatten()[0].item()
        return found

    # spellings

    def _spelled(self, node: fx.Node) -> None:
        """Put what rounds, in whatever spelling, as a staircase."""
        name, self.at, made = kind_of(node), node, None
        with self.graph.inserting_before(node):
            for spelling in (self._own, self._rounds, self._coded, self._compares, self._buckets,
                             self._looked_up, self._chooses):  # fmt: skip
                made = made or spelling(node, name)
        if made is not None and made is not node:
            node.replace_all_uses_with(made)
            self.graph.erase_node(node)

    def _own(self, node: fx.Node, name: str) -> fx.Node | None:
        """Operations of this library, which `capture` leaves whole."""
        space, _, kind = operation(node).removesuffix(".default").partition(".")
        if space != "defquant":
            return None
        if kind == "affine_round":
            x, *how = node.args
            made = self._codes(x, *(self._along(a, None, node) for a in how[:2]), *how[2:])
            return self.call("mul", made, self._along(how[0], None, node))
        found = self.captured.quantiser(node)
        return None if found is None else self.part(found, node.args[0])

    def _rounds(self, node: fx.Node, name: str) -> fx.Node | None:
        """Roundings, whole divisions and remainders, casts to whole numbers, signs."""
        x, *rest = node.args or (None,)
        mode = node.kwargs.get("rounding_mode")
        if not isinstance(x, fx.Node):
            return None
        if name == "type_as":
            return x
        if name in _ROUNDS and operation(node).endswith(".default"):
            return x if self._whole(x) else self.stairs(x, _ROUNDS[name])
        if (name == "div" and mode) or name == "floor_divide":
            return self.stairs(self.call("div", x, *rest), _ROUNDS[str(mode or "floor")])
        if name in ("remainder", "fmod"):
            whole = torch.floor if name == "remainder" else torch.trunc
            times = self.stairs(self.call("div", x, *rest), whole)
            return self.call("sub", x, self.call("mul", times, *rest))
        if name == "sign":
            u = self.call("div", x, _SIGN)
            above = self.stairs(u, torch.ceil, 0, 1)
            return self.call("add", above, self.stairs(u, torch.floor, -1, 0))
        kinds = _dtype(x), _dtype(node)
        if name not in CASTS or None in kinds or torch.bool in kinds:
            return None
        before, after = (kind is not None and kind.is_floating_point for kind in kinds)
        if after:
            return None
        return self.stairs(x, torch.trunc) if before and not self._whole(x) else x

    def _whole(self, node: fx.Node) -> bool:
        """Whether it is whole numbers, by the way it is made."""
        while kind_of(node) in CLIPS | _LIES:
            node = node.all_input_nodes[0]
        return node in self.found and isinstance(self.staircase(node), Staircase)

    def staircase(self, node: fx.Node) -> nn.Module:
        return self.root.get_submodule(str(node.target))

    def _coded(self, node: fx.Node, name: str) -> fx.Node | None:
        """`quantize` and `dequantize` of PT2E and torchao, to and from whole floats."""
        space, _, rest = operation(node).partition(".")
        if space not in ("quantized_decomposed", "torchao"):
            return None
        kind, target = rest.split(".")[0], node.target
        if not kind.startswith(("quantize_", "dequantize_")):
            node.target = _still(target)  # measures a range: no gradient
            return node
        x, *how = node.args
        axis: Any = _axis_of_blocks(how.pop(0), node) if kind.endswith("_affine") else None
        scale, zero, *others = how
        axis = others[0] if "channel" in kind else axis
        scale, zero = (self._along(t, axis, node) for t in (scale, 0 if zero is None else zero))
        if kind.startswith("dequantize_"):
            return self.call("mul", x if zero == 0 else self.call("sub", x, zero), scale)
        made = self._codes(x, scale, zero, *_range(others, node))
        return made if zero == 0 else self.call("add", made, zero)

    def _codes(self, x: Any, scale: Any, zero: Any, low: float, high: float) -> fx.Node:
        """clamp(round(x / scale) + zero, low, high) - zero."""
        u = self.call("div", x, scale)
        if isinstance(zero, int | float):
            return self.stairs(u, torch.round, low - zero, high - zero)
        made = self.stairs(self.call("add", u, zero), torch.round, low, high)
        return self.call("sub", made, zero)

    def _along(self, argument: Any, axis: Any, node: fx.Node) -> Any:
        """A scale or zero point as a number, or as a tensor that broadcasts along `axis`."""
        value = self.value(argument)
        if not isinstance(value, Tensor):
            return argument if value is None else value
        shape = [1] * node.meta["val"].ndim
        if axis is not None:
            shape[axis] = -1
        self.count += 1
        self.root.register_buffer(f"made{self.count}", value.float().reshape(shape))
        return self.graph.get_attr(f"made{self.count}")

    def _compares(self, node: fx.Node, name: str) -> fx.Node | None:
        """x > t, where a number is made of it; one that only switches values stays as it is."""
        if name not in _TURNED or not all(self._counts(user, node) for user in node.users):
            return None
        x, t = node.args[:2]
        if self.value(t) is None:
            x, t, name = t, x, _TURNED[name]
        if self.value(t) is None or not isinstance(x, fx.Node):
            return None
        width, steps = self._width(x, t)
        u = self.call("div", self.call("sub", x, t), width)
        if name in ("gt", "le"):
            made = stairs = self.stairs(u, torch.ceil, 0, 1)
        else:
            stairs = self.stairs(u, torch.floor, -1, 0)
            made = self.call("add", stairs, 1.0)
        module: Any = self.staircase(stairs)
        module.bits = module.own = min(8, steps.bit_length())  # of all its steps together
        if name in ("lt", "le"):
            made = self.call("add", self.call("mul", made, -1.0), 1.0)
        self.switches.add(made)
        return made

    def _counts(self, user: fx.Node, node: fx.Node) -> bool:
        name, others = kind_of(user), [a for a in user.all_input_nodes if a is not node]
        if name == "where":
            return user.args[0] is node and all(self.value(a) is not None for a in user.args[1:])
        if name in ("mul", "add", "sub"):
            switch = {a for a in others if a in self.switches or _dtype(a) == torch.bool}
            return all(a in switch or self.value(a) is not None for a in others)
        number = name in CASTS and _dtype(user) != torch.bool
        return number or name in ("cat", "stack", "sum")

    def _width(self, x: fx.Node, t: Any) -> tuple[float, int]:
        """Of the cell around a threshold, to its neighbours, else what the values spread over;
        and how many thresholds there are.
        """
        found = self.captured.constant(t) if isinstance(t, fx.Node) else torch.tensor(float(t))
        base = x.all_input_nodes[0] if kind_of(x) in _LIES else x
        if x not in self.near:
            others = [user.args[1] for user in x.users if kind_of(user) in _TURNED]
            numbers = [float(n) for n in others if isinstance(n, int | float)]
            own = torch.as_tensor(found).flatten().float()
            self.near[x] = torch.cat([own, torch.tensor(numbers)]).unique()
        near = self.near[x]
        spread = self.spread.get(x) or self.spread.get(base) or 1.0
        gap = float(near.diff().median()) if len(near) > 1 else max(2 * spread, 1e-6)
        return gap, len(near)

    def _buckets(self, node: fx.Node, name: str) -> fx.Node | None:
        if name not in ("bucketize", "searchsorted"):
            return None
        x, edges = node.args[:2] if name == "bucketize" else node.args[1::-1]
        at, how = self.captured.constant(edges), node.kwargs
        gap = None if at is None or at.ndim != 1 else _step(at)
        if at is None or gap is None:
            return None
        u = self.call("div", self.call("sub", x, float(at[0])), gap)
        if how.get("right") or how.get("side") == "right" or True in node.args[2:]:
            return self.call("add", self.stairs(u, torch.floor, -1, len(at) - 1), 1.0)
        return self.stairs(u, torch.ceil, 0, len(at))

    def _looked_up(self, node: fx.Node, name: str) -> fx.Node | None:
        """An even table at whole floats is affine."""
        if name != "index":
            return None
        indices: Any = node.args[1]
        table, (code, *more) = self.captured.constant(node.args[0]), indices
        step = _step(table) if table is not None and table.ndim == 1 else None
        at: Any = code
        while kind_of(at) in _LIES | LINEAR | CLIPS:
            at = at.all_input_nodes[0]
        if more or step is None or table is None or at not in self.found:
            return None
        return self.call("add", self.call("mul", code, step), float(table[0]))

    def _chooses(self, node: fx.Node, name: str) -> fx.Node | None:
        """where(c, a, b) of a switch c is a c + b (1 - c); where(x > t, t, x) is a clip."""
        if name != "where":
            return None
        chosen, *both = node.args
        a, b = (n if isinstance(self.value(n), Tensor) else self.value(n) for n in both)
        turn = kind_of(chosen)
        if turn in _TURNED and isinstance(chosen, fx.Node) and both[1] is chosen.args[0]:
            t, upper = self.value(chosen.args[1]), turn in ("gt", "ge")
            if isinstance(a, int | float) and a == t:
                clip = aten.clamp_max.default if upper else aten.clamp_min.default
                made = self.graph.call_function(clip, (both[1], a))
                made.meta = dict(node.meta)
                return made
        if chosen not in self.switches:
            return None
        others = self.call("add", self.call("mul", chosen, -1.0), 1.0)
        return self.call("add", self.call("mul", chosen, a), self.call("mul", others, b))

    def _cancel(self) -> None:
        """Put the one term that is left where a sum takes away what it adds, as x + (q - x)."""
        terms: dict[fx.Node, Counter[fx.Node]] = {}
        for node in list(self.graph.nodes):
            terms[node] = Counter({node: 1})
            name, inputs = kind_of(node), [a for a in node.args[:2] if isinstance(a, fx.Node)]
            if name not in ("add", "sub") or node.kwargs or len(inputs) < 2:
                continue
            a, b = (terms[n] for n in inputs)
            found = Counter(a)
            for term, times in b.items():
                found[term] += times if name == "add" else -times
            found = Counter({term: times for term, times in found.items() if times})
            (left, times), *others = found.items() or [(node, 0)]
            one = times == 1 and not others and len(set(a) | set(b)) > 1
            if one and left.meta["val"].shape == node.meta["val"].shape:
                node.replace_all_uses_with(left)
                terms[node] = Counter({left: 1})
            elif len(found) < 16:
                terms[node] = found


def _step(values: Tensor) -> float | None:
    """From each value to the next, where they are even."""
    gaps = values.float().diff()
    mean = float(gaps.mean()) if len(gaps) else 0.0
    return mean if mean and float((gaps - mean).abs().max()) < _NEAR * abs(mean) else None


def _still(target: Any) -> Callable[..., Any]:
    @torch.no_grad()
    def measured(*args: Any, **named: Any) -> Any:
        still = [a.detach() if isinstance(a, Tensor) else a for a in args]
        return target(*still, **named)

    return measured


def _axis_of_blocks(block: Any, node: fx.Node) -> int | None:
    """The one axis along which torchao's blocks have a scale each; None for one scale."""
    shape = node.meta["val"].shape
    axes = [i for i, (b, s) in enumerate(zip(block, shape, strict=True)) if b != s]
    axes = [i for i in axes if i or block[i] != 1] or axes[:1]
    if len(axes) > 1 or any(block[i] != 1 for i in axes):
        raise UserError(f"cannot open {node.name}: quantised in blocks {list(block)}")
    return axes[0] if axes else None


def _range(others: Sequence[Any], node: fx.Node) -> tuple[float, float]:
    """Of the codes: as given, else of their type."""
    whole = [a for a in others if isinstance(a, int | float) and not isinstance(a, bool)]
    if len(whole) >= 2:
        return whole[-2], whole[-1]
    kinds = (*others, *node.kwargs.values())
    found = torch.iinfo(next(a for a in kinds if isinstance(a, torch.dtype)))
    return found.min, found.max
