"""The twin of a torch network: its program with every staircase open; and what stays closed."""

import copy
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from defquant.attacks.access import differentiable, gradient, untouched
from defquant.captured import Captured, capture, kind_of
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


def _few(value: Any) -> bool:
    return value.numel() >= MANY and len(value.flatten()[:65536].unique()) <= FEW


def _closed(twin: fx.GraphModule, x: Tensor) -> Iterator[str]:
    """Layers of what makes few values of many, and is no staircase of ours."""
    few: dict[fx.Node, bool] = {}

    def keep(node: fx.Node, value: Any) -> None:
        if isinstance(value, Tensor):
            few[node] = _few(value)

    Captured(twin, "").values(x, keep)
    for node in few:
        inputs = [few[a] for a in node.all_input_nodes if a in few]
        if few[node] and node.op == "call_function" and inputs and not all(inputs):
            kind = node.meta.get("val")
            switches = isinstance(kind, Tensor) and kind.dtype == torch.bool
            if not switches or any(few.get(user) for user in node.users):
                yield str(node.meta.get("layer") or node.name)


def few_layers(model: nn.Module, x: Tensor) -> tuple[str, ...]:
    """Modules that make many values few, in a network that is no program."""
    found: dict[str, None] = {}
    names = {module: name or type(model).__name__ for name, module in model.named_modules()}

    def hook(module: nn.Module, inputs: Any, output: Any) -> None:
        many = [t for t in (*inputs, output) if isinstance(t, Tensor) and t.numel() >= MANY]
        *before, after = [_few(t) for t in many] or [False]
        if before and after and not all(before):
            found[names[module]] = None

    with ExitStack() as stack, untouched(model), torch.no_grad():
        for module in names:
            try:
                stack.callback(module.register_forward_hook(hook).remove)
            except RuntimeError:  # TorchScript lets nobody look inside
                found["the whole network"] = None
        model(x)
    return tuple(found)


# clamp(round(u)) is round(clamp(u)): the clips around a staircase are its range

Link = tuple[fx.Node, fx.Node]
"""What clips, or is affine in, or changes the type of the second node, and of it alone."""


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
    links, start, kept = list[Link](), None, list[Link]()
    node: Any = stairs.args[0]
    while (before := _given(program, node)) is not None:
        links.insert(0, (node, before))
        if kind_of(node) in CLIPS:
            ends = _ends(_pushed(program, links, -math.inf, math.inf))
            if ends is None:
                break
            yield _rounded(module, ends[0]), _rounded(module, ends[1])
            start, kept = before, [link for link in links if kind_of(link[0]) not in CLIPS]
        node = before
    if start is not None:
        with program.graph.inserting_before(stairs):
            for old, before in kept:
                start = program.graph.node_copy(old, _putting(start, before))
        stairs.args = (start,)


def _after(program: Rewriting, stairs: fx.Node) -> Iterator[Ends]:
    """The ranges that clips leave whose ends it can take, while nothing else uses it."""
    links, node = list[Link](), stairs
    while len(node.users) == 1:
        (user,) = node.users
        if _given(program, user) is not node:
            return
        if kind_of(user) not in CLIPS:
            links, node = [*links, (user, node)], user
            continue
        shift, step = _pushed(program, links, 0.0, 1.0)
        clip = _pushed(program, [(user, node)], -math.inf, math.inf)
        ends = _ends(torch.stack(torch.broadcast_tensors(*(clip - shift) / (step - shift))))
        if ends is None or any(abs(e - round(e)) > _NEAR for e in ends if math.isfinite(e)):
            return
        yield tuple(round(e) if math.isfinite(e) else e for e in ends)  # type: ignore[misc]
        user.replace_all_uses_with(node)
        program.graph.erase_node(user)


def _given(program: Rewriting, node: Any) -> Any:
    """The one node that a clip, an affine map or a cast is given; None for any other."""
    if kind_of(node) not in CLIPS | LINEAR | CASTS or "rounding_mode" in node.kwargs:
        return None
    moving = [a for a in node.all_input_nodes if program.value(a) is None]
    inverse = kind_of(node) == "div" and moving[:1] != [node.args[0]]
    return None if len(moving) != 1 or inverse or node.args.count(moving[0]) > 1 else moving[0]


def _pushed(program: Rewriting, links: Sequence[Link], *numbers: float) -> Tensor:
    """What `links`, one behind the other, make of numbers, for all channels: (numbers, ...)."""
    values = torch.tensor(numbers).view(-1, 1, 1, 1, 1)
    for node, source in links:
        if kind_of(node) not in CASTS:
            known = {a: program.captured.constant(a) for a in node.all_input_nodes}
            args = fx.node.map_arg(node.args, (known | {source: values}).__getitem__)
            values = node.target(*args, **node.kwargs)  # type: ignore[operator]
    return values


def _ends(values: Tensor) -> Ends | None:
    """Of a range given by its ends, where it is one for all channels."""
    low, high = (end.flatten() for end in (values.amin(0), values.amax(0)))
    if any(bool(((end != end[0]) & ~((end - end[0]).abs() < _NEAR)).any()) for end in (low, high)):
        return None
    return float(low[0]), float(high[0])


def _rounded(module: Staircase, end: float) -> float:
    near = round(end) if math.isfinite(end) else end
    end = near if abs(end - near) < _NEAR else end  # 6 / 0.4 is 15, up to its rounding
    return float(module.rounding(torch.tensor(float(end))))


def _putting(new: Any, old: fx.Node) -> Callable[[fx.Node], fx.Node]:
    return lambda node: new if node is old else node
