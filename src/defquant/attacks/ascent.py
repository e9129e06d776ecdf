"""Ascent that finds its own step size, the kernel of Auto-PGD (Croce & Hein 2020)."""

import math
from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import torch
from torch import Tensor

from defquant.attacks.base import uniform
from defquant.attacks.kernel import Look, Loss, State, Surrogate, column, into_ball

__all__ = ["Ascent", "checkpoints"]

RHO, ALPHA = 0.75, 0.75  # share of steps that must gain; weight of the gradient step


@cache
def checkpoints(steps: int) -> tuple[int, ...]:
    """Iterations w_j = ceil(p_j · steps) after which the step size may be halved.

    p_0 = 0, p_1 = 0.22, p_{j+1} = p_j + max(p_j - p_{j-1} - 0.03, 0.06), up to 1 (section 3 of
    the paper). Equal ones, of short runs, count once.

    >>> checkpoints(100)
    (22, 41, 57, 70, 80, 87, 93, 99)
    """
    before, p, found = 0.0, 0.22, []
    while p <= 1:
        found.append(math.ceil(round(p * steps, 6)))
        before, p = p, p + max(p - before - 0.03, 0.06)
    return tuple(dict.fromkeys(found))


@dataclass(frozen=True)
class Ascent:
    """The kernel of `APGD`.

    z = P(x_k + η sign ∇L),  x_{k+1} = P(x_k + α (z - x_k) + (1 - α)(x_k - x_{k-1})),
    P the projection, η at first 2 eps. At a checkpoint η is halved, and the search goes on from
    the best point so far, where fewer than ρ of the steps since the last gained, or where neither
    η nor the best loss has changed since.
    """

    bounded: ClassVar[bool] = True

    loss: Loss
    steps: int
    restarts: int
    targets: int
    surrogate: Surrogate | None

    @property
    def looks(self) -> int:
        return self.steps

    @property
    def climbs(self) -> int:
        return self.steps

    def begin(self, rows: State, eps: float | Tensor, seed: int) -> State:
        x = rows["x"]
        noise = uniform(seed, rows["id"], rows["start"], x.shape[1:]).mul_(2).sub_(1)
        noise /= column(noise.abs().amax((1, 2, 3)).clamp_min(1e-12))
        at = (x + noise * eps).clamp_(0, 1)
        low = torch.full_like(rows["step"], -torch.inf, dtype=torch.float32)
        return rows | {
            "at": at, "last": at, "best": at, "best_grad": torch.zeros_like(at), "loss": low,
            "best_loss": low, "checked_loss": low, "size": torch.full_like(low, 2.0),
            "gains": torch.zeros_like(low), "halved": torch.ones_like(low, dtype=torch.bool),
        }  # fmt: skip

    def advance(self, rows: State, look: Look, eps: float | Tensor, seed: int) -> State:
        rows = self._check(_noted(rows, look))
        at, x, first = rows["at"], rows["x"], rows["step"] == 0
        size = column(rows["size"]) * eps
        ahead = into_ball(at + rows["grad"].sign() * size, x, eps)
        weight = column(torch.where(first, 1.0, ALPHA))
        moved = at + weight * (ahead - at) + (1 - weight) * (at - rows["last"])
        rows = rows | {"at": into_ball(moved, x, eps), "last": at, "step": rows["step"] + 1}
        return {name: part for name, part in rows.items() if name != "grad"}

    def _check(self, rows: State) -> State:
        """Halve the step and go back to the best point, where the schedule says so."""
        width = _widths(self.steps, rows["step"].device)[rows["step"]]
        due = width > 0
        stuck = ~rows["halved"] & (rows["checked_loss"] >= rows["best_loss"])
        halve = due & ((rows["gains"] <= RHO * width) | stuck)
        back = column(halve)
        return rows | {
            "size": torch.where(halve, rows["size"] / 2, rows["size"]),
            "at": torch.where(back, rows["best"], rows["at"]),
            "grad": torch.where(back, rows["best_grad"], rows["grad"]),
            "gains": torch.where(due, 0.0, rows["gains"]),
            "halved": torch.where(due, halve, rows["halved"]),
            "checked_loss": torch.where(due, rows["best_loss"], rows["checked_loss"]),
        }


def _noted(rows: State, look: Look) -> State:
    """The rows with what was seen: whether the last step gained, and the best point so far."""
    start = rows["step"] == 0
    gains = rows["gains"] + (~start & (look.loss > rows["loss"]))
    better = look.loss > rows["best_loss"]
    best_loss = torch.where(better, look.loss, rows["best_loss"])
    return rows | {
        "grad": look.grad, "loss": look.loss, "gains": gains,
        "best": torch.where(column(better), rows["at"], rows["best"]),
        "best_grad": torch.where(column(better), look.grad, rows["best_grad"]),
        "best_loss": best_loss,
        "checked_loss": torch.where(start, best_loss, rows["checked_loss"]),
    }  # fmt: skip


@cache
def _widths(steps: int, device: torch.device) -> Tensor:
    """Steps since the checkpoint before, at each checkpoint; 0 elsewhere; (steps + 1,)."""
    widths, before = torch.zeros(steps + 1), 0
    for checkpoint in checkpoints(steps):
        widths[checkpoint], before = checkpoint - before, checkpoint
    return widths.to(device)
