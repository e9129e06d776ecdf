"""Tables 2 and 3 in words: what the paper's numbers say of its text, and what ours show."""

from collections.abc import Iterator, Sequence

from defquant.experiments import paper
from defquant.experiments.compose import Trial
from defquant.experiments.defended_cells import Defended
from defquant.experiments.section import Number, Table
from defquant.experiments.words import blind, listed, tally, untrained

__all__ = ["Measured", "against_table", "found", "paper_slips"]

Measured = Sequence[tuple[Defended, Sequence[tuple[Trial, Number]]]]
"""Every row with its trials, the same in each, and their numbers."""


BOXES = ("clean", "white box", "black box")


def found(measured: Measured) -> list[str]:
    """DQ over all techniques, the sign of masking, vanishing gradients."""
    every = [_against(measured, row) for row, _ in measured if row.dq]
    counts = {box: tally(pair for pairs in every for pair in pairs[box]) for box in BOXES}
    parts = "; ".join(f"{box} {counted}" for box, counted in counts.items() if counted)
    over_all = f"DQ against the same technique without it, over all rows and ε: {parts}."
    numbers = ((row.name, n) for row, pairs in measured for _, n in pairs)
    clean = ((row.name, n) for row, pairs in measured for t, n in pairs if t.attack == "clean")
    return [over_all if parts else "", _masking(measured), blind(numbers), untrained(clean)]


def against_table(measured: Measured) -> Table:
    """Each row with DQ against that without, counted over attacks and radii."""
    rows = [
        (row.name, *(tally(_against(measured, row)[box]) or None for box in BOXES))
        for row, _ in measured
        if row.dq
    ]
    caption = (
        "Where the accuracy lies against that of the same technique without DQ, over all attacks "
        "but Random and all ε."
    )
    return Table(("Training technique", *(box.capitalize() for box in BOXES)), tuple(rows), caption)


def _against(measured: Measured, row: Defended) -> dict[str, list[tuple[Number, Number]]]:
    """The numbers of a row with DQ beside those without it."""
    with_dq = next(pairs for r, pairs in measured if r == row)
    without = next(p for r, p in measured if r.technique == row.technique and not r.dq)
    found: dict[str, list[tuple[Number, Number]]] = {box: [] for box in BOXES}
    for (trial, ours), (_, plain) in zip(with_dq, without, strict=True):
        if trial.attack == "clean":
            found["clean"].append((ours, plain))
        elif trial.attack != "random":
            found["black box" if trial.through else "white box"].append((ours, plain))
    return found


def _masking(measured: Measured) -> str:
    """How often the white box leaves more than the black box of the same attack and radius."""
    parts, total = [], 0
    for row, pairs in measured:
        gaps = list(_boxes(pairs))
        above = sum(gap > 0 for gap in gaps)
        total += len(gaps)
        parts += [f"{row.name} at {above} of {len(gaps)}"] * (above > 0)
    where = "; ".join(parts) or f"at none of {total}"
    sign = "More left by the white box than by the black box is a sign of masked gradients"
    return f"{sign}: {where} pairs of FGSM or PGD at one ε." if total else ""


def _boxes(pairs: Sequence[tuple[Trial, Number]]) -> Iterator[float]:
    """White box minus black box."""
    white = {(t.attack, t.eps): n.mean for t, n in pairs if t.through is None}
    for trial, black in pairs:
        mean = white[trial.attack, trial.eps]
        if trial.through is not None and mean is not None and black.mean is not None:
            yield mean - black.mean


def paper_slips(table: int) -> list[str]:
    """Where the paper's own numbers contradict its text on black boxes and on masking."""
    falls, masked = _falls(table), _masked(table)
    improves = (
        "That it “consistently improves the black-box robustness” is not what its numbers say. "
        f"With DQ these fall: {listed(falls)}."
    )
    sign = (
        f"White-box FGSM leaves more than black-box FGSM for {listed(masked)}: by its own rule a "
        "sign of masked gradients."
    )
    return [improves] * bool(falls) + [sign] * bool(masked)


def _falls(table: int) -> list[str]:
    """Black-box cells of the paper in which DQ has less than its technique alone."""
    every = paper.TABLE2 if table == 2 else paper.TABLE3
    return [
        f"{technique} {attack.upper()} at {eps} ({before} to {after})"
        for technique in dict.fromkeys(technique for technique, _ in every)
        for attack in ("fgsm(B)", "pgd(B)")
        for eps, before, after in zip(
            paper.DEFENSE_EPS,
            every[technique, False][1][attack],
            every[technique, True][1][attack],
            strict=True,
        )
        if after < before
    ]


def _masked(table: int) -> list[str]:
    """Cells of the paper in which white-box FGSM leaves more than black-box FGSM."""
    every = paper.TABLE2 if table == 2 else paper.TABLE3
    return [
        f"{technique}{' + DQ' * dq} at {eps} ({white} and {black})"
        for (technique, dq), (_, values) in every.items()
        for eps, white, black in zip(
            paper.DEFENSE_EPS, values["fgsm"], values["fgsm(B)"], strict=True
        )
        if white > black
    ]
