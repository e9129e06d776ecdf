"""Every table and figure by its name on the command line."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from defquant.experiments import (
    amplification,
    beta,
    bits,
    defended,
    masking,
    pictures,
    ranges,
    surrogates,
)
from defquant.experiments.cells import Cell
from defquant.experiments.scales import Scale
from defquant.experiments.section import Section
from defquant.experiments.store import Results

__all__ = ["EXPERIMENTS", "Experiment", "cells_of"]


@dataclass(frozen=True)
class Experiment:
    """`cells` says what to train and to measure, `render` makes the section of what is there."""

    title: str
    cells: Callable[[Scale], list[Cell]]
    render: Callable[[Scale, Results], Section]


EXPERIMENTS: Mapping[str, Experiment] = {
    "fig1": Experiment("accuracy against bits", bits.fig1_cells, bits.fig1),
    "fig3": Experiment("error amplification", amplification.fig3_cells, amplification.fig3),
    "table1": Experiment("vanilla and DQ against bits", bits.table1_cells, bits.table1),
    "fig5": Experiment("white box and black box against bits", bits.fig5_cells, bits.fig5),
    "table2": Experiment("DQ with other defences, SVHN", defended.table2_cells, defended.table2),
    "table3": Experiment("the same, CIFAR-10", defended.table3_cells, defended.table3),
    "table4": Experiment("ReLU1 against ReLU6", ranges.table4_cells, ranges.table4),
    "table5": Experiment("tanh quantisation", masking.table5_cells, masking.table5),
    "table6": Experiment("FGSM training", masking.table6_cells, masking.table6),
    "fig6": Experiment("accuracy against beta", beta.fig6_cells, beta.fig6),
    "fig7": Experiment("pictures with predictions", pictures.fig7_cells, pictures.fig7),
    "surrogates": Experiment(
        "beyond the paper: what the straight-through gradient overstates",
        surrogates.surrogates_cells,
        surrogates.surrogates,
    ),
}


def cells_of(names: Iterable[str], scale: Scale) -> list[Cell]:
    """The union of the experiments' cells, each once."""
    return list(dict.fromkeys(cell for name in names for cell in EXPERIMENTS[name].cells(scale)))
