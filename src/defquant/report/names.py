"""Networks and attacks as a report names and orders them, and what was measured of each."""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, TypeVar

from defquant.errors import visible
from defquant.paper.section import Number, eps_text, listed, number
from defquant.records import BLACK, EIGHT_BIT, FOREIGN, UNAWARE, Measurement

__all__ = [
    "Cell", "Family", "Series", "attack_at", "attack_order", "distinct", "grouped",
    "is_entire", "is_validation", "is_white", "markdown", "over_seeds", "unlike", "whole_text",
]  # fmt: skip

ATTACKS = ("clean", "Random", "FGSM", "R+FGSM", "RFGSM", "BIM", "PGD", "APGD", "Square")

T = TypeVar("T")
K = TypeVar("K")


@dataclass(frozen=True)
class Family:
    """Networks that differ only in bits: a row of the summary. `float` is vanilla's at full
    precision; `added` are `squeezing` and the attack it was trained on, and a foreign model is the
    user's own, whose bits nobody named.
    """

    method: str
    beta: float

    @property
    def is_foreign(self) -> bool:
        return self.method.startswith(FOREIGN)

    @property
    def added(self) -> tuple[str, ...]:
        return tuple(self.method.split(" + ")[1:])

    @property
    def order(self) -> tuple[Any, ...]:
        """As the paper's tables: plain, squeezed, adversarially trained; vanilla before DQ."""
        unsqueezed = not any(part.startswith("squeezing") for part in self.added)
        is_dq = self.method.split(" ")[0] == "DQ"
        return (len(self.added), unsqueezed, self.added, is_dq, self.beta, self.method)

    @property
    def shown_beta(self) -> str:
        return f"β = {self.beta:g}" if self.beta or self.method.split(" ")[0] == "DQ" else ""

    def __str__(self) -> str:
        return self.method + f" ({self.shown_beta})" * bool(self.shown_beta)


@dataclass(frozen=True)
class Series:
    """One network up to its seed: a line in the figures; `short` is its name without β."""

    method: str
    bits: int | None
    beta: float

    @property
    def family(self) -> Family:
        return Family(re.sub(r"^float(?= |$)", "vanilla", self.method), self.beta)

    @property
    def order(self) -> tuple[Any, ...]:
        return (self.family.order, self.bits or 0)

    @property
    def untagged(self) -> str:
        """The method without the digits that tell networks of one name apart."""
        return re.sub(r"( \[[0-9a-f ]+\])+$", "", self.method)

    @property
    def short(self) -> str:
        base, space, rest = self.method.partition(" ")
        if base == "float" or (self.bits is None and self.family.is_foreign):
            return self.method
        precision = "full precision" if self.bits is None else f"{self.bits}-bit"
        return f"{base} {precision}{space}{rest}"

    def __str__(self) -> str:
        return self.short + f" ({self.family.shown_beta})" * bool(self.family.shown_beta)


@dataclass(frozen=True)
class Cell:
    """The measurements of one network under one attack, which differ in their seed alone."""

    series: Series
    model: str
    data: str
    attack: str
    eps: float
    found: tuple[Measurement, ...]  # in order of their seeds

    @property
    def seeds(self) -> tuple[int, ...]:
        return tuple(m.seed for m in self.found)

    @cached_property
    def n(self) -> Number:
        return replace(number(self.found), cells=())

    @property
    def mean(self) -> float:
        return self.n.mean or 0.0

    @property
    def vanishing(self) -> float:
        """The largest share of images with zero gradients, whether the attack needs any or not."""
        return max(m.vanishing or 0.0 for m in self.found)


def over_seeds(measurements: Iterable[Measurement]) -> list[Cell]:
    """Cells in order of first appearance, of measurements that are `told_apart`."""
    groups = grouped(
        measurements,
        lambda m: (Series(m.method, m.bits, m.beta), m.model, m.data, m.attack, m.eps),
    )
    return [Cell(*at, tuple(sorted(own, key=lambda m: m.seed))) for at, own in groups.items()]


def unlike(a: Cell, b: Cell) -> list[str]:
    """Settings of the trainings, known of both, without a value in common: `epochs 60, not 15`."""
    ours, theirs = ([m.trained for m in cell.found] for cell in (a, b))
    known = [name for name in ours[0] if all(name in own for own in (*ours, *theirs))]
    pairs = [(name, {o[name] for o in ours}, {o[name] for o in theirs}) for name in known]
    return [
        f"{name} {listed(sorted(x))}, not {listed(sorted(y))}" for name, x, y in pairs if not x & y
    ]


def attack_at(attack: str, eps: float) -> str:
    """`clean`, `FGSM 8/255`."""
    return attack if attack == "clean" else f"{attack} {eps_text(eps)}"


def whole_text(families: Iterable[Family]) -> str:
    """The name of their column without bits: of a user's own model it is not known."""
    kinds = {family.is_foreign for family in families}
    both = "Full precision, or as given"
    return both if len(kinds) > 1 else "As given" if True in kinds else "Full precision"


def attack_order(attack: str) -> tuple[int, int, str]:
    """White box, unaware, black box; within each from the weakest to the strongest family."""
    kind = attack.endswith(UNAWARE) + 2 * attack.endswith(BLACK)
    stem = attack.removesuffix(EIGHT_BIT).removesuffix(UNAWARE).removesuffix(BLACK).split("-")[0]
    return (kind, ATTACKS.index(stem) if stem in ATTACKS else len(ATTACKS), attack)


def is_entire(attack: str) -> bool:
    """No part of `adaptive`, which names its surrogate in brackets."""
    return "(" not in attack.removesuffix(EIGHT_BIT).removesuffix(BLACK).removesuffix(UNAWARE)


def is_white(attack: str) -> bool:
    """Follows the gradients of the network itself."""
    aside = attack.startswith(("clean", "Random", "Square")) or attack.endswith((BLACK, UNAWARE))
    return is_entire(attack) and not aside


def distinct(items: Iterable[T]) -> list[T]:
    """Each item once, in order of first appearance."""
    return list(dict.fromkeys(items))


def grouped(items: Iterable[T], key: Callable[[T], K]) -> dict[K, list[T]]:
    """Items of one key together, in order of first appearance."""
    found: dict[K, list[T]] = {}
    for item in items:
        found.setdefault(key(item), []).append(item)
    return found


def is_validation(data: str) -> bool:
    """Whether data of this name are held-out training images, by which something was chosen."""
    return data.endswith(", validation")


def markdown(text: str) -> str:
    """`text` as Markdown that shows it letter by letter."""
    return re.sub(r"([\\`*_\[\]<>|&~])", r"\\\1", visible(text))
