"""The engine of the L-infinity attacks. `Single` is one of them; `perturb` and `unbroken` run it.

An attack moves rows, one for each start of each example: `begin` gives a row its first image `at`,
the engine looks at the model there, and `advance` moves `at` by what was seen, until `plan` ends.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from defquant.attacks.access import channels_last
from defquant.attacks.contract import Ids, InBall, Target, confirmed, to_pixels
from defquant.attacks.look import (
    Forward,
    Look,
    Looks,
    Plan,
    Radius,
    State,
    Surrogate,
    at_once,
    count,
    look,
    opened,
    searchable,
    smooth,
)  # fmt: skip
from defquant.data import to_unit

__all__ = [
    "Forward", "Look", "Plan", "Radius", "Single", "State", "Surrogate", "better", "column",
    "into_ball", "look", "perturb", "rank", "searchable", "smooth",
    "stepped", "unbroken",
]  # fmt: skip


@dataclass(frozen=True, repr=False)
class Single(InBall):
    """An L-infinity attack on rows that do not know of each other. `eps` 0 returns the images.

    Calling it returns the best iterate of every example (see `perturb`), in the ball of radius
    `eps` around `x` and in [0, 1]. Raises `UserError` for images outside [0, 1].
    """

    @property
    def plan(self) -> Plan:
        raise TypeError(f"{type(self).__name__} is abstract: use FGSM, PGD, APGD, ...")

    def begin(self, rows: State, eps: Radius, seed: int) -> State:
        """The rows with `at`, the start, and the attack's own state."""
        raise NotImplementedError

    def advance(self, rows: State, look: Look, eps: Radius, seed: int) -> State:
        """The rows after a look at `at`: a new `at`, and `step` risen.

        All rows of a call need the gradient, or none does.
        """
        raise NotImplementedError

    def made(self, model: nn.Module, x: Tensor, y: Tensor, ids: Tensor, *, seed: int) -> Tensor:
        return perturb(model, x, y, self, seed=seed, ids=ids)

    def standing(self, target: Target, ids: Tensor) -> Tensor:
        return unbroken(target, self, ids)

    def eight_bit(
        self, model: nn.Module, x: Tensor, y: Tensor, ids: Tensor, *, seed: int
    ) -> Tensor:
        return to_pixels(self.made(model, x, y, ids, seed=seed), x, self.eps)


def perturb(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    attack: Single,
    *,
    seed: int,
    ids: Ids = None,
    eps: Radius | None = None,
    keep: Literal["best", "last"] = "best",
) -> Tensor:
    """Adversarial examples of one batch, every example attacked to the end.

    Args:
        model: returns logits; left as it was found.
        x: images in [0, 1], (n, c, h, w).
        y: labels, (n,).
        attack: gives the plan and moves the rows.
        seed: of the draws.
        ids: int64 (n,), the names under which the examples draw; else 0, 1, ...
        eps: radius in [0, 1], or one per example, (n, 1, 1, 1); else the attack's.
        keep: `best`: of all iterates and starts the one with the highest loss among those
            that fool the model, else the highest loss (a start counts only if it fools); for a
            plan that is not bounded, the one that fools nearest to `x` within eps, else `x`.
            `last`: the final iterate, a forward pass cheaper.
    """
    plan, eps = attack.plan, attack.eps if eps is None else eps
    every = torch.arange(len(x), device=x.device)
    ids = every if ids is None else ids
    # on a GPU training waits for no label: those of a `Dataset` are known to be right
    top = -1 if not len(y) or (y.is_cuda and keep == "last") else int(y.max())
    with opened(model, plan, x) as forwards:
        best, best_rank = x, torch.full((len(x),), -torch.inf, device=x.device)
        rivals = rivals_of(forwards, x, y, plan.targets, len(x))
        starts = plan.restarts * rivals.shape[1]
        for start in range(starts):
            rows = attack.begin(rows_of(every + start * len(x), x, y, ids, rivals), eps, seed)
            for step in range(plan.looks + 1):
                ended = step == plan.looks
                if ended and keep == "last" and starts == 1:
                    return rows["at"]
                climb = step < plan.looks - plan.queries
                seen = look(forwards, rows, plan, gradient=climb, top=top)
                if ended or keep == "best":
                    order = rank_of(plan, rows, seen, eps)
                    if step == 0 and not ended:
                        order = torch.where(seen.fooled, order, -torch.inf)
                    best, best_rank = better(best, best_rank, rows["at"], order)
                if not ended:
                    rows = attack.advance(rows, seen, eps, seed)
    return best


def stepped(at: Tensor, x: Tensor, grad: Tensor, size: Radius, eps: Radius) -> Tensor:
    """at + size · sign(∇ₓL), projected: the step of FGSM, BIM and PGD."""
    return into_ball(at + grad.sign().mul_(size), x, eps)


def into_ball(at: Tensor, x: Tensor, eps: Radius) -> Tensor:
    """The nearest image of [0, 1] within `eps` of `x`."""
    return torch.minimum(torch.maximum(at, x - eps), x + eps).clamp_(0, 1)


def unbroken(target: Target, attack: Single, ids: Tensor) -> Tensor:
    """Which of the examples `ids` no iterate of any start fools: bool (len(ids),).

    The batch is kept full: a fallen or finished example leaves it at once and the next one of
    the queue takes its place. The queue holds every example's first start, then every second
    start, so that late starts stack in the batch; starts of fallen examples are skipped. On a CPU,
    rows at a step at which most fell so far show their logits first: a gradient costs one or two
    forward passes more, and convolutions run channels last. The answer does not depend on the batch
    size (beyond rounding).
    """
    few = to_unit(target.images[ids[:4]])
    with (
        channels_last(target.model, few),
        opened(target.model, attack.plan, target.images) as forwards,
    ):
        return _Search(target, attack, ids, forwards).ended()


class _Search:
    """The rows of `unbroken` in play, and which examples stand so far."""

    def __init__(
        self, target: Target, attack: Single, ids: Tensor, forwards: Sequence[Forward]
    ) -> None:
        self.target, self.plan, self.eps = target, attack.plan, attack.eps
        images, labels, device = target.images[ids], target.labels[ids], ids.device
        self.attack, self.most, top = attack, target.batch_size, int(labels.max())
        rivals = rivals_of(forwards, images, labels, self.plan.targets, self.most)
        self.given = images, labels, ids, rivals
        fast, rough = searchable(target.model, self.plan, device), smooth(target.model, self.plan)
        self.looks = Looks(forwards, self.plan, self.most, top, fast=fast, rough=rough)
        self.standing = torch.ones(len(ids), dtype=torch.bool, device=device)
        self.position, self.total = 0, len(ids) * self.plan.restarts * rivals.shape[1]
        self.active = self.waiting = self.begun(ids[:0])
        self.patient = device.type == "cpu"  # a GPU would be waited for once more
        self.met, self.fallen = torch.zeros(2, self.plan.steps + 1)  # rows, of each step
        self.rate = 1.0  # of a search without gradients: the share of looks that gain, of late
        self.spent = 0  # looks at rows

    def ended(self) -> Tensor:
        """The examples that stand when every row has ended."""
        while True:
            self.fill()
            if self.target.tick is not None:
                self.target.tick(self.progress)
            if count(self.active):
                self.climb()
            elif self.position == self.total and not count(self.waiting):
                return self.standing

    def progress(self) -> tuple[float, int]:
        """The share of the looks that are done, and how many examples stand."""
        stand, looks = int(self.standing.sum()), self.plan.looks
        left = (self.total - self.position) * looks * stand / len(self.standing)
        for rows in (self.active, self.waiting):
            left += max(0, looks * count(rows) - int(rows["step"].sum()))
        return self.spent / max(1.0, self.spent + left), stand

    def begun(self, row: Tensor) -> State:
        return self.attack.begin(rows_of(row, *self.given), self.eps, self.target.seed)

    def stand(self, rows: State) -> Tensor:
        return self.standing[rows["row"] % len(self.standing)]

    def fill(self) -> None:
        """The active rows that stand, and fresh ones in their room.

        Those that need no gradient wait until a batch of their kind is together, and go on.
        """
        active, waiting = where(self.active, self.stand(self.active)), self.waiting
        room = (2 if self.plan.climbs else 1) * self.most - count(waiting)
        room = min(self.most, room) - count(active)
        self.position, fresh = refill(self.position, self.total, room, self.standing)
        if len(fresh):
            active = both(active, self.begun(fresh))
        climbs = active["step"] < self.plan.climbs
        waiting, self.active = both(waiting, where(active, ~climbs)), where(active, climbs)
        if count(waiting) >= self.most or not count(self.active):
            some, waiting = cut(where(waiting, self.stand(waiting)), self.most)
            self.spent += count(some)
            if count(some):
                waiting = both(waiting, self.queried(some))
        self.waiting = waiting

    def climb(self) -> None:
        """The active rows by a gradient, such as likely fool by their logits first."""
        before, rows = self.active, self.active
        self.spent += count(rows)
        if self.patient:
            likely = (self.fallen / (self.met + 1) > 0.5)[rows["step"]] | rows["early"]
            if 4 * int(likely.sum()) > count(rows):
                rows = both(self.screened(where(rows, likely)), where(rows, ~likely))
        if count(rows):
            seen = self.looks(rows, gradient=True)
            self.active = self.advanced(rows, seen)
            self.judge(rows, seen)
        else:
            self.active = rows
        if self.patient:
            fell = ~self.stand(before)
            self.met.index_add_(0, before["step"], torch.ones(len(fell)))
            self.fallen.index_add_(0, before["step"], fell.float())

    def screened(self, rows: State) -> State:
        """Those that stand by their logits: as they were, but for those that retreat."""
        seen = self.looks(rows, gradient=False)
        self.judge(rows, seen)
        retreat = rows["early"] & seen.fooled  # which needs no gradient
        after = both(where(rows, ~retreat), self.advanced(*some_of(rows, seen, retreat)))
        return where(after, self.stand(after))

    def queried(self, rows: State) -> State:
        """The rows after a look without a gradient, less those that had ended."""
        # a search that ends with its gradients is judged at its end by the model itself
        exact = not self.plan.queries
        rows, seen = self.gaining(rows, partial(self.looks, gradient=False, exact=exact))
        going = rows["step"] < self.plan.steps
        after = self.advanced(*(rows, seen) if bool(going.all()) else some_of(rows, seen, going))
        self.judge(rows, seen, exact=exact)
        return after

    def gaining(self, rows: State, ask: Callable[[State], Look]) -> tuple[State, Look]:
        """The rows and what is seen there; of a search, at the next of its images that gains.

        The rarer gains are, the more images of each of a few rows share a look.
        """
        if not (self.patient and self.plan.ahead):
            return rows, ask(rows)
        n, room = count(rows), min(self.most, at_once(rows["at"]) // 2)
        last = int(self.plan.steps - rows["step"].max())
        depth = max(1, min(room // n, 1 + int(0.15 / self.rate), 1 + last))
        if depth > 1:
            rows = both(rows, ahead(self.attack, rows, depth, self.eps, self.target.seed))
        seen = ask(rows)
        gains = ((seen.loss > rows["best_loss"]) | seen.fooled).view(depth, n)
        first = torch.where(gains.any(0), gains.byte().argmax(0), depth - 1)
        self.rate += 0.05 * (int(gains.any(0).sum()) / int((first + 1).sum()) - self.rate)
        return (rows, seen) if depth == 1 else some_of(rows, seen, first * n + torch.arange(n))

    def advanced(self, rows: State, seen: Look) -> State:
        if not count(rows):
            return rows
        return self.attack.advance(rows, seen, self.eps, self.target.seed)

    def judge(self, rows: State, seen: Look, *, exact: bool = False) -> None:
        """What fools the model, and the witness, stands no more; a GPU is waited for."""
        found = hits(self.plan, rows, seen, self.eps)
        fell = confirmed(self.target, rows["id"], rows["at"], found).nonzero().squeeze(1)
        if self.looks.rough and not exact and len(fell):
            claimed = {name: rows[name][fell] for name in ("row", "at", "x", "y", "target")}
            again = self.looks(claimed, gradient=False, exact=True)
            fell = fell[hits(self.plan, claimed, again, self.eps)]
        self.standing[rows["row"][fell] % len(self.standing)] = False


def hits(plan: Plan, rows: State, seen: Look, eps: Radius) -> Tensor:
    """Which rows fool the model, within eps."""
    return seen.fooled if plan.bounded else seen.fooled & (distance(rows) <= eps)


def distance(rows: State) -> Tensor:
    """||at - x||_inf of each row, (n,)."""
    return (rows["at"] - rows["x"]).abs().amax((1, 2, 3))


def rank(loss: Tensor, fooled: Tensor) -> Tensor:
    """Orders iterates: all that fool above all that do not, by loss within each."""
    share = loss / (1 + loss.abs())  # in [-1, 1]; inf / inf is caught below
    return torch.where(fooled, 1 + share.clamp_min(0).nan_to_num(1.0), share.nan_to_num(1.0))


def rank_of(plan: Plan, rows: State, seen: Look, eps: Radius) -> Tensor:
    """`rank`; where the plan is not bounded, all that hit by distance, and no others."""
    if plan.bounded:
        return rank(seen.loss, seen.fooled)
    return torch.where(hits(plan, rows, seen, eps), 2 - distance(rows), -torch.inf)


def better(best: Tensor, best_rank: Tensor, at: Tensor, rank: Tensor) -> tuple[Tensor, Tensor]:
    gains = rank > best_rank
    return torch.where(column(gains), at, best), torch.where(gains, rank, best_rank)


def column(values: Tensor) -> Tensor:
    """(n,) as (n, 1, 1, 1), to stand beside images."""
    return values[:, None, None, None]


def rows_of(row: Tensor, images: Tensor, labels: Tensor, ids: Tensor, rivals: Tensor) -> State:
    """The starts numbered `row` = start * n + example, not yet begun."""
    example, start, targets = row % len(images), row // len(images), rivals.shape[1]
    return {
        "row": row, "step": torch.zeros_like(row), "start": start, "restart": start // targets,
        "id": ids[example], "x": to_unit(images[example]), "y": labels[example],
        "target": rivals[example, start % targets],
        "early": torch.zeros_like(row, dtype=torch.bool),
    }  # fmt: skip


def rivals_of(
    forwards: Sequence[Forward], images: Tensor, labels: Tensor, targets: int, batch_size: int
) -> Tensor:
    """The `targets` classes (all, where there are fewer) that the model prefers after the label.

    int64 (n, targets); the labels themselves, (n, 1), where the attack has no targets.
    """
    if not targets:
        return labels[:, None]
    with torch.no_grad():
        parts = [forwards[0](to_unit(part)).float() for part in images.split(batch_size)]
    logits = torch.cat(parts).nan_to_num().scatter(1, labels[:, None], -torch.inf)
    return logits.topk(min(targets, logits.shape[1] - 1), dim=1).indices


def ahead(attack: Single, rows: State, depth: int, eps: Radius, seed: int) -> State:
    """The rows after 1 to `depth` - 1 looks that gain nothing, one behind the other."""
    later = torch.arange(depth - 1).repeat_interleave(count(rows))
    rows = {name: torch.cat([part] * (depth - 1)) for name, part in rows.items()}
    rows["step"] = rows["step"] + later
    nothing = torch.full((len(rows["step"]),), -torch.inf)
    seen = Look(nothing, torch.zeros_like(nothing, dtype=torch.bool), torch.zeros_like(rows["at"]))
    return attack.advance(rows, seen, eps, seed)


def where(rows: State, mask: Tensor) -> State:
    kept = mask.nonzero().squeeze(1)  # once: a GPU is waited for
    return rows if len(kept) == len(mask) else pick(rows, kept)


def pick(rows: State, kept: Tensor) -> State:
    return {name: part[kept] for name, part in rows.items()}


def some_of(rows: State, seen: Look, kept: Tensor) -> tuple[State, Look]:
    return pick(rows, kept), Look(*(part[kept] for part in seen))


def both(a: State, b: State) -> State:
    if not count(a) or not count(b):
        return a if count(a) else b
    return {name: torch.cat([part, b[name]]) for name, part in a.items()}


def cut(rows: State, n: int) -> tuple[State, State]:
    """The first `n` rows, and the others."""
    first, others = ({k: part[s] for k, part in rows.items()} for s in (slice(n), slice(n, None)))
    return first, others


def refill(position: int, total: int, room: int, standing: Tensor) -> tuple[int, Tensor]:
    """The next `room` unbroken rows from `position` on, fewer at the end, and where they end."""
    found, taken = torch.empty(0, dtype=torch.int64, device=standing.device), position
    while taken < total and (missing := room - len(found)) > 0:
        rows = torch.arange(taken, min(taken + missing, total), device=standing.device)
        found = torch.cat([found, rows[standing[rows % len(standing)]]])
        taken += len(rows)
    return taken, found
