"""Attacks by the names of the command line: one line of `ATTACKS` for each."""

import re
from collections.abc import Callable
from functools import partial
from typing import Any

from defquant.attacks.apgd import APGD
from defquant.attacks.compose import Adaptive, Composition, Standard
from defquant.attacks.engine import Single, Surrogate
from defquant.attacks.fab import FAB
from defquant.attacks.first_order import BIM, FGSM, PGD, RFGSM, FirstOrder, Random
from defquant.attacks.square import Square
from defquant.attacks.surrogates import EOT, ClipFree, FloatTwin, Precisions, SoftRound
from defquant.errors import UserError, near

__all__ = ["ATTACKS", "parse_attack", "parse_first_order"]

_STEPS, _BOTH = ("steps",), ("steps", "restarts")
ATTACKS: dict[str, tuple[Callable[..., Single | Composition], tuple[str, ...]]] = {
    "random": (Random, ("samples",)), "fgsm": (FGSM, ()), "rfgsm": (RFGSM, ()),
    "bim": (BIM, _STEPS), "pgd": (PGD, _BOTH),
    "apgd": (APGD, _BOTH), "apgd-dlr": (partial(APGD, loss="dlr"), _BOTH),
    "apgd-margin": (partial(APGD, loss="margin"), _BOTH),
    "apgd-t": (partial(APGD, loss="dlr-targeted"), _BOTH),
    "fab": (FAB, _BOTH), "fab-t": (partial(FAB, targets=9), _BOTH),
    "square": (Square, ("queries",)), "standard": (Standard, ()), "adaptive": (Adaptive, _STEPS),
    "adaptive-t": (partial(Adaptive, targets=5), _STEPS),
}  # fmt: skip


_SURROGATES: dict[str, Surrogate] = {
    "soft": SoftRound(), "twin": FloatTwin(), "clipfree": ClipFree(), "eot": EOT(),
    "bits": Precisions(),
}  # fmt: skip


def parse_attack(text: str, eps: float) -> Single | Composition:
    """The attack that `text` names, at `eps`.

    `random[-SAMPLES]`, `fgsm`, `rfgsm`, `bim[-STEPS]`, `pgd[-STEPS[xRESTARTS]]`,
    `apgd[-STEPS[xRESTARTS]]` (cross-entropy), `apgd-dlr[...]`, `apgd-margin[...]`, `apgd-t[...]`
    (targeted DLR), each of them through a surrogate as in `apgd-margin@soft-50` (also `@twin`,
    `@clipfree`, `@eot`, `@bits`), or with queries from its best point as in `apgd-50+200`;
    `fab[...]`, `fab-t[...]` (targeted), `square[-QUERIES]`, `standard`, `adaptive[-STEPS]` or
    `adaptive-t[-STEPS]` (its end towards targets). Without STEPS, BIM and PGD take the paper's
    schedule. Raises `UserError` for anything else.
    """
    match = re.fullmatch(
        r"([a-z]+(?:-[a-z]+)*)(?:@([a-z]+))?(?:-(\d+)(?:x(\d+))?)?(?:\+(\d+))?", text.lower()
    )
    own = match and (match[2] or match[5])  # what only APGD takes
    if match and match[1] in ATTACKS and (not own or match[1].startswith("apgd")):
        make, names = ATTACKS[match[1]]
        numbers = [int(number) for number in match.groups()[2:4] if number]
        options: dict[str, Any] = dict(zip(names, numbers, strict=False))
        if match[2] in _SURROGATES:
            options["surrogate"] = _SURROGATES[match[2]]
        if match[5]:
            options["queries"] = int(match[5])
        if len(numbers) <= len(names) and match[2] in (None, *_SURROGATES):
            return make(eps, **options)
    *known, last = ATTACKS
    like = near(re.split(r"[@+]|-\d", text)[0], ATTACKS)
    raise UserError(
        f"unknown attack {text!r}{like}: use {', '.join(known)} or {last}, with steps, restarts, "
        "surrogate and queries as in pgd-20, apgd-50x10 or apgd@soft-50+200"
    )


def parse_first_order(text: str, eps: float) -> FirstOrder:
    """`parse_attack`, where the last iterate is wanted; `UserError` for the others."""
    attack = parse_attack(text, eps)
    if isinstance(attack, FirstOrder):
        return attack
    raise UserError(
        f"this needs an attack with a last iterate: random, fgsm, rfgsm, bim or pgd; found {text!r}"
    )
