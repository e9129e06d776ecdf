"""The weight of the penalty: Figure 6, and how a beta is chosen on validation images."""

from collections.abc import Sequence

from defquant.experiments import paper
from defquant.experiments.cells import Cell, Network
from defquant.experiments.compose import Trial, paper_line, section, trials
from defquant.experiments.scales import Scale
from defquant.experiments.section import Line, Number, Panel, Section, Table, number
from defquant.experiments.standard import attacked, clean, dq, hard, vanilla
from defquant.experiments.store import Results
from defquant.experiments.words import (
    attack_text,
    attacks_text,
    blind,
    eps_text,
    listed,
    model_text,
    percent,
    setting,
)

__all__ = ["chosen_beta", "fig6", "fig6_cells", "fig6_networks", "validation_cell"]

BITS = 4
JUDGE = "pgd-20"  # the attack by which beta is chosen


def fig6_networks(scale: Scale) -> dict[float, Network]:
    """By beta, vanilla at 0, all at 4 bits."""
    return {0.0: vanilla(scale, BITS)} | {beta: dq(scale, BITS, beta) for beta in scale.betas}


def fig6_cells(scale: Scale) -> list[Cell]:
    """Test images for the figure, validation images for the choice."""
    cells = []
    for network in fig6_networks(scale).values():
        cells += [clean(scale, network), *attacked(scale, network, "fgsm"), *hard(scale, network)]
        chosen_by = validation_cell(scale, network)
        cells += [] if chosen_by is None else [chosen_by]
    return cells


def validation_cell(scale: Scale, network: Network) -> Cell | None:
    """By what beta is chosen; None where no images are held out for it."""
    if not scale.data.validation_images:
        return None
    images = min(scale.data.validation_images, 2 * (scale.few or 1000))
    return Cell(network, "accuracy", JUDGE, scale.hard_eps[0], images, "validation")


def chosen_beta(scale: Scale, results: Results) -> float | None:
    """The one of `scale.betas` with the highest validation accuracy, the smaller of equals.

    None where no images are held out, and until all have been measured.
    """
    networks = fig6_networks(scale)
    found = {beta: _validated(scale, results, networks[beta]).mean for beta in sorted(scale.betas)}
    known = {beta: mean for beta, mean in found.items() if mean is not None}
    return max(known, key=known.__getitem__) if found and len(known) == len(found) else None


def _validated(scale: Scale, results: Results, network: Network) -> Number:
    cell = validation_cell(scale, network)
    return Number(None) if cell is None else number(results, [cell])


def fig6(scale: Scale, results: Results) -> Section:
    """Accuracy over beta on the test images, and the choice on the validation images."""
    columns = [(trial, _numbers(results, trial)) for trial in trials(scale)]
    networks = fig6_networks(scale)
    validated = [_validated(scale, results, network) for network in networks.values()]
    rows = zip(map(_axis, networks), *(numbers for _, numbers in columns), validated, strict=True)
    heads = ("β", *(trial.name for trial, _ in columns), f"{_judge(scale)}, validation")
    return section(
        "fig6",
        "Figure 6: accuracy against β",
        [*_about(scale, results), *_found(scale, results, columns)],
        fig6_cells(scale),
        results,
        images=(scale.data, "cifar10"),
        tables=[Table(heads, tuple(rows), _CAPTION)],
        panels=_panels(scale, columns),
    )


_CAPTION = (
    "Accuracy at 4 bits by β, vanilla at β = 0; the last column is on held-out training images. "
    "The paper's numbers are those of its Table 1 for the same β; its figure prints none."
)


def _axis(beta: float) -> str:
    return f"{beta:g}"


def _judge(scale: Scale) -> str:
    return f"{attack_text(JUDGE)} {eps_text(scale.hard_eps[0])}"


def _numbers(results: Results, trial: Trial) -> list[Number]:
    networks = fig6_networks(trial.scale)
    return [
        number(results, [trial.cell(n)], paper.at_4_bits(beta, trial.attack, trial.eps))
        for beta, n in networks.items()
    ]


def _panels(scale: Scale, columns: Sequence[tuple[Trial, Sequence[Number]]]) -> list[Panel]:
    """Clean and FGSM as in the paper, then the strong attacks; a colour for each radius."""
    places = list(map(_axis, fig6_networks(scale)))
    lines: dict[bool, list[Line]] = {False: [], True: []}
    for trial, numbers in columns:
        points = tuple(zip(places, numbers, strict=True))
        kind = eps_text(trial.eps) if trial.attack == "fgsm" else trial.name
        line = Line(trial.name, points, kind)
        lines[trial.attack in scale.strong] += [line, *paper_line(line)]
    titles = {False: "clean and FGSM", True: listed(map(attack_text, scale.strong))}
    return [Panel(titles[key], "β", "accuracy", tuple(own)) for key, own in lines.items()]


def _about(scale: Scale, results: Results) -> list[str]:
    names = f"{model_text(scale.wrn)} at 4 bits, vanilla (β = 0) and DQ"
    test = fig6_cells(scale)
    return [
        setting(names, "WRN-28-10, 200 epochs", scale.train, scale.data, test, results)
        + attacks_text(scale, "FGSM"),
        f"The paper: adversarial accuracy rises up to β = {paper.BEST_BETA:g} and then slowly "
        "falls; clean accuracy is steadier. It studies 4 bits, while its default is 1 bit.",
    ]


def _found(
    scale: Scale, results: Results, columns: Sequence[tuple[Trial, Sequence[Number]]]
) -> list[str]:
    said = " ".join(filter(None, (_peak(scale, trial, numbers) for trial, numbers in columns)))
    names = [f"β = {beta:g}" for beta in fig6_networks(scale)]
    masked = blind(pair for _, numbers in columns for pair in zip(names, numbers, strict=True))
    return [said, _choice(scale, results), masked]


def _peak(scale: Scale, trial: Trial, numbers: Sequence[Number]) -> str:
    """Where the numbers over all beta are highest and lowest; empty where one is missing."""
    pairs = zip(fig6_networks(scale), numbers, strict=True)
    means = {beta: n.mean for beta, n in pairs if n.mean is not None}
    if len(means) < len(numbers):
        return ""
    high, low = max(means, key=means.__getitem__), min(means, key=means.__getitem__)
    return (
        f"{trial.name}: highest at β = {high:g} ({percent(means[high])}), lowest at β = {low:g} "
        f"({percent(means[low])})."
    )


def _choice(scale: Scale, results: Results) -> str:
    used = f"the other sections use β = {scale.beta:g}"
    if not scale.data.validation_images:
        return f"No training images are held out at this scale, so nothing chooses β; {used}."
    chosen, cell = chosen_beta(scale, results), validation_cell(scale, vanilla(scale, BITS))
    if chosen is None or cell is None:
        return f"β is chosen when every validation accuracy is there; {used}."
    return (
        f"By {_judge(scale)} on {cell.images:,} held-out training images β = {chosen:g} is the "
        f"best of {len(scale.betas)}; {used}."
    )
