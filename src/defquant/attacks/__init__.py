"""Attacks: frozen dataclasses with one signature, `attack(model, x, y, generator=g) -> x_adv`."""

from defquant.attacks.base import Attack, untouched
from defquant.attacks.diva import DIVA
from defquant.attacks.gradient import BIM, FGSM, PGD, RFGSM, FirstOrder, Random, RandomEps
from defquant.attacks.transfer import Replay, Transfer

__all__ = [
    "BIM",
    "DIVA",
    "FGSM",
    "PGD",
    "RFGSM",
    "Attack",
    "FirstOrder",
    "Random",
    "RandomEps",
    "Replay",
    "Transfer",
    "untouched",
]
