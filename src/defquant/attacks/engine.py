"""First-order L-infinity attacks as one walk, and the loop that works only on the unbroken."""

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
    n, device = len(images), images.device
    standing = torch.ones(n, dtype=torch.bool, device=device)
    position, total = 0, n * walk.restarts
    row = torch.empty(0, dtype=torch.int64, device=device)  # restart * n + example
    active: _Rows = (row, row, to_unit(images[:0]), to_unit(images[:0]))
    ended = active
    with untouched(model), torch.autocast(device.type, enabled=False):
        while True:
            active = _where(active, standing[active[0] % n])
            position, fresh = _refill(position, total, batch_size - len(active[0]), standing)
            if len(fresh):
                x = to_unit(images[fresh % n])
                start = _start(walk, x, eps, seed, ids[fresh % n], fresh // n)
                active = _both(active, (fresh, torch.zeros_like(fresh), x, start))
            # the last iterate needs no gradient: it waits until a batch of its kind is together
            at_end = active[1] == walk.steps
            ended, active = _both(ended, _where(active, at_end)), _where(active, ~at_end)
            if len(ended[0]) >= batch_size or not len(active[0]):
                ended = _where(ended, standing[ended[0] % n])
                _settle(model, ended, labels, standing, gradient=False)
                ended = _where(ended, torch.zeros_like(ended[0], dtype=torch.bool))
            if len(active[0]):
                rows, step, clean, at = active
                grad = _settle(model, active, labels, standing, gradient=True)
                active = (rows, step + 1, clean, _advance(walk, at, clean, eps, grad))
            elif position == total:
                return standing


_Rows = tuple[Tensor, Tensor, Tensor, Tensor]  # row, step, clean image, iterate


def _where(rows: _Rows, mask: Tensor) -> _Rows:
    return (
        rows if bool(mask.all()) else (rows[0][mask], rows[1][mask], rows[2][mask], rows[3][mask])
    )


def _both(a: _Rows, b: _Rows) -> _Rows:
    if not len(a[0]) or not len(b[0]):
        return a if len(a[0]) else b
    row, step, clean, at = (torch.cat(pair) for pair in zip(a, b, strict=True))
    return row, step, clean, at


def _settle(
    model: nn.Module, rows: _Rows, labels: Tensor, standing: Tensor, *, gradient: bool
) -> Tensor:
    """Strike from `standing` the examples that these iterates fool; the loss's gradient there."""
    example, at = rows[0] % len(standing), rows[3]
    if not len(at):
        return at
    seen = _round_up(len(at))
    _, fooled, grad = _look(model, at, labels[example], gradient=gradient, rows=seen)
    standing[example[fooled]] = False
    return grad


def _refill(position: int, total: int, room: int, standing: Tensor) -> tuple[int, Tensor]:
    """The next `room` unbroken rows from `position` on, fewer at the end, and where they end."""
    found, taken = torch.empty(0, dtype=torch.int64, device=standing.device), position
    while taken < total and (missing := room - len(found)) > 0:
        rows = torch.arange(taken, min(taken + missing, total), device=standing.device)
        found = torch.cat([found, rows[standing[rows % len(standing)]]])
        taken += len(rows)
    return taken, found


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
    model: nn.Module, at: Tensor, y: Tensor, *, gradient: bool = True, rows: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Per-example cross-entropy, whether the model is fooled, and the gradient at the images.

    With `rows` the model sees that many rows at least.
    """
    n, at = len(at), _padded(at.detach(), rows or 0)
    with torch.set_grad_enabled(gradient):
        at = at.requires_grad_(gradient)
        logits = model(at)[:n].float()
        loss = nn.functional.cross_entropy(logits, y, reduction="none")
        grad = torch.autograd.grad(loss.sum(), at)[0][:n] if gradient else torch.zeros_like(at[:n])
    # a NaN among the logits is an answer as wrong as any, and must not stop its neighbours
    fooled = (logits.argmax(1) != y) | logits.isnan().any(1)
    return loss.detach().nan_to_num_(torch.inf), fooled, grad.nan_to_num_(0.0)


def _padded(x: Tensor, rows: int) -> Tensor:
    """`x` with rows of zeros added, up to `rows` of them."""
    missing = rows - len(x)
    return x if missing <= 0 else torch.cat([x, x.new_zeros(missing, *x.shape[1:])])


def _round_up(n: int) -> int:
    """`n` up to the next of 1, 2, 4, 8, 16, 32, 48, 64, ...

    A batch that shrinks row by row would have convolution kernels made for every size it has.
    """
    return 1 << (n - 1).bit_length() if n < 16 else -(-n // 16) * 16


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
