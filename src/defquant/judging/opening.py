"""The twin of a torch network: its program with every staircase open; and what stays closed."""

import copy
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from defquant.attacks.access import differentiable, gradient, untouched
from defquant.captured import capture, kind_of
from defquant.errors import DefquantWarning, UserError
from defquant.judging.staircases import CASTS, CLIPS, LINEAR, Rewriting
from defquant.quantize import Staircase

__all__ = ["Opened", "few_layers", "has_gradient", "open_staircases"]

Ends = tuple[float, float]
FEW, MANY = 256, 1024
"""What takes no more than `FEW` values in `MANY` numbers or more is a staircase."""
ALIKE = 0.02  # of the images: what rounding may let a twin answer otherwise
_NEAR = 1e-3  # of a cell: what rounding may do to an end


def has_gradient(model: nn.Module, x: Tensor) -> bool:
    """Whether autograd reaches the images at all."""
    try:
        with untouched(model), differentiable(), warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            warnings.simplefilter("ignore", DefquantWarning)
            at = x[:2].clone().requires_grad_()
            gradient(model(at).float(), at)
    except (UserError, RuntimeError, NotImplementedError, UserWarning):
        return False
    return True


@dataclass(frozen=True)
class Opened:
    """A network whose staircases are `Staircase` modules.

    Attributes:
        twin: gives the network's logits; its gradient goes through every staircase in it.
        staircases: the layers of those.
        closed: layers of operations that make many values few and were not opened: an attack that
            follows the gradient may be blind there, and what it leaves is an upper bound.
    """

    twin: nn.Module
    staircases: tuple[str, ...]
    closed: tuple[str, ...]


def open_staircases(model: nn.Module, images: Tensor) -> Opened:
    """The twin of `model`; `images` are (n, c, h, w), float in [0, 1].

    Raises `UserError` in one line where the model cannot be captured as a program, and where the
    twin would answer otherwise than the model does.
    """
    x = images[:64].float().cpu()
    captured = capture(_without_observers(model), x)
    with untouched(model), torch.no_grad():
        wanted = model(images[:64]).argmax(1).cpu()
        rewriting = Rewriting(captured, x)
        twin = rewriting.module(_take_clips)
        differ = int((wanted != twin(x).argmax(1)).sum())
    if differ > ALIKE * len(x):
        raise UserError(
            f"cannot open the staircases of {captured.model}: its twin answers {differ} of "
            f"{len(x)} images otherwise"
        )
    layers = [layer for node, layer in rewriting.found.items() if node.graph is rewriting.graph]
    return Opened(twin, tuple(dict.fromkeys(layers)), tuple(_closed(twin, x)))


def _without_observers(model: nn.Module) -> nn.Module:
    """`model`, or a copy in which fake quantisers of torch.ao are what they compute, unobserved."""
    from torch.ao.quantization import FakeQuantizeBase

    found = [name for name, part in model.named_modules() if isinstance(part, FakeQuantizeBase)]
    model = copy.deepcopy(model) if found else model
    for name in found:
        parent, _, own = name.rpartition(".")
        part: Any = model.get_submodule(name)
        fixed = _Fixed(part) if bool(part.fake_quant_enabled[0]) else nn.Identity()
        setattr(model.get_submodule(parent), own, fixed)
    return model


class _Fixed(nn.Module):
    """A fake quantiser of torch.ao at the scale that it has."""

    def __init__(self, part: Any) -> None:
        super().__init__()
        observer = getattr(part, "activation_post_process", part)
        self.range = int(observer.quant_min), int(observer.quant_max)
        # of one number NNCF's have no dimension
        self.register_buffer("scale", part.scale.detach().float().reshape(-1))
        self.register_buffer("zero", part.zero_point.detach().to(torch.int32).reshape(-1))
        self.axis = int(part.ch_axis) if part.scale.numel() > 1 else None

    def forward(self, x: Tensor) -> Tensor:
        scale, zero = self.get_buffer("scale"), self.get_buffer("zero")
        if self.axis is None:
            return torch.fake_quantize_per_tensor_affine(x, scale, zero, *self.range)
        return torch.fake_quantize_per_channel_affine(x, scale, zero, self.axis, *self.range)


class _Few(fx.Interpreter):
    """Which nodes take few values."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.few: dict[fx.Node, bool] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, Tensor) and n.op != "get_attr":
            self.few[n] = value.numel() >= MANY and len(value.flatten()[:65536].unique()) <= FEW
        return value


def _closed(twin: fx.GraphModule, x: Tensor) -> Iterator[str]:
    """Layers of what makes few values of many, and is no staircase of ours."""
    seen = _Few(twin)
    seen.run(x)
    for node, few in seen.few.items():
        inputs = [a for a in node.all_input_nodes if a in seen.few]
        opened = node.op == "call_module" or node.op == "placeholder"
        if few and not opened and inputs and not all(seen.few[a] for a in inputs):
            kind = node.meta.get("val")
            switches = isinstance(kind, Tensor) and kind.dtype == torch.bool
            if not switches or any(seen.few.get(user) for user in node.users):
                yield str(node.meta.get("layer") or node.name)


def few_layers(model: nn.Module, x: Tensor) -> tuple[str, ...]:
    """Modules that make many values few, in a network that is no program."""
    found: dict[str, None] = {}
    with _watched(model, found), untouched(model), torch.no_grad():
        model(x)
    return tuple(found)


@contextmanager
def _watched(model: nn.Module, found: dict[str, None]) -> Iterator[None]:
    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            many = [t for t in (*inputs, output) if isinstance(t, Tensor) and t.numel() >= MANY]
            few = [len(t.flatten()[:65536].unique()) <= FEW for t in many]
            if len(few) > 1 and few[-1] and not all(few[:-1]):
                found[name or type(model).__name__] = None

        return hook

    handles = []
    for name, module in model.named_modules():
        try:
            handles.append(module.register_forward_hook(watch(name)))
        except RuntimeError:  # TorchScript lets nobody look inside
            found["the whole network"] = None
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


# clamp(round(u)) is round(clamp(u)): the clips around a staircase are its range


def _take_clips(program: Rewriting, stairs: fx.Node) -> None:
    """Take the clips before and after a staircase into its range."""
    module = program.staircase(stairs)
    if not isinstance(module, Staircase):
        return
    low, high = module.low, module.high
    for first, last in (*_before(program, stairs, module), *_after(program, stairs)):
        low, high = max(low, first), min(high, last)
    if (low, high) != (module.low, module.high) and low < high:
        program.root.set_submodule(str(stairs.target), Staircase(low, high, module.rounding))


def _before(program: Rewriting, stairs: fx.Node, module: Staircase) -> Iterator[Ends]:
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
    program: Rewriting, node: fx.Node, a: Tensor, b: Tensor
) -> tuple[fx.Node, Tensor, Tensor, Ends | None] | None:
    """What goes into `node`, and u = a x + b of that; the range of u where it clips."""
    name = kind_of(node)
    if name in CLIPS:
        ends = _ends(_clip(program, node, name), a, b)
        return None if ends is None else (node.all_input_nodes[0], a, b, ends)
    if name in CASTS:
        return node.all_input_nodes[0], a, b, None
    linear = _linear(program, node, name)
    if linear is None:
        return None
    return linear[0], a * linear[1], b + a * linear[2], None


def _after(program: Rewriting, stairs: fx.Node) -> Iterator[Ends]:
    """The ranges that clips leave whose ends it can take, while nothing else uses it."""
    a, b, node = torch.tensor(1.0), torch.tensor(0.0), stairs
    while len(node.users) == 1:
        (user,) = node.users
        name = kind_of(user)
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


def _linear(program: Rewriting, node: fx.Node, name: str) -> tuple[fx.Node, Any, Any] | None:
    """(x, a, b) of a node a x + b."""
    x, c, *_ = *node.args, None, None
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


def _clip(program: Rewriting, node: fx.Node, name: str) -> Ends | None:
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
