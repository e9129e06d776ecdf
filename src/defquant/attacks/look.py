"""A look at the model: loss, whether it is fooled, gradient; and which iterate is the best."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from defquant.attacks.base import differentiable, lint_answer, untouched
from defquant.attacks.base import gradient as gradient_at
from defquant.attacks.kernel import Forward, Kernel, Look, Loss, State
from defquant.attacks.losses import cross_entropy
from defquant.attacks.rows import padded

__all__ = ["better", "distance", "look", "opened", "rank", "rank_of"]


@contextmanager
def opened(model: nn.Module, kernel: Kernel, x: Tensor) -> Iterator[tuple[Forward, ...]]:
    """The model's forwards as the kernel wants them; it is left as it was found.

    Nothing outside of `look` is differentiated.
    """
    with untouched(model), torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        if kernel.surrogate is None:
            yield (model,)
        else:
            with kernel.surrogate(model) as forwards:
                yield forwards


def look(
    forwards: Forward | tuple[Forward, ...],
    at: Tensor,
    y: Tensor,
    *,
    gradient: bool = True,
    rows: int | None = None,
    loss: Loss = cross_entropy,
    target: Tensor | None = None,
    top: int = -1,
) -> Look:
    """Per-example loss, whether the model is fooled, and the gradient at the images.

    With `rows` the model sees that many rows at least. Over several forwards loss and gradient
    are averaged, and the mean of the logits decides. `top`: the highest label, if it is known.
    """
    n, at = len(at), padded(at.detach(), rows or 0)
    logits, losses, grads = [], [], []
    with differentiable() if gradient else torch.no_grad():
        at = at.requires_grad_(gradient)
        for forward in forwards if isinstance(forwards, tuple) else (forwards,):
            given = forward(at)
            lint_answer(given, len(at), top)
            answer = given[:n].float()
            value = loss(answer, y, y if target is None else target)
            if gradient:
                grads.append(gradient_at(value, at)[:n])
            logits.append(answer.detach())
            losses.append(value.detach())
    grad = _mean(grads) if gradient else torch.zeros_like(at[:n])
    mean = _mean(logits)
    # a NaN among the logits is an answer as wrong as any, and must not stop its neighbours
    fooled = (mean.argmax(1) != y) | mean.isnan().any(1)
    return Look(_mean(losses).nan_to_num(torch.inf), fooled, grad.nan_to_num(0.0))


def _mean(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.stack(list(parts)).mean(0)


def distance(rows: State) -> Tensor:
    """||at - x||_inf of each row, (n,)."""
    return (rows["at"] - rows["x"]).abs().amax((1, 2, 3))


def rank(loss: Tensor, fooled: Tensor) -> Tensor:
    """Orders iterates: all that fool above all that do not, by loss within each."""
    share = loss / (1 + loss.abs())  # in [-1, 1]; inf / inf is caught below
    return torch.where(fooled, 1 + share.clamp_min(0).nan_to_num(1.0), share.nan_to_num(1.0))


def rank_of(kernel: Kernel, rows: State, seen: Look) -> Tensor:
    """`rank`; where the kernel is not bounded, all that fool by distance, and no others."""
    if kernel.bounded:
        return rank(seen.loss, seen.fooled)
    return torch.where(seen.fooled, 2 - distance(rows), -torch.inf)


def better(best: Tensor, best_rank: Tensor, at: Tensor, rank: Tensor) -> tuple[Tensor, Tensor]:
    gains = rank > best_rank
    return torch.where(gains[:, None, None, None], at, best), torch.where(gains, rank, best_rank)
