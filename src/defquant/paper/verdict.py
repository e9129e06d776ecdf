"""Questions to the results: contrasts of cells in, readings out. No torch."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from defquant.paper import tables
from defquant.paper.contrasts import (
    Interval,
    Sample,
    Spread,
    accuracy,
    decide,
    exact,
    interval,
    pooled,
    trend,
)
from defquant.paper.grid import Cell, Results, Scale
from defquant.paper.section import Answer, Reading, bits_text
from defquant.results import Measurement

__all__ = [
    "MARGIN", "Asked", "Chosen", "Contrast", "Counts", "Evidence", "Question", "Row",
    "Term", "evidence_of", "fitted", "means", "stratum", "versus",
]  # fmt: skip

MARGIN = 0.01  # what "no loss" and "no gap" leave open
UNTRAINED = 0.2  # clean accuracy: twice that of a guess among ten classes
ONE_SEED = "one seed: training not in the interval"
HARDLY = ", hardly trained"

_RANK: dict[Answer, int] = {"does not hold": 0, "not decided": 1, "holds": 2}
_KINDS = {"fgsm": "one step", "rfgsm": "one step", "adaptive": "worst case"}

Row = tuple[Cell, ...]
"""Cells that differ in their seed alone."""

Stratum = tuple[str, float, bool]


# --- evidence -----------------------------------------------------------------------------


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

    def sample(self, row: Row) -> Sample | None:
        """The accuracy over the seeds that are there; None where none is."""
        found = self._found(row)
        if not found:
            return None
        shares = [m.score.accuracy for _, m in found]
        return accuracy(shares, min(m.total for _, m in found), self.spread(row[0]))

    def spread(self, cell: Cell) -> Spread | None:
        """That of the cell's stratum; at an eps without one, the largest of its kind."""
        kind, eps, one_bit = stratum(cell)
        alike = {e: s for (k, e, b), s in self.spreads.items() if (k, b) == (kind, one_bit)}
        return alike.get(eps) or max(alike.values(), key=lambda s: s.sd, default=None)

    def masked(self, row: Row) -> list[str]:
        """Networks of `row` whose accuracy under attack is no robustness: `vanilla at 1 bit`.

        The attack was blind, or the network hardly trained: it keeps what it answers to anything.
        """
        found = self._found(row)
        names = [f"{m.method} at {bits_text(m.bits)}" for _, m in found if m.masked]
        hardly = [m for cell, m in found if cell.attack != "clean" and m.run in self.untrained]
        names += [f"{m.method} at {bits_text(m.bits)}" + HARDLY for m in hardly]
        probed = [cell.network for cell in row if cell.kind != "accuracy"]
        weak = [network for network in probed if network.name in self.untrained]
        return names + [bits_text(network.model.bits) + HARDLY for network in weak]

    def _found(self, row: Row) -> list[tuple[Cell, Measurement]]:
        pairs = [(cell, self.results.score(cell)) for cell in row]
        return [(cell, m) for cell, m in pairs if m is not None]


def evidence_of(scale: Scale, results: Results) -> Evidence:
    """Spreads are pooled over the networks of Table 1 and Figure 5, which have several seeds.

    Elsewhere (other architectures, adversarial training, SVHN) there is one training of each, and
    these spreads are taken for theirs.
    """
    found: dict[Stratum, list[Sequence[float]]] = {}
    for row in dict.fromkeys(a.cells for a in tables.table1(scale) + tables.fig5(scale)):
        shares = [m.score.accuracy for cell in row if (m := results.score(cell)) is not None]
        found.setdefault(stratum(row[0]), []).append(shares)
    spreads = {key: pooled(groups) for key, groups in found.items()}
    clean = (m for m in results.scores.values() if m.attack == "clean")
    untrained = frozenset(m.run for m in clean if m.score.accuracy < UNTRAINED)
    return Evidence(results, {key: s for key, s in spreads.items() if s is not None}, untrained)


# --- contrasts ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Term:
    """A weight and what it stands before: an accuracy, or what `read` makes of a cell's value."""

    weight: float
    row: Row
    read: Callable[[Any], Sample | None] | None = None

    def sample(self, evidence: Evidence) -> Sample | None:
        if self.read is None:
            return evidence.sample(self.row)
        value = evidence.results.value(self.row[0])
        return None if value is None else self.read(value)


@dataclass(frozen=True)
class Contrast:
    """A sum of weighted terms that the claim says is above -`margin`.

    `blind` says what a masked accuracy spoils. A blind attack overstates robustness, so by rule it
    spoils a verdict that leans on the masked network: `supporting`. For "nothing is masked" it
    spoils any support; where the claim is that there is masking, nothing (`none`). A hardly trained
    network's distances say nothing either way: they spoil any verdict (`either`).
    """

    name: str
    terms: tuple[Term, ...]
    margin: float = 0.0
    blind: Literal["supporting", "any", "none", "either"] = "supporting"

    def spoilt(self, evidence: Evidence, verdict: Answer) -> list[str]:
        """The masked networks for whose sake `verdict` cannot stand."""
        if self.blind == "none" or (self.blind == "any" and verdict == "does not hold"):
            return []
        sign = -1 if verdict == "does not hold" else 1
        every = self.blind in ("any", "either")
        rows = [t.row for t in self.terms if every or sign * t.weight > 0]
        return list(dict.fromkeys(name for row in rows for name in evidence.masked(row)))


def means(
    name: str, plus: Iterable[Sequence[Row]], minus: Iterable[Sequence[Row]], **options: Any
) -> Contrast:
    """The mean of each group in `plus`, less that of each in `minus`."""
    signed = [(1, group) for group in plus] + [(-1, group) for group in minus]
    terms = tuple(Term(sign / len(group), row) for sign, group in signed for row in group)
    return Contrast(name, terms, **options)


def versus(name: str, plus: Sequence[Row], minus: Sequence[Row], **options: Any) -> Contrast:
    """The mean of `plus` minus the mean of `minus`."""
    return means(name, [plus], [minus], **options)


def fitted(name: str, rows: Sequence[Row]) -> Contrast:
    """Last minus first of the line fitted to `rows`."""
    pairs = zip(trend(len(rows)), rows, strict=True)
    return Contrast(name, tuple(Term(weight, row) for weight, row in pairs if weight))


# --- questions ----------------------------------------------------------------------------


class Asked(Protocol):
    """Anything that reads `cells` and answers."""

    @property
    def cells(self) -> list[Cell]: ...

    def answer(self, evidence: Evidence) -> Reading: ...


@dataclass(frozen=True)
class Finding:
    """What came of one contrast."""

    name: str
    interval: Interval
    verdict: Answer
    remarks: tuple[str, ...]


@dataclass(frozen=True)
class Question:
    """Whether all `contrasts` are positive.

    Their intervals hold together (Bonferroni over `comparisons`, by default their number). It
    holds if all lower ends are positive, and fails if any upper end is negative. The reading has
    the numbers of the worst contrast. With one of them missing it cannot hold.

    Attributes:
        attack: name of the reading.
        what: what is compared.
        contrasts: one or more.
        comparisons: more than there are contrasts, where they were chosen among more.
        extra: a remark computed from the evidence.
    """

    attack: str
    what: str
    contrasts: tuple[Contrast, ...]
    comparisons: int = 0
    extra: Callable[[Evidence, "Question"], str] | None = None

    @property
    def cells(self) -> list[Cell]:
        return [cell for c in self.contrasts for term in c.terms for cell in term.row]

    def answer(self, evidence: Evidence) -> Reading:
        count = self.comparisons or len(self.contrasts)
        judged = [_judge(contrast, evidence, count) for contrast in self.contrasts]
        found = [finding for finding in judged if finding is not None]
        if not found:
            return _unmeasured(self.attack)
        worst = min(found, key=lambda f: (_RANK[f.verdict], f.interval.low))
        missing = len(judged) - len(found)
        held = worst.verdict == "holds"
        verdict: Answer = "not decided" if missing and held else worst.verdict
        words = [self.what, f"worst: {worst.name}" if len(judged) > 1 else "", *worst.remarks]
        words += [f"{missing} of {len(judged)} not measured" if missing else ""]
        words += [self.extra(evidence, self)] if self.extra else []
        w = worst.interval
        detail = "; ".join(filter(None, words))
        return Reading(self.attack, w.effect, w.low, w.high, verdict, detail)


def _judge(contrast: Contrast, evidence: Evidence, comparisons: int) -> Finding | None:
    pairs = [(term.weight, term.sample(evidence)) for term in contrast.terms]
    terms = [(weight, sample) for weight, sample in pairs if sample is not None]
    if len(terms) < len(pairs):
        return None
    found = interval(terms, comparisons)
    verdict = decide(found, contrast.margin)
    remarks = [_seeds([sample for _, sample in terms])]
    remarks += [f"margin {100 * contrast.margin:g} point"] if contrast.margin else []
    masked = contrast.spoilt(evidence, verdict)
    if masked:
        remarks.append(f"masked, which proves nothing: {', '.join(masked)}")
        verdict = "not decided"
    return Finding(contrast.name, found, verdict, tuple(remarks))


def _seeds(samples: Sequence[Sample]) -> str:
    fewest = min(sample.seeds for sample in samples)
    if any(sample.spread is None for sample in samples):
        return ONE_SEED
    if fewest > 1:
        return f"{fewest} seeds"
    of_others = any(sample.spread and sample.spread.sd > 0 for sample in samples)
    return "1 seed, spread as between those of Table 1" if of_others else "1 seed"


@dataclass(frozen=True)
class Chosen:
    """A question whose contrasts are chosen, by the means that were found, among `comparisons`."""

    attack: str
    what: str
    rows: Mapping[str, Row]
    choose: Callable[[Mapping[str, float], Mapping[str, Row]], Sequence[Contrast]]
    comparisons: int

    @property
    def cells(self) -> list[Cell]:
        return [cell for row in self.rows.values() for cell in row]

    def answer(self, evidence: Evidence) -> Reading:
        samples = {name: evidence.sample(row) for name, row in self.rows.items()}
        found = {name: sample.mean for name, sample in samples.items() if sample is not None}
        if len(found) < len(samples):
            return _unmeasured(self.attack)
        contrasts = tuple(self.choose(found, self.rows))
        return Question(self.attack, self.what, contrasts, self.comparisons).answer(evidence)


def _unmeasured(attack: str, why: str = "not measured") -> Reading:
    return Reading(attack, None, None, None, "not decided", why)


@dataclass(frozen=True)
class Counts:
    """Whether something comes about more often than by `chance`, counted by `count`.

    `count` makes (successes, trials) of the cells' values. The effect is a share minus `chance`;
    its interval is exact, over the pictures alone.
    """

    attack: str
    what: str
    row: Row
    count: Callable[[list[Any]], tuple[int, int]]
    chance: float = 0.5

    @property
    def cells(self) -> list[Cell]:
        return list(self.row)

    def answer(self, evidence: Evidence) -> Reading:
        values = [evidence.results.value(cell) for cell in self.row]
        if any(value is None for value in values):
            return _unmeasured(self.attack)
        successes, trials = self.count(values)
        if not trials:
            return _unmeasured(self.attack, f"{self.what}; no such picture")
        low, high = (end - self.chance for end in exact(successes, trials))
        found = Interval(successes / trials - self.chance, low, high, trained=False)
        detail = f"{self.what}: {successes} of {trials}, {self.chance:.0%} by chance; {ONE_SEED}"
        return Reading(self.attack, found.effect, low, high, decide(found), detail)
