"""Where two curves of robust accuracy cross, with a bootstrap over the images they share."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from defquant.attacks import Attack
from defquant.errors import UserError
from defquant.evaluate import Images, sweep

__all__ = ["Crossing", "crossing", "smallest_broken"]


@dataclass(frozen=True)
class Crossing:
    """The first eps at which the curve that was above goes below the other.

    Attributes:
        eps: of the crossing, between the grid's points by straight lines; None: they never cross.
        low, high: 95 % bootstrap interval; an end of None, where `eps` is not, lies beyond the
            grid. Both None where the curves do not cross.
        above: which curve is above first; None where they are equal all along.
        share: of the bootstrap samples, those whose curves cross in that direction (of any, where
            `eps` is None).
        examples: images.
    """

    eps: float | None
    low: float | None
    high: float | None
    above: str | None
    share: float
    examples: int


def smallest_broken(
    model: nn.Module,
    data: Images,
    attack: Callable[[float], Attack],
    radii: Sequence[float],
    *,
    batch_size: int = 256,
    seed: int = 0,
) -> Tensor:
    """The smallest of `radii` at which `attack(eps)` breaks each image: float64 (n,).

    0 where the clean image is misclassified, inf where none breaks it. What fell stays fallen
    (`sweep`), so that #{images with a value above eps} / n is the robust accuracy at eps.
    Raises `UserError` for radii that do not rise from above 0.
    """
    _check_radii(radii)
    clean, *scored = sweep(
        model, data, [attack(eps) for eps in radii], batch_size=batch_size, seed=seed
    )
    broken = torch.where(clean.survivors, torch.inf, 0.0).double()
    for eps, point in zip(reversed(radii), reversed(scored), strict=True):
        broken = torch.where(clean.survivors & ~point.survivors, eps, broken)
    return broken.cpu()


def crossing(
    first: Tensor,
    second: Tensor,
    radii: Sequence[float],
    *,
    samples: int = 2000,
    seed: int = 0,
) -> Crossing:
    """Where the robust accuracies r(eps) = mean(broken > eps) of two networks cross.

    On the grid 0, *radii, with straight lines between. The interval is the paired percentile
    bootstrap over images: each sample draws the same images for both. Samples that do not cross
    in the direction of the whole count as crossing beyond the grid where they end in the first
    order, as crossing at 0 where they have the later order throughout.

    Args:
        first, second: (n,), `smallest_broken` of the same images in the same order.
        radii: rising, in (0, 1].
        samples: bootstrap samples.
        seed: of the draws.

    Raises:
        UserError: unequal or no images, or radii that do not rise from above 0.
    """
    _check_radii(radii)
    if first.shape != second.shape or first.ndim != 1 or not len(first):
        raise UserError(
            f"curves are compared on the same images; found {[*first.shape]} and {[*second.shape]}"
        )
    grid = torch.tensor([0.0, *radii], dtype=torch.float64)
    after = grid + 1e-6  # so that a value rounded to float32 is still the grid's
    ahead = (first[:, None] > after).double() - (second[:, None] > after).double()
    points, draws = grid.tolist(), _draws(len(first), samples, seed)
    own = _turns(ahead.sum(0).tolist(), points)
    turned = [_turns(difference, points) for difference in (draws @ ahead).tolist()]
    above = {0: None, 1: "first", -1: "second"}[own.start]
    if not own.places:
        share = sum(bool(t.places) for t in turned) / samples
        return Crossing(None, None, None, above, share, len(first))
    places = sorted(t.first(own.start) for t in turned if t.start)
    low, high = (places[round(q * (len(places) - 1))] for q in (0.025, 0.975))
    share = sum(own.start in t.before for t in turned) / samples
    return Crossing(own.places[0], _finite(low), _finite(high), above, share, len(first))


@dataclass(frozen=True)
class _Turns:
    """Where a difference changes its sign, and its sign before each place; 0: zero all along."""

    start: int
    end: int
    places: tuple[float, ...]
    before: tuple[int, ...]

    def first(self, sign: int) -> float:
        """The first place with `sign` before it; inf where `sign` lasts, 0 where it never is."""
        if sign in self.before:
            return self.places[self.before.index(sign)]
        return math.inf if self.end == sign else 0.0


def _turns(difference: Sequence[float], grid: Sequence[float]) -> _Turns:
    """Straight lines between the grid's points; the middle of a stretch where it is zero."""
    signed = [i for i, d in enumerate(difference) if d]
    places, before = [], []
    for i, j in pairwise(signed):
        a, b = difference[i], difference[j]
        if a * b < 0:
            straight = grid[i] + (grid[j] - grid[i]) * a / (a - b)
            places.append(straight if j == i + 1 else (grid[i + 1] + grid[j - 1]) / 2)
            before.append(1 if a > 0 else -1)
    ends = [1 if difference[i] > 0 else -1 for i in signed] or [0]
    return _Turns(ends[0], ends[-1], tuple(places), tuple(before))


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _draws(n: int, samples: int, seed: int) -> Tensor:
    """How often each sample drew each image: (samples, n), rows of sum n."""
    generator = torch.Generator().manual_seed(seed)
    counts = torch.zeros(samples, n, dtype=torch.float64)
    for row in counts:
        row += torch.randint(n, (n,), generator=generator).bincount(minlength=n)
    return counts


def _check_radii(radii: Sequence[float]) -> None:
    if not radii or any(b <= a for a, b in pairwise([0.0, *radii])):
        raise UserError(f"radii must rise from above 0; found {[*radii]}")
