"""Answers to claims: contrasts of numbers in, readings out. No torch.

Two kinds of chance stand between a measured difference of accuracies and the true one: which test
images there are, and how each training happened to end. A 95 % interval here covers both.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from defquant.paper import tables
from defquant.paper.ask import Ask, Found, ask_all
from defquant.paper.grid import Cell, Results, Scale
from defquant.paper.section import Answer, Number, Reading, bits_text

__all__ = [
    "ALONE", "Blind", "Contrast", "Evidence", "Interval", "Sample", "Spread", "accuracy", "answer",
    "counted", "decide", "evidence_of", "interval", "pooled", "stratum", "trend",
    "unmeasured", "versus",
]  # fmt: skip

LEVEL = 0.95
ALONE = 0.20  # what a single training must show where nothing is known of the chance in training
UNTRAINED = 0.2  # clean accuracy: twice that of a guess among ten classes
ONE_SEED = "one seed: training not in the interval"
HARDLY = ", hardly trained"
_SPOILT = "masked, which proves nothing"

_RANK: dict[Answer, int] = {"does not hold": 0, "not decided": 1, "holds": 2}
_KINDS = {"fgsm": "one step", "rfgsm": "one step", "adaptive": "worst case"}


# --- intervals ----------------------------------------------------------------------------


class Spread(NamedTuple):
    """Standard deviation between trainings that differ in their seed, `df` degrees of freedom."""

    sd: float
    df: float


class Sample(NamedTuple):
    """The mean over `seeds` trainings; its `variance` by the choice of test images, which are the
    same for every seed, so that more do not reduce it; the `spread` between trainings, if known.
    """

    mean: float
    variance: float
    seeds: int = 1
    spread: Spread | None = None


class Interval(NamedTuple):
    """An effect with its interval; `trained` where that covers the chance in training."""

    effect: float
    low: float
    high: float
    trained: bool


def accuracy(mean: float, images: int, seeds: int, spread: Spread | None) -> Sample:
    """The accuracy of equal trainings on the same `images`.

    Variance p (1 - p) / n at p = (correct + 1) / (n + 2), so that 0 of n is not taken for
    certainty (Agresti and Caffo 2000).
    """
    p = (mean * images + 1) / (images + 2)
    return Sample(mean, p * (1 - p) / images, seeds, spread)


def pooled(numbers: Iterable[Number]) -> Spread | None:
    """s^2 = sum (k - 1) s_g^2 / sum (k - 1) over numbers of k seeds; None where all have one."""
    several = [(n.seeds - 1, n.spread) for n in numbers if n.seeds > 1]
    df = sum(k for k, _ in several)
    return Spread(math.sqrt(sum(k * s**2 for k, s in several) / df), df) if df else None


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
    from scipy.stats import t

    effect = sum(w * x.mean for w, x in terms)
    trained = all(x.spread is not None for _, x in terms)
    parts: dict[Spread, float] = {}
    for w, x in terms:
        if trained and x.spread is not None:
            parts[x.spread] = parts.get(x.spread, 0.0) + (w * x.spread.sd) ** 2 / x.seeds
    total = sum(w * w * x.variance for w, x in terms) + sum(parts.values())
    error = sum(part**2 / spread.df for spread, part in parts.items())
    df, share = total**2 / error if error else math.inf, 1 - (1 - LEVEL) / (2 * comparisons)
    half = float(t.ppf(share, df)) * math.sqrt(total)
    return Interval(effect, effect - half, effect + half, trained)


def decide(found: Interval, margin: float = 0.0) -> Answer:
    """Whether the effect is above -`margin`: holds, or fails, if the whole interval is.

    Without the chance in training in the interval, the effect must also be `ALONE` away from
    there: single trainings of one setting had a standard deviation of up to 7 points (digits, 1 bit
    aside), so that two of them lie further apart than `ALONE` in 5 of 100 cases at most.
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


# --- evidence -----------------------------------------------------------------------------

Stratum = tuple[str, float, bool]


def stratum(cell: Cell) -> Stratum:
    """What the spread between trainings depends on: kind of attack, eps, and 1 bit or not.

    In the demo, clean accuracies of equal 1-bit networks have a standard deviation of 6 to 12
    points between seeds, those of all others of at most 1. Vanilla and DQ at 1 bit share a stratum:
    two seeds of one network alone give one degree of freedom, which decides nothing.
    """
    one_bit = cell.network.model.bits == 1
    if cell.attack in ("clean", "random"):
        return "clean", 0.0, one_bit
    kind = _KINDS.get(cell.attack.partition("-")[0], "many steps")
    return ("black box" if cell.substitute else kind), cell.eps, one_bit


@dataclass(frozen=True)
class Evidence:
    """Results, the spread between trainings in each stratum where it is known, and the networks
    whose clean accuracy is hardly above a guess.
    """

    results: Results
    spreads: Mapping[Stratum, Spread]
    untrained: frozenset[str] = frozenset()

    def sample(self, ask: Ask, n: Number, alone: bool) -> Sample | None:
        """None where nothing was measured. Distances vary over the examples, whose standard
        deviation is known; `alone`, of one network, its training plays no part in them.
        """
        if n.mean is None:
            return None
        if ask.trial.kind == "accuracy":
            return accuracy(n.mean, n.images, n.seeds, self.spread(ask.cells[0]))
        return Sample(n.mean, n.spread**2 / n.images, 1, Spread(0.0, 1.0) if alone else None)

    def spread(self, cell: Cell) -> Spread | None:
        """That of the cell's stratum; at an eps without one, the largest of its kind."""
        kind, eps, one_bit = stratum(cell)
        alike = {e: s for (k, e, b), s in self.spreads.items() if (k, b) == (kind, one_bit)}
        return alike.get(eps) or max(alike.values(), key=lambda s: s.sd, default=None)

    def masked(self, ask: Ask) -> list[str]:
        """Networks whose accuracy under attack is no robustness: `vanilla at 1 bit`.

        The attack was blind, or the network hardly trained: it keeps what it answers to anything.
        """
        hardly = [cell for cell in ask.cells if cell.network.name in self.untrained]
        if ask.trial.kind != "accuracy":
            return [bits_text(cell.network.model.bits) + HARDLY for cell in hardly]
        found = [(cell, m) for cell in ask.cells if (m := self.results.of(cell)) is not None]
        names = [f"{m.method} at {bits_text(m.bits)}" for _, m in found if m.masked]
        attacked = [m for cell, m in found if cell.attack != "clean" and cell in hardly]
        return names + [f"{m.method} at {bits_text(m.bits)}{HARDLY}" for m in attacked]


def evidence_of(scale: Scale, results: Results) -> Evidence:
    """Spreads are pooled over the networks of Table 1 and Figure 5, which have several seeds.

    Elsewhere (other architectures, adversarial training, SVHN) there is one training of each, and
    these spreads are taken for theirs.
    """
    found: dict[Stratum, dict[tuple[Cell, ...], Number]] = {}
    for ask, n in ask_all(tables.table1(scale) + tables.fig5(scale), results):
        found.setdefault(stratum(ask.cells[0]), {})[ask.cells] = n
    spreads = {key: pooled(numbers.values()) for key, numbers in found.items()}
    clean = (m for m in results.scores.values() if m.attack == "clean")
    untrained = frozenset(m.run for m in clean if m.score.accuracy < UNTRAINED)
    return Evidence(results, {key: s for key, s in spreads.items() if s is not None}, untrained)


# --- readings -----------------------------------------------------------------------------

Blind = Literal["supporting", "any", "none", "either"]


class Contrast(NamedTuple):
    """A sum of weighted numbers that the claim says is above -`margin`.

    `blind` says what a masked accuracy spoils. A blind attack overstates robustness, so by rule it
    spoils a verdict that leans on the masked network: `supporting`. For "nothing is masked" it
    spoils any support; where the claim is that there is masking, nothing (`none`). A hardly trained
    network's distances say nothing either way: they spoil any verdict (`either`).
    """

    name: str
    terms: Sequence[tuple[float, tuple[Ask, Number]]]
    margin: float = 0.0
    blind: Blind = "supporting"

    def spoilt(self, evidence: Evidence, verdict: Answer) -> list[str]:
        """The masked networks for whose sake `verdict` cannot stand."""
        if self.blind == "none" or (self.blind == "any" and verdict == "does not hold"):
            return []
        sign = -1 if verdict == "does not hold" else 1
        every = self.blind in ("any", "either")
        asks = [ask for weight, (ask, _) in self.terms if every or sign * weight > 0]
        return list(dict.fromkeys(name for ask in asks for name in evidence.masked(ask)))

    def undecided(self, evidence: Evidence, comparisons: int) -> bool:
        """Whether more measurements may decide it: what is masked, they do not."""
        found = self.judged(evidence, comparisons)
        return found is None or (found.verdict == "not decided" and _SPOILT not in found.detail)

    def judged(self, evidence: Evidence, comparisons: int) -> Reading | None:
        """The reading, called by the contrast's name; None where a term is missing."""
        alone = len({ask.networks for _, (ask, _) in self.terms}) == 1
        pairs = [(weight, evidence.sample(*term, alone)) for weight, term in self.terms]
        terms = [(weight, sample) for weight, sample in pairs if sample is not None]
        if len(terms) < len(pairs):
            return None
        found = interval(terms, comparisons)
        verdict = decide(found, self.margin)
        remarks = [_seeds([sample for _, sample in terms])]
        remarks += [f"margin {100 * self.margin:g} point"] if self.margin else []
        if masked := self.spoilt(evidence, verdict):
            remarks.append(f"{_SPOILT}: {', '.join(masked)}")
            verdict = "not decided"
        return Reading(self.name, *found[:3], verdict, "; ".join(remarks))


def versus(name: str, plus: Sequence[Found], minus: Sequence[Found], *options: object) -> Contrast:
    """The mean of each group in `plus`, less that of each in `minus`."""
    signed = [(1, group) for group in plus] + [(-1, group) for group in minus]
    terms = [(sign / len(group), row) for sign, group in signed for row in group]
    return Contrast(name, terms, *options)  # type: ignore[arg-type]


def _seeds(samples: Sequence[Sample]) -> str:
    fewest = min(sample.seeds for sample in samples)
    if any(sample.spread is None for sample in samples):
        return ONE_SEED
    if fewest > 1:
        return f"{fewest} seeds"
    of_others = any(sample.spread and sample.spread.sd > 0 for sample in samples)
    return "1 seed, spread as between those of Table 1" if of_others else "1 seed"


def answer(
    attack: str,
    what: str,
    contrasts: Sequence[Contrast],
    evidence: Evidence,
    comparisons: int = 0,
    extra: str = "",
) -> Reading:
    """Whether all `contrasts` are positive.

    Their intervals hold together (Bonferroni over `comparisons`, where they were chosen among more
    than their number). It holds if all lower ends are positive, and fails if any upper end is
    negative. The reading, called `attack`, has the numbers of the worst contrast and says `what` is
    compared and the remark `extra`. With one of them missing it cannot hold.
    """
    judged = [contrast.judged(evidence, comparisons or len(contrasts)) for contrast in contrasts]
    found = [reading for reading in judged if reading is not None]
    if not found:
        return unmeasured(attack)
    worst = min(found, key=lambda r: (_RANK[r.verdict], r.low))
    missing = len(judged) - len(found)
    words = [what, (len(judged) > 1) * f"worst: {worst.attack}", worst.detail]
    words += [(missing > 0) * f"{missing} of {len(judged)} not measured", extra]
    verdict: Answer = "not decided" if missing and worst.verdict == "holds" else worst.verdict
    return replace(worst, attack=attack, verdict=verdict, detail="; ".join(filter(None, words)))


def counted(attack: str, what: str, outcomes: Sequence[bool], chance: float) -> Reading:
    """Whether `outcomes` are true more often than by `chance`.

    The effect is a share minus `chance`; its interval is exact, over the pictures alone (Clopper
    and Pearson 1934).
    """
    from scipy.stats import binomtest

    if not outcomes:
        return unmeasured(attack, f"{what}; no such picture")
    right, count = sum(outcomes), len(outcomes)
    ends = binomtest(right, count).proportion_ci(LEVEL)
    low, high = float(ends.low) - chance, float(ends.high) - chance
    whole = Interval(right / count - chance, low, high, trained=False)
    detail = f"{what}: {right} of {count}, {chance:.0%} by chance; {ONE_SEED}"
    return Reading(attack, *whole[:3], decide(whole), detail)


def unmeasured(attack: str, why: str = "not measured") -> Reading:
    return Reading(attack, None, None, None, "not decided", why)
