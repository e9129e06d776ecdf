"""Accuracy against activation bits: Figure 1, Table 1 and Figure 5."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise

from defquant.experiments import paper
from defquant.experiments.bits_cells import (
    fig1_cells,
    fig1_networks,
    fig5_beta,
    fig5_cells,
    table1_cells,
    table1_networks,
)
from defquant.experiments.boxes import fig5
from defquant.experiments.compose import Trial, section, trials
from defquant.experiments.curves import Row, bits_panel, bits_row, bits_table, blind_rows
from defquant.experiments.scales import Scale
from defquant.experiments.section import Number, Section, difference
from defquant.experiments.store import Results
from defquant.experiments.words import (
    amount,
    attacks_text,
    listed,
    method_text,
    model_text,
    setting,
    signed,
    tally,
)

__all__ = [
    "fig1", "fig1_cells", "fig1_networks", "fig5", "fig5_beta", "fig5_cells", "table1",
    "table1_cells", "table1_networks",
]  # fmt: skip


def fig1(scale: Scale, results: Results) -> Section:
    """Vanilla VGG and Wide ResNet over bits, clean and attacked."""
    cells = fig1_cells(scale)
    rows = [
        bits_row(results, name, trial, [networks], partial(_fig1_paper, name, trial))
        for trial in trials(scale)
        for name, networks in fig1_networks(scale).items()
    ]
    by_trial = [[row for row in rows if row.trial == trial] for trial in trials(scale)]
    by_name = [[row for row in rows if row.name == name] for name in fig1_networks(scale)]
    return section(
        "fig1",
        "Figure 1: accuracy against activation bits",
        [*_fig1_about(scale, results), *map(_fig1_words, by_name), blind_rows(rows)],
        cells,
        results,
        images=(scale.data, "cifar10"),
        tables=[bits_table(rows, "Accuracy by activation bits.", [("5 bits − full", _fifth)])],
        panels=[bits_panel(group[0].trial.name, group) for group in by_trial],
    )


def _fig1_about(scale: Scale, results: Results) -> list[str]:
    names = f"{model_text(scale.vgg)} and {model_text(scale.wrn)}, vanilla"
    loss = listed(f"{points} points ({name})" for name, points in paper.LOSS_AT_5_BITS.items())
    return [
        setting(
            names,
            "VGG-16 and WRN-28-10, 200 epochs",
            scale.train,
            scale.data,
            fig1_cells(scale),
            results,
        )
        + attacks_text(scale, "FGSM"),
        "The paper: 5 bits cost nothing on clean images, but under FGSM at 8/255 they lose "
        f"{loss}. Its Wide ResNet seems to be the vanilla row of its Table 1, where it is 9.1; the "
        "rest of its figure is printed in no table.",
    ]


def _fig1_paper(name: str, trial: Trial, bits: int | None) -> float | None:
    known = name == "Wide ResNet"
    return paper.table1(0, trial.attack, trial.eps, bits) if known else None


def _fifth(row: Row) -> Number:
    """5 bits minus full precision, beside the loss that the paper's section 3 gives."""
    at_paper = row.trial.attack == "fgsm" and paper.is_eps(row.trial.eps)
    lost = paper.LOSS_AT_5_BITS.get(row.name) if at_paper else None
    return difference(row.at(5), row.at(None), None if lost is None else -lost / 100)


def _fig1_words(rows: Sequence[Row]) -> str:
    words = "; ".join(filter(None, (row.words() for row in rows)))
    what = "bit widths against full precision, whose accuracy is in brackets"
    return f"{rows[0].name}, {what}: {words}." if words else ""


def table1(scale: Scale, results: Results) -> Section:
    """Vanilla and DQ over bits, with Quantize Gain and Best Acc."""
    rows = _table1_rows(scale, results)
    names = list(dict.fromkeys(row.name for row in rows))
    ends = [("Quantize Gain", partial(_gain, names)), ("Best", partial(_best, names))]
    ours = listed(f"{beta:g}" for beta in scale.table1_betas)
    caption = (
        "Accuracy by activation bits; the paper has clean images and FGSM at 8/255. Its three "
        f"DQ rows (β = 3e-4, 6e-4 and 1e-3) stand in order beside ours (β = {ours}): a short "
        "training needs a larger β. Quantize Gain: the best bit width minus full precision, the "
        "best of several against one. Best: the highest of the row."
    )
    return section(
        "table1",
        "Table 1: vanilla and defensive quantisation",
        [*_table1_about(scale, results), *_table1_found(scale, rows), blind_rows(rows)],
        table1_cells(scale),
        results,
        images=(scale.data, "cifar10"),
        tables=[bits_table(rows, caption, ends)],
    )


def _table1_rows(scale: Scale, results: Results) -> list[Row]:
    seeds = [table1_networks(scale, seed) for seed in scale.seeds]
    rows = []
    for index, beta in enumerate((0.0, *scale.table1_betas)):
        for trial in trials(scale):
            printed = partial(paper.table1, index, trial.attack, trial.eps)
            networks = [by_beta[beta] for by_beta in seeds]
            rows.append(bits_row(results, method_text(beta), trial, networks, printed))
    return rows


def _gain(names: Sequence[str], row: Row) -> Number | None:
    """None for clean images, as in the paper."""
    printed = paper.table1_end(names.index(row.name), row.trial.attack, row.trial.eps, "gain")
    return None if row.trial.attack == "clean" else replace(row.gain, paper=printed)


def _best(names: Sequence[str], row: Row) -> Number | None:
    printed = paper.table1_end(names.index(row.name), row.trial.attack, row.trial.eps, "best")
    return None if row.trial.attack == "clean" else replace(row.best, paper=printed)


def _table1_about(scale: Scale, results: Results) -> list[str]:
    printed = list(paper.TABLE1.values())
    lost = amount(printed[0]["gain"] / 100)
    gains = listed(signed(row["gain"] / 100) for row in printed[1:])
    return [
        setting(
            model_text(scale.wrn),
            "WRN-28-10, 200 epochs",
            scale.train,
            scale.data,
            table1_cells(scale),
            results,
            seeds=len(scale.seeds),
        )
        + attacks_text(scale, "FGSM"),
        f"The paper: vanilla's best bit width stays {lost} points below full precision; with DQ, "
        f"Quantize Gain is {gains} as β grows. Its section 3 prints "
        f"{paper.LOSS_AT_5_BITS['Wide ResNet']} for the loss at 5 bits that this table has as "
        f"{lost}. Fewer bits are not always better there: at β = 1e-3, 5 bits are the best.",
    ]


def _table1_found(scale: Scale, rows: Sequence[Row]) -> list[str]:
    """Gains, DQ against vanilla and the direction of bits: at the paper's attack and the strong."""
    attacks = [t for t in trials(scale) if t.attack != "clean"]
    shown = [t for t in attacks if t.attack != "fgsm" or t.eps == scale.paper_eps]
    return [_table1_words([row for row in rows if row.trial == trial]) for trial in shown]


def _table1_words(rows: Sequence[Row]) -> str:
    vanilla, *defended = rows
    gains = [f"{r.name} {signed(r.gain.mean)}" for r in rows if r.gain.mean is not None]
    pairs = [pair for r in defended for pair in zip(r.numbers, vanilla.numbers, strict=True)]
    words = [f"Quantize Gain: {listed(gains)}."] if gains else []
    if counted := tally(pairs):
        words.append(f"DQ against vanilla at the same bits: {counted}.")
    steps = [step for row in defended for step in pairwise(n.mean for n in row.quantised)]
    falls = [more < fewer for fewer, more in steps if fewer is not None and more is not None]
    if falls:
        words.append(f"One bit more lowers DQ's accuracy in {sum(falls)} of {len(falls)} steps.")
    return f"{vanilla.trial.name}: {' '.join(words)}" if words else ""
