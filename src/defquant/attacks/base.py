"""What every attack keeps to: one signature, the model left as it was, draws per example."""

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn

from defquant.data import as_labels, in_unit
from defquant.errors import DefquantWarning, UserError

__all__ = [
    "SAME", "Attack", "ById", "draw_seed", "lint_answer", "lint_attack", "lint_images",
    "lint_model", "uniform", "untouched",
]  # fmt: skip

SAME = 1e-4  # of the largest logit: what rounding may change between identical calls


class Attack(Protocol):
    """Any function that returns adversarial examples within its own eps of `x`.

    `x` holds images in [0, 1], (n, c, h, w); `y` their true labels, (n,).
    """

    def __call__(
        self, model: nn.Module, x: Tensor, y: Tensor, *, generator: torch.Generator | None = None
    ) -> Tensor: ...


@runtime_checkable
class ById(Protocol):
    """An `Attack` that tells examples apart by `ids`, int64 (n,): their places in the data set.

    Its answer does not depend on the batch or on who stands. `by_id` marks it.
    """

    by_id: ClassVar[bool]

    def __call__(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        *,
        generator: torch.Generator | None = None,
        ids: Tensor | None = None,
    ) -> Tensor: ...


@contextmanager
def untouched(model: nn.Module) -> Iterator[nn.Module]:
    """Put `model` in eval mode without parameter gradients; on the way out restore all of it.

    Inside, a float64 or half model takes float32 images, too.
    Restored, also after an exception: each module's `training` flag, each parameter's
    `requires_grad` and `.grad` (the same tensor object), each buffer (attacks run many forward
    passes), and torch's global random state on the CPU.
    """
    modes = [(module, module.training) for module in model.modules()]
    params = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    buffers = _by_kind(model.buffers())
    before = [_flat(group) for group in buffers]
    random_state = torch.get_rng_state()
    try:
        model.eval()
        for parameter, _, _ in params:
            parameter.requires_grad_(False)
        with _fed(model):
            yield model
    finally:
        for module, training in modes:
            module.training = training
        for parameter, requires_grad, grad in params:
            parameter.requires_grad_(requires_grad)
            parameter.grad = grad
        for group, values in zip(buffers, before, strict=True):
            _restore(group, values)
        torch.set_rng_state(random_state)


@contextmanager
def _fed(model: nn.Module) -> Iterator[None]:
    """A model whose numbers are all of one other type, as float64 or half, is given images so."""
    numbers = [t for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()]
    kinds = {number.dtype for number in numbers}
    if len(kinds) != 1 or kinds == {torch.float32}:
        yield
        return
    kind = kinds.pop()
    handle = model.register_forward_pre_hook(
        lambda _, args: tuple(a.to(kind) if a.is_floating_point() else a for a in args)
    )
    try:
        yield
    finally:
        handle.remove()


def _by_kind(tensors: Iterable[Tensor]) -> list[list[Tensor]]:
    """The tensors of each type and device."""
    groups: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for tensor in tensors:
        groups.setdefault((tensor.dtype, tensor.device), []).append(tensor)
    return list(groups.values())


@torch.no_grad()
def _flat(tensors: Iterable[Tensor]) -> Tensor:
    """A copy of all of them in one flat tensor."""
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


@torch.no_grad()
def _restore(tensors: Sequence[Tensor], values: Tensor) -> None:
    """Undo what changed since `_flat`; compared as a whole, for a GPU is waited for each time."""
    if torch.equal(values, _flat(tensors)):
        return
    sizes = [tensor.numel() for tensor in tensors]
    for tensor, value in zip(tensors, values.split(sizes), strict=True):
        if not torch.equal(tensor, value.view(tensor.shape)):
            tensor.copy_(value.view(tensor.shape))


def draw_seed(generator: torch.Generator | None) -> int:
    """A seed drawn from `generator`; 0 without one, so that nothing depends on global state."""
    if generator is None:
        return 0
    return int(torch.randint(2**62, (), generator=generator, device=generator.device))


def uniform(seed: int, ids: Tensor, restart: Tensor, shape: torch.Size) -> Tensor:
    """Uniform draws in [0, 1) that depend on (seed, example id, restart, position) alone.

    A counter hashed by splitmix64 (Steele, Lea, Flood 2014): the same numbers on every device,
    for every batch size and order. `ids` and `restart` are int64 (n,); returns float32 (n, *shape).
    """
    key = _mix(_mix(_mix(torch.full_like(ids, seed)) ^ ids) + restart)
    counter = torch.arange(1, shape.numel() + 1, device=ids.device)
    bits = _mix(key[:, None] + counter * _signed(0x9E3779B97F4A7C15))
    return _shift(bits, 40).float().mul_(2.0**-24).view(len(ids), *shape)


def _mix(z: Tensor) -> Tensor:
    z = (z ^ _shift(z, 30)) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ _shift(z, 27)) * _signed(0x94D049BB133111EB)
    return z ^ _shift(z, 31)


def _shift(z: Tensor, by: int) -> Tensor:
    return (z >> by) & ((1 << (64 - by)) - 1)  # logical: torch's shift drags the sign along


def _signed(word: int) -> int:
    return word - 2**64


def lint_attack(attack: object) -> None:
    """Raise `UserError` for what is no attack: a name, a class, anything that cannot be called."""
    if isinstance(attack, type):
        found, use = f"the class {attack.__name__}", f"an object of it, {attack.__name__}(8/255)"
    elif not callable(attack):
        found, use = repr(attack)[:80], "an object, as dq.PGD(8/255)"
    else:
        return
    raise UserError(f"an attack is an object or a function; found {found}: use {use}")


def lint_images(x: Any, y: Any) -> tuple[Tensor, Tensor]:
    """`x` and `y` as every entry takes them: (n, c, h, w) uint8 or in [0, 1], and int64 (n,).

    Arrays, and labels of other widths or in a list, are converted (`as_labels`, `in_unit`).
    Raises `UserError` for all others.
    """
    if not isinstance(x, Tensor | np.ndarray) or x.ndim != 4:
        array = isinstance(x, Tensor | np.ndarray)
        found = f"{x.dtype} {tuple(x.shape)}" if array else type(x).__name__
        raise UserError(f"an attack takes images (n, c, h, w); found {found}")
    if len(x) == 0:
        raise UserError("there are no images to attack")
    if x.shape[1] == x.shape[2] > 4 and x.shape[3] in (1, 3):
        raise UserError(
            f"an attack takes images (n, c, h, w); found {tuple(x.shape)}, which looks like "
            "(n, h, w, c): use x.permute(0, 3, 1, 2)"
        )
    return in_unit(x), as_labels(y, len(x))


def lint_answer(logits: object, n: int, top: int = -1) -> None:
    """Raise `UserError` unless `logits` are float (n, classes), 2 classes or more, above `top`.

    `top`: the highest label; -1 where it need not be looked at.
    """
    if not isinstance(logits, Tensor) or not logits.is_floating_point():
        raise UserError(
            f"the model must return logits, one float tensor; it returned {_kind(logits)}: wrap it "
            "in a module that returns them alone"
        )
    if logits.ndim != 2 or len(logits) != n:
        raise UserError(
            f"the model must return logits (n, classes) for n images; for {n} it returned "
            f"{tuple(logits.shape)}"
        )
    classes = logits.shape[1]
    if classes < 2:
        raise UserError(
            f"the model must return a logit for each of two or more classes; it returned "
            f"{classes}: for two classes by one logit z, return torch.cat([-z, z], 1) / 2"
        )
    if top >= classes:
        raise UserError(f"labels must lie in 0..{classes - 1}, the model's classes; found {top}")


def lint_model(model: nn.Module, x: Tensor, y: Tensor) -> None:
    """Warn of models whose attack would mislead; raise `UserError` for outputs that cannot be.

    `x`: a few images, no more than the model may see at once. Warns when the model is in training
    mode, gives probabilities instead of logits, is random, lets an example's output depend on its
    batch, or answers NaN.
    """
    if any(module.training for module in model.modules()):
        _warn("the model is in training mode: it is attacked in eval mode, and put back after")
    with untouched(model), torch.no_grad():
        logits = model(x)
        lint_answer(logits, len(x), int(y.max()))
        again, alone = model(x).float(), model(x[:1]).float()
    logits = logits.float()
    if not logits.isfinite().all():
        _warn("the model's outputs are not all finite: a NaN counts as a wrong answer")
        return
    if logits.min() >= 0 and torch.allclose(logits.sum(1), torch.ones(()).to(logits), atol=1e-3):
        _warn("the model seems to return probabilities: without its softmax attacks are stronger")
    scale = logits.abs().max().clamp_min(1)
    if (logits - again).abs().max() > SAME * scale:
        _warn(
            "two identical calls of the model differ: every score is partly chance, and more "
            "looks find more of it: fix its draws, or attack their average, apgd@eot"
        )
    elif (logits[0] - alone[0]).abs().max() > 1e-2 * scale:
        _warn("an example's output depends on the batch it comes in: its score does, too")


def _kind(answer: object) -> str:
    """`a tuple of 2 (Tensor, Tensor)`, `a dict with keys 'logits'`, `a torch.int64 tensor`."""
    if isinstance(answer, Tensor):
        return f"a {answer.dtype} tensor"
    if isinstance(answer, Mapping):
        return f"a {type(answer).__name__} with keys {', '.join(map(repr, answer))}"
    if isinstance(answer, Sequence):
        parts = ", ".join(type(part).__name__ for part in answer)
        return f"a {type(answer).__name__} of {len(answer)} ({parts})"
    return f"a {type(answer).__name__}"


def _warn(message: str) -> None:
    warnings.warn(message, DefquantWarning, stacklevel=3)
