"""The paper's claims, each with a verdict: rows of `claims.yaml`, evaluated. No torch."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise, product
from math import comb
from typing import Any, Literal

from defquant.paper.ask import Ask, Found
from defquant.paper.figures import EXPERIMENTS
from defquant.paper.grid import Results, Scale, Trial
from defquant.paper.section import Number, Reading, Verdict, bits_text, eps_text, listed, signed
from defquant.paper.verdict import (
    Blind,
    Contrast,
    Evidence,
    answer,
    counted,
    evidence_of,
    trend,
    unmeasured,
    versus,
)  # fmt: skip
from defquant.typed import from_mapping, written

__all__ = ["CLAIMS", "Claim", "verdicts"]

MARGIN = 0.01  # what "no loss" and "no gap" leave open
_WEAKER = ("random", "fgsm", "rfgsm")

Labels = Mapping[str, Any]
Answers = Mapping[str, Found]
"""What the experiments have, by name."""


@dataclass(frozen=True)
class Comparison:
    """Rows of one table against others, asked under several trials; a line of `claims.yaml`."""

    what: str  # is compared, in words
    of: Sequence[str] = ("table1",)  # tables whose rows it reads
    trials: Sequence[str] = ("fgsm", "strong")  # sets of trials by name, as in `_trials`
    under: str = ""  # instead, of the name of a reading over rows of every trial
    suffix: str = ""  # of the readings' names
    # a label: a contrast for each of its values; `every LABEL` with none (full precision)
    each: str = ""
    values: Sequence[Any] = ()  # with `each`, these alone
    # labels of the rows that are compared; several groups add up
    plus: Labels | Sequence[Labels] = field(default_factory=dict)
    minus: Labels | Sequence[Labels] = field(default_factory=dict)
    # instead, by name: `plus` and `minus` each
    contrasts: Mapping[str, Mapping[str, Labels]] = field(default_factory=dict)
    # `up`, `down`: the line fitted to the rows `plus`, last minus first or first minus last;
    # `next`: from each value to the next; `peak`, `range`: see `_chosen`
    over: Literal["", "up", "down", "next", "peak", "range"] = ""
    margin: bool = False  # whether a loss of 1 point is none
    blind: Blind = "supporting"  # as in `Contrast`
    # of Tables 2 and 3, the bits to ask at: the `first`, which are the paper's, or the `rest`
    widths: Literal["", "first", "rest"] = ""
    maximum: bool = False  # tell the paper's Quantize Gain, too

    def readings(self, scale: Scale, answers: Answers, evidence: Evidence) -> Iterator[Reading]:
        for name, what, contrasts, choices in self.asked(scale, answers):
            extra = _best_gains(contrasts) if self.maximum else ""
            yield answer(name, what, contrasts, evidence, choices, extra)

    def asked(
        self, scale: Scale, answers: Answers
    ) -> Iterator[tuple[str, str, Sequence[Contrast], int]]:
        """Of each reading its name, what it compares, its contrasts and among how many choices."""
        every = [(a, n) for name in self.of for a, n in answers[name] if isinstance(n, Number)]
        widths = {"": [None], "first": scale.defense_bits[:1], "rest": scale.defense_bits[1:]}
        trials = [None] if self.under else _trials(scale, every, self.trials)
        for bits, trial in product(widths[self.widths], trials):
            rows = _Rows(every, trial, {"bits": bits} if self.widths else {})
            name, what, choices = self.under, self.what, 0
            if trial is not None:
                name = trial.name + f", {bits_text(bits)}" * bool(self.widths) + self.suffix
                words = {"eps": eps_text(trial.eps), "attack": trial.column}
                what = what.format(bits=bits_text(bits), **words)
            if self.over in ("peak", "range"):
                clean = _Rows(every, scale.trial(), {}).find({})
                contrasts, choices = _chosen(self.over, clean, rows.find({}))
            else:
                contrasts = list(self._contrasts(rows))
            yield name, what, contrasts, choices

    def _contrasts(self, rows: "_Rows") -> Iterator[Contrast]:
        options = MARGIN * self.margin, self.blind
        plus, minus = _groups(self.plus), _groups(self.minus)
        for name, sides in self.contrasts.items():
            yield versus(name, [rows.find(sides["plus"])], [rows.find(sides["minus"])], *options)
        label = self.each.removeprefix("every ")
        values = self.values or rows.values(label, plus[0], whole=self.each != label)
        if self.over == "next":
            for a, b in pairwise(values):
                name = f"{_value(label, a)} to {b:g}"
                yield versus(name, [rows.find({label: b})], [rows.find({label: a})], *options)
            return
        for value in () if self.contrasts else values if label else [None]:
            at = {label: value} if label else {}
            more, fewer = ([rows.find({**at, **g}) for g in side] for side in (plus, minus))
            if self.over:
                (found,), sign = more, -1 if self.over == "down" else 1
                weights = trend(len(found)) if len(found) > 1 else (1.0,)
                terms = [(sign * w, row) for w, row in zip(weights, found, strict=True) if w]
                yield Contrast(_value(label, value), terms, *options)
            else:
                yield versus(_value(label, value) if label else "", more, fewer, *options)


def _groups(labels: Labels | Sequence[Labels]) -> Sequence[Labels]:
    return [labels] if isinstance(labels, Mapping) else labels


def _value(label: str, value: Any) -> str:
    if label in ("trial", "bits"):
        return str(value.name) if label == "trial" else bits_text(value)
    words = {"beta": "beta {:g}", "high": "ReLU{:g}", "row": "eps {}/255"}
    return words.get(label, "{}").format(value)


@dataclass(frozen=True)
class _Rows:
    """The rows `found` under `trial`, by their labels; `at` are labels that DQ rows have, too."""

    found: Found
    trial: Trial | None
    at: Labels

    def find(self, labels: Labels) -> Found:
        """A label is a value, `max` or `min` of those that are not 0, or `quantised` for bits.

        `box` is `white` or `black`: this attack as such, or what there is at its radius. `trial`
        is another one, or `this`.
        """
        other = labels.get("trial", "this")
        trial = self._box(labels.get("box")) if other == "this" else other
        own = [(a, n) for a, n in self._having(labels) if trial in (None, a.trial)]
        assert own, f"no row has {labels}"
        return own

    def values(self, label: str, plus: Labels, whole: bool = False) -> list[Any]:
        """Those of the rows that `plus` may be; without 0 and none, but for `whole`."""
        if label == "trial":  # the paper's other attacks at this radius
            weaker = [t for t in self._here() if t.substitute or t.attack in _WEAKER]
            return [trial for trial in weaker if not trial.unaware]
        there = self._having({k: v for k, v in plus.items() if k != label})
        found = dict.fromkeys(a.at[label] for a, _ in there if label in a.at)
        return [value for value in found if value or whole]

    def _having(self, labels: Labels) -> Found:
        labels = {**labels, **(self.at if labels.get("dq") else {})}
        wanted = {k: self._wanted(k, v) for k, v in labels.items() if k not in ("box", "trial")}
        return [(a, n) for a, n in self.found if all(a.at.get(k) in v for k, v in wanted.items())]

    def _wanted(self, label: str, value: Any) -> list[Any]:
        every = [a.at[label] for a, _ in self.found if a.at.get(label)]
        if value in ("max", "min"):
            return [max(every) if value == "max" else min(every)]
        return every if value == "quantised" else [value]

    def _box(self, box: str | None) -> Trial | None:
        if self.trial is None or box is None or (box == "black" and self.trial.substitute):
            return self.trial
        if box == "white":
            return replace(self.trial, substitute=None)
        through = [t for t in self._here() if t.substitute]
        return next((t for t in through if t.attack == self.trial.attack), through[0])

    def _here(self) -> list[Trial]:
        """The trials at this radius."""
        every = dict.fromkeys(a.trial for a, _ in self.found)
        return [trial for trial in every if self.trial and trial.eps == self.trial.eps]


def _trials(scale: Scale, found: Found, names: Sequence[str]) -> list[Trial]:
    """The trials of these sets, each once; FGSM is at the paper's radius and where small networks
    are right at times.
    """
    radii = dict.fromkeys((scale.paper_eps, scale.hard_eps[0]))
    through = dict.fromkeys(a.trial for a, _ in found if a.trial.substitute)
    black = [trial for eps in radii for trial in through if trial.eps == eps]
    sets = {
        "clean": [scale.trial()],
        "first": [scale.trial("fgsm", scale.paper_eps)],
        "fgsm": [scale.trial("fgsm", eps) for eps in radii],
        "more": [scale.trial(attack, scale.paper_eps) for attack in ("rfgsm", "pgd")],
        "pgd": [scale.trial("pgd", eps) for eps in radii],
        "strong": scale.strong_trials,
        "black": black,
        "white": [replace(trial, substitute=None) for trial in black],
    }
    return list(dict.fromkeys(trial for name in names for trial in sets[name]))


def _best_gains(contrasts: Sequence[Contrast]) -> str:
    """The paper's Quantize Gain of each contrast: the best bits minus full precision."""
    words = []
    for contrast in contrasts:
        *quantised, full = [n.mean for _, (_, n) in contrast.terms]
        there = [mean for mean in quantised if mean is not None]
        if there and full is not None:
            words.append(f"{signed(max(there) - full)} at {contrast.name}")
    return f"best bits minus full precision, biased upward as a maximum: {listed(words)}"


def _chosen(over: str, clean: Found, attacked: Found) -> tuple[list[Contrast], int]:
    """By beta, with the number of choices that the intervals must allow for: the best one inside
    against both ends; or the range under attack against that of clean images. Until all is
    measured, one contrast that lacks what is missing.
    """
    needed = [*attacked, *(clean if over == "range" else ())]
    if any(n.mean is None for _, n in needed):
        return [versus(over, [needed], [])], 1
    low, *inner, high = attacked
    if over == "peak":
        best = max(inner, key=_mean)
        names = {f"beta {best[0].at['name']} minus {end[0].at['name']}": end for end in (low, high)}
        return [versus(name, [[best]], [[end]]) for name, end in names.items()], 2 * len(inner)
    (a, *_, b), (c, *_, d) = (sorted(rows, key=_mean) for rows in (clean, attacked))
    return [versus("ranges", [[d], [a]], [[c], [b]])], comb(len(clean), 2) ** 2


def _mean(row: tuple[Ask, Number]) -> float:
    return row[1].mean or 0.0


def _surer(found: Found) -> Iterator[Reading]:
    """Figure 7: of FP, VQ and DQ on each attacked picture, which are right and how sure each is."""
    answers = [[(e["label"], e["adversarial"]) for e in (v or {}).get("examples", ())]
               for _, v in found]  # fmt: skip
    told = [[(y == a["prediction"], float(a["confidence"])) for y, a in own] for own in answers]
    every = list(zip(*told, strict=False))
    cases = (
        (
            "VQ or DQ fooled", "of the pictures that fool one of VQ and DQ, VQ", 1 / 2,
            [not vq[0] for _, vq, dq in every if vq[0] != dq[0]],
        ),
        (
            "all fooled", "of the pictures that fool all, DQ is least sure", 1 / 3,
            [dq[1] < min(fp[1], vq[1]) for fp, vq, dq in every if not (fp[0] or vq[0] or dq[0])],
        ),
        (
            "FP and DQ right", "of the pictures that fool neither, DQ is surer", 1 / 2,
            [dq[1] > fp[1] for fp, _, dq in every if fp[0] and dq[0]],
        ),
    )  # fmt: skip
    for name, what, chance, outcomes in cases:
        attack = f"{found[0][0].trial.name}, {name}"
        yield counted(attack, what, outcomes, chance) if every else unmeasured(attack)


# --- all claims ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Claim:
    """A claim of the paper: where it stands, its numbers, and the comparisons that decide it.

    `made` has the experiments that make the measurements; `note` the paper's contradictions.
    The one without comparisons is that on Figure 7.
    """

    slug: str
    where: str
    claim: str
    paper: str
    made: str
    note: str = ""
    asks: tuple[Comparison, ...] = ()

    def readings(self, scale: Scale, answers: Answers, evidence: Evidence) -> tuple[Reading, ...]:
        every = [r for one in self.asks for r in one.readings(scale, answers, evidence)]
        return tuple(every or _surer(answers["fig7"]))


CLAIMS: Sequence[Claim] = [
    from_mapping(Claim, {"slug": slug, **entry}, f"{slug}: ")
    for slug, entry in written(__file__, "claims.yaml").items()
]


def verdicts(
    scale: Scale, results: Results, evidence: Evidence | None = None
) -> tuple[Verdict, ...]:
    """Every claim with a reading for each attack.

    A reading's interval covers the choice of test images and, where some setting was trained with
    several seeds, the chance in training. 5 in 100 intervals miss; readings are not corrected for
    there being many of them.
    """
    known = evidence or evidence_of(scale, results)
    answers = {name: experiment.found(scale, results) for name, experiment in EXPERIMENTS.items()}
    return tuple(
        Verdict(
            f"C{i}", claim.where, claim.claim, claim.paper,
            claim.readings(scale, answers, known), claim.note,
            f"defquant reproduce {claim.made} {scale.flags}",
        )
        for i, claim in enumerate(CLAIMS, start=1)
    )  # fmt: skip
