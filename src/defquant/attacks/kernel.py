"""What an attack is to the engine: a kernel that moves rows, one look at the model at a time."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from defquant.attacks.base import uniform

__all__ = [
    "Ask",
    "Forward",
    "Kernel",
    "Look",
    "Loss",
    "State",
    "Surrogate",
    "Tick",
    "column",
    "draws",
    "into_ball",
]

State = dict[str, Tensor]
"""The rows in play, one for each start of an example; every tensor has a row for each.

The engine gives `x` (clean images), `y`, `target` (the label itself where the attack has no
targets), `id`, `start` (one number for each target and restart), `restart`, `row`, `step` (0). A
kernel adds `at`, where the model is looked at next, and what else it must remember; `step` rises
to `Kernel.steps`.
"""


Ask = Callable[[], tuple[float, int]]
"""The share of an attack that is done, at a guess, and how many examples stand. Waits for a GPU."""

Tick = Callable[[Ask], object]
"""What an attack calls after every look; it asks only where someone wants to know."""


class Look(NamedTuple):
    """What the model answers at the rows' `at`: loss (n,), fooled (n,), gradient, shaped as `at`.

    The loss is not NaN (it is inf there), nor is the gradient (0 there).
    """

    loss: Tensor
    fooled: Tensor
    grad: Tensor


Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(logits (n, classes), labels (n,), targets (n,)) to what the attack raises, (n,)."""

Forward = Callable[[Tensor], Tensor]
"""Images to logits."""

Surrogate = Callable[[nn.Module], AbstractContextManager[tuple[Forward, ...]]]
"""Opens a model to attack: forwards that give its logits, and gradients that need not be its own.

Where there are several, logits and gradients are averaged over them.
"""


class Kernel(Protocol):
    """An attack, row by row: what a row becomes depends on that row alone.

    Attributes:
        steps: a row has ended when its `step` has come so far and its `at` was looked at.
        looks: how many calls of `advance` that takes at most.
        restarts: independent starts (of each target).
        targets: attack so many classes in turn, those of the highest clean logits; 0 for none.
        climbs: a row needs the gradient while its `step` is below; from there on, and at the end,
            logits are enough.
        bounded: whether every iterate lies in the ball; else only those that do may count.
        loss: what the attack raises.
        surrogate: how the model is opened; None for the model as it is.
    """

    @property
    def steps(self) -> int: ...
    @property
    def looks(self) -> int: ...
    @property
    def restarts(self) -> int: ...
    @property
    def targets(self) -> int: ...
    @property
    def climbs(self) -> int: ...
    @property
    def bounded(self) -> bool: ...
    @property
    def loss(self) -> Loss: ...
    @property
    def surrogate(self) -> Surrogate | None: ...

    def begin(self, rows: State, eps: float | Tensor, seed: int) -> State:
        """The rows with `at`, the start, and the kernel's own state."""
        ...

    def advance(self, rows: State, look: Look, eps: float | Tensor, seed: int) -> State:
        """The rows after a look at `at`: a new `at`, and `step` risen. May overwrite the look.

        All rows of a call need the gradient, or none does.
        """
        ...


def draws(rows: State, seed: int, size: torch.Size) -> Tensor:
    """Uniform in [0, 1), (n, *size), by (seed, example id, start, step) alone."""
    return uniform(seed, rows["id"], rows["start"] + ((rows["step"] + 1) << 32), size)


def column(values: Tensor) -> Tensor:
    """(n,) as (n, 1, 1, 1), to stand beside images."""
    return values[:, None, None, None]


def into_ball(at: Tensor, x: Tensor, eps: float | Tensor) -> Tensor:
    """The nearest image of [0, 1] within `eps` of `x`."""
    return torch.minimum(torch.maximum(at, x - eps), x + eps).clamp_(0, 1)
