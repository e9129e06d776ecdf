"""Attacks made of attacks: the worst case over several, and those made on another network."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from defquant.attacks.apgd import APGD
from defquant.attacks.contract import (
    Ask,
    Attack,
    Draws,
    Ids,
    InBall,
    Target,
    Tick,
    eight_bit,
    eps_of,
    made_by,
    name_of,
    pixels,
    right,
    seed_of,
    standing,
)  # fmt: skip
from defquant.attacks.engine import Surrogate
from defquant.attacks.fab import FAB
from defquant.attacks.lint import lint_attack
from defquant.attacks.losses import LossName
from defquant.attacks.square import Square
from defquant.attacks.surrogates import ClipFree, FloatTwin, SoftRound
from defquant.config import positive
from defquant.data import to_unit
from defquant.errors import UserError
from defquant.records import BLACK

__all__ = ["Adaptive", "Composition", "Elsewhere", "Replay", "Standard", "Transfer", "Worst"]

_Make = Callable[[Attack, Tensor, int], Tensor]  # (part, rows, seed) to images

_Part = tuple[float, int, LossName, Surrogate | None, int]
PLAN: tuple[_Part, ...] = (
    (1, 1, "margin", SoftRound(), 4),
    (1 / 2, 1, "ce", None, 0),
    (1 / 4, 1, "dlr", FloatTwin(), 0),
    (1 / 8, 1, "dlr", ClipFree(), 0),
)
"""Of `Adaptive`: share of the steps, starts, loss and surrogate of each part, queries per step."""
END: tuple[_Part, ...] = (
    (1, 2, "margin", SoftRound(), 12),
    (1 / 2, 1, "dlr-targeted", SoftRound(), 0),
)
"""With `targets`, for what `PLAN` leaves: longer searches, as few bits need; towards classes."""


@dataclass(frozen=True, repr=False)
class Composition(InBall):
    """An example stands only if every one of `attacks` fails on it; each sees what still stands."""

    @property
    def attacks(self) -> tuple[Attack, ...]:
        raise TypeError(f"{type(self).__name__} is abstract: use Worst, Standard or Adaptive")

    def standing(self, target: Target, ids: Tensor) -> Tensor:
        kept = torch.ones_like(ids, dtype=torch.bool)
        for place, attack in enumerate(self.attacks):
            if bool(kept.any()):
                part = target._replace(
                    seed=seed_of(target.seed, place),
                    tick=target.tick and _share(target.tick, place, len(self.attacks)),
                )
                kept[kept.clone()] = standing(attack, part, ids[kept])
        return kept

    def made(self, model: nn.Module, x: Tensor, y: Tensor, ids: Tensor, *, seed: int) -> Tensor:
        """The first image that fools; where none does, the last attack's."""

        def make(attack: Attack, rows: Tensor, seed: int) -> Tensor:
            draw = torch.Generator().manual_seed(seed)
            return made_by(attack, model, x[rows], y[rows], generator=draw, ids=ids[rows])

        return self._first(model, x, y, seed, make)

    def eight_bit(
        self, model: nn.Module, x: Tensor, y: Tensor, ids: Tensor, *, seed: int
    ) -> Tensor:
        """The first 8-bit image that fools; where none does, the last attack's."""

        def make(attack: Attack, rows: Tensor, seed: int) -> Tensor:
            return eight_bit(attack, model, x[rows], y[rows], ids[rows], seed=seed)

        return self._first(model, x, y, seed, make)

    def _first(self, model: nn.Module, x: Tensor, y: Tensor, seed: int, make: _Make) -> Tensor:
        made, left = x.clone(), torch.arange(len(x), device=x.device)
        for place, attack in enumerate(self.attacks):
            if len(left):
                made[left] = make(attack, left, seed_of(seed, place))
                left = left[right(model, made[left], y[left])]
        return made


def _share(tick: Tick, place: int, places: int) -> Tick:
    """`tick` for one of several parts, as if each took as long."""

    def tell(ask: Ask) -> None:
        def whole() -> tuple[float, int]:
            done, stand = ask()
            return (place + done) / places, stand

        tick(whole)

    return tell


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

    @property
    def attacks(self) -> tuple[Attack, ...]:
        eps = self.eps
        return (APGD(eps), APGD(eps, loss="dlr-targeted"), FAB(eps, targets=9), Square(eps))


@dataclass(frozen=True, repr=False)
class Adaptive(Composition):
    """The worst case over surrogates, losses and a search, for quantised networks (`PLAN`).

    The first part climbs the margin through `SoftRound`, then tries random squares from where it
    came, as logits alone judge them (`Search`). The others are there for networks at full
    precision, and for those whose clip or rounding is another. An example that stands costs 1.9
    times the gradients of PGD at equal `steps`, and 4 forward passes for each of them: in all at
    most 5 times PGD's time where it was measured (docs/benchmarks.md); one that falls far less.
    `eps` lies in [0, 1].

    With `targets` what still stands is searched from two more starts, three times as long, then
    gone for towards each of so many likeliest classes (`END`): in all 4 to 7 times PGD's time on
    images of 32x32 (docs/benchmarks.md).
    """

    steps: int = 50
    targets: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(steps=self.steps)
        if self.targets < 0:
            raise UserError(f"targets must be 0 (untargeted) or more; found {self.targets}")

    @property
    def attacks(self) -> tuple[Attack, ...]:
        return tuple(
            APGD(
                self.eps,
                max(1, round(share * self.steps)),
                starts,
                loss,
                self.targets or APGD.targets,
                surrogate,
                queries * self.steps,
            )
            for share, starts, loss, surrogate, queries in (PLAN + END if self.targets else PLAN)
        )

    @property
    def name(self) -> str:
        targeted, steps = "-T" * (self.targets > 0), "" if self.steps == 50 else f"-{self.steps}"
        return f"Adaptive{targeted}{steps}"


@dataclass(frozen=True)
class Elsewhere:
    """`attack`, made on another network than the one that it is shown to."""

    by_id: ClassVar[bool] = True
    where: ClassVar[str] = ""

    attack: Attack

    @property
    def eps(self) -> float:
        return eps_of(self.attack)

    @property
    def name(self) -> str:
        """The attack's name followed by (B), as in Tables 2 and 3, or by another place."""
        return name_of(self.attack) + self.where

    def __call__(
        self, model: nn.Module, x: Tensor, y: Tensor, *, generator: Draws = None, ids: Ids = None
    ) -> Tensor:
        return self.made(model, to_unit(x), y, generator, ids)

    def made(self, model: nn.Module, x: Tensor, y: Tensor, draws: Draws, ids: Ids) -> Tensor:
        """As every `Attack`, of `x` float in [0, 1]."""
        raise NotImplementedError


@dataclass(frozen=True)
class Transfer(Elsewhere):
    """Adversarial examples of `attack` on `substitute`, for whatever model is called with.

    The last iterate of a `FirstOrder` is used: an example that stops at the substitute's boundary
    transfers badly. Of any other attack, what it returns. `source` names the substitute in the
    results. The model itself is never asked.
    """

    where: ClassVar[str] = BLACK

    substitute: nn.Module = field(repr=False)
    source: str = ""

    def made(self, model: nn.Module, x: Tensor, y: Tensor, draws: Draws, ids: Ids) -> Tensor:
        return made_by(self.attack, self.substitute, x, y, generator=draws, ids=ids, last=True)


@dataclass(frozen=True, eq=False, repr=False)
class Replay(Elsewhere):
    """What a `Transfer` made of a whole data set, given again: `images[ids]` for whatever model.

    Attributes:
        attack: that made the images, on a substitute.
        images: float32 in [0, 1], (n, c, h, w): its last iterates, by example id.
        source: names the substitute in the results, where it cannot be told from that `Transfer`.
    """

    where: ClassVar[str] = BLACK

    images: Tensor
    source: str = ""

    def __repr__(self) -> str:
        return f"Transfer(attack={self.attack!r}, source={self.source!r})"

    def made(self, model: nn.Module, x: Tensor, y: Tensor, draws: Draws, ids: Ids) -> Tensor:
        """The images kept for `ids`, int64 (n,), on the device of `x`; nothing is computed.

        Raises `UserError` without `ids`, for an id that is not kept, and where `x` is further than
        eps from the images kept: those were made of another data set.
        """
        if ids is None:
            raise UserError("kept adversarial images are found by ids: score them with sweep")
        low, high = ids.aminmax()
        if low < 0 or high >= len(self.images):
            raise UserError(
                f"{self!r} is kept for {len(self.images):,} images; found ids {low} to {high}: "
                "replay it on the images it was made of"
            )
        kept = self.images[ids.to(self.images.device)].to(x.device)
        if kept.shape != x.shape or not (kept - x).abs().max() <= self.eps + 1e-5:
            raise UserError(
                f"{self!r} is kept for other images than these: replay it on those it was made of"
            )
        return kept
