"""The range of activations: Table 4, ReLU1 against ReLU6."""

from defquant.experiments import paper
from defquant.experiments.cells import Cell, Network
from defquant.experiments.compose import Trial, section, trials
from defquant.experiments.scales import Scale
from defquant.experiments.section import Number, Section, Table, difference, number
from defquant.experiments.standard import attacked, clean
from defquant.experiments.store import Results
from defquant.experiments.words import (
    attacks_text,
    blind,
    model_text,
    percent,
    setting,
    signed,
    tally,
)

__all__ = ["table4", "table4_cells", "table4_networks"]

BITS = 4
RANGES = (1.0, 6.0)


def table4_networks(scale: Scale) -> dict[tuple[bool, float], Network]:
    """ResNet-18 at 4 bits, by (is it DQ, upper end of the range)."""
    return {
        (beta > 0, high): scale.network(scale.resnet, bits=BITS, beta=beta, high=high)
        for beta in (0.0, scale.beta)
        for high in RANGES
    }


def table4_cells(scale: Scale) -> list[Cell]:
    """Clean accuracy as in the paper; FGSM beside it."""
    networks = table4_networks(scale).values()
    return [c for n in networks for c in (clean(scale, n), *attacked(scale, n, "fgsm"))]


def table4(scale: Scale, results: Results) -> Section:
    """ReLU1 beside ReLU6, vanilla and DQ; clean as in the paper, then under FGSM."""
    every = [t for t in trials(scale) if t.attack not in scale.strong]
    rows = [
        (dq, trial, _ranges(scale, results, dq, trial)) for trial in every for dq in (False, True)
    ]
    table = Table(
        ("Quantisation", "Images", "ReLU1", "ReLU6", "Difference"),
        tuple((_name(scale, dq), trial.name, *numbers) for dq, trial, numbers in rows),
        "Accuracy; Difference is ReLU1 minus ReLU6. The paper has clean images only.",
    )
    found = [_words(_name(scale, dq), trial, numbers) for dq, trial, numbers in rows]
    plain, defended = (numbers[:2] for _, trial, numbers in rows if trial.attack == "clean")
    counted = tally(zip(defended, plain, strict=True))
    found += [f"DQ against vanilla, over both ranges: {counted}."] if counted else []
    masked = blind((_name(scale, dq), n) for dq, _, numbers in rows for n in numbers)
    return section(
        "table4",
        "Table 4: ReLU1 against ReLU6",
        [*_about(scale, results), " ".join(filter(None, found)), masked],
        table4_cells(scale),
        results,
        images=(scale.data, "cifar10"),
        tables=[table],
    )


def _ranges(scale: Scale, results: Results, dq: bool, trial: Trial) -> tuple[Number, ...]:
    """ReLU1, ReLU6 and their difference."""
    networks, clean_images = table4_networks(scale), trial.attack == "clean"
    one, six = (
        number(
            results,
            [trial.cell(networks[dq, high])],
            paper.share(paper.TABLE4[dq, high]) if clean_images else None,
        )
        for high in RANGES
    )
    printed = paper.share(paper.TABLE4_DIFFERENCE[dq]) if clean_images else None
    return one, six, difference(one, six, printed)


def _name(scale: Scale, dq: bool) -> str:
    return f"DQ (β = {scale.beta:g})" if dq else "vanilla"


def _about(scale: Scale, results: Results) -> list[str]:
    """What is measured and what the paper has."""
    names = f"{model_text(scale.resnet)} at {BITS} bits"
    return [
        setting(
            names, "ResNet of unnamed depth", scale.train, scale.data, table4_cells(scale), results
        )
        + attacks_text(scale, "FGSM", strong=False),
        "Activations are cut at 1 or at 6; the two could compute the same, but train differently. "
        f"The paper: on clean images ReLU1 loses {-paper.TABLE4_DIFFERENCE[False]} points with "
        f"vanilla quantisation, and gains {paper.TABLE4_DIFFERENCE[True]} with DQ, which is better "
        "than vanilla at both ranges.",
    ]


def _words(name: str, trial: Trial, numbers: tuple[Number, ...]) -> str:
    one, six, gap = numbers
    if trial.attack != "clean" or one.mean is None or six.mean is None or gap.mean is None:
        return ""
    return (
        f"Ours on clean images, {name}: ReLU1 {percent(one.mean)}, ReLU6 {percent(six.mean)}, "
        f"difference {signed(gap.mean)} points."
    )
