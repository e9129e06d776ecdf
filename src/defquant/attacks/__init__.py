"""Attacks: frozen dataclasses with one signature, `attack(model, x, y, generator=g) -> x_adv`."""

from defquant.attacks.access import untouched
from defquant.attacks.apgd import APGD
from defquant.attacks.compose import Adaptive, Composition, Replay, Standard, Transfer, Worst
from defquant.attacks.contract import Attack
from defquant.attacks.diva import DIVA
from defquant.attacks.engine import Single
from defquant.attacks.fab import FAB
from defquant.attacks.first_order import BIM, FGSM, PGD, RFGSM, FirstOrder, Random, RandomEps
from defquant.attacks.square import Square

__all__ = [
    "APGD", "BIM", "DIVA", "FAB", "FGSM", "PGD", "RFGSM", "Adaptive", "Attack", "Composition",
    "FirstOrder", "Random", "RandomEps", "Replay", "Single", "Square", "Standard", "Transfer",
    "Worst", "untouched",
]  # fmt: skip
