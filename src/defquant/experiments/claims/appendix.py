"""Claims of appendices B and C: Figures 6 and 7. No torch."""

from collections.abc import Iterator, Mapping, Sequence
from math import comb
from typing import Any

from defquant.experiments.beta import fig6_networks
from defquant.experiments.claims.evidence import Row
from defquant.experiments.claims.questions import (
    Asked,
    Chosen,
    Claim,
    Contrast,
    Counts,
    less,
    versus,
)
from defquant.experiments.claims.rows import white_box
from defquant.experiments.compose import Trial
from defquant.experiments.pictures import fig7_cells
from defquant.experiments.scales import Scale

__all__ = ["CLAIMS"]


def _by_beta(scale: Scale, trial: Trial) -> dict[str, Row]:
    return {f"{beta:g}": (trial.cell(n),) for beta, n in fig6_networks(scale).items()}


def _peak(scale: Scale) -> Iterator[Asked]:
    """The best beta inside is chosen on the same images: the intervals allow for every choice."""
    what = "best beta that is neither the smallest nor the largest, minus both of these"
    for trial in white_box(scale):
        rows = _by_beta(scale, trial)
        yield Chosen(trial.name, what, rows, _inside, comparisons=2 * (len(rows) - 2))


def _inside(means: Mapping[str, float], rows: Mapping[str, Row]) -> Sequence[Contrast]:
    first, *inner, last = rows
    best = max(inner, key=lambda name: means[name])
    return [versus(f"beta {best} minus {end}", [rows[best]], [rows[end]]) for end in (first, last)]


def _stable(scale: Scale) -> Iterator[Asked]:
    """The intervals allow for every choice of the two betas, clean and attacked."""
    clean = {f"clean {name}": row for name, row in _by_beta(scale, Trial(scale)).items()}
    for trial in white_box(scale):
        rows = clean | _by_beta(scale, trial)
        pairs = comb(len(clean), 2)
        what = "range over beta under attack minus the clean range"
        yield Chosen(trial.name, what, rows, _ranges, comparisons=pairs**2)


def _ranges(means: Mapping[str, float], rows: Mapping[str, Row]) -> Sequence[Contrast]:
    clean = [name for name in rows if name.startswith("clean")]
    attacked = [name for name in rows if name not in clean]
    a, b = (_range(names, means, rows) for names in (attacked, clean))
    return [less("ranges", a, b)]


def _range(names: Sequence[str], means: Mapping[str, float], rows: Mapping[str, Row]) -> Contrast:
    ordered = sorted(names, key=lambda name: means[name])
    return versus("range", [rows[ordered[-1]]], [rows[ordered[0]]])


def _confidence(scale: Scale) -> Iterator[Asked]:
    row = tuple(fig7_cells(scale))
    kinds = (
        ("VQ or DQ fooled", "of the pictures that fool one of VQ and DQ, VQ", _vq_fooled, 1 / 2),
        ("all fooled", "of the pictures that fool all, DQ is least sure", _least_sure, 1 / 3),
        ("FP and DQ right", "of the pictures that fool neither, DQ is surer", _surer, 1 / 2),
    )
    for name, what, count, chance in kinds:
        yield Counts(f"{Trial(scale, 'fgsm', row[0].eps).name}, {name}", what, row, count, chance)


Picture = tuple[tuple[bool, float], ...]
"""Under attack, of FP, VQ and DQ: whether it is right, and how sure of its answer."""


def _pictures(values: Sequence[Any]) -> list[Picture]:
    shown = zip(*(value["examples"] for value in values), strict=True)
    return [tuple(_answer(example) for example in picture) for picture in shown]


def _answer(example: Any) -> tuple[bool, float]:
    answer = example["adversarial"]
    return answer["prediction"] == example["label"], float(answer["confidence"])


def _vq_fooled(values: Sequence[Any]) -> tuple[int, int]:
    lone = [vq for _, (vq, _), (dq, _) in _pictures(values) if vq != dq]
    return lone.count(False), len(lone)


def _least_sure(values: Sequence[Any]) -> tuple[int, int]:
    fooled = [p for p in _pictures(values) if not any(right for right, _ in p)]
    least = [dq < min(fp, vq) for (_, fp), (_, vq), (_, dq) in fooled]
    return sum(least), len(least)


def _surer(values: Sequence[Any]) -> tuple[int, int]:
    both = [(fp[1], dq[1]) for fp, _, dq in _pictures(values) if fp[0] and dq[0]]
    return sum(dq > fp for fp, dq in both), len(both)


CLAIMS = (
    Claim(
        "beta-peak",
        "appendix B, Figure 6",
        "At 4 bits, the adversarial accuracy first gets larger as beta increases, and goes down "
        "afterwards.",
        "Figure 6: a drawing; the peak is at beta 0.002",
        "fig6",
        _peak,
        "Appendix B studies 4 bits; the default elsewhere, beta 0.002, is used with 1 bit.",
    ),
    Claim(
        "clean-more-stable",
        "appendix B, Figure 6",
        "The clean accuracy is more stable in beta than the adversarial one.",
        "Figure 6: a drawing",
        "fig6",
        _stable,
    ),
    Claim(
        "surer",
        "appendix C, Figure 7",
        "VQ misclassifies more adversarial samples than DQ; where all are fooled, DQ is the least "
        "confident; where FP and DQ are right, DQ is the more confident.",
        "8 pictures: 1, 2, 4, 6 fool VQ; DQ is least sure on 3 and 8, surer than FP on 1, 4, 6",
        "fig7",
        _confidence,
        "Eight chosen pictures; the attack is not named.",
    ),
)
