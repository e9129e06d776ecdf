"""How networks, attacks and numbers are named and ordered, everywhere in a report."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeVar

from defquant.results import Cell

__all__ = [
    "Family",
    "Series",
    "attack_order",
    "bits_text",
    "distinct",
    "eps_text",
    "percent",
    "series_of",
    "signed",
]

ATTACKS = ("clean", "Random", "FGSM", "R+FGSM", "RFGSM", "BIM", "PGD", "APGD", "Square")

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
        return self.method.split()[0] == "DQ"

    @property
    def order(self) -> tuple[bool, str, bool, float, str]:
        trained = self.method.partition(" + ")[2]
        return (trained != "", trained, self.is_dq, self.beta, self.method)

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
    def order(self) -> tuple[tuple[bool, str, bool, float, str], int]:
        return (self.family.order, self.bits or 0)

    @property
    def short(self) -> str:
        """Without β: `DQ 4-bit`."""
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


def bits_text(bits: int | None) -> str:
    """`4-bit`, or `full precision` where there are none."""
    return "full precision" if bits is None else f"{bits}-bit"


def attack_order(attack: str) -> tuple[bool, int, str]:
    """White box before black box, then from the weakest to the strongest family."""
    white = attack.removesuffix("(B)")
    stem = white.split("-")[0]
    return (white != attack, ATTACKS.index(stem) if stem in ATTACKS else len(ATTACKS), attack)


def eps_text(eps: float) -> str:
    """`8/255` for 0.03137."""
    return f"{eps_number(eps)}/255"


def eps_number(eps: float) -> str:
    """`8` for 8/255, `0.5` for 0.5/255; a stored radius may be rounded in its fourth digit."""
    scaled = 255 * eps
    return f"{round(scaled)}" if abs(scaled - round(scaled)) < 0.02 else f"{scaled:.3g}"


def percent(fraction: float) -> str:
    """`39.2%`."""
    return f"{100 * fraction:.1f}%"


def signed(points: float) -> str:
    """A difference of accuracies in points: `+1.4`, `−9.1`."""
    text = f"{100 * points:+.1f}"
    return "0.0" if text in ("+0.0", "-0.0") else text.replace("-", "−")


def distinct(items: Iterable[T]) -> list[T]:
    """Each item once, in order of first appearance."""
    return list(dict.fromkeys(items))
