"""How networks and attacks are named and ordered, everywhere in a report."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeVar

from defquant.errors import visible
from defquant.results import BLACK, EIGHT_BIT, FOREIGN, UNAWARE, Cell

__all__ = [
    "Family", "Series", "attack_order", "bits_text", "distinct", "is_validation", "markdown",
    "series_of", "whole_text",
]  # fmt: skip

ATTACKS = ("clean", "Random", "FGSM", "R+FGSM", "RFGSM", "BIM", "PGD", "APGD", "Square")

FamilyOrder = tuple[int, bool, list[str], bool, float, str]

T = TypeVar("T")


@dataclass(frozen=True)
class Family:
    """Networks that differ only in bits: a row of the summary. `float` is vanilla's at full
    precision.
    """

    method: str
    beta: float

    @property
    def is_dq(self) -> bool:
        return self.method.split(" ")[0] == "DQ"

    @property
    def is_foreign(self) -> bool:
        """A model of the user's own, whose bits nobody named."""
        return self.method.startswith(FOREIGN)

    @property
    def added(self) -> list[str]:
        """What is added to the network: `squeezing`, the attack it was trained on."""
        return self.method.split(" + ")[1:]

    @property
    def order(self) -> FamilyOrder:
        """As the paper's tables: plain, squeezed, adversarially trained; vanilla before DQ."""
        added = self.added
        unsqueezed = not any(part.startswith("squeezing") for part in added)
        return (len(added), unsqueezed, added, self.is_dq, self.beta, self.method)

    def __str__(self) -> str:
        return f"{self.method} (β = {self.beta:g})" if self.is_dq or self.beta else self.method


@dataclass(frozen=True)
class Series:
    """One network up to its seed: a line in the figures, with one colour on the whole page."""

    method: str
    bits: int | None
    beta: float

    @property
    def family(self) -> Family:
        base, space, rest = self.method.partition(" ")
        return Family(("vanilla" if base == "float" else base) + space + rest, self.beta)

    @property
    def order(self) -> tuple[FamilyOrder, int]:
        return (self.family.order, self.bits or 0)

    @property
    def short(self) -> str:
        """Without β: `DQ 4-bit`."""
        if self.bits is None and self.family.is_foreign:
            return self.method
        base, space, rest = self.method.partition(" ")
        precision = "" if base == "float" else f" {bits_text(self.bits)}"
        return f"{base}{precision}{space}{rest}"

    @property
    def shows_beta(self) -> bool:
        return self.family.is_dq or bool(self.beta)

    def __str__(self) -> str:
        return f"{self.short} (β = {self.beta:g})" if self.shows_beta else self.short


def series_of(cell: Cell) -> Series:
    """The network that `cell` measured."""
    return Series(cell.method, cell.bits, cell.beta)


def whole_text(families: Iterable[Family]) -> str:
    """The name of their column without bits: of a user's own model it is not known."""
    kinds = {family.is_foreign for family in families}
    if True not in kinds:
        return "Full precision"
    return "Full precision, or as given" if False in kinds else "As given"


def bits_text(bits: int | None) -> str:
    """`4-bit`, or `full precision` where there are none."""
    return "full precision" if bits is None else f"{bits}-bit"


def attack_order(attack: str) -> tuple[int, int, str]:
    """White box, unaware, black box; within each from the weakest to the strongest family."""
    kind = attack.endswith(UNAWARE) + 2 * attack.endswith(BLACK)
    stem = attack.removesuffix(EIGHT_BIT).removesuffix(UNAWARE).removesuffix(BLACK).split("-")[0]
    return (kind, ATTACKS.index(stem) if stem in ATTACKS else len(ATTACKS), attack)


def distinct(items: Iterable[T]) -> list[T]:
    """Each item once, in order of first appearance."""
    return list(dict.fromkeys(items))


def is_validation(data: str) -> bool:
    """Whether data of this name are held-out training images, by which something was chosen."""
    return data.endswith(", validation")


def markdown(text: str) -> str:
    """`text` as Markdown that shows it letter by letter."""
    return re.sub(r"([\\`*_\[\]<>|&~])", r"\\\1", visible(text))
