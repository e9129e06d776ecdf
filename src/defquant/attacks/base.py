"""What every attack keeps to: one signature, the model left as it was, draws per example."""

import random
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, ClassVar, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn

from defquant.data import as_labels, in_unit
from defquant.errors import DefquantWarning, UserError

__all__ = [
    "SAME", "Attack", "ById", "differentiable", "draw_seed", "generator_of", "gradient", "leaf",
    "lint_answer", "lint_attack", "lint_images", "lint_model", "made_by", "name_of", "seed_of",
    "to_eval", "uniform", "untouched",
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

    Restored, also after an exception, which is never hidden: each module's `training` flag, each
    parameter's `requires_grad` and `.grad` (the same tensor object), each buffer by module and
    name (those that appeared go, those that grew or were bound anew come back), and torch's global
    random state on the CPU and on the model's GPUs. Not restored: what a forward pass writes into
    parameters, and its Python attributes, but for those of a module whose buffers it bound anew
    (they may tell which buffers there are). Inside, a float64 or half model takes float32
    images, too, and `torch.inference_mode` is off.

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
            with _fed(model), torch.inference_mode(False) if inference else nullcontext():
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


def to_eval(model: nn.Module) -> nn.Module:
    """`model` in eval mode; a program of `torch.export` has but one mode, and refuses the call."""
    try:
        model.eval()
    except NotImplementedError:
        for module in model.modules():
            module.training = False
    return model


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


def made_by(
    attack: Attack,
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    generator: torch.Generator | None,
    ids: Tensor | None = None,
    last: bool = False,
) -> Tensor:
    """What any `attack` makes of one batch in [0, 1], checked before it is believed.

    The attack is handed copies without a graph, and the model as in `untouched`. Where it draws
    from the global state of torch, NumPy or Python, that is seeded from the next draw of
    `generator` and the first of `ids`, and restored after. `last`: the last iterate of an attack
    that knows one. Returns images of the type and device of `x`, without a graph.

    Raises `UserError` unless they are float, of the shape of `x`, finite, in [0, 1] and within the
    attack's `eps` (beyond rounding).
    """
    make: Callable[..., Tensor] = getattr(attack, "last", attack) if last else attack
    named = {"ids": ids} if ids is not None and isinstance(attack, ById) else {}
    batch = 0 if ids is None or not len(ids) else int(ids[0])
    with untouched(model), _seeded(seed_of(_next_draw(generator), batch), x.device):
        made = make(model, leaf(x).clone(), leaf(y).clone(), generator=generator, **named)
    return _checked(made, x.detach(), attack)


def generator_of(attack: Attack, seed: int, ids: Tensor) -> torch.Generator:
    """The draws of one batch: of a `ById` the same for all batches, for ids tell them apart."""
    batch = 0 if isinstance(attack, ById) else int(ids[0])
    return torch.Generator().manual_seed(seed_of(seed, batch))


def name_of(attack: Attack) -> str:
    """Name of the family as the tables show it."""
    return str(getattr(attack, "name", getattr(attack, "__name__", repr(attack))))


def _checked(made: object, x: Tensor, attack: Attack) -> Tensor:
    if not isinstance(made, Tensor) or made.shape != x.shape or not made.is_floating_point():
        found = f"{tuple(made.shape)}, {made.dtype}" if isinstance(made, Tensor) else _kind(made)
        raise UserError(
            f"{attack!r} must return float images {tuple(x.shape)}, as it was given; found {found}"
        )
    made = made.detach().to(x)
    eps = getattr(attack, "eps", None)
    low, high = made.aminmax()
    distance, low, high = torch.stack([(made - x).abs().max(), low, high]).tolist()
    if not (low >= -1e-6 and high <= 1 + 1e-6):  # nor is NaN
        raise UserError(f"{attack!r} returned images outside [0, 1]: [{low:.3g}, {high:.3g}]")
    if eps is not None and not distance <= eps + 1e-5:
        raise UserError(f"{attack!r} moved a pixel by {distance:.4g}, further than its eps {eps:g}")
    return made.clamp(0, 1)


def _next_draw(generator: torch.Generator | None) -> int:
    """What `draw_seed` would give, without taking it away."""
    if generator is None:
        return 0
    copy = torch.Generator(generator.device)
    return draw_seed(copy.set_state(generator.get_state()))


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """The global random states that a foreign attack may draw from, seeded; then as before."""
    gpus = [device] if device.type == "cuda" else []
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(gpus):
        try:
            torch.default_generator.manual_seed(seed)
            for gpu in gpus:
                with torch.cuda.device(gpu):
                    torch.cuda.manual_seed(seed)
            random.seed(seed)
            np.random.seed(seed % 2**32)
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


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


def seed_of(seed: int, place: int) -> int:
    """The seed of what comes in that place: the first, 0, has the seed itself."""
    return (seed + place * 0x9E3779B97F4A7C15) % 2**62


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
    return leaf(in_unit(x)), leaf(as_labels(y, len(x)))


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
    if any(getattr(module, "training", False) for module in model.modules()):
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
