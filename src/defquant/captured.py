"""A network as what it computes: one program of torch operations, captured by `torch.export`.

Hooks, parametrisations, subclasses with a forward of their own, buffers and branches are seen as
the operations that they carry out on an image in eval mode; not by the names of their types.
"""

import copy
import operator
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from io import StringIO
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from defquant.attacks.access import untouched
from defquant.errors import UserError, shown
from defquant.functional import Reading, name_of
from defquant.quantize import QuantBranch, Quantizer, QuantReLU, QuantSigned, QuantTanh
from defquant.rounding import WHOLE, affine_round

__all__ = [
    "MOVES", "RESHAPES", "Captured", "arguments", "bare", "border", "capture", "kind_of",
    "operation",
]  # fmt: skip

RESHAPES = {"_unsafe_view", "flatten", "reshape", "squeeze", "unflatten", "unsqueeze", "view"}
"""Operations that lay out the same values in the same order."""
MOVES = RESHAPES | {
    "channel_shuffle", "chunk", "diagonal", "expand", "expand_as", "flip", "getitem",
    "index_select", "mT", "movedim", "narrow", "permute", "pixel_shuffle", "pixel_unshuffle",
    "repeat", "repeat_interleave", "roll", "rot90", "select", "slice", "split",
    "split_with_sizes", "swapaxes", "t", "tensor_split", "tile", "transpose", "unbind", "unfold",
    "upsample_nearest2d",
}  # fmt: skip
"""Operations on one tensor that give values of it: moved, copied or left out, none computed."""


@dataclass(frozen=True)
class Captured:
    """A functional program: `image` (n, c, h, w) to logits (n, classes), in eval mode.

    Attributes:
        module: its nodes are `placeholder` (the images), `get_attr` (constants: weights, buffers
            and all that is computed from them alone), `call_function` and `output`. In the `meta`
            of a node: `layer`, the path of the module it was called in or whose parameter it
            takes; `val`, a tensor of its shape and type, whose batch is symbolic; of a constant
            `name`, its path in the model, `sources`, the paths of all that went into it, and
            `bits`, where it is a weight on a grid.
        model: the name of the network's class.
    """

    module: fx.GraphModule
    model: str

    @property
    def nodes(self) -> list[fx.Node]:
        return list(self.module.graph.nodes)

    @property
    def calls(self) -> list[fx.Node]:
        """The operations on the image, in order."""
        return [node for node in self.nodes if node.op == "call_function"]

    @property
    def end(self) -> fx.Node:
        """The node of the logits."""
        (end,) = self.nodes[-1].all_input_nodes
        return end

    def constant(self, node: Any) -> Tensor | None:
        """The tensor of a constant node; None for anything else."""
        if not isinstance(node, fx.Node) or node.op != "get_attr":
            return None
        tensor: Tensor = getattr(self.module, str(node.target))
        return tensor

    def quantiser(self, node: fx.Node) -> Quantizer | None:
        """The module of this library that an operation is; None for any other."""
        kind, given = kind_of(node), arguments(node)
        if kind == "clip_round":
            return QuantReLU(given["bits"], given["high"])
        if kind == "tanh_round":
            return QuantTanh(given["bits"])
        if kind != "signed_round" or (peak := self.constant(given["peak"])) is None:
            return None
        ends = {"peak": float(peak), "least": given["least"]}
        between = given["bits"] == QuantBranch.fixed
        return QuantBranch(**ends) if between else QuantSigned(given["bits"], **ends)

    @torch.no_grad()
    def values(self, x: Tensor, keep: Callable[[fx.Node, Any], object] | None = None) -> Tensor:
        """The logits of `x`; `keep(node, value)` sees it and what each operation gives."""
        logits: Tensor = _Kept(self.module, keep).run(x)
        return logits


class _Kept(fx.Interpreter):
    def __init__(
        self, module: fx.GraphModule, keep: Callable[[fx.Node, Any], object] | None
    ) -> None:
        super().__init__(module)
        self.keep = keep

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if self.keep is not None and n.op not in ("get_attr", "output"):
            self.keep(n, value)
        return value


def operation(node: fx.Node) -> str:
    """The name of an operation with its overload, `aten.conv2d.default`; "" of other nodes.

    Python's own have no overload: `getitem`, what one of several outputs is taken by.
    """
    return name_of(node.target) if node.op == "call_function" else ""


def kind_of(node: Any) -> str:
    """`conv2d` of `aten.conv2d.default`, `getitem`; "" of what is no operation of torch."""
    if not isinstance(node, fx.Node):
        return ""
    parts = operation(node).split(".")
    return parts[1] if len(parts) == 3 else "getitem" * (node.target is operator.getitem)


def border(node: fx.Node) -> tuple[int, int, int, int] | None:
    """(top, left, bottom, right) of zeros around height and width for one reader; else None."""
    given = arguments(node)
    zeros = given.get("mode", "constant") == "constant" and not given.get("value")
    if kind_of(node) not in ("constant_pad_nd", "pad") or not zeros or len(node.users) > 1:
        return None
    pads: list[int] = given["pad"]
    return (pads[2], pads[0], pads[3], pads[1]) if len(pads) == 4 and min(pads) >= 0 else None


def arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments of an operation by name, defaults too."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return {}
    given = dict(zip((a.name for a in schema.arguments), node.args, strict=False)) | node.kwargs
    return {a.name: given.get(a.name, a.default_value) for a in schema.arguments}


def capture(model: nn.Module, images: Tensor, *, trainable: bool = False) -> Captured:
    """What `model` computes in eval mode, as one program for any number of images.

    Args:
        model: any module that maps images to logits; left as it was found. One of half or double
            precision, or on another device, is captured as a float32 copy on the CPU.
        images: (n, c, h, w), float in [0, 1], one at least: their shape is that of the input.
        trainable: keep dropouts and `detach`, which matter in training alone.

    Raises:
        UserError: in one line, what cannot be captured, and in which layer: decisions by value,
            a fixed batch, more than one input or output, changes in place behind a view, answers
            that are NaN or that differ from the model's own (a model that draws at random).
    """
    model, x = _plain(model), _two(images)
    with untouched(model), torch.no_grad():
        own = model(x) if _takes_images(model, x) else x
        program = _exported(model, x)
    kind = type(model).__name__
    captured = Captured(Reading(program, trainable).module(), kind)
    _check(captured, x, own)
    return captured


def bare(model: nn.Module) -> nn.Module:
    """What is inside of `torch.compile`, `DataParallel` and the like."""
    parallel = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    while isinstance(model, parallel) or hasattr(model, "_orig_mod"):
        model = getattr(model, "module" if isinstance(model, parallel) else "_orig_mod")
    return model


def _plain(model: nn.Module) -> nn.Module:
    """`model`, or a float32 copy of it on the CPU, without wrappers."""
    model = bare(model)
    tensors = [t for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()]
    if all(t.dtype == torch.float32 and t.device.type == "cpu" for t in tensors):
        return model
    return copy.deepcopy(model).float().cpu()


def _two(images: Tensor) -> Tensor:
    if images.ndim != 4 or not images.is_floating_point() or len(images) == 0:
        raise UserError(
            f"images are float (n, c, h, w), one at least; found {images.dtype} "
            f"{tuple(images.shape)}"
        )
    x = images.detach()[:2].float().cpu()
    return x if len(x) == 2 else torch.cat([x, x])


def _takes_images(model: nn.Module, x: Tensor) -> bool:
    """True; raises `UserError` where the model does not answer images with one row of logits."""
    try:
        answer = model(x)
    except Exception as error:  # whatever the model's own code raises
        raise _refused(model, error) from None
    if not isinstance(answer, Tensor) or answer.ndim != 2 or len(answer) != len(x):
        found = list(answer.shape) if isinstance(answer, Tensor) else type(answer).__name__
        raise UserError(
            f"cannot follow {type(model).__name__}: it must give one tensor of logits (n, classes) "
            f"for images (n, c, h, w); found {found} for {list(x.shape)}"
        )
    if not bool(answer.isfinite().all()):
        raise UserError(
            f"cannot follow {type(model).__name__}: it answers NaN or infinity{_not_finite(model)}"
        )
    return True


def _not_finite(model: nn.Module) -> str:
    named = (*model.named_parameters(), *model.named_buffers())
    bad = [name for name, t in named if t.is_floating_point() and not bool(t.isfinite().all())]
    return f"; {bad[0]!r} is not finite" if bad else ""


@contextmanager
def _whole_quantizers() -> Iterator[None]:
    """Quantisers are single operations of the program, and known by them; torch's own, too."""
    former, WHOLE.on = WHOLE.on, True
    fused = torch.backends.mha.get_fastpath_enabled()  # attention as one operation of its own
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with _TorchsQuantizers():
            yield
    finally:
        WHOLE.on = former
        torch.backends.mha.set_fastpath_enabled(fused)


_ENDS = ("quant_min", "quant_max")
_TORCHS: Any = {
    torch.fake_quantize_per_tensor_affine: ("input", "scale", "zero_point", *_ENDS),
    torch.fake_quantize_per_channel_affine: ("input", "scale", "zero_point", "axis", *_ENDS),
}


class _TorchsQuantizers(TorchFunctionMode):
    """`torch.fake_quantize_per_tensor_affine`, which torch cannot export, as an operation of ours.

    The one per channel, of weights, is written out.
    """

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        given = dict[str, Any](kwargs or {})
        names = _TORCHS.get(function)
        if names is None:
            return function(*args, **given)
        given = dict(zip(names, args, strict=False)) | given
        x, scale, zero, *axis, low, high = (given[name] for name in names)
        if not axis:
            ends = (torch.as_tensor(end, dtype=x.dtype) for end in (scale, zero))
            return affine_round(x, *ends, low, high)
        along = [-1 if dim == axis[0] % x.ndim else 1 for dim in range(x.ndim)]
        scale, zero = scale.view(along), zero.view(along)
        return x.div(scale).round().add(zero).clamp(low, high).sub(zero).mul(scale)


def _exported(model: nn.Module, x: Tensor) -> torch.export.ExportedProgram:
    shapes = ({0: torch.export.Dim.DYNAMIC},)
    try:
        with warnings.catch_warnings(), _whole_quantizers(), _silent(), _one_precision():
            warnings.simplefilter("ignore")  # torch's own, of its own insides
            return torch.export.export(model, (x,), dynamic_shapes=shapes, strict=False)
    except Exception as error:  # torch has many, and the model's own code any
        raise _refused(model, error) from None


@contextmanager
def _one_precision() -> Iterator[None]:
    """`torch.autocast` in a forward does nothing; where that matters, `_check` finds out."""
    kind: Any = torch.autocast
    former = kind.__enter__, kind.__exit__
    kind.__enter__, kind.__exit__ = (lambda self: self), (lambda self, *error: None)
    try:
        yield
    finally:
        kind.__enter__, kind.__exit__ = former


@contextmanager
def _silent() -> Iterator[None]:
    """Without the graphs that torch logs and prints before it raises."""
    import logging

    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with redirect_stderr(StringIO()):
            yield
    finally:
        logging.disable(before)


def _refused(model: nn.Module, error: Exception) -> UserError:
    kind, text = type(model).__name__, str(error).strip()
    if "data-dependent" in text or ("bool" in text and "Tensor" in text):
        reason = "it decides by the values it sees"
    elif "specialized it to be a constant" in text or "Constraints violated" in text:
        reason = "it works for one number of images alone; take the batch from x.shape[0], which "
        reason += "len(x) is not"
    else:
        reason = shown(text.split("\n")[0], 160) or type(error).__name__
    return UserError(f"cannot follow {kind}{_where(model, error)}: {reason}")


def _where(model: nn.Module, error: Exception) -> str:
    """The innermost layer that was being called, by the frames of the traceback."""
    names = {id(module): name for name, module in model.named_modules()}
    found, step = "", error.__traceback__
    while step is not None:
        caller = step.tb_frame.f_locals.get("self")
        if isinstance(caller, nn.Module):
            found = names.get(id(caller), found)
        step = step.tb_next
    return f", layer {found!r}" if found else ""


def _check(captured: Captured, x: Tensor, own: Tensor) -> None:
    """Raise `UserError` unless the program answers as the model does."""
    found = captured.values(x)
    room = 1e-4 * float(own.abs().max().clamp_min(1e-6))
    if found.shape != own.shape or float((found - own.float()).abs().max()) > room:
        raise UserError(
            f"cannot follow {captured.model}: it answers the same images otherwise when it is "
            "captured; does it draw at random, open torch.autocast, or change what it holds?"
        )
