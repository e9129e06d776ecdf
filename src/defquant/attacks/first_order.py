"""The paper's white-box attacks (section 2.2.1): Random, FGSM, R+FGSM, BIM, PGD."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from defquant.attacks.contract import Draws, Ids, draw_seed, pixels, uniform
from defquant.attacks.engine import Look, Plan, Radius, Single, State, perturb, stepped
from defquant.attacks.lint import lint_images
from defquant.config import positive
from defquant.data import to_unit
from defquant.errors import UserError

__all__ = [
    "BIM", "FGSM", "PGD", "RFGSM", "FirstOrder", "Random", "RandomEps", "Walk", "paper_steps",
]  # fmt: skip


def paper_steps(eps: float) -> int:
    """Iterations of the paper's BIM and PGD: floor(min(eps + 4, 1.25 eps)), eps in pixels.

    2, 10 and 20 at 2/255, 8/255 and 16/255 (section 2.2.1, after Kurakin et al. 2016).
    """
    pixels = eps * 255
    return math.floor(min(pixels + 4, 1.25 * pixels) + 1e-6)


@dataclass(frozen=True)
class Walk:
    """x₀ from `start`, then `steps` times x + rate·eps·sign(∇ₓL), projected; L the cross-entropy.

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


@dataclass(frozen=True, repr=False)
class FirstOrder(Single):
    """An attack that is one `Walk`."""

    @property
    def walk(self) -> Walk:
        raise TypeError(f"{type(self).__name__} is abstract: use FGSM, PGD, ...")

    @property
    def plan(self) -> Plan:
        return Plan(self.walk.steps, restarts=self.walk.restarts)

    def begin(self, rows: State, eps: Radius, seed: int | Tensor) -> State:
        x, walk = rows["x"], self.walk
        if walk.start == "clean":
            return rows | {"at": x}
        noise = uniform(seed, rows["id"], rows["start"], x.shape[1:]).mul_(2).sub_(1)
        if walk.start == "sign":
            noise = torch.where(noise < 0, -1.0, 1.0)
        return rows | {"at": (x + noise * (walk.reach * eps)).clamp_(0, 1)}

    def advance(self, rows: State, look: Look, eps: Radius, seed: int) -> State:
        at = stepped(rows["at"], rows["x"], look.grad, self.walk.rate * eps, eps)
        return rows | {"at": at, "step": rows["step"] + 1}

    def last(
        self, model: nn.Module, x: Tensor, y: Tensor, *, generator: Draws = None, ids: Ids = None
    ) -> Tensor:
        """The last iterate instead of the best: for adversarial training and for transfer.

        A forward pass cheaper; and an example that stops at one model's boundary transfers badly.
        `ids` as in `perturb`.
        """
        x, y = lint_images(x, y)
        seed = draw_seed(generator)
        return perturb(model, to_unit(x), y, self, seed=seed, ids=ids, keep="last")


@dataclass(frozen=True, repr=False)
class Random(FirstOrder):
    """x + U(-eps, eps), clipped to [0, 1]; no knowledge of the model. `samples` draws each."""

    samples: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(samples=self.samples)

    @property
    def walk(self) -> Walk:
        return Walk("uniform", steps=0, restarts=self.samples)

    @property
    def name(self) -> str:
        return "Random" if self.samples == 1 else f"Random-{self.samples}"


@dataclass(frozen=True, repr=False)
class FGSM(FirstOrder):
    """x + eps · sign(∇ₓL(x, y)) (Eq. 1; Goodfellow et al. 2014)."""

    @property
    def walk(self) -> Walk:
        return Walk("clean", steps=1)


@dataclass(frozen=True, repr=False)
class RFGSM(FirstOrder):
    """x' = x + eps/2 · sign(N(0, I)), then eps/2 along the gradient's sign at x' (Eq. 2).

    Eq. 2 prints the gradient at x; it is taken at x', as Tramèr et al. 2017 define it.
    """

    @property
    def walk(self) -> Walk:
        return Walk("sign", steps=1, rate=0.5, reach=0.5)

    @property
    def name(self) -> str:
        return "R+FGSM"


@dataclass(frozen=True, repr=False)
class BIM(FirstOrder):
    """x ← clip(x + alpha · sign(∇ₓL)), from x (Eq. 3; Kurakin et al. 2016).

    Attributes:
        steps: iterations; when none, the paper's schedule (`paper_steps`) with alpha 1/255.
        alpha: step size; when none, 1/255 with the paper's schedule, else 2.5 eps / steps.
    """

    steps: int | None = None
    alpha: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps is not None:
            positive(steps=self.steps)
        if self.alpha is not None and not 0 < self.alpha <= 1:
            raise UserError(f"alpha is a step size in (0, 1], as 1/255; found {self.alpha:g}")

    @property
    def walk(self) -> Walk:
        return Walk("clean", *self._pace())

    def _pace(self) -> tuple[int, float]:
        """Steps, and step size over eps."""
        steps = max(1, paper_steps(self.eps)) if self.steps is None else self.steps
        if self.eps == 0:
            return steps, 0.0
        if self.alpha is not None:
            return steps, self.alpha / self.eps
        return steps, (1 / 255 / self.eps if self.steps is None else 2.5 / steps)

    @property
    def name(self) -> str:
        return type(self).__name__ + ("" if self.steps is None else f"-{self.steps}")

    @property
    def settings(self) -> Mapping[str, Any]:
        steps, rate = self._pace()
        return {"steps": steps, "alpha": pixels(rate * self.eps), "restarts": self.walk.restarts}


@dataclass(frozen=True, repr=False)
class PGD(BIM):
    """BIM from a uniform start in the ball, `restarts` times (Madry et al. 2017).

    The paper's schedule (the default) is weak at small eps: report PGD-50x10 beside it.
    """

    restarts: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(restarts=self.restarts)

    @property
    def walk(self) -> Walk:
        return replace(super().walk, start="uniform", restarts=self.restarts)

    @property
    def name(self) -> str:
        return super().name + ("" if self.restarts == 1 else f"x{self.restarts}")


@dataclass(frozen=True)
class RandomEps:
    """Training attack whose eps is drawn anew: clip(|N(0, sigma)|, 0, 2 sigma) (section 5.2).

    Per example for one-step attacks, per batch for those whose step count depends on eps. Every
    example is walked to the end and the last iterate returned, as adversarial training needs.

    Attributes:
        attack: gives the walk; its own eps is not used.
        sigma: of the normal distribution, in [0, 1]; the paper's is 8/255.
    """

    attack: FirstOrder
    sigma: float = 8 / 255

    def __call__(
        self, model: nn.Module, x: Tensor, y: Tensor, *, generator: Draws = None
    ) -> Tensor:
        per_batch = isinstance(self.attack, BIM)
        eps = self.radii(1 if per_batch else len(x), generator)
        if per_batch:
            return replace(self.attack, eps=float(eps)).last(model, x, y, generator=generator)
        radius = eps.to(x.device, non_blocking=True)
        seed = draw_seed(generator)
        return perturb(model, x, y, self.attack, seed=seed, eps=radius, keep="last")

    def radii(self, n: int, generator: Draws) -> Tensor:
        """The next `n` radii, (n, 1, 1, 1), on the CPU."""
        draws = torch.randn(n, generator=generator).mul_(self.sigma).abs_()
        return draws.clamp_(max=2 * self.sigma)[:, None, None, None]
