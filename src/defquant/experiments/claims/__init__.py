"""The paper's claims, each with a verdict computed from results. No torch."""

from defquant.experiments.cells import Cell
from defquant.experiments.claims import (
    amplification,
    appendix,
    combined,
    defense,
    masking,
    quantization,
)
from defquant.experiments.claims.evidence import Evidence, evidence_of
from defquant.experiments.claims.questions import Claim
from defquant.experiments.scales import Scale
from defquant.experiments.section import Verdict
from defquant.experiments.store import Results

__all__ = ["CLAIMS", "cells", "verdicts"]

CLAIMS = (
    *quantization.CLAIMS,
    *amplification.CLAIMS,
    *defense.CLAIMS,
    *combined.CLAIMS,
    *masking.CLAIMS,
    *appendix.CLAIMS,
)


def verdicts(scale: Scale, results: Results) -> tuple[Verdict, ...]:
    """Every claim with a reading for each attack.

    A reading's interval covers the choice of test images and, where some setting was trained with
    several seeds, the chance in training. 5 in 100 intervals miss; readings are not corrected for
    there being many of them.
    """
    evidence = evidence_of(scale, results)
    return tuple(
        _verdict(f"C{i}", claim, scale, evidence) for i, claim in enumerate(CLAIMS, start=1)
    )


def cells(scale: Scale) -> list[Cell]:
    """All cells that the claims read, each once."""
    asked = (question for claim in CLAIMS for question in claim.questions(scale))
    return list(dict.fromkeys(cell for question in asked for cell in question.cells))


def _verdict(name: str, claim: Claim, scale: Scale, evidence: Evidence) -> Verdict:
    return Verdict(
        name=name,
        where=claim.where,
        claim=claim.claim,
        paper=claim.paper,
        readings=tuple(question.answer(evidence) for question in claim.questions(scale)),
        note=claim.note,
        command=f"defquant reproduce {claim.experiments} --preset {scale.name}",
    )
