"""One clear error or warning for each usual mistake of a call: what is no attack, image or model.

`suspect` looks for what explains a low clean accuracy: images or labels that are not the model's.
"""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from defquant.attacks.access import leaf, untouched
from defquant.data import as_labels, in_unit, to_unit
from defquant.errors import DefquantWarning, UserError

__all__ = [
    "NORMS", "SAME", "kind_of", "lint_answer", "lint_attack", "lint_images", "lint_model",
    "probabilities", "suspect",
]  # fmt: skip

SAME = 1e-4  # of the largest logit: what rounding may change between identical calls
_PROBED = 256
_FEWEST = 32
_DEAD = "the model gives different images exactly the same output: look for dead layers"
NORMS = {
    "ImageNet's": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "CIFAR-10's": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
}
"""Means and deviations of images in [0, 1], by whose they are."""


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
            f"the model must return logits, one float tensor; it returned {kind_of(logits)}: wrap "
            "it in a module that returns them alone"
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
    if probabilities(logits):
        _warn("the model seems to return probabilities: without its softmax attacks are stronger")
    scale = logits.abs().max().clamp_min(1)
    if (logits - again).abs().max() > SAME * scale:
        _warn(
            "two identical calls of the model differ: every score is partly chance, and more "
            "looks find more of it: fix its draws, or attack their average, apgd@eot"
        )
    elif (logits[0] - alone[0]).abs().max() > 1e-2 * scale:
        _warn("an example's output depends on the batch it comes in: its score does, too")


def probabilities(logits: Tensor) -> bool:
    """Whether no number is below 0 and each row sums to 1."""
    one = torch.ones(()).to(logits)
    return bool(logits.min() >= 0) and torch.allclose(logits.sum(1), one, atol=1e-3)


def kind_of(answer: object) -> str:
    """`a tuple of 2 (Tensor, Tensor)`, `a dict with keys 'logits'`, `a torch.int64 tensor`."""
    if isinstance(answer, Tensor):
        return f"a {answer.dtype} tensor"
    if isinstance(answer, Mapping):
        return f"a {type(answer).__name__} with keys {', '.join(map(repr, answer))}"
    if isinstance(answer, Sequence):
        parts = ", ".join(type(part).__name__ for part in answer)
        return f"a {type(answer).__name__} of {len(answer)} ({parts})"
    return f"a {type(answer).__name__}"


def suspect(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    right: Tensor,
    *,
    dead: bool = True,
    batch_size: int = 64,
) -> None:
    """Warn where `model` is right on few `images` as they are, and on most after a usual repair.

    Tried on up to 256 images that are spread over all: normalisations, pixels of 0..255, the
    colours in reverse, classes numbered otherwise. A repair is named where it makes at least half
    of them right, and three times as many as before (another order of classes: four of five, as
    untrained networks sort a little, too): so no poor network is suspected. Costs a few
    forward passes, and nothing where half of the images are right or there are fewer than 32.
    """
    if len(images) < _FEWEST or 2 * int(right.sum()) > len(images):
        return
    some = torch.linspace(0, len(images) - 1, min(_PROBED, len(images))).round().long()
    some = some.to(images.device)
    x, y, before = to_unit(images[some]), labels[some], int(right[some].sum())
    enough = max(len(y) / 2, 3 * before)
    with untouched(model), torch.no_grad():
        logits = torch.cat([model(part) for part in x[:64].split(batch_size)])
        if (logits == logits[:1]).all() and (x[:64] != x[:1]).any():
            if dead:  # else the caller knows: short experiments leave dead networks
                _warn(_DEAD, 5)
            return
        renamed = _renamed(_answers(model, x, batch_size), y, enough)
        if renamed:
            _say(before, len(y), *renamed, "correct the labels, or the order of the classes")
            return
        tried = {name: int((_answers(model, z, batch_size) == y).sum()) for name, z in _repairs(x)}
    repair, after = max(tried.items(), key=lambda item: item[1])
    if after >= enough:
        _say(before, len(y), after, repair, "put that into the model's forward")


def _answers(model: nn.Module, x: Tensor, batch_size: int) -> Tensor:
    return torch.cat([model(part).argmax(1) for part in x.split(min(64, batch_size))])


def _repairs(x: Tensor) -> Iterator[tuple[str, Tensor]]:
    channels = x.shape[1]
    mean, std = x.mean((0, 2, 3), keepdim=True), x.std((0, 2, 3), keepdim=True).clamp_min(1e-6)
    for name, (means, deviations) in NORMS.items():
        if channels == 3:
            yield (
                f"normalised with {name} mean and deviation",
                (x - _row(means, x)) / _row(deviations, x),
            )
    yield "scaled to [-1, 1]", 2 * x - 1
    yield "as pixels of 0..255", 255 * x
    yield "inverted, 1 - x", 1 - x
    if channels == 3:
        yield "with the colours in reverse, BGR for RGB", x.flip(1)
    if x.shape[2] == x.shape[3]:
        yield "with rows and columns swapped", x.transpose(2, 3)
    yield "with their own mean and deviation taken out", (x - mean) / std


def _row(values: tuple[float, ...], x: Tensor) -> Tensor:
    return x.new_tensor(values).view(1, -1, 1, 1)


def _renamed(answers: Tensor, labels: Tensor, enough: float) -> tuple[int, str] | None:
    """How many are right when classes are numbered otherwise, and how: off by one or permuted."""
    for step, name in ((1, "one below"), (-1, "one above")):
        right = int((answers == labels + step).sum())
        if right >= enough:
            return right, f"if each label is taken for {name} the model's class"
    known = labels.unique()
    if (
        len(labels) < 8 * len(known) or 0.8 * len(labels) < enough
    ):  # so few that chance finds an order that fits
        return None
    from scipy.optimize import linear_sum_assignment

    size = 1 + int(torch.maximum(answers.max(), labels.max()))
    table = torch.bincount(labels * size + answers, minlength=size * size).view(size, size)
    rows, columns = linear_sum_assignment(table.cpu().numpy(), maximize=True)
    right = int(table[torch.from_numpy(rows), torch.from_numpy(columns)].sum())
    return (right, "if the classes are put in another order") if right >= enough else None


def _say(before: int, total: int, after: int, repair: str, remedy: str) -> None:
    _warn(
        f"the model is right on {before} of {total} images as they are, and on {after} {repair}: "
        f"{remedy}",
        5,
    )


def _warn(message: str, level: int = 3) -> None:
    warnings.warn(message, DefquantWarning, stacklevel=level)
