"""Auto-PGD (Croce & Hein 2020): ascent that finds its own step size; and a search from its end."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from defquant.attacks.contract import uniform
from defquant.attacks.engine import (
    Look,
    Plan,
    Radius,
    Single,
    State,
    Surrogate,
    column,
    into_ball,
    stepped,
)
from defquant.attacks.losses import LOSSES, LossName
from defquant.attacks.square import searched
from defquant.config import positive
from defquant.errors import UserError

__all__ = ["APGD", "checkpoints"]

RHO, ALPHA = 0.75, 0.75  # share of steps that must gain; weight of the gradient step
COVER = 0.8  # of the image, by the first squares of the search


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


@dataclass(frozen=True, repr=False)
class APGD(Single):
    """Auto-PGD from a random start, `restarts` times (Croce & Hein 2020).

    z = P(x_k + η sign ∇L),  x_{k+1} = P(x_k + α (z - x_k) + (1 - α)(x_k - x_{k-1})),
    P the projection, η at first 2 eps. At a checkpoint η is halved, and the search goes on from
    the best point so far, where fewer than ρ of the steps since the last gained, or where neither
    η nor the best loss has changed since.

    With `queries` squares are tried from the best point on. A surrogate's gradient leads near the
    boundary; on a network of few bits the last of the way is a matter of which activations cross
    a threshold, and there trying is surer than any gradient.

    Attributes:
        steps: iterations, each one gradient.
        restarts: starts, for each target where there are targets.
        loss: what it raises: `ce`; `scaled-ce`, `margin` or `dlr`, whose gradients do not vanish
            on confident networks; `dlr-targeted` towards each of the `targets` likeliest classes.
        targets: of `dlr-targeted`: how many classes (all others, where there are fewer).
        surrogate: the backward pass (`defquant.attacks.surrogates`); none for the model's own.
        queries: random squares tried after each ascent.
    """

    steps: int = 100
    restarts: int = 1
    loss: LossName = "ce"
    targets: int = 9
    surrogate: Surrogate | None = None
    queries: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(steps=self.steps, restarts=self.restarts, targets=self.targets)
        if self.queries < 0:
            raise UserError(f"queries must be 0 (none) or more; found {self.queries}")
        if self.loss not in LOSSES:
            raise UserError(f"loss must be one of {', '.join(LOSSES)}; found {self.loss!r}")

    @property
    def plan(self) -> Plan:
        return Plan(
            self.steps, self.queries, LOSSES[self.loss], self.restarts, self.settings["targets"],
            self.surrogate,
        )  # fmt: skip

    def begin(self, rows: State, eps: Radius, seed: int) -> State:
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

    def advance(self, rows: State, look: Look, eps: Radius, seed: int) -> State:
        if bool(rows["step"][0] >= self.steps):
            return searched(rows, look, eps, seed, self.queries, COVER, after=self.steps)
        rows = self._checked(_noted(rows, look))
        at, x, first = rows["at"], rows["x"], rows["step"] == 0
        ahead = stepped(at, x, rows["grad"], column(rows["size"]) * eps, eps)
        weight = column(torch.where(first, 1.0, ALPHA))
        moved = at + weight * (ahead - at) + (1 - weight) * (at - rows["last"])
        rows = rows | {"at": into_ball(moved, x, eps), "last": at, "step": rows["step"] + 1}
        return {name: part for name, part in rows.items() if name != "grad"}

    def _checked(self, rows: State) -> State:
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

    @property
    def name(self) -> str:
        loss = "T" if self.loss == "dlr-targeted" else self.loss.upper()
        steps = "" if self.steps == 100 and self.restarts == 1 else f"-{self.steps}"
        again = "" if self.restarts == 1 else f"x{self.restarts}"
        search = f"+{self.queries}" if self.queries else ""
        through = f" ({self.surrogate!r})" if self.surrogate else ""
        return f"APGD-{loss}{steps}{again}{search}{through}"

    @property
    def settings(self) -> Mapping[str, Any]:
        return {**super().settings, "targets": self.targets * (self.loss == "dlr-targeted")}


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
