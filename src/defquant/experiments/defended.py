"""Defensive quantisation with other defences: Table 2 (SVHN) and Table 3 (CIFAR-10)."""

from defquant.experiments import paper
from defquant.experiments.compose import Trial, section, strong_trials
from defquant.experiments.defended_cells import (
    BLACK_BOX,
    WHITE_BOX,
    Defended,
    detector_cells,
    row_cells,
    table2_cells,
    table3_cells,
    table_cells,
    table_rows,
    table_substitute,
)
from defquant.experiments.defended_words import Measured, against_table, found, paper_slips
from defquant.experiments.scales import Scale
from defquant.experiments.section import Entry, Number, Section, Table, number
from defquant.experiments.squeezed import detector_table, unaware_table
from defquant.experiments.store import Results
from defquant.experiments.words import (
    adversary_text,
    attacks_text,
    bits_text,
    epochs_text,
    eps_text,
    listed,
    model_text,
    setting,
)

__all__ = [
    "Defended", "detector_cells", "row_cells", "table2", "table2_cells", "table3", "table3_cells",
    "table_cells", "table_rows", "table_substitute",
]  # fmt: skip


def table2(scale: Scale, results: Results) -> Section:
    """On SVHN, or on the images of Table 3 where SVHN is not at hand."""
    return _section(scale, results, 2)


def table3(scale: Scale, results: Results) -> Section:
    """On CIFAR-10."""
    return _section(scale, results, 3)


def _section(scale: Scale, results: Results, table: int) -> Section:
    measured = _measured(scale, results, table)
    images = (scale.svhn, "svhn") if table == 2 else (scale.data, "cifar10")
    return section(
        f"table{table}",
        f"Table {table}: DQ with other defences, {'SVHN' if table == 2 else 'CIFAR-10'}",
        [*_about(scale, results, table), *found(measured)],
        table_cells(scale, table),
        results,
        images=images,
        tables=[
            *(_table(measured, eps) for eps in scale.eps),
            against_table(measured),
            unaware_table(scale, results, table),
            detector_table(scale, results, table),
        ],
    )


def _trials(scale: Scale, table: int) -> list[Trial]:
    """The columns of the paper's table at every radius, and the strong attacks."""
    through = table_substitute(scale, table)
    found = []
    for eps in scale.eps:
        found += [Trial(scale, attack, eps) for attack in WHITE_BOX]
        found += [Trial(scale, attack, eps, through) for attack in BLACK_BOX]
        found += [trial for trial in strong_trials(scale) if trial.eps == eps]
    return [Trial(scale), *found]


def _measured(scale: Scale, results: Results, table: int) -> Measured:
    def ours(row: Defended, trial: Trial) -> Number:
        return number(results, [trial.cell(row.network)], _paper(table, row, trial))

    every = _trials(scale, table)
    return [(row, [(t, ours(row, t)) for t in every]) for row in table_rows(scale, table)]


def _paper(table: int, row: Defended, trial: Trial) -> float | None:
    """The paper's DQ rows have 1 bit."""
    if row.dq and row.bits != 1:
        return None
    attack = trial.attack + "(B)" * (trial.through is not None)
    return paper.defended(table, row.technique, row.dq, attack, trial.eps)


def _table(measured: Measured, eps: float) -> Table:
    """All rows at one radius, clean images beside it."""
    heads: tuple[str, ...] = ()
    rows: list[tuple[Entry, ...]] = []
    for row, pairs in measured:
        here = [(trial, n) for trial, n in pairs if trial.attack == "clean" or trial.eps == eps]
        heads = ("Training technique", *(trial.column for trial, _ in here))
        rows.append((row.name, *(n for _, n in here)))
    return Table(heads, tuple(rows), f"Accuracy at ε = {eps_text(eps)}; (B): black box.")


def _about(scale: Scale, results: Results, table: int) -> list[str]:
    train, data = (scale.svhn_train, scale.svhn) if table == 2 else (scale.train, scale.data)
    printed = "WRN-16-4, 160 epochs" if table == 2 else "WRN-28-10, 200 epochs"
    names = f"{model_text(scale.svhn_wrn if table == 2 else scale.wrn)}, DQ with β = {scale.beta:g}"
    rows = table_rows(scale, table)
    slips = paper_slips(table)
    adversary = next(row.network.train for row in rows if row.technique == "Adversarial R+FGSM")
    return [
        setting(names, printed, train, data, table_cells(scale, table), results)
        + attacks_text(scale, "Random", "FGSM", "R+FGSM", "FGSM(B)", long=["PGD", "PGD(B)"])
        + f" The black box goes through a full-precision {model_text(scale.vgg)} of another seed. "
        + f"Adversarial training: {epochs_text(adversary)} on {adversary_text(adversary)}"
        + (", or of PGD." if table == 3 else "."),
        " ".join(["The paper: DQ improves every technique, white box and black box.", *slips]),
        _bits(scale, table),
    ]


def _bits(scale: Scale, table: int) -> str:
    """Which bits are compared; in Table 3 the paper's "Normal" is known to be float."""
    own = listed(bits_text(bits) for bits in scale.defense_bits)
    paper_has = "the paper does not say of what bits its own is"
    if table == 3:
        paper_has = "so is the paper's: it is the full-precision row of its Table 1"
    return (
        f"“Normal” is full precision ({paper_has}) and DQ has {own} (the paper: 1 bit), so the "
        "rows differ in bits as well as in DQ. Table 1 has vanilla and DQ at equal bits."
    )
