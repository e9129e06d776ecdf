"""First-order L-infinity attacks as one walk, and the loop that works only on the unbroken."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from defquant.attacks.base import uniform
from defquant.attacks.kernel import Forward, Kernel, Look, Loss, State, Tick, into_ball
from defquant.attacks.look import better, distance, look, opened, rank, rank_of
from defquant.attacks.losses import cross_entropy
from defquant.attacks.rows import (
    both,
    count,
    cut,
    refill,
    rivals_of,
    round_up,
    rows_of,
    where,
)

__all__ = ["Walk", "perturb", "unbroken"]

_look, _rank = look, rank


@dataclass(frozen=True)
class Walk:
    """How an attack moves: x₀ from `start`, then `steps` times x + rate·eps·sign(∇ₓL), projected.

    A `Kernel` on the cross-entropy L.

    Attributes:
        start: `clean` at x; `uniform` in the ball; `sign` at x + reach·eps·sign(N(0, I)).
        steps: gradient steps.
        rate: step size over eps.
        restarts: independent starts.
        reach: share of eps that the start covers.
    """

    targets: ClassVar[int] = 0
    bounded: ClassVar[bool] = True
    surrogate: ClassVar[None] = None

    start: Literal["clean", "uniform", "sign"]
    steps: int
    rate: float = 1.0
    restarts: int = 1
    reach: float = 1.0

    @property
    def looks(self) -> int:
        return self.steps

    @property
    def climbs(self) -> int:
        return self.steps

    @property
    def loss(self) -> Loss:
        return cross_entropy

    def begin(self, rows: State, eps: float | Tensor, seed: int) -> State:
        return rows | {"at": _start(self, rows["x"], eps, seed, rows["id"], rows["start"])}

    def advance(self, rows: State, look: Look, eps: float | Tensor, seed: int) -> State:
        at = _advance(self, rows["at"], rows["x"], eps, look.grad)
        return rows | {"at": at, "step": rows["step"] + 1}


def perturb(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    kernel: Kernel,
    eps: float | Tensor,
    *,
    seed: int,
    ids: Tensor | None = None,
    keep: Literal["best", "last"] = "best",
) -> Tensor:
    """Adversarial examples of one batch, every example attacked to the end.

    Args:
        model: returns logits; left as it was found.
        x: images in [0, 1], (n, c, h, w).
        y: labels, (n,).
        kernel: the attack.
        eps: radius in [0, 1], or one per example, (n, 1, 1, 1).
        seed: of the draws.
        ids: int64 (n,), the names under which the examples draw; else 0, 1, ...
        keep: `best`: of all iterates and starts the one with the highest loss among those
            that fool the model, else the highest loss (a start counts only if it fools); for a
            kernel that is not bounded, the one that fools nearest to `x`, else `x`.
            `last`: the final iterate, a forward pass cheaper.
    """
    ids = torch.arange(len(x), device=x.device) if ids is None else ids
    # on a GPU training waits for no label: those of a `Dataset` are known to be right
    top = -1 if not len(y) or (y.is_cuda and keep == "last") else int(y.max())
    with opened(model, kernel, x) as forwards:
        best, best_rank = x.clone(), torch.full((len(x),), -torch.inf, device=x.device)
        rivals = rivals_of(forwards, x, y, kernel.targets, len(x))
        starts = kernel.restarts * rivals.shape[1]
        climbs = kernel.looks - (kernel.steps - kernel.climbs)
        for start in range(starts):
            fresh = torch.arange(len(x), device=x.device) + start * len(x)
            rows = kernel.begin(rows_of(fresh, x, y, ids, rivals), eps, seed)
            for step in range(kernel.looks):
                seen = _see(forwards, rows, kernel, gradient=step < climbs, top=top)
                if keep == "best":
                    order = rank_of(kernel, rows, seen)
                    if step == 0:
                        order = torch.where(seen.fooled, order, -torch.inf)
                    best, best_rank = better(best, best_rank, rows["at"], order)
                rows = kernel.advance(rows, seen, eps, seed)
            if keep == "last" and starts == 1:
                return rows["at"]
            seen = _see(forwards, rows, kernel, gradient=False)
            best, best_rank = better(best, best_rank, rows["at"], rank_of(kernel, rows, seen))
    return best


def unbroken(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    kernel: Kernel,
    eps: float,
    *,
    ids: Tensor,
    seed: int,
    batch_size: int,
    tick: Tick | None = None,
) -> Tensor:
    """Which examples no iterate of any start fools: bool (n,).

    The batch is kept full: a fallen or finished example leaves it at once and the next one of
    the queue takes its place. The queue holds every example's first start, then every second
    start, so that late starts stack in the batch; starts of fallen examples are skipped.

    Args:
        model: returns logits; left as it was found.
        images: uint8, or float in [0, 1]; (n, c, h, w), on the model's device.
        labels: int64 (n,).
        kernel: the attack.
        eps: radius in [0, 1].
        ids: int64 (n,), the names under which the examples draw.
        seed: of the draws.
        batch_size: rows at a time; the answer does not depend on it (beyond rounding).
        tick: told after each look how far it is, if it asks.
    """
    n, device, top = len(images), images.device, int(labels.max())
    none = torch.empty(0, dtype=torch.int64, device=device)
    with opened(model, kernel, images) as forwards:
        standing = torch.ones(n, dtype=torch.bool, device=device)

        def moved(rows: State, *, gradient: bool) -> State:
            room = min(round_up(count(rows)), batch_size)
            return _moved(
                forwards, rows, kernel, standing, eps, seed, gradient=gradient, room=room, top=top
            )

        def ask() -> tuple[float, int]:
            stand = int(standing.sum())
            left = (total - position) * kernel.looks * stand / n
            for rows in (active, waiting):
                left += max(0, kernel.looks * count(rows) - int(rows["step"].sum()))
            return spent / max(1.0, spent + left), stand

        rivals = rivals_of(forwards, images, labels, kernel.targets, batch_size)
        spent = 0  # looks at rows
        position, total = 0, n * kernel.restarts * rivals.shape[1]
        most = 2 * batch_size if kernel.climbs else batch_size
        active = kernel.begin(rows_of(none, images, labels, ids, rivals), eps, seed)
        waiting = active
        while True:
            active = where(active, standing[active["row"] % n])
            room = min(batch_size, most - count(waiting)) - count(active)
            position, fresh = refill(position, total, room, standing)
            if len(fresh):
                rows = rows_of(fresh, images, labels, ids, rivals)
                active = both(active, kernel.begin(rows, eps, seed))
            # rows that need no gradient wait until a batch of their kind is together
            climbs = active["step"] < kernel.climbs
            waiting, active = both(waiting, where(active, ~climbs)), where(active, climbs)
            if count(waiting) >= batch_size or not count(active):
                waiting = where(waiting, standing[waiting["row"] % n])
                some, later = cut(waiting, batch_size)
                spent += count(some)
                waiting = both(later, moved(some, gradient=False))
            if tick is not None:
                tick(ask)
            if count(active):
                spent += count(active)
                active = moved(active, gradient=True)
            elif position == total and not count(waiting):
                return standing


def _moved(
    forwards: tuple[Forward, ...],
    rows: State,
    kernel: Kernel,
    standing: Tensor,
    eps: float,
    seed: int,
    *,
    gradient: bool,
    room: int,
    top: int,
) -> State:
    """The rows after a look, less those that had ended; strikes from `standing` what it fools."""
    if not count(rows):
        return rows
    seen = _see(forwards, rows, kernel, gradient=gradient, room=room, top=top)
    fell = seen.fooled if kernel.bounded else seen.fooled & (distance(rows) <= eps)
    standing[rows["row"][fell] % len(standing)] = False
    if gradient:
        return kernel.advance(rows, seen, eps, seed)
    going = rows["step"] < kernel.steps
    rows, seen = where(rows, going), Look(*(part[going] for part in seen))
    return kernel.advance(rows, seen, eps, seed) if count(rows) else rows


def _see(
    forwards: tuple[Forward, ...],
    rows: State,
    kernel: Kernel,
    *,
    gradient: bool,
    room: int | None = None,
    top: int = -1,
) -> Look:
    return look(
        forwards, rows["at"], rows["y"], gradient=gradient, rows=room, loss=kernel.loss,
        target=rows["target"], top=top,
    )  # fmt: skip


def _start(
    walk: Walk, x: Tensor, eps: float | Tensor, seed: int, ids: Tensor, restart: Tensor
) -> Tensor:
    if walk.start == "clean":
        return x
    noise = uniform(seed, ids, restart, x.shape[1:]).mul_(2).sub_(1)
    if walk.start == "sign":
        noise = torch.where(noise < 0, -1.0, 1.0)
    return (x + noise * (walk.reach * eps)).clamp_(0, 1)


def _advance(walk: Walk, at: Tensor, x: Tensor, eps: float | Tensor, grad: Tensor) -> Tensor:
    return into_ball(at + grad.sign_().mul_(walk.rate * eps), x, eps)
