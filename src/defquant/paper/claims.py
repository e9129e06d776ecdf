"""The paper's claims, each with a verdict: rows of `claims.yaml`, evaluated. No torch."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from math import comb
from pathlib import Path
from typing import Any, Literal, cast

import yaml

from defquant.paper.ask import Ask
from defquant.paper.contrasts import Sample, Spread, trend
from defquant.paper.figures import EXPERIMENTS, fig3_cells, fig7_cells
from defquant.paper.grid import Cell, Results, Scale, Trial
from defquant.paper.section import Verdict, bits_text, eps_text, listed, signed
from defquant.paper.tables import fig6
from defquant.paper.verdict import (
    MARGIN,
    Asked,
    Chosen,
    Contrast,
    Counts,
    Evidence,
    Question,
    Row,
    Term,
    evidence_of,
    fitted,
    means,
    versus,
)
from defquant.typed import from_mapping

__all__ = ["CLAIMS", "Claim", "cells", "verdicts"]

Labels = Mapping[str, Any]


@dataclass(frozen=True)
class Comparison:
    """Rows of one table against others, asked under several trials; a line of `claims.yaml`.

    Attributes:
        what: what is compared, in words.
        of: the tables whose questions it reads.
        trials: sets of trials by name, as in `_trials`.
        suffix: of the readings' names.
        each: a label: a contrast for each of its values; `every LABEL` with none (full precision).
        pairs: with `each`, a contrast for each pair of values; `next` for each and its successor.
        plus, minus: labels of the rows that are compared; several groups add up.
        contrasts: instead, by name: `plus` and `minus` each.
        trend: the label over whose values the line is fitted, of the rows `plus`.
        margin: whether a loss of 1 point is none.
        blind: as in `Contrast`.
        widths: of Tables 2 and 3, the bits to ask at: the `first`, the paper's, or the `rest`.
        maximum: tell the paper's Quantize Gain, too.
    """

    what: str
    of: Sequence[str] = ("table1",)
    trials: Sequence[str] = ("fgsm", "strong")
    suffix: str = ""
    each: str = ""
    pairs: Sequence[Sequence[Any]] | Literal["next"] = ()
    plus: Labels | Sequence[Labels] = field(default_factory=dict)
    minus: Labels | Sequence[Labels] = field(default_factory=dict)
    contrasts: Mapping[str, Mapping[str, Labels]] = field(default_factory=dict)
    trend: str = ""
    margin: bool = False
    blind: Literal["supporting", "any", "none", "either"] = "supporting"
    widths: Literal["", "first", "rest"] = ""
    maximum: bool = False

    def questions(self, scale: Scale) -> Iterator[Question]:
        asks = [ask for name in self.of for ask in EXPERIMENTS[name].asks(scale)]
        first, *rest = scale.defense_bits
        for bits in [None] if not self.widths else [first] if self.widths == "first" else rest:
            at = {"bits": bits} if self.widths else {}
            more = f", {bits_text(bits)}" if self.widths else ""
            for trial in _trials(scale, asks, self.trials):
                what = self.what.format(
                    eps=eps_text(trial.eps), attack=trial.column, bits=bits_text(bits)
                )
                contrasts = tuple(self._contrasts(_Rows(asks, trial, at)))
                extra = _best_gains if self.maximum else None
                yield Question(trial.name + more + self.suffix, what, contrasts, extra=extra)

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
    if isinstance(value, Trial):
        return value.name
    if label == "bits":
        return bits_text(value)
    names = {"beta": "beta {:g}", "high": "ReLU{:g}"}
    return names.get(label, "{}").format(value)


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
        labels = {**labels, **(self.at if labels.get("dq") else {})}
        other = labels.get("trial", "this")
        trial = self._box(labels.get("box")) if other == "this" else other
        wanted = {k: self._wanted(k, v) for k, v in labels.items() if k not in ("box", "trial")}
        here = (a for a in self.asks if a.trial == trial)
        found = dict.fromkeys(
            a.cells for a in here if all(a.at.get(k) in v for k, v in wanted.items())
        )
        assert found, f"no row has {labels}"
        return list(found)

    def values(self, label: str, plus: Labels, whole: bool = False) -> list[Any]:
        """Those of the rows that `plus` may be; without 0 and none, but for `whole`."""
        if label == "trial":
            return self._weaker()
        fixed = {**plus, **(self.at if plus.get("dq") else {})}
        fixed = {k: self._wanted(k, v) for k, v in fixed.items() if k not in (label, "box")}
        there = (a for a in self.asks if all(a.at.get(k) in v for k, v in fixed.items()))
        found = dict.fromkeys(a.at[label] for a in there if label in a.at)
        return [value for value in found if value or whole]

    def _wanted(self, label: str, value: Any) -> list[Any]:
        every = [a.at[label] for a in self.asks if a.at.get(label)]
        ends = {"max": max, "min": min}
        if value in ("max", "min"):
            return [ends[value](every)]
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


def _best_gains(evidence: Evidence, question: Question) -> str:
    """The paper's Quantize Gain of each contrast: the best bits minus full precision."""
    words = []
    for contrast in question.contrasts:
        samples = [term.sample(evidence) for term in contrast.terms]
        *quantized, full = [None if s is None else s.mean for s in samples]
        there = [mean for mean in quantized if mean is not None]
        if there and full is not None:
            words.append(f"{signed(max(there) - full)} at {contrast.name}")
    return f"best bits minus full precision, biased upward as a maximum: {listed(words)}"


# --- Figure 3: distances ------------------------------------------------------------------

WITHIN = Spread(0.0, 1.0)  # all distances come from one network: its training plays no part
TOLD = "distances D, not accuracies"


def _sample(
    spread: Spread | None, pick: Callable[[Any], Sequence[Any]], value: Any
) -> Sample | None:
    """The only distance that `pick` finds, or last minus first of the line fitted to several.

    The variance is that of means over examples: sum w^2 spread^2 / examples.
    """
    found = pick(value)
    weights = trend(len(found)) if len(found) > 1 else (1.0,)
    if any(d["mean"] is None for d in found):
        return None
    pairs = list(zip(weights, found, strict=True))
    squares = [(w * d["spread"]) ** 2 / (d["examples"] - d["left_out"]) for w, d in pairs]
    return Sample(sum(w * d["mean"] for w, d in pairs), sum(squares), 1, spread)


def _side(name: str, value: Any) -> Sequence[Any]:
    return [value[name]]


def _layers(value: Any) -> Sequence[Any]:
    return [layer["distance"] for layer in value]


def _last(value: Any) -> Sequence[Any]:
    return _layers(value)[-1:]


_at_the_end = partial(_sample, None, _last)


def _rounding(scale: Scale) -> Iterator[Asked]:
    by_eps = {round(255 * cell.eps): cell for cell in fig3_cells(scale)["first"]}
    small = _rounded(by_eps[1], sign=-1)
    yield Question("FGSM 1/255", f"D minus D rounded to 3 bits; {TOLD}", (small,))
    large = tuple(_rounded(by_eps[eps], sign=1) for eps in range(4, 9))
    yield Question("FGSM 4/255 to 8/255", f"D rounded to 3 bits minus D; {TOLD}", large)


def _rounded(cell: Cell, sign: int) -> Contrast:
    sides = (("quantized", sign), ("plain", -sign))
    terms = (Term(w, (cell,), partial(_sample, WITHIN, partial(_side, name))) for name, w in sides)
    return Contrast(f"eps {255 * cell.eps:.0f}/255", tuple(terms))


def _amplified(scale: Scale) -> Iterator[Asked]:
    read = partial(_sample, WITHIN, _layers)
    contrasts = (
        Contrast(bits_text(c.network.model.bits), (Term(1.0, (c,), read),), blind="either")
        for c in fig3_cells(scale)["vgg"]
    )
    what = f"line fitted to D over the layers, last minus first, at each bit width; {TOLD}"
    yield Question("FGSM 8/255", what, tuple(contrasts))


def _amplified_more(scale: Scale) -> Iterator[Asked]:
    few = [cell for cell in fig3_cells(scale)["vgg"] if cell.network.model.bits]
    few.sort(key=lambda cell: -(cell.network.model.bits or 0))
    weights = zip(trend(len(few)), few, strict=True)
    terms = [Term(weight, (cell,), _at_the_end) for weight, cell in weights if weight]
    what = f"line fitted to D at the last layer over bits, its value at 1 minus at 5; {TOLD}"
    yield Question("FGSM 8/255", what, (Contrast("trend", tuple(terms), blind="either"),))


def _amplified_less(scale: Scale) -> Iterator[Asked]:
    vanilla, dq = fig3_cells(scale)["wrn"]
    terms = (Term(1.0, (vanilla,), _at_the_end), Term(-1.0, (dq,), _at_the_end))
    what = f"D at the last layer of the Wide ResNet at 4 bits, vanilla minus DQ; {TOLD}"
    yield Question("FGSM 8/255", what, (Contrast("4 bits", terms, blind="either"),))


# --- Figure 6: chosen on the same images, so the intervals allow for every choice ----------


def _by_beta(scale: Scale, trial: Trial) -> dict[str, Row]:
    return {ask.at["name"]: ask.cells for ask in fig6(scale) if ask.trial == trial}


def _peak(scale: Scale) -> Iterator[Asked]:
    what = "best beta that is neither the smallest nor the largest, minus both of these"
    for trial in _trials(scale, [], ["fgsm", "strong"]):
        rows = _by_beta(scale, trial)
        yield Chosen(trial.name, what, rows, _inside, comparisons=2 * (len(rows) - 2))


def _inside(found: Mapping[str, float], rows: Mapping[str, Row]) -> Sequence[Contrast]:
    first, *inner, last = rows
    best = max(inner, key=lambda name: found[name])
    return [versus(f"beta {best} minus {end}", [rows[best]], [rows[end]]) for end in (first, last)]


def _stable(scale: Scale) -> Iterator[Asked]:
    clean = {f"clean {name}": row for name, row in _by_beta(scale, scale.trial()).items()}
    what = "range over beta under attack minus the clean range"
    for trial in _trials(scale, [], ["fgsm", "strong"]):
        rows = clean | _by_beta(scale, trial)
        yield Chosen(trial.name, what, rows, _ranges, comparisons=comb(len(clean), 2) ** 2)


def _ranges(found: Mapping[str, float], rows: Mapping[str, Row]) -> Sequence[Contrast]:
    ordered = sorted(rows, key=lambda name: found[name])
    clean = [rows[name] for name in ordered if name.startswith("clean")]
    attacked = [rows[name] for name in ordered if not name.startswith("clean")]
    highs, lows = ([attacked[-1]], [clean[0]]), ([attacked[0]], [clean[-1]])
    return [means("ranges", highs, lows)]


# --- Figure 7: pictures -------------------------------------------------------------------

Picture = tuple[tuple[bool, float], ...]
"""Under attack, of FP, VQ and DQ: whether it is right, and how sure of its answer."""


def _confidence(scale: Scale) -> Iterator[Asked]:
    row = tuple(fig7_cells(scale))
    kinds = (
        ("VQ or DQ fooled", "of the pictures that fool one of VQ and DQ, VQ", _vq_fooled, 1 / 2),
        ("all fooled", "of the pictures that fool all, DQ is least sure", _least_sure, 1 / 3),
        ("FP and DQ right", "of the pictures that fool neither, DQ is surer", _surer, 1 / 2),
    )
    for name, what, count, chance in kinds:
        yield Counts(f"{Trial('fgsm', row[0].eps).name}, {name}", what, row, count, chance)


def _pictures(values: Sequence[Any]) -> list[Picture]:
    shown = zip(*(value["examples"] for value in values), strict=True)
    return [tuple(map(_answer, picture)) for picture in shown]


def _answer(example: Any) -> tuple[bool, float]:
    answer = example["adversarial"]
    return answer["prediction"] == example["label"], float(answer["confidence"])


def _vq_fooled(values: Sequence[Any]) -> tuple[int, int]:
    lone = [vq for _, (vq, _), (dq, _) in _pictures(values) if vq != dq]
    return lone.count(False), len(lone)


def _least_sure(values: Sequence[Any]) -> tuple[int, int]:
    fooled = [p for p in _pictures(values) if not any(right for right, _ in p)]
    least = [dq < min(fp, vq) for (_, fp), (_, vq), (_, dq) in fooled]
    return sum(least), len(least)


def _surer(values: Sequence[Any]) -> tuple[int, int]:
    both = [(fp[1], dq[1]) for fp, _, dq in _pictures(values) if fp[0] and dq[0]]
    return sum(dq > fp for fp, dq in both), len(both)


# --- all claims ---------------------------------------------------------------------------

OTHERS: Mapping[str, Callable[[Scale], Iterable[Asked]]] = {
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

    def questions(self, scale: Scale) -> list[Asked]:
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
