"""White box against black box over activation bits: Figure 5."""

from collections.abc import Sequence
from functools import partial

from defquant.experiments import paper
from defquant.experiments.bits_cells import fig5_beta, fig5_cells, table1_networks
from defquant.experiments.compose import Trial, section
from defquant.experiments.curves import Row, bits_panel, bits_row, bits_table
from defquant.experiments.scales import Scale
from defquant.experiments.section import Section
from defquant.experiments.standard import substitute
from defquant.experiments.store import Results
from defquant.experiments.words import attacks_text, method_text, model_text, setting, tally

__all__ = ["fig5"]


def fig5(scale: Scale, results: Results) -> Section:
    """White box and black box over bits, vanilla and DQ."""
    groups = _fig5_groups(scale, results)
    rows = [row for group in groups for row in group]
    caption = (
        "Accuracy by activation bits; (B): the images were made on another network. The paper's "
        "black box is printed in no table, and its white box is taken from its Table 1, β = 1e-3: "
        "it does not say which β it drew."
    )
    return section(
        "fig5",
        "Figure 5: white box and black box against activation bits",
        [*_fig5_about(scale, results), _fig5_words(groups), _fig5_masking(groups)],
        fig5_cells(scale),
        results,
        images=(scale.data, "cifar10"),
        tables=[bits_table(rows, caption)],
        panels=[bits_panel(group[0].trial.name, group) for group in groups],
    )


def _fig5_groups(scale: Scale, results: Results) -> list[list[Row]]:
    """Vanilla and DQ under each trial: clean, then white box and black box at every radius."""
    seeds = [table1_networks(scale, seed) for seed in scale.seeds]
    both = [
        Trial(scale, "fgsm", eps, through)
        for eps in scale.eps
        for through in (None, substitute(scale))
    ]
    return [
        [
            bits_row(
                results, method_text(beta), trial, [by_beta[beta] for by_beta in seeds],
                partial(_fig5_paper, row, trial),
            )
            for row, beta in ((0, 0.0), (3, fig5_beta(scale)))
        ]
        for trial in (Trial(scale), *both)
    ]  # fmt: skip


def _fig5_paper(row: int, trial: Trial, bits: int | None) -> float | None:
    return None if trial.through else paper.table1(row, trial.attack, trial.eps, bits)


def _fig5_about(scale: Scale, results: Results) -> list[str]:
    names = f"{model_text(scale.wrn)}, vanilla and DQ (β = {fig5_beta(scale):g})"
    return [
        setting(
            names,
            "WRN-28-10, 200 epochs",
            scale.train,
            scale.data,
            fig5_cells(scale),
            results,
            seeds=len(scale.seeds),
        )
        + attacks_text(scale, "FGSM", "FGSM(B)", strong=False)
        + f" The black box goes through a full-precision {model_text(scale.vgg)} of another seed.",
        "The paper: white box and black box agree; vanilla quantisation loses robustness, DQ wins "
        "it back and more, so that its gain is not masking.",
    ]


def _fig5_words(groups: Sequence[Sequence[Row]]) -> str:
    """DQ against vanilla at the same bits, trial by trial."""
    counts = [
        (own[0].trial.name, tally(zip(own[1].numbers, own[0].numbers, strict=True)))
        for own in groups
    ]
    words = "; ".join(f"{name} {counted}" for name, counted in counts if counted)
    return f"DQ against vanilla at the same bits: {words}." if words else ""


def _fig5_masking(groups: Sequence[Sequence[Row]]) -> str:
    """How often the white box leaves more than the black box, the sign of masking."""
    _, *attacked = groups
    pairs = [
        pair
        for white, black in zip(attacked[::2], attacked[1::2], strict=True)
        for ours, through in zip(white, black, strict=True)
        for pair in zip(ours.numbers, through.numbers, strict=True)
    ]
    counted = tally(pairs)
    sign = "More accuracy left by the white box than by the black box is a sign of masked gradients"
    return f"{sign}: over all radii and bits the white box is {counted}." if counted else ""
