"""Attacks by the names of the command line."""

import re

from defquant.attacks.gradient import BIM, FGSM, PGD, RFGSM, FirstOrder, Random
from defquant.errors import UserError

__all__ = ["parse_attack"]


def parse_attack(text: str, eps: float) -> FirstOrder:
    """`random[-SAMPLES]`, `fgsm`, `rfgsm`, `bim[-STEPS]` or `pgd[-STEPS[xRESTARTS]]` at `eps`.

    Without STEPS, BIM and PGD take the paper's schedule. Raises `UserError` for anything else.
    """
    match = re.fullmatch(r"(random|r?fgsm|bim|pgd)(?:-(\d+))?(?:x(\d+))?", text.lower())
    name, steps, restarts = match.groups() if match else ("", None, None)
    count, again = int(steps) if steps else None, int(restarts or 1)
    if name == "random" and not restarts:
        return Random(eps, samples=count or 1)
    if name == "fgsm" and not steps:
        return FGSM(eps)
    if name == "rfgsm" and not steps:
        return RFGSM(eps)
    if name == "bim" and not restarts:
        return BIM(eps, steps=count)
    if name == "pgd" and (steps or not restarts):
        return PGD(eps, steps=count, restarts=again)
    raise UserError(
        f"unknown attack {text!r}: use random, fgsm, rfgsm, bim or pgd, with steps and restarts "
        "as in pgd-20 or pgd-50x10"
    )
