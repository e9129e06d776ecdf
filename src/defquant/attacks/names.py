"""Attacks by the names of the command line."""

import re
from collections.abc import Callable
from functools import partial

from defquant.attacks.apgd import APGD
from defquant.attacks.fab import FAB
from defquant.attacks.gradient import BIM, FGSM, PGD, RFGSM, FirstOrder, Random
from defquant.attacks.single import Single
from defquant.attacks.square import Square
from defquant.attacks.worst import Adaptive, Composition, Standard
from defquant.errors import UserError

__all__ = ["parse_attack", "parse_first_order"]

_STEPS, _BOTH = ("steps",), ("steps", "restarts")
_MAKE: dict[str, tuple[Callable[..., Single | Composition], tuple[str, ...]]] = {
    "random": (Random, ("samples",)), "fgsm": (FGSM, ()), "rfgsm": (RFGSM, ()),
    "bim": (BIM, _STEPS), "pgd": (PGD, _BOTH),
    "apgd": (APGD, _BOTH), "apgd-dlr": (partial(APGD, loss="dlr"), _BOTH),
    "apgd-t": (partial(APGD, loss="dlr-targeted"), _BOTH),
    "fab": (FAB, _BOTH), "fab-t": (partial(FAB, targets=9), _BOTH),
    "square": (Square, ("queries",)), "standard": (Standard, ()), "adaptive": (Adaptive, _STEPS),
}  # fmt: skip


def parse_attack(text: str, eps: float) -> Single | Composition:
    """The attack that `text` names, at `eps`.

    `random[-SAMPLES]`, `fgsm`, `rfgsm`, `bim[-STEPS]`, `pgd[-STEPS[xRESTARTS]]`,
    `apgd[-STEPS[xRESTARTS]]` (cross-entropy), `apgd-dlr[...]`, `apgd-t[...]` (targeted DLR),
    `fab[...]`, `fab-t[...]` (targeted), `square[-QUERIES]`, `standard` or `adaptive[-STEPS]`.
    Without STEPS, BIM and PGD take the paper's schedule. Raises `UserError` for anything else.
    """
    match = re.fullmatch(r"([a-z]+(?:-(?:dlr|t))?)(?:-(\d+)(?:x(\d+))?)?", text.lower())
    if match and match[1] in _MAKE:
        make, names = _MAKE[match[1]]
        numbers = [int(number) for number in match.groups()[1:] if number]
        if len(numbers) <= len(names):
            return make(eps, **dict(zip(names, numbers, strict=False)))
    raise UserError(
        f"unknown attack {text!r}: use random, fgsm, rfgsm, bim, pgd, apgd, apgd-dlr, apgd-t, fab, "
        "square, standard or adaptive, with steps and restarts as in pgd-20 or apgd-50x10"
    )


def parse_first_order(text: str, eps: float) -> FirstOrder:
    """`parse_attack`, where the last iterate is wanted; `UserError` for the others."""
    attack = parse_attack(text, eps)
    if isinstance(attack, FirstOrder):
        return attack
    raise UserError(
        f"this needs an attack with a last iterate: random, fgsm, rfgsm, bim or pgd; found {text!r}"
    )
