"""The paper's claims, each with a verdict: rows of `claims.yaml`, evaluated. No torch."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from math import comb
from pathlib import Path
from typing import Any, Literal, cast

import yaml

from defquant.paper.ask import Ask
from defquant.paper.figures import EXPERIMENTS, fig3, fig7
from defquant.paper.grid import Cell, Results, Scale, Trial
from defquant.paper.section import Verdict, bits_text, eps_text, listed, signed
from defquant.paper.tables import fig6
from defquant.paper.verdict import (
    MARGIN,
    Contrast,
    Evidence,
    Question,
    Row,
    Sample,
    Spread,
    Term,
    chosen,
    counted,
    evidence_of,
    fitted,
    means,
    question,
    trend,
    versus,
)  # fmt: skip
from defquant.typed import from_mapping

__all__ = ["CLAIMS", "Claim", "cells", "verdicts"]

Labels = Mapping[str, Any]


@dataclass(frozen=True)
class Comparison:
    """Rows of one table against others, asked under several trials; a line of `claims.yaml`."""

    what: str  # is compared, in words
    of: Sequence[str] = ("table1",)  # tables whose questions it reads
    trials: Sequence[str] = ("fgsm", "strong")  # sets of trials by name, as in `_trials`
    suffix: str = ""  # of the readings' names
    # a label: a contrast for each of its values; `every LABEL` with none (full precision)
    each: str = ""
    # with `each`, a contrast for each pair of values; `next` for each and its successor
    pairs: Sequence[Sequence[Any]] | Literal["next"] = ()
    # labels of the rows that are compared; several groups add up
    plus: Labels | Sequence[Labels] = field(default_factory=dict)
    minus: Labels | Sequence[Labels] = field(default_factory=dict)
    # instead, by name: `plus` and `minus` each
    contrasts: Mapping[str, Mapping[str, Labels]] = field(default_factory=dict)
    trend: str = ""  # the label over whose values the line is fitted, of the rows `plus`
    margin: bool = False  # whether a loss of 1 point is none
    blind: Literal["supporting", "any", "none", "either"] = "supporting"  # as in `Contrast`
    # of Tables 2 and 3, the bits to ask at: the `first`, which are the paper's, or the `rest`
    widths: Literal["", "first", "rest"] = ""
    maximum: bool = False  # tell the paper's Quantize Gain, too

    def questions(self, scale: Scale) -> Iterator[Question]:
        every = [ask for name in self.of for ask in EXPERIMENTS[name].asks(scale)]
        asks = [ask for ask in every if ask.trial.kind == "accuracy"]
        first, *rest = scale.defense_bits
        for bits in [None] if not self.widths else [first] if self.widths == "first" else rest:
            at = {"bits": bits} if self.widths else {}
            more = f", {bits_text(bits)}" if self.widths else ""
            for trial in _trials(scale, asks, self.trials):
                what = self.what.format(
                    eps=eps_text(trial.eps), attack=trial.column, bits=bits_text(bits)
                )
                contrasts = list(self._contrasts(_Rows(asks, trial, at)))
                extra = partial(_best_gains, contrasts) if self.maximum else None
                yield question(trial.name + more + self.suffix, what, contrasts, extra=extra)

    def _contrasts(self, rows: "_Rows") -> Iterator[Contrast]:
        options: dict[str, Any] = {"margin": MARGIN * self.margin, "blind": self.blind}
        plus, minus = _groups(self.plus), _groups(self.minus)
        for name, sides in self.contrasts.items():
            yield versus(name, rows.find(sides["plus"]), rows.find(sides["minus"]), **options)
        label = self.each.removeprefix("every ")
        values = rows.values(label, plus[0], whole=self.each != label) if label else []
        if self.trend:
            over = rows.values(self.trend, plus[0])
            yield fitted("trend", [rows.find({**plus[0], self.trend: v})[0] for v in over])
        elif self.pairs == "next":
            for a, b in pairwise(values):
                name = f"{_value(label, a)} to {b:g}"
                yield versus(name, rows.find({label: b}), rows.find({label: a}), **options)
        elif self.pairs:
            for a, b in cast(Sequence[Sequence[Any]], self.pairs):
                ours, theirs = rows.find({**plus[0], label: a}), rows.find({**minus[0], label: b})
                yield versus(f"{a} minus {b}", ours, theirs, **options)
        elif self.each:
            for value in values:
                more, fewer = ([rows.find({label: value, **g}) for g in s] for s in (plus, minus))
                yield means(_value(label, value), more, fewer, **options)
        elif not self.contrasts:
            yield means("", map(rows.find, plus), map(rows.find, minus), **options)


def _groups(labels: Labels | Sequence[Labels]) -> Sequence[Labels]:
    return [labels] if isinstance(labels, Mapping) else labels


def _value(label: str, value: Any) -> str:
    if label in ("trial", "bits"):
        return str(value.name) if label == "trial" else bits_text(value)
    return {"beta": "beta {:g}", "high": "ReLU{:g}"}.get(label, "{}").format(value)


@dataclass(frozen=True)
class _Rows:
    """The rows of `asks` under `trial`, found by labels; `at` are labels that DQ rows have, too."""

    asks: Sequence[Ask]
    trial: Trial
    at: Labels

    def find(self, labels: Labels) -> list[Row]:
        """A label is a value, `max` or `min` of those that are not 0, or `quantised` for bits.

        `box` is `white` or `black`: this attack as such, or what there is at its radius. `trial`
        is another one, or `this`.
        """
        other = labels.get("trial", "this")
        trial = self._box(labels.get("box")) if other == "this" else other
        found = dict.fromkeys(a.cells for a in self._having(labels) if a.trial == trial)
        assert found, f"no row has {labels}"
        return list(found)

    def values(self, label: str, plus: Labels, whole: bool = False) -> list[Any]:
        """Those of the rows that `plus` may be; without 0 and none, but for `whole`."""
        if label == "trial":
            return self._weaker()
        there = self._having({k: v for k, v in plus.items() if k != label})
        found = dict.fromkeys(a.at[label] for a in there if label in a.at)
        return [value for value in found if value or whole]

    def _having(self, labels: Labels) -> list[Ask]:
        labels = {**labels, **(self.at if labels.get("dq") else {})}
        wanted = {k: self._wanted(k, v) for k, v in labels.items() if k not in ("box", "trial")}
        return [a for a in self.asks if all(a.at.get(k) in v for k, v in wanted.items())]

    def _wanted(self, label: str, value: Any) -> list[Any]:
        every = [a.at[label] for a in self.asks if a.at.get(label)]
        if value in ("max", "min"):
            return [max(every) if value == "max" else min(every)]
        return every if value == "quantised" else [value]

    def _box(self, box: str | None) -> Trial:
        if box != "black" or self.trial.through:
            return self.trial.direct if box == "white" else self.trial
        through = [a.trial for a in self.asks if a.trial.through and a.trial.eps == self.trial.eps]
        same = [trial for trial in through if trial.attack == self.trial.attack]
        return (same or through)[0]

    def _weaker(self) -> list[Trial]:
        """The paper's other attacks at this radius."""
        every = dict.fromkeys(a.trial for a in self.asks if a.trial.eps == self.trial.eps)
        direct = ("random", "fgsm", "rfgsm")
        return [t for t in every if (t.through or t.attack in direct) and not t.unaware]


def _trials(scale: Scale, asks: Sequence[Ask], names: Sequence[str]) -> list[Trial]:
    """The trials of these sets, each once; FGSM is at the paper's radius and where small networks
    are right at times.
    """
    radii = dict.fromkeys((scale.paper_eps, scale.hard_eps[0]))
    through = dict.fromkeys(a.trial for a in asks if a.trial.through)
    black = [trial for eps in radii for trial in through if trial.eps == eps]
    sets = {
        "clean": [scale.trial()],
        "first": [scale.trial("fgsm", scale.paper_eps)],
        "fgsm": [scale.trial("fgsm", eps) for eps in radii],
        "more": [scale.trial(attack, scale.paper_eps) for attack in ("rfgsm", "pgd")],
        "pgd": [scale.trial("pgd", eps) for eps in radii],
        "strong": scale.strong_trials,
        "black": black,
        "white": [trial.direct for trial in black],
    }
    return list(dict.fromkeys(trial for name in names for trial in sets[name]))


def _best_gains(contrasts: Sequence[Contrast], evidence: Evidence) -> str:
    """The paper's Quantize Gain of each contrast: the best bits minus full precision."""
    words = []
    for contrast in contrasts:
        samples = [term.sample(evidence) for term in contrast.terms]
        *quantized, full = [None if s is None else s.mean for s in samples]
        there = [mean for mean in quantized if mean is not None]
        if there and full is not None:
            words.append(f"{signed(max(there) - full)} at {contrast.name}")
    return f"best bits minus full precision, biased upward as a maximum: {listed(words)}"


# --- Figure 3: distances ------------------------------------------------------------------

WITHIN = Spread(0.0, 1.0)  # all distances come from one network: its training plays no part
TOLD = "distances D, not accuracies"


def _distance(part: str, spread: Spread | None = None) -> Callable[[Any], Sample | None]:
    """Reads one side of the first block, the distance at the `last` layer, or last minus first of
    the line fitted to all `layers`.

    The variance is that of means over examples: sum w^2 spread^2 / examples.
    """

    def read(value: Any) -> Sample | None:
        block = isinstance(value, dict)
        found = [value[part]] if block else [layer["distance"] for layer in value]
        found = found[-1:] if part == "last" else found
        if any(d["mean"] is None for d in found):
            return None
        pairs = list(zip(trend(len(found)) if len(found) > 1 else (1.0,), found, strict=True))
        squares = [(w * d["spread"]) ** 2 / (d["examples"] - d["left_out"]) for w, d in pairs]
        return Sample(sum(w * d["mean"] for w, d in pairs), sum(squares), 1, spread)

    return read


def _rows(scale: Scale, part: str) -> list[tuple[Any, Row]]:
    """Bits and cells."""
    return [(ask.at["bits"], ask.cells) for ask in fig3(scale) if ask.at["part"] == part]


def _rounding(scale: Scale) -> Iterator[Question]:
    rows = _rows(scale, "first")

    def rounded(eps: int, sign: int) -> Contrast:
        sides = (("quantized", sign), ("plain", -sign))
        terms = (Term(w, rows[eps - 1][1], _distance(side, WITHIN)) for side, w in sides)
        return Contrast(f"eps {eps}/255", tuple(terms))

    yield question("FGSM 1/255", f"D minus D rounded to 3 bits; {TOLD}", [rounded(1, -1)])
    large = [rounded(eps, 1) for eps in range(4, 9)]
    yield question("FGSM 4/255 to 8/255", f"D rounded to 3 bits minus D; {TOLD}", large)


def _amplified(scale: Scale) -> Iterator[Question]:
    read = _distance("layers", WITHIN)
    terms = {bits_text(bits): [Term(1.0, row, read)] for bits, row in _rows(scale, "vgg")}
    yield _over_layers(
        "line fitted to D over the layers, last minus first, at each bit width", terms
    )


def _amplified_more(scale: Scale) -> Iterator[Question]:
    few = sorted(((b, row) for b, row in _rows(scale, "vgg") if b), key=lambda pair: -pair[0])
    weights = zip(trend(len(few)), few, strict=True)
    terms = [Term(w, row, _distance("last")) for w, (_, row) in weights if w]
    what = "line fitted to D at the last layer over bits, its value at 1 minus at 5"
    yield _over_layers(what, {"trend": terms})


def _amplified_less(scale: Scale) -> Iterator[Question]:
    pairs = zip((1.0, -1.0), _rows(scale, "wrn"), strict=True)
    terms = [Term(w, row, _distance("last")) for w, (_, row) in pairs]
    what = "D at the last layer of the Wide ResNet at 4 bits, vanilla minus DQ"
    yield _over_layers(what, {"4 bits": terms})


def _over_layers(what: str, terms: Mapping[str, Sequence[Term]]) -> Question:
    contrasts = [Contrast(name, tuple(own), blind="either") for name, own in terms.items()]
    return question("FGSM 8/255", f"{what}; {TOLD}", contrasts)


# --- Figure 6: chosen on the same images, so the intervals allow for every choice ----------


def _by_beta(scale: Scale, trial: Trial) -> dict[str, Row]:
    return {ask.at["name"]: ask.cells for ask in fig6(scale) if ask.trial == trial}


def _peak(scale: Scale) -> Iterator[Question]:
    what = "best beta that is neither the smallest nor the largest, minus both of these"
    for trial in _trials(scale, [], ["fgsm", "strong"]):
        rows = _by_beta(scale, trial)
        choose = partial(_inside, rows)
        yield chosen(trial.name, what, rows, choose, comparisons=2 * (len(rows) - 2))


def _inside(rows: Mapping[str, Row], found: Mapping[str, float]) -> list[Contrast]:
    first, *inner, last = rows
    best = max(inner, key=found.__getitem__)
    return [versus(f"beta {best} minus {end}", [rows[best]], [rows[end]]) for end in (first, last)]


def _stable(scale: Scale) -> Iterator[Question]:
    clean = {f"clean {name}": row for name, row in _by_beta(scale, scale.trial()).items()}
    what = "range over beta under attack minus the clean range"
    for trial in _trials(scale, [], ["fgsm", "strong"]):
        rows = clean | _by_beta(scale, trial)
        choices = comb(len(clean), 2) ** 2
        yield chosen(trial.name, what, rows, partial(_ranges, rows), comparisons=choices)


def _ranges(rows: Mapping[str, Row], found: Mapping[str, float]) -> list[Contrast]:
    ordered = sorted(rows, key=found.__getitem__)
    clean = [rows[name] for name in ordered if name.startswith("clean")]
    attacked = [rows[name] for name in ordered if not name.startswith("clean")]
    highs, lows = ([attacked[-1]], [clean[0]]), ([attacked[0]], [clean[-1]])
    return [means("ranges", highs, lows)]


# --- Figure 7: pictures -------------------------------------------------------------------

Picture = Callable[[Sequence[bool], Sequence[float]], bool | None]
"""Of FP, VQ and DQ under attack, which are right and how sure each is of its answer: what comes of
a picture; None where it is not of those that are counted.
"""

PICTURES: Sequence[tuple[str, str, float, Picture]] = (
    (
        "VQ or DQ fooled", "of the pictures that fool one of VQ and DQ, VQ", 1 / 2,
        lambda right, sure: None if right[1] == right[2] else not right[1],
    ),
    (
        "all fooled", "of the pictures that fool all, DQ is least sure", 1 / 3,
        lambda right, sure: None if any(right) else sure[2] < min(sure[:2]),
    ),
    (
        "FP and DQ right", "of the pictures that fool neither, DQ is surer", 1 / 2,
        lambda right, sure: sure[2] > sure[0] if right[0] and right[2] else None,
    ),
)  # fmt: skip


def _confidence(scale: Scale) -> Iterator[Question]:
    asks = fig7(scale)
    row = tuple(ask.cells[0] for ask in asks)
    for name, what, chance, rule in PICTURES:
        attack = f"{asks[0].trial.name}, {name}"
        yield counted(attack, what, row, partial(_outcomes, rule), chance)


def _outcomes(rule: Picture, values: Sequence[Any]) -> list[bool]:
    found = []
    for picture in zip(*(value["examples"] for value in values), strict=True):
        answers = [(example["label"], example["adversarial"]) for example in picture]
        right = [label == answer["prediction"] for label, answer in answers]
        found.append(rule(right, [float(answer["confidence"]) for _, answer in answers]))
    return [outcome for outcome in found if outcome is not None]


# --- all claims ---------------------------------------------------------------------------

OTHERS: Mapping[str, Callable[[Scale], Iterator[Question]]] = {
    "rounding-threshold": _rounding,
    "noise-amplified": _amplified,
    "fewer-bits-amplify": _amplified_more,
    "penalty-suppresses-noise": _amplified_less,
    "beta-peak": _peak,
    "clean-more-stable": _stable,
    "surer": _confidence,
}


@dataclass(frozen=True)
class Claim:
    """A claim of the paper: where it stands, its numbers, and the comparisons that decide it.

    `made` has the experiments that make the measurements; `note` the paper's contradictions.
    Without comparisons its questions are those of `OTHERS`.
    """

    slug: str
    where: str
    claim: str
    paper: str
    made: str
    note: str = ""
    asks: tuple[Comparison, ...] = ()

    def questions(self, scale: Scale) -> list[Question]:
        if not self.asks:
            return list(OTHERS[self.slug](scale))
        return [question for one in self.asks for question in one.questions(scale)]


def _claims() -> list[Claim]:
    path = Path(__file__).with_name("claims.yaml")
    every = yaml.safe_load(path.read_text(encoding="utf-8"))
    return [from_mapping(Claim, {"slug": s, **entry}, f"{s}: ") for s, entry in every.items()]


CLAIMS: Sequence[Claim] = _claims()


def verdicts(scale: Scale, results: Results) -> tuple[Verdict, ...]:
    """Every claim with a reading for each attack.

    A reading's interval covers the choice of test images and, where some setting was trained with
    several seeds, the chance in training. 5 in 100 intervals miss; readings are not corrected for
    there being many of them.
    """
    evidence = evidence_of(scale, results)
    return tuple(
        Verdict(
            name=f"C{i}",
            where=claim.where,
            claim=claim.claim,
            paper=claim.paper,
            readings=tuple(question.answer(evidence) for question in claim.questions(scale)),
            note=claim.note,
            command=f"defquant reproduce {claim.made} --preset {scale.name}",
        )
        for i, claim in enumerate(CLAIMS, start=1)
    )


def cells(scale: Scale) -> list[Cell]:
    """All cells that the claims read, each once."""
    asked = (question for claim in CLAIMS for question in claim.questions(scale))
    return list(dict.fromkeys(cell for question in asked for cell in question.cells))
