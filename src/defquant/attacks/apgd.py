"""Auto-PGD (Croce & Hein 2020), and a search by queries from where it led."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from defquant.attacks.ascent import Ascent
from defquant.attacks.kernel import Kernel, Look, Loss, State, Surrogate
from defquant.attacks.losses import LOSSES, LossName
from defquant.attacks.single import Single, pixels, positive
from defquant.attacks.square import Squares
from defquant.errors import UserError

__all__ = ["APGD", "Search"]

COVER = 0.8  # of the image, by the first squares


@dataclass(frozen=True)
class Search:
    """The kernel of `APGD` with `queries`: `ascent`, then `squares` from its best point.

    A surrogate's gradient leads near the boundary; on a network of few bits the last of the way is
    a matter of which activations cross a threshold, and there trying is surer than any gradient.
    """

    bounded: ClassVar[bool] = True

    ascent: Ascent
    squares: Squares

    @property
    def steps(self) -> int:
        return self.ascent.steps + self.squares.steps

    @property
    def looks(self) -> int:
        return self.steps

    @property
    def climbs(self) -> int:
        return self.ascent.steps

    @property
    def restarts(self) -> int:
        return self.ascent.restarts

    @property
    def targets(self) -> int:
        return self.ascent.targets

    @property
    def loss(self) -> Loss:
        return self.ascent.loss

    @property
    def surrogate(self) -> Surrogate | None:
        return self.ascent.surrogate

    def begin(self, rows: State, eps: float | Tensor, seed: int) -> State:
        return self.ascent.begin(rows, eps, seed)

    def advance(self, rows: State, look: Look, eps: float | Tensor, seed: int) -> State:
        if bool(rows["step"][0] < self.climbs):
            return self.ascent.advance(rows, look, eps, seed)
        return self.squares.advance(rows, look, eps, seed)


@dataclass(frozen=True, repr=False)
class APGD(Single):
    """Auto-PGD from a random start, `restarts` times (Croce & Hein 2020; see `Ascent`).

    Attributes:
        steps: iterations, each one gradient.
        restarts: starts, for each target where there are targets.
        loss: what it raises: `ce`; `scaled-ce`, `margin` or `dlr`, whose gradients do not vanish
            on confident networks; `dlr-targeted` towards each of the `targets` likeliest classes.
        targets: of `dlr-targeted`: how many classes (all others, where there are fewer).
        surrogate: the backward pass (`defquant.attacks.surrogates`); none for the model's own.
        queries: random squares tried after each ascent, from its best point (see `Search`).
    """

    steps: int = 100
    restarts: int = 1
    loss: LossName = "ce"
    targets: int = 9
    surrogate: Surrogate | None = None
    queries: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        positive("steps", self.steps)
        positive("restarts", self.restarts)
        positive("targets", self.targets)
        if self.queries < 0:
            raise UserError(f"queries must be 0 (none) or more; found {self.queries}")
        if self.loss not in LOSSES:
            raise UserError(f"loss must be one of {', '.join(LOSSES)}; found {self.loss!r}")

    @property
    def kernel(self) -> Kernel:
        targets = self.targets if self.loss == "dlr-targeted" else 0
        ascent = Ascent(LOSSES[self.loss], self.steps, self.restarts, targets, self.surrogate)
        if not self.queries:
            return ascent
        return Search(ascent, Squares(self.queries, COVER, after=self.steps))

    @property
    def name(self) -> str:
        loss = "T" if self.loss == "dlr-targeted" else self.loss.upper()
        steps = "" if self.steps == 100 and self.restarts == 1 else f"-{self.steps}"
        again = "" if self.restarts == 1 else f"x{self.restarts}"
        search = f"+{self.queries}" if self.queries else ""
        through = f" ({self.surrogate!r})" if self.surrogate else ""
        return f"APGD-{loss}{steps}{again}{search}{through}"

    def __repr__(self) -> str:
        parts = [f"eps={pixels(self.eps)}", f"steps={self.steps}"]
        parts += [f"restarts={self.restarts}"] * (self.restarts > 1) + [f"loss={self.loss}"]
        parts += [f"targets={self.targets}"] * (self.loss == "dlr-targeted")
        parts += [f"surrogate={self.surrogate!r}"] * (self.surrogate is not None)
        parts += [f"queries={self.queries}"] * (self.queries > 0)
        return f"APGD({', '.join(parts)})"
