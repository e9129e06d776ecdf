"""A model in the hands of an attack: left as it was found; its gradient, or why it has none."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from defquant.attacks.graphs import tensor_float
from defquant.errors import UserError

__all__ = [
    "channels_last", "differentiable", "gradient", "leaf", "only_type", "to_eval", "untouched",
]  # fmt: skip

SMALL = 16 * 16
"""Pixels of an image under which the order of memory saves nothing."""


@contextmanager
def untouched(model: nn.Module) -> Iterator[nn.Module]:
    """Put `model` in eval mode without parameter gradients; on the way out restore all of it.

    Restored, also after an exception, which is never hidden: each module's `training` flag, each
    parameter's `requires_grad` and `.grad` (the same tensor object), each buffer by module and
    name (those that appeared go, those that grew or were bound anew come back), and torch's global
    random state on the CPU and on the model's GPUs. Not restored: what a forward pass writes into
    parameters, and its Python attributes, but for those of a module whose buffers it bound anew
    (they may tell which buffers there are). Inside, a float64 or half model takes float32
    images, too, `torch.inference_mode` is off, and so is TensorFloat-32, which torch allows a GPU's
    convolutions: 10 bits of a pixel, too few for an attack and for a quantiser.

    Raises `UserError` for lazy layers that have met no image yet.
    """
    params, buffers = list(model.parameters()), list(model.buffers())
    if any(map(nn.parameter.is_lazy, (*params, *buffers))):
        raise UserError("the model has lazy layers without a shape: run it once on an image before")
    modes = [(module, getattr(module, "training", False)) for module in model.modules()]
    flags = [(p, p.requires_grad and not p.is_inference(), p.grad) for p in params]
    bound = [(m, dict(m._buffers.items()), dict(vars(m))) for m in model.modules()]
    groups = [(group, _flat(group), [t.shape for t in group]) for group in _by_kind(buffers)]
    gpus = {tensor.device for tensor in (*params, *buffers) if tensor.device.type == "cuda"}

    def put_back() -> None:
        for module, training in modes:
            module.training = training
        for parameter, requires_grad, grad in flags:
            if requires_grad:
                parameter.requires_grad_()
            parameter.grad = grad
        for module, named, attributes in bound:
            _rebind(module, named, attributes)
        for group in groups:
            _restore(*group)

    with torch.random.fork_rng(list(gpus)):
        try:
            to_eval(model)
            for parameter, requires_grad, _ in flags:
                if requires_grad:
                    parameter.requires_grad_(False)
            inference = torch.is_inference_mode_enabled()  # to leave it turns gradients on, too
            free = torch.inference_mode(False) if inference else nullcontext()
            with _fed(model), free, tensor_float(False):
                yield model
        except BaseException as first:
            try:
                put_back()
            except Exception as second:
                first.add_note(f"nor could the model be put back as it was: {second}")
            raise
        put_back()


@contextmanager
def _fed(model: nn.Module) -> Iterator[None]:
    """A model whose numbers are all of one other type, as float64 or half, is given images so."""
    kind = only_type(model)
    if kind in (None, torch.float32):
        yield
        return
    with model.register_forward_pre_hook(
        lambda _, args: tuple(a.to(kind) if a.is_floating_point() else a for a in args)
    ):
        yield


def only_type(model: nn.Module) -> torch.dtype | None:
    """The type of all of a model's floating numbers; None where there are several, or none."""
    numbers = [t for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()]
    kinds = {number.dtype for number in numbers}
    return kinds.pop() if len(kinds) == 1 else None


def to_eval(model: nn.Module) -> nn.Module:
    """`model` in eval mode; a program of `torch.export` has but one mode, and refuses the call."""
    try:
        model.eval()
    except NotImplementedError:
        for module in model.modules():
            module.training = False
    return model


@contextmanager
def channels_last(model: nn.Module, images: Tensor) -> Iterator[None]:
    """On a CPU the convolutions of `model` run channels last inside, in which oneDNN is faster.

    Its answers are the same but for the last digits of float32; where they are not (a kernel of the
    user's own that knows the usual order alone, a reshape by `view`), it runs as it is. So does
    what torch compiled, and what takes small images. `images`: a few to ask, in [0, 1].
    """
    weights = _kernels(model)
    kept = [weight.data for weight in weights]
    try:
        if weights and images.device.type == "cpu" and images[0, 0].numel() >= SMALL:
            with untouched(model), torch.no_grad():
                usual = _answer(model, images)
                for weight in weights:
                    weight.data = weight.data.contiguous(memory_format=torch.channels_last)
                if not _alike(usual, _answer(model, images)):
                    _put(weights, kept)
        yield
    finally:
        _put(weights, kept)


def _kernels(model: nn.Module) -> list[Tensor]:
    """Weights of plain convolutions, not channels last; none of a model that torch compiled."""
    modules = list(model.modules())
    if any(hasattr(m, "_orig_mod") or m._compiled_call_impl is not None for m in modules):
        return []
    found = [m._parameters.get("weight") for m in modules if isinstance(m, nn.Conv2d)]
    own = {id(w): w for w in found if type(w) is nn.Parameter and not w.is_inference()}
    return [w for w in own.values() if not w.is_contiguous(memory_format=torch.channels_last)]


def _put(weights: Iterable[Tensor], kept: Iterable[Tensor]) -> None:
    for weight, data in zip(weights, kept, strict=True):
        weight.data = data


def _answer(model: nn.Module, images: Tensor) -> Tensor | None:
    try:
        return leaf(model(images))
    except Exception:  # what is wrong with a model is said where it is attacked
        return None


def _alike(a: Tensor | None, b: Tensor | None) -> bool:
    """Whether an image has the same logits; not each one: few bits make much of a last digit."""
    if a is None or b is None or a.shape != b.shape or a.dim() != 2:
        return False
    far = (a - b).abs().amax(1)
    return bool((far <= 0.01 * (a.amax(1) - a.amin(1))).any())


def _by_kind(tensors: Iterable[Tensor]) -> list[list[Tensor]]:
    """The dense tensors of each type and device."""
    groups: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for tensor in tensors:
        if tensor.layout == torch.strided:
            groups.setdefault((tensor.dtype, tensor.device), []).append(tensor)
    return list(groups.values())


@torch.no_grad()
def _flat(tensors: Iterable[Tensor]) -> Tensor:
    """A copy of all of them in one flat tensor."""
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def _rebind(module: nn.Module, buffers: dict[str, Any], attributes: dict[str, Any]) -> None:
    """Give `module` the buffers that it had, the same objects; where it has them, do nothing."""
    now = dict(module._buffers.items())
    if now.keys() == buffers.keys() and all(now[name] is buffers[name] for name in now):
        return
    vars(module).clear()
    vars(module).update(attributes)
    module._buffers.clear()
    module._buffers.update(buffers)


@torch.no_grad()
def _restore(tensors: Sequence[Tensor], values: Tensor, shapes: Sequence[torch.Size]) -> None:
    """Undo what changed since `_flat`; compared as a whole, for a GPU is waited for each time."""
    kind = (values.dtype, values.device)
    now = [(*t.shape, t.dtype, t.device) for t in tensors]
    same = now == [(*shape, *kind) for shape in shapes]
    if same and torch.equal(values, _flat(tensors)):
        return
    parts = values.split([shape.numel() for shape in shapes])
    for tensor, part, shape in zip(tensors, parts, shapes, strict=True):
        value = part.view(shape)
        if (tensor.shape, tensor.dtype, tensor.device) != (shape, *kind):
            tensor.data = value.clone()
        elif not torch.equal(tensor, value):
            tensor.copy_(value)


def leaf(x: Tensor) -> Tensor:
    """`x` without its graph; a copy where autograd takes no other (`torch.inference_mode`)."""
    if not x.is_inference():
        return x.detach()
    with torch.inference_mode(False):
        return x.clone()


@contextmanager
def differentiable() -> Iterator[None]:
    """Gradients are on inside; `UserError` where torch says that the model lets none through."""
    try:
        with torch.enable_grad():
            yield
    except (RuntimeError, UserWarning) as error:
        if "Inference tensors cannot be saved" in str(error):
            raise UserError(
                "the model's weights were made under torch.inference_mode and give no gradient: "
                "build or load it outside, or use square"
            ) from None
        if any(clue in str(error) for clue in ("detach().numpy()", "autograd kernel was not")):
            raise UserError(_NO_GRADIENT) from None
        raise


def gradient(value: Tensor, at: Tensor, *, keep: bool = False) -> Tensor:
    """The gradient of the sum of `value` at `at`; `keep` the graph for another.

    Raises `UserError` where there is none. Inside `differentiable`.
    """
    found = None
    if value.requires_grad:
        (found,) = torch.autograd.grad(value.sum(), at, retain_graph=keep, allow_unused=True)
    if found is None:
        raise UserError(_NO_GRADIENT)
    return found


_NO_GRADIENT = (
    "this attack follows the gradient, and the model's outputs have none (no_grad, detach, numpy "
    "or integer layers inside it?): let it through, or use square"
)
