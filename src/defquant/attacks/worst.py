"""The worst case, example by example, over several attacks; `Standard` and `Adaptive` are such."""

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from defquant.attacks.apgd import APGD
from defquant.attacks.base import (
    Attack,
    draw_seed,
    lint_attack,
    lint_images,
    made_by,
    name_of,
    seed_of,
    untouched,
)
from defquant.attacks.fab import FAB
from defquant.attacks.kernel import Surrogate
from defquant.attacks.losses import LossName
from defquant.attacks.single import pixels, positive
from defquant.attacks.square import Square
from defquant.attacks.surrogates import ClipFree, FloatTwin, SoftRound
from defquant.config import check_eps
from defquant.data import to_unit
from defquant.errors import UserError

__all__ = ["Adaptive", "Composition", "Standard", "Worst"]


PLAN: tuple[tuple[float, LossName, Surrogate | None, int], ...] = (
    (1, "margin", SoftRound(), 4),
    (1 / 2, "ce", None, 0),
    (1 / 4, "dlr", FloatTwin(), 0),
    (1 / 8, "dlr", ClipFree(), 0),
)
"""Of `Adaptive`: share of the steps, loss and surrogate of each part, and its queries per step."""


@dataclass(frozen=True, repr=False)
class Composition:
    """An example stands only if every one of `attacks` fails on it; each sees what still stands.

    `by_id`: draws are told apart by `ids`, so that the answer depends on no batch.
    """

    by_id: ClassVar[bool] = True

    eps: float

    @property
    def attacks(self) -> tuple[Attack, ...]:
        raise TypeError(f"{type(self).__name__} is abstract: use Worst, Standard or Adaptive")

    @property
    def name(self) -> str:
        """Name of the family as the tables show it."""
        return type(self).__name__

    def __call__(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        *,
        generator: torch.Generator | None = None,
        ids: Tensor | None = None,
    ) -> Tensor:
        """The first image that fools; where none does, the last attack's. As every `Attack`."""
        x, y = lint_images(x, y)
        seed, made = draw_seed(generator), to_unit(x).clone()
        ids = torch.arange(len(x), device=x.device) if ids is None else ids
        left = torch.arange(len(x), device=x.device)
        for place, attack in enumerate(self.attacks):
            if not len(left):
                break
            draw = torch.Generator().manual_seed(seed_of(seed, place))
            made[left] = made_by(attack, model, x[left], y[left], generator=draw, ids=ids[left])
            with untouched(model), torch.no_grad():
                logits = model(made[left])
            left = left[(logits.argmax(1) == y[left]) & ~logits.isnan().any(1)]
        return made


@dataclass(frozen=True, repr=False)
class Worst(Composition):
    """The worst case over `parts`, any attacks of one eps, in this order: the cheap ones first."""

    eps: float = field(init=False)
    parts: tuple[Attack, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "parts", tuple(self.parts))
        for part in self.parts:
            lint_attack(part)
        found = {float(part.eps) for part in self.parts if hasattr(part, "eps")}
        if not self.parts or len(found) > 1:
            listed = ", ".join(sorted(map(pixels, found))) if self.parts else "none"
            raise UserError(f"Worst takes one or more attacks of one eps; found {listed}")
        object.__setattr__(self, "eps", next(iter(found), 1.0))  # parts that name none may go far

    @property
    def attacks(self) -> tuple[Attack, ...]:
        return self.parts

    @property
    def name(self) -> str:
        return f"Worst({', '.join(map(name_of, self.parts))})"

    def __repr__(self) -> str:
        return f"Worst({', '.join(map(repr, self.parts))})"


@dataclass(frozen=True, repr=False)
class Standard(Composition):
    """AutoAttack's standard worst case (Croce & Hein 2020), L-infinity, one restart each.

    APGD-CE, APGD on the targeted DLR, FAB towards targets (100 steps; 9 targets each), Square
    (5,000 queries). `eps` lies in [0, 1].
    """

    def __post_init__(self) -> None:
        check_eps(self.eps)

    @property
    def attacks(self) -> tuple[Attack, ...]:
        eps = self.eps
        return (APGD(eps), APGD(eps, loss="dlr-targeted"), FAB(eps, targets=9), Square(eps))

    def __repr__(self) -> str:
        return f"Standard(eps={pixels(self.eps)})"


@dataclass(frozen=True, repr=False)
class Adaptive(Composition):
    """The worst case over surrogates, losses and a search, for quantised networks (`PLAN`).

    The first part climbs the margin through `SoftRound`, then tries random squares from where it
    came, as logits alone judge them (`Search`). The others are there for networks at full
    precision, and for those whose clip or rounding is another. An example that stands costs 1.9
    times the gradients of PGD at equal `steps`, and 4 forward passes for each of them: in all less
    than 3 times PGD's time (docs/benchmarks.md); one that falls far less. `eps` lies in [0, 1].
    """

    steps: int = 50

    def __post_init__(self) -> None:
        check_eps(self.eps)
        positive("steps", self.steps)

    @property
    def attacks(self) -> tuple[Attack, ...]:
        return tuple(
            APGD(
                self.eps,
                max(1, round(share * self.steps)),
                loss=loss,
                surrogate=surrogate,
                queries=queries * self.steps,
            )
            for share, loss, surrogate, queries in PLAN
        )

    @property
    def name(self) -> str:
        return "Adaptive" if self.steps == 50 else f"Adaptive-{self.steps}"

    def __repr__(self) -> str:
        return f"Adaptive(eps={pixels(self.eps)}, steps={self.steps})"
