"""Contrasts of accuracies: weighted sums of them, with 95 % intervals. No torch.

Two kinds of chance stand between a measured difference and the true one: which test images there
are, and how each training happened to end. An interval here covers both.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean, variance

from defquant.paper.section import Answer

__all__ = [
    "ALONE", "Interval", "Sample", "Spread", "accuracy", "decide", "exact", "interval", "pooled",
    "trend",
]  # fmt: skip

LEVEL = 0.95
ALONE = 0.10  # what a single training must show where nothing is known of the chance in training


@dataclass(frozen=True)
class Spread:
    """Standard deviation between trainings that differ in their seed, `df` degrees of freedom."""

    sd: float
    df: float


@dataclass(frozen=True)
class Sample:
    """One term of a contrast.

    Attributes:
        mean: over the seeds.
        variance: of the mean by the choice of test images; they are the same for every seed, so
            that more seeds do not reduce it.
        seeds: how many trainings.
        spread: between trainings; None where it is unknown.
    """

    mean: float
    variance: float
    seeds: int = 1
    spread: Spread | None = None


@dataclass(frozen=True)
class Interval:
    """An effect with its interval; `trained` where that covers the chance in training."""

    effect: float
    low: float
    high: float
    trained: bool


def accuracy(shares: Sequence[float], images: int, spread: Spread | None) -> Sample:
    """The accuracies of equal trainings on the same `images`.

    Variance p (1 - p) / n at p = (correct + 1) / (n + 2), so that 0 of n is not taken for
    certainty (Agresti and Caffo 2000).
    """
    mean = fmean(shares)
    p = (mean * images + 1) / (images + 2)
    return Sample(mean, p * (1 - p) / images, len(shares), spread)


def pooled(groups: Iterable[Sequence[float]]) -> Spread | None:
    """s^2 = sum (k - 1) s_g^2 / sum (k - 1) over groups of k seeds; None where all have one."""
    several = [group for group in groups if len(group) > 1]
    df = sum(len(group) - 1 for group in several)
    squares = sum((len(group) - 1) * variance(group) for group in several)
    return Spread(math.sqrt(squares / df), df) if df else None


def interval(terms: Sequence[tuple[float, Sample]], comparisons: int = 1) -> Interval:
    """sum w x with its interval, one of `comparisons` that hold together (Bonferroni).

    V = sum w^2 v + sum w^2 s^2 / k: images, then trainings. Both sums take the terms as
    independent. Networks that see the same images err on the same images; where the weights sum
    to zero and any two networks agree about equally, that part cancels, so the interval is wider
    than it must be. s^2 contains some of the images' chance, which then counts twice.

    The quantile is Student's, its degrees of freedom V^2 / sum V_g^2 / df_g over the parts V_g of V
    that share one estimated s (Welch 1947, Satterthwaite 1946). Where a term's s is unknown
    the interval covers the images only.
    """
    effect = sum(w * x.mean for w, x in terms)
    trained = all(x.spread is not None for _, x in terms)
    total = sum(w * w * x.variance for w, x in terms)
    parts = _training(terms) if trained else {}
    total += sum(parts.values())
    error = sum(part**2 / spread.df for spread, part in parts.items())
    half = _quantile(comparisons, total**2 / error if error else math.inf) * math.sqrt(total)
    return Interval(effect, effect - half, effect + half, trained)


def _training(terms: Iterable[tuple[float, Sample]]) -> Mapping[Spread, float]:
    parts: dict[Spread, float] = {}
    for weight, sample in terms:
        if sample.spread is not None:
            part = (weight * sample.spread.sd) ** 2 / sample.seeds
            parts[sample.spread] = parts.get(sample.spread, 0.0) + part
    return parts


def _quantile(comparisons: int, df: float) -> float:
    """Of Student's t, two-sided."""
    from scipy.special import stdtrit

    share = 1 - (1 - LEVEL) / (2 * comparisons)
    return NormalDist().inv_cdf(share) if math.isinf(df) else float(stdtrit(df, share))


def decide(found: Interval, margin: float = 0.0) -> Answer:
    """Whether the effect is above -`margin`: holds, or fails, if the whole interval is.

    Without the chance in training in the interval, the effect must also be `ALONE` away from
    there: trainings of one setting were seen to differ by a few points, at 1 bit by ten.
    """
    if not found.trained and abs(found.effect + margin) <= ALONE:
        return "not decided"
    if found.low > -margin:
        return "holds"
    return "does not hold" if found.high < -margin else "not decided"


def trend(count: int) -> tuple[float, ...]:
    """Weights of `count` evenly spaced values: last minus first of the line fitted to them."""
    centred = [i - (count - 1) / 2 for i in range(count)]
    return tuple((count - 1) * c / sum(c * c for c in centred) for c in centred)


def exact(successes: int, trials: int) -> tuple[float, float]:
    """The 95 % interval of a share by the binomial's tails (Clopper and Pearson 1934)."""
    from scipy.special import betaincinv

    tail, k, n = (1 - LEVEL) / 2, successes, trials
    low = 0.0 if k == 0 else float(betaincinv(k, n - k + 1, tail))
    high = 1.0 if k == n else float(betaincinv(k + 1, n - k, 1 - tail))
    return low, high
