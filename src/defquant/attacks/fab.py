"""FAB: the nearest image that fools, along the linearised boundary (Croce & Hein 2020a)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from defquant.attacks.contract import uniform
from defquant.attacks.engine import Look, Plan, Radius, Single, State, Surrogate, column
from defquant.attacks.losses import difference, margin
from defquant.config import positive
from defquant.errors import UserError

__all__ = ["FAB", "to_plane"]

ALPHA_MAX, ETA, BETA = 0.1, 1.05, 0.9  # bias to the clean image, overshoot, way kept after a hit


def to_plane(x: Tensor, w: Tensor, gap: Tensor) -> Tensor:
    """The smallest step δ, in L-infinity, with w·δ = gap and x + δ in [0, 1]^d.

    δ = sign(gap w) · min(t, room), room the way to the bound, and t the least with
    Σ |w| min(t, room) >= |gap|. That sum is concave in t, so Newton's steps from 0 rise to t and
    reach it exactly, mostly in one or two: no rooms are sorted. Where the plane misses the box, δ
    goes as far towards it as the box allows. `x`, `w`: (n, d); `gap`: (n,). Returns (n, d).
    """
    heading = (w * gap.sign()[:, None]).sign()
    room = torch.where(heading > 0, 1 - x, x)
    slope, wanted = w.abs(), gap.abs()[:, None]
    t, full = torch.zeros_like(wanted), room <= 0
    while True:  # ends: pixels only fill
        filled = torch.where(full, slope * room, 0.0).sum(1, keepdim=True)
        free = torch.where(full, 0.0, slope).sum(1, keepdim=True).clamp_min(1e-30)
        t = torch.maximum(t, (wanted - filled) / free)
        before, full = full, room <= t
        if torch.equal(before, full):
            return heading * torch.minimum(t, room)


@dataclass(frozen=True, repr=False)
class FAB(Single):
    """Fast adaptive boundary attack (Croce & Hein 2020a), L-infinity.

    It looks for the nearest image that fools, wherever that lies; an example falls once one lies
    within `eps`. Called, it returns the nearest found where that is within `eps`, else the clean
    image.

    With f = z_t - z_y linearised at x_k, δ_k and δ_0 lead from x_k and from the clean image x to
    the plane f = 0; x_{k+1} = (1 - α)(x_k + η δ_k) + α (x + η δ_0), clipped to [0, 1], with
    α = min(|δ_k| / (|δ_k| + |δ_0|), 0.1) and η = 1.05. After an iterate that fools, the next
    starts from x + 0.9 (x_k - x).

    Attributes:
        steps: projections on the boundary, each one gradient (a retreat after an iterate that
            fools costs one more).
        restarts: starts (of each target), the first at the clean image, others within eps / 2.
        targets: as AutoAttack has it, go for each of so many likeliest classes in turn; 0: for
            the class of the highest logit at the time, one gradient where the paper takes one for
            every class.
        surrogate: the backward pass (`defquant.attacks.surrogates`); none for the model's own.
    """

    steps: int = 100
    restarts: int = 1
    targets: int = 0
    surrogate: Surrogate | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(steps=self.steps, restarts=self.restarts)
        if self.targets < 0:
            raise UserError(f"targets must be 0 (untargeted) or more; found {self.targets}")

    @property
    def plan(self) -> Plan:
        return Plan(
            self.steps, loss=difference if self.targets else margin, restarts=self.restarts,
            targets=self.targets, surrogate=self.surrogate, bounded=False, retreats=self.steps,
        )  # fmt: skip

    @property
    def name(self) -> str:
        return "FAB-T" if self.targets else "FAB"

    def begin(self, rows: State, eps: Radius, seed: int) -> State:
        x, again = rows["x"], rows["restart"] > 0
        noise = uniform(seed, rows["id"], rows["start"], x.shape[1:]).mul_(2).sub_(1)
        noise /= column(noise.abs().amax((1, 2, 3)).clamp_min(1e-12))
        at = torch.where(column(again), (x + noise * (eps / 2)).clamp_(0, 1), x)
        return rows | {"at": at, "stepped": torch.zeros_like(again)}

    def advance(self, rows: State, look: Look, eps: Radius, seed: int) -> State:
        at, x = rows["at"], rows["x"]
        retreat = rows["stepped"] & look.fooled
        ended = rows["step"] >= self.steps
        moved, cross = x + BETA * (at - x), ~retreat
        if bool(cross.any()):
            moved[cross] = _crossed(at[cross], x[cross], Look(*(part[cross] for part in look)))
        return rows | {
            "at": torch.where(column(ended), at, moved),
            "stepped": cross,
            "early": cross & ~rows["stepped"],  # the step before fooled: this one may, too
            "step": rows["step"] + (cross & ~ended),
        }


def _crossed(at: Tensor, x: Tensor, look: Look) -> Tensor:
    """The next iterate from both projections."""
    flat, clean, w = at.flatten(1), x.flatten(1), look.grad.flatten(1)
    gap = torch.where(look.loss.isfinite(), -look.loss, 0.0)
    near = to_plane(flat, w, gap)
    far = to_plane(clean, w, gap - (w * (clean - flat)).sum(1))
    lengths = [step.abs().amax(1, keepdim=True).clamp_min(1e-8) for step in (near, far)]
    alpha = (lengths[0] / (lengths[0] + lengths[1])).clamp_max(ALPHA_MAX)
    moved = (flat + ETA * near) * (1 - alpha) + (clean + ETA * far) * alpha
    return moved.clamp_(0, 1).view_as(at)
