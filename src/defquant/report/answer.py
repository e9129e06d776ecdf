"""What a page answers: a question, its verdict, three marks and charts. No torch.

A `Place` is one architecture on one data set, of which the page asks its question.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from statistics import fmean, stdev
from typing import Any

from defquant.paper.section import Answer as Decided
from defquant.paper.section import Number, bits_text, eps_text, listed, signed
from defquant.paper.verdict import ALONE, Interval, accuracy, decide, interval, pooled
from defquant.report.marks import UNSHIPPED, Kind, Mark, masking, missing, strength
from defquant.report.model import WORDS, Row, interval_text, panels
from defquant.report.names import (
    Cell,
    Series,
    attack_at,
    attack_order,
    distinct,
    grouped,
    is_entire,
    is_validation,
    is_white,
    unlike,
)
from defquant.report.plot import Figure, Looks, Spec, chart, differences, looks, trade
from defquant.report.sources import Diagnosis

__all__ = ["Answer", "Place", "gap", "kind_of", "ladder", "of_places", "rows_of"]

At = tuple[str, float]
"""An attack and its eps."""
SEEDS = 3  # that both have, of which a paired interval is made
VERDICTS: Mapping[Decided, tuple[str, Kind]] = {
    "holds": ("Yes", "right"),
    "does not hold": ("No", "wrong"),
    "not decided": ("Not shown", "open"),
}


@dataclass(frozen=True)
class Answer:
    """The first screen, and the charts below it."""

    question: str
    word: str
    kind: Kind
    sentence: str
    marks: Sequence[Mark]
    beside: Sequence[str] = ()
    missing: Sequence[str] = ()
    figures: Sequence[Figure] = ()


# --- differences ----------------------------------------------------------------------------


def gap(a: Cell, b: Cell, alike: Iterable[Cell] = ()) -> tuple[Interval, str]:
    """Accuracy of `a` less that of `b` with its 95 % interval, and what that covers.

    Of three seeds or more that both have, all on the same images, d_s = a_s - b_s: mean d ±
    t s_d / sqrt(n), Student's t of n - 1. It covers the chance in training, not that of other
    images; equal d_s, as of one image, are not taken for certainty. Else as
    `paper.verdict.interval`: the test images' chance and the training's, whose spread is pooled
    over `alike`, cells of the same attack; of the images alone where nobody has two seeds.
    """
    from scipy.special import stdtrit

    ours, theirs = ({m.seed: m.score.accuracy for m in c.found} for c in (a, b))
    own = [ours[seed] - theirs[seed] for seed in ours.keys() & theirs.keys()]
    paired = len(ours) == len(a.seeds) and len(theirs) == len(b.seeds)
    seen = {(m.fingerprint, m.total) for c in (a, b) for m in c.found}
    spread = stdev(own) if len(own) >= SEEDS and paired and len(seen) == 1 else 0.0
    if spread > 1e-9:
        half = float(stdtrit(len(own) - 1, 0.975)) * spread / math.sqrt(len(own))
        mean = fmean(own)
        covers = f"over training on these test images, paired over {len(own)} seeds"
        return Interval(mean, mean - half, mean + half, True), covers
    known = pooled(c.n for c in alike)
    terms = [
        (sign, accuracy(c.mean, c.n.images, c.n.seeds, known)) for sign, c in ((1, a), (-1, b))
    ]
    found = interval(terms)
    found = found._replace(low=max(-1.0, found.low), high=min(1.0, found.high))
    if known:
        return found, "over test images and training, not paired"
    return (
        found,
        f"over test images alone, not paired: only more than {100 * ALONE:g} points decide",
    )


def _number(found: Interval, cell: Cell) -> Number:
    ends = found.low, found.high
    return Number(found.effect, 0.0, cell.n.seeds, cell.n.images, *ends, points=True)


# --- runs -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """The cells of one architecture on one data set, and the radius of its verdict."""

    data: str
    model: str
    cells: Sequence[Cell]
    eps: float

    @property
    def name(self) -> str:
        return f"{self.model} on {self.data}"

    @cached_property
    def networks(self) -> dict[Series, dict[At, Cell]]:
        """In order."""
        found: dict[Series, dict[At, Cell]] = {}
        for cell in sorted(self.cells, key=lambda cell: cell.series.order):
            found.setdefault(cell.series, {})[cell.attack, cell.eps] = cell
        return found

    @cached_property
    def floats(self) -> list[Series]:
        """Float; else the plainest networks, of full precision if there are any. Several differ in
        the digits that tell networks of one name apart.
        """

        def rank(s: Series) -> tuple[Any, ...]:
            plain = replace(s, method=s.untagged)
            return (plain.method != "float", len(s.family.added), s.bits is not None, plain.order)

        best = min(map(rank, self.networks))
        return [s for s in self.networks if rank(s) == best]

    def reference_of(self, series: Series) -> Series:
        """Of the floats the one with the fewest settings of training that `series` does not share;
        the first of equals, and of each other.
        """
        own = series in self.floats
        return min(self.floats, key=lambda s: 0 if own else len(self.unlike(s, series)))

    def unlike(self, a: Series, b: Series) -> list[str]:
        """What differs in how they were trained."""
        return unlike(*(next(iter(self.networks[s].values())) for s in (a, b)))

    @cached_property
    def reference(self) -> Series:
        """The candidate's."""
        return self.reference_of(self.candidate) if self.candidate else self.floats[0]

    @cached_property
    def candidate(self) -> Series | None:
        """The plainest DQ network of 4 bits or near; of several betas the most measured, or the
        middle one: none is chosen by its accuracy.
        """

        def rank(s: Series) -> tuple[Any, ...]:
            far, is_dq = abs((s.bits or 9) - 4), s.method.split(" ")[0] == "DQ"
            return (s.bits is None, len(s.family.added), not is_dq, far, -len(self.networks[s]))

        others = [s for s in self.networks if s not in self.floats] or self.floats[1:]
        best = min(map(rank, others), default=None)
        tied = sorted((s for s in others if rank(s) == best), key=lambda s: s.beta)
        return tied[len(tied) // 2] if tied else None

    @property
    def pair(self) -> list[Series]:
        return [self.reference, *([self.candidate] if self.candidate else [])]

    @cached_property
    def keys(self) -> list[Series]:
        """The candidate, vanilla of its bits, and its full precision."""
        c = self.candidate
        return [
            s for s in self.networks
            if c and s != self.reference == self.reference_of(s)
            and s.family.added == c.family.added
            and (s == c or (s.method.startswith("vanilla") and s.bits == c.bits)
                 or (s.family == c.family and s.bits is None))
        ]  # fmt: skip

    @cached_property
    def plain(self) -> list[Series]:
        """The pair and what differs from it in bits, or in DQ, alone."""
        c = self.candidate
        return [
            s for s in self.networks
            if s in self.pair or (s.untagged in ("float", "vanilla", "DQ")
                                  and s not in self.floats
                                  and self.reference_of(s) == self.reference
                                  and (not s.beta or c is None or s.beta == c.beta))
        ]  # fmt: skip

    @cached_property
    def looks(self) -> Looks:
        """Those of all its networks; the plain ones have theirs first."""
        return looks((str(s), kind_of(s)) for s in (*self.plain, *self.networks))

    @cached_property
    def rungs(self) -> list[str]:
        """Attacks that follow gradients, at `eps`, on the pair and as many seeds; weak ones first.

        The last is the strongest.
        """
        every = [self.networks[s] for s in self.pair]
        shared = [
            a for a, e in every[0]
            if e == self.eps and is_white(a) and all((a, e) in own for own in every)
        ]  # fmt: skip
        seeds = {a: min(len(own[a, self.eps].seeds) for own in every) for a in shared}
        height = {a: fmean(own[a, self.eps].mean for own in every) for a in shared}
        kept = [a for a in shared if seeds[a] == max(seeds.values())]
        return sorted(kept, key=lambda a: (-height[a], attack_order(a)))

    @property
    def at(self) -> At:
        """The strongest attack, at the radius; or none."""
        return (self.rungs[-1], self.eps) if self.rungs else ("clean", 0.0)

    def less(self, a: Cell, other: Series) -> tuple[Interval, str] | None:
        """`a` less another network under the same attack."""
        b = self.networks[other].get((a.attack, a.eps))
        if b is None or a.series == other:
            return None
        return gap(a, b, self._alike[a.attack, a.eps, a.series.bits == 1])

    @cached_property
    def _alike(self) -> dict[tuple[str, float, bool], list[Cell]]:
        return grouped(self.cells, lambda c: (c.attack, c.eps, c.series.bits == 1))

    def row(self, cell: Cell, telling: bool = False) -> Row:
        """A cell beside its reference."""
        series, reference = cell.series, self.reference_of(cell.series)
        less = self.less(cell, reference)
        right, total = (sum(getattr(m, k) for m in cell.found) for k in ("correct", "total"))
        about = {
            "Right": f"{right:,} of {total:,}",
            "95% interval": interval_text(cell.n),
            "Seeds": ", ".join(map(str, cell.seeds)),
            f"Less {reference}": less[1] if less else "",
            "No gradient": f"{cell.vanishing:.1%} of the right images" * (cell.vanishing > 0),
            "Runs": " ".join(distinct(m.run for m in cell.found if not m.cell)),
            "Cells": " ".join(distinct(m.cell for m in cell.found if m.cell)),
        }
        return Row(
            self.name, str(series), kind_of(series), str(series.family), series.bits, cell.attack,
            cell.eps, cell.n, _number(less[0], cell) if less else None, telling,
            {name: text for name, text in about.items() if text},
        )  # fmt: skip

    def answer(self, diagnoses: Mapping[str, Diagnosis], ships: Mark | None) -> Answer:
        """Whether the candidate is safer than the reference; `diagnoses` by run."""
        series, attack = self.pair[-1], attack_at(*self.at)
        own = self.networks[series]
        cell = own.get(self.at) or next(iter(own.values()))
        marks = [strength(cell), masking(cell, diagnoses), ships or UNSHIPPED]
        kept, found = f"{100 * cell.mean:.1f} %", self.less(cell, self.reference)
        absent, figures = missing([a for a, _ in own], marks, cell), _figures(self)
        if found is None:
            ends = f"[{interval_text(cell.n).replace(' to ', ', ')}]"
            return Answer(
                f"How robust is {series}?", kept, "open",
                f"of {cell.n.images:,} images are right, {attack}, 95 % interval {ends}. There is "
                "no other network to set it beside.", marks, (), absent, figures,
            )  # fmt: skip
        word, kind = VERDICTS[decide(found[0])]
        theirs = self.networks[self.reference][cell.attack, cell.eps]
        where = f"under {attack}, the strongest attack here" if self.rungs else "on clean images"
        return Answer(
            f"Is {series} safer than {self.reference}?", word, kind,
            f"{_points(found[0])} {where}: {kept} of the images stay right, "
            f"{100 * theirs.mean:.1f} % with {self.reference}. The 95 % interval is {found[1]}.",
            marks, self._beside(cell), absent, figures,
        )  # fmt: skip

    def _beside(self, cell: Cell) -> list[str]:
        """Where no reference, or no single one, was trained as the candidate; then its keys."""
        series, of = cell.series, self.reference
        floats = {s: self.unlike(s, series) for s in self.floats if s != series}
        equal = [str(s) for s, own in floats.items() if len(own) == len(floats[of])]
        said = [f"{listed(equal)} share as much of its training: the first is taken."]
        others = [(s, self.less(cell, s), self.unlike(s, series)) for s in self.keys if s != series]
        return [
            *said * (len(equal) > 1),
            *[f"{of} was trained otherwise: {'; '.join(floats[of])}."] * bool(floats[of]),
            *(
                f"Safer than {s}? {VERDICTS[decide(less[0])][0]}: {_points(less[0])}"
                + f", trained otherwise: {'; '.join(own)}" * bool(own)
                + "."
                for s, less, own in others
                if less
            ),
        ]


def kind_of(series: Series) -> str:
    """Its colour's name."""
    return series.method if series.method.startswith("float") else str(series.family)


def of_places(cells: Sequence[Cell], radius: Callable[[Sequence[Cell]], float]) -> list[Place]:
    """The largest first, validation images last; `radius` of a place's cells is its eps."""
    found = grouped(cells, lambda cell: (cell.data, cell.model))
    ordered = sorted(found, key=lambda name: (is_validation(name[0]), -len(found[name])))
    return [Place(*name, found[name], radius(found[name])) for name in ordered]


def rows_of(places: Sequence[Place]) -> list[Row]:
    """The leaderboard: every cell; of the first place the strongest attack is seen at once."""
    found = []
    for place in places:
        cells = [cell for own in place.networks.values() for cell in own.values()]
        for cell in sorted(cells, key=lambda c: (attack_order(c.attack), c.eps, c.series.order)):
            telling = place is places[0] and (cell.attack, cell.eps) == place.at
            found.append(place.row(cell, telling))
    return found


def _points(found: Interval) -> str:
    return f"{signed(found.effect)} points [{signed(found.low)}, {signed(found.high)}]"


# --- charts ---------------------------------------------------------------------------------


def _figures(place: Place) -> list[Figure]:
    """Differences, clean against strongest, and the ladder, as far as there is something to see."""
    every = [place.networks[s] for s in (place.reference, *place.keys)]
    shared = [
        (a, e) for a, e in every[0]
        if e in (0.0, place.eps) and is_entire(a) and all((a, e) in own for own in every)
    ]  # fmt: skip
    rows = [place.row(own[at]) for own in every[1:] for at in shared]
    found = [differences(rows, str(place.reference), place.looks)] * bool(rows)
    ends = [(s, o.get(("clean", 0.0)), o.get(place.at)) for s in place.plain
            if (o := place.networks[s])]  # fmt: skip
    shown = [(str(s), kind_of(s), clean.n, cell.n) for s, clean, cell in ends if clean and cell]
    if len(shown) > 1 and place.rungs:
        found.append(trade(shown, attack_at(*place.at), place.looks))
    if drawn := ladder(place):
        title = "The ladder: from the weakest attack to the strongest"
        about = f"A panel per precision; the attack grows stronger to the right. {WORDS['bars']}"
        found.append(Figure(title, about, drawn, ladder(place, whole=True)))
    return found


def ladder(place: Place, whole: bool = False) -> Spec | None:
    """Accuracy over attacks, weak ones first: a panel per precision, vanilla beside DQ.

    None where there are no two attacks that follow gradients.
    """
    own = [s for s in place.plain if all((a, place.eps) in place.networks[s] for a in place.rungs)]
    found = panels(
        (
            (bits_text(s.bits), str(s), kind_of(s), a, place.networks[s][a, place.eps].n)
            for s in sorted(own, key=lambda s: s.bits or 0)
            for a in place.rungs
            if len(place.rungs) > 1
        ),
        "attack", f"accuracy at {eps_text(place.eps)}",
    )  # fmt: skip
    keyed = [str(s) for s in (place.reference, *place.keys)]
    size = max(110, 780 // max(1, len(found))), 240
    return chart(found, len(found), size, whole, place.looks, keyed) if found else None
