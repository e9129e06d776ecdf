"""Attacks: frozen dataclasses with one signature, `attack(model, x, y, generator=g) -> x_adv`."""

from defquant.attacks.apgd import APGD
from defquant.attacks.base import Attack, untouched
from defquant.attacks.diva import DIVA
from defquant.attacks.fab import FAB
from defquant.attacks.gradient import BIM, FGSM, PGD, RFGSM, FirstOrder, Random, RandomEps
from defquant.attacks.single import Single
from defquant.attacks.square import Square
from defquant.attacks.transfer import Replay, Transfer
from defquant.attacks.worst import Adaptive, Composition, Standard, Worst

__all__ = [
    "APGD",
    "BIM",
    "DIVA",
    "FAB",
    "FGSM",
    "PGD",
    "RFGSM",
    "Adaptive",
    "Attack",
    "Composition",
    "FirstOrder",
    "Random",
    "RandomEps",
    "Replay",
    "Single",
    "Square",
    "Standard",
    "Transfer",
    "Worst",
    "untouched",
]
