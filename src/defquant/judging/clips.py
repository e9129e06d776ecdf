"""The clips around a rounding, taken into its range: clamp(round(u)) is round(clamp(u))."""

import math
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, fx, nn

from defquant.captured import operation
from defquant.quantize import Staircase

__all__ = ["CASTS", "CLIPS", "LINEAR", "Ends", "name_of", "take_clips"]

Ends = tuple[float, float]
_NEAR = 1e-3  # of a cell: what rounding may do to an end
CLIPS = {"relu", "relu6", "hardtanh", "clamp", "clamp_min", "clamp_max", "maximum", "minimum"}
LINEAR = {"add", "sub", "mul", "div", "neg"}
CASTS = {"to", "_to_copy"}


class Program(Protocol):
    """A program of which some nodes are staircases; `value` is that of a constant."""

    root: fx.GraphModule
    graph: fx.Graph

    def value(self, argument: Any) -> Any: ...

    def staircase(self, node: fx.Node) -> nn.Module: ...


def name_of(node: Any) -> str:
    """`gt` of aten.gt.Scalar; "" of what is no operation of aten."""
    space, _, rest = (operation(node) if isinstance(node, fx.Node) else "").partition(".")
    return rest.split(".")[0].removesuffix("_") if space == "aten" else ""


def take_clips(program: Program, stairs: fx.Node) -> None:
    """Take the clips before and after a staircase into its range."""
    module = program.staircase(stairs)
    if not isinstance(module, Staircase):
        return
    low, high = module.low, module.high
    for first, last in (*_before(program, stairs, module), *_after(program, stairs)):
        low, high = max(low, first), min(high, last)
    if (low, high) != (module.low, module.high) and low < high:
        program.root.set_submodule(str(stairs.target), Staircase(low, high, module.rounding))


def _before(program: Program, stairs: fx.Node, module: Staircase) -> Iterator[Ends]:
    """The ranges of u that clips leave; `stairs` then takes u as it is without them."""
    a, b, chain = torch.tensor(1.0), torch.tensor(0.0), list[tuple[fx.Node, fx.Node]]()
    node, start, kept = stairs.args[0], None, 0
    while isinstance(node, fx.Node) and (step := _step(program, node, a, b)) is not None:
        before, a, b, ends = step
        if ends is None:
            chain.append((node, before))
        else:
            yield _rounded(module, ends[0]), _rounded(module, ends[1])
            start, kept = before, len(chain)
        node = before
    if start is not None:
        with program.graph.inserting_before(stairs):
            for old, before in reversed(chain[:kept]):
                start = program.graph.node_copy(old, _putting(start, before))
        stairs.args = (start,)


def _step(
    program: Program, node: fx.Node, a: Tensor, b: Tensor
) -> tuple[fx.Node, Tensor, Tensor, Ends | None] | None:
    """What goes into `node`, and u = a x + b of that; the range of u where it clips."""
    name = name_of(node)
    if name in CLIPS:
        ends = _ends(_clip(program, node, name), a, b)
        return None if ends is None else (node.all_input_nodes[0], a, b, ends)
    if name in CASTS:
        return node.all_input_nodes[0], a, b, None
    linear = _linear(program, node, name)
    if linear is None:
        return None
    return linear[0], a * linear[1], b + a * linear[2], None


def _after(program: Program, stairs: fx.Node) -> Iterator[Ends]:
    """The ranges that clips leave whose ends it can take, while nothing else uses it."""
    a, b, node = torch.tensor(1.0), torch.tensor(0.0), stairs
    while len(node.users) == 1:
        (user,) = node.users
        name = name_of(user)
        if name in CLIPS:
            ends = _ends(_clip(program, user, name), 1 / a, -b / a)
            if ends is None or any(abs(e - round(e)) > _NEAR for e in ends if math.isfinite(e)):
                return
            yield tuple(round(e) if math.isfinite(e) else e for e in ends)  # type: ignore[misc]
            user.replace_all_uses_with(node)
            program.graph.erase_node(user)
            continue
        linear = _linear(program, user, name)
        if linear is not None and linear[0] is node:
            a, b = a * linear[1], b * linear[1] + linear[2]
        elif name not in CASTS:
            return
        node = user


def _linear(program: Program, node: fx.Node, name: str) -> tuple[fx.Node, Any, Any] | None:
    """(x, a, b) of a node a x + b."""
    x, c, *_ = *node.args, None
    if name == "neg" and isinstance(x, fx.Node):
        return x, -1.0, 0.0
    if name in ("add", "mul") and program.value(x) is not None:
        x, c = c, x
    c = program.value(c)
    if name not in LINEAR or c is None or node.kwargs or not isinstance(x, fx.Node):
        return None
    c = torch.as_tensor(c, dtype=torch.float32)
    made = {"add": (1.0, c), "sub": (1.0, -c), "mul": (c, 0.0), "div": (1 / c, 0.0)}
    return (x, *made[name])


def _clip(program: Program, node: fx.Node, name: str) -> Ends | None:
    given = [program.value(a) for a in node.args[1:]]
    fixed: dict[str, list[Any]] = {
        "relu": [0, None],
        "relu6": [0, 6],
        "hardtanh": [*given, -1, 1][:2],
    }
    if name == "hardtanh" and len(given) == 1:
        fixed[name] = [given[0], 1]
    ends = fixed.get(name, [*given, None, None][:2])
    if name in ("clamp_max", "minimum"):
        ends = ends[::-1]
    low: Any = node.kwargs.get("min", ends[0])
    high: Any = node.kwargs.get("max", ends[1])
    if any(isinstance(end, Tensor | fx.Node) for end in (low, high)) or low is high is None:
        return None
    return (-math.inf if low is None else float(low)), math.inf if high is None else float(high)


def _ends(clip: Ends | None, a: Tensor, b: Tensor) -> Ends | None:
    """The range of a x + b for x in `clip`, where it is one for all channels."""
    if clip is None:
        return None
    ends = torch.broadcast_tensors(*((a * e + b) if math.isfinite(e) else a * e for e in clip))
    low, high = torch.minimum(*ends).flatten(), torch.maximum(*ends).flatten()
    for end in (low, high):
        if not bool(((end == end[0]) | ((end - end[0]).abs() < _NEAR)).all()):
            return None
    return float(low[0]), float(high[0])


def _rounded(module: Staircase, end: float) -> float:
    near = round(end) if math.isfinite(end) else end
    end = near if abs(end - near) < _NEAR else end  # 6 / 0.4 is 15, up to its rounding
    return float(module.rounding(torch.tensor(float(end))))


def _putting(new: Any, old: fx.Node) -> Callable[[fx.Node], fx.Node]:
    return lambda node: new if node is old else node
