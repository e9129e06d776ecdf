"""First-order L-infinity attacks as one walk, and the loop that works only on the unbroken."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from defquant.attacks.base import uniform, untouched
from defquant.data import to_unit

__all__ = ["Walk", "perturb", "unbroken"]


@dataclass(frozen=True)
class Walk:
    """How an attack moves: x₀ from `start`, then `steps` times x + rate·eps·sign(∇ₓL), projected.

    Attributes:
        start: `clean` at x; `uniform` in the ball; `sign` at x + reach·eps·sign(N(0, I)).
        steps: gradient steps.
        rate: step size over eps.
        restarts: independent starts.
        reach: share of eps that the start covers.
    """

    start: Literal["clean", "uniform", "sign"]
    steps: int
    rate: float = 1.0
    restarts: int = 1
    reach: float = 1.0


def perturb(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    walk: Walk,
    eps: float | Tensor,
    *,
    seed: int,
    ids: Tensor | None = None,
    keep: Literal["best", "last"] = "best",
) -> Tensor:
    """Adversarial examples of one batch, every example walked to the end.

    Args:
        model: returns logits; left as it was found.
        x: images in [0, 1], (n, c, h, w).
        y: labels, (n,).
        walk: the attack.
        eps: radius in [0, 1], or one per example, (n, 1, 1, 1).
        seed: of the starts.
        ids: int64 (n,), the names under which the examples draw their starts; else 0, 1, ...
        keep: `best`: of all iterates and restarts the one with the highest loss among those
            that fool the model, else the highest loss (a start counts only if it fools);
            `last`: the final iterate, a forward pass cheaper.
    """
    ids = torch.arange(len(x), device=x.device) if ids is None else ids
    best, best_rank = x.clone(), torch.full((len(x),), -torch.inf, device=x.device)
    with untouched(model), torch.autocast(x.device.type, enabled=False):
        for restart in range(walk.restarts):
            at = _start(walk, x, eps, seed, ids, torch.full_like(ids, restart))
            for step in range(walk.steps):
                loss, fooled, grad = _look(model, at, y)
                if keep == "best":
                    rank = _rank(loss, fooled)
                    if step == 0:
                        rank = torch.where(fooled, rank, -torch.inf)
                    best, best_rank = _better(best, best_rank, at, rank)
                at = _advance(walk, at, x, eps, grad)
            if keep == "last" and walk.restarts == 1:
                return at
            loss, fooled, _ = _look(model, at, y, gradient=False)
            best, best_rank = _better(best, best_rank, at, _rank(loss, fooled))
    return best


def unbroken(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    walk: Walk,
    eps: float,
    *,
    ids: Tensor,
    seed: int,
    batch_size: int,
) -> Tensor:
    """Which examples no iterate of any restart fools: bool (n,).

    The batch is kept full: a fallen or finished example leaves it at once and the next one of
    the queue takes its place. The queue holds every example's first start, then every second
    start, so that late restarts stack in the batch; starts of fallen examples are skipped.

    Args:
        model: returns logits; left as it was found.
        images: uint8, or float in [0, 1]; (n, c, h, w), on the model's device.
        labels: int64 (n,).
        walk: the attack.
        eps: radius in [0, 1].
        ids: int64 (n,), the names under which the examples draw their starts.
        seed: of the starts.
        batch_size: rows at a time; the answer does not depend on it (beyond rounding).
    """
    device, n = images.device, len(images)
    standing = torch.ones(n, dtype=torch.bool, device=device)
    queue = _queue(n * walk.restarts, max(1, batch_size // 4), device)
    rows = torch.empty(0, dtype=torch.int64, device=device)  # restart * n + example
    step = rows.clone()
    clean = at = to_unit(images[:0])
    with untouched(model), torch.autocast(device.type, enabled=False):
        while True:
            stays = (standing[rows % n]) & (step <= walk.steps)
            rows, step, clean, at = rows[stays], step[stays], clean[stays], at[stays]
            fresh = _next_rows(queue, batch_size - len(rows), standing)
            if len(fresh):
                x = to_unit(images[fresh % n])
                start = _start(walk, x, eps, seed, ids[fresh % n], fresh // n)
                rows, step = torch.cat([rows, fresh]), torch.cat([step, torch.zeros_like(fresh)])
                clean, at = torch.cat([clean, x]), torch.cat([at, start])
            if not len(rows):
                return standing
            moving = bool((step < walk.steps).any())
            _, fooled, grad = _look(model, at, labels[rows % n], gradient=moving)
            standing[(rows % n)[fooled]] = False
            at = _advance(walk, at, clean, eps, grad) if moving else at
            step = step + 1


def _queue(total: int, chunk: int, device: torch.device) -> Iterator[Tensor]:
    for first in range(0, total, chunk):
        yield torch.arange(first, min(first + chunk, total), device=device)


def _next_rows(queue: Iterator[Tensor], room: int, standing: Tensor) -> Tensor:
    """The next unbroken rows of the queue: none without room, else at least `room` while it lasts.

    Whole chunks, a quarter of a batch each: the batch may run over by less than that.
    """
    found: list[Tensor] = []
    while room > 0 and (rows := next(queue, None)) is not None:
        found.append(rows[standing[rows % len(standing)]])
        room -= len(found[-1])
    return torch.cat(found) if found else torch.empty(0, dtype=torch.int64, device=standing.device)


def _start(
    walk: Walk, x: Tensor, eps: float | Tensor, seed: int, ids: Tensor, restart: Tensor
) -> Tensor:
    if walk.start == "clean":
        return x
    noise = uniform(seed, ids, restart, x.shape[1:]).mul_(2).sub_(1)
    if walk.start == "sign":
        noise = torch.where(noise < 0, -1.0, 1.0)
    return (x + noise * (walk.reach * eps)).clamp_(0, 1)


def _look(
    model: nn.Module, at: Tensor, y: Tensor, *, gradient: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """Per-example cross-entropy, whether the model is fooled, and the gradient at the images."""
    with torch.set_grad_enabled(gradient):
        at = at.detach().requires_grad_(gradient)
        logits = model(at).float()
        loss = nn.functional.cross_entropy(logits, y, reduction="none")
        grad = torch.autograd.grad(loss.sum(), at)[0] if gradient else torch.zeros_like(at)
    # a NaN among the logits is an answer as wrong as any, and must not stop its neighbours
    fooled = (logits.argmax(1) != y) | logits.isnan().any(1)
    return loss.detach().nan_to_num_(torch.inf), fooled, grad.nan_to_num_(0.0)


def _advance(walk: Walk, at: Tensor, x: Tensor, eps: float | Tensor, grad: Tensor) -> Tensor:
    moved = at + grad.sign_().mul_(walk.rate * eps)
    return torch.minimum(torch.maximum(moved, x - eps), x + eps).clamp_(0, 1)


def _rank(loss: Tensor, fooled: Tensor) -> Tensor:
    """Orders iterates: all that fool above all that do not, by loss within each."""
    share = loss / (1 + loss)  # in [0, 1]; inf / inf is caught below
    return torch.where(fooled, 1 + share.nan_to_num(1.0), share.nan_to_num(1.0))


def _better(best: Tensor, best_rank: Tensor, at: Tensor, rank: Tensor) -> tuple[Tensor, Tensor]:
    gains = rank > best_rank
    return torch.where(gains[:, None, None, None], at, best), torch.where(gains, rank, best_rank)
