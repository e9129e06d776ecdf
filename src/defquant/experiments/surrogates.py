"""What the straight-through gradient overstates, by bits 1 to 8; beyond the paper."""

from collections.abc import Sequence
from dataclasses import replace

from defquant.experiments.bits_cells import fig1_networks
from defquant.experiments.cells import Cell, Network
from defquant.experiments.compose import Trial, section
from defquant.experiments.scales import Scale
from defquant.experiments.section import (
    Entry,
    Line,
    Number,
    Panel,
    Section,
    Table,
    difference,
    number,
)
from defquant.experiments.standard import clean, dq, vanilla
from defquant.experiments.store import Results
from defquant.experiments.words import (
    attack_text,
    bits_text,
    eps_text,
    images_text,
    listed,
    method_text,
    model_text,
    place,
    setting,
    signed,
)

__all__ = ["surrogates", "surrogates_cells", "surrogates_networks", "surrogates_trials"]

BITS = (None, 1, 2, 3, 4, 5, 6, 7, 8)
NAMES = {
    "": "straight-through, margin",
    "@soft": "soft round, margin",
    "@twin": "float twin, margin",
    "@clipfree": "clip-free, margin",
}


def surrogates_networks(scale: Scale) -> dict[str, dict[int | None, Network]]:
    """By name and bits: the Wide ResNet vanilla and with DQ, the vanilla VGG of Figure 1."""
    vgg = dict(zip(scale.bits, fig1_networks(scale)["VGG-16"], strict=True))
    return {
        f"vanilla {model_text(scale.wrn)}": {bits: vanilla(scale, bits) for bits in BITS},
        f"{model_text(scale.wrn)} with {method_text(scale.beta)}": {b: dq(scale, b) for b in BITS},
        f"vanilla {model_text(scale.vgg)}": vgg,
    }


def surrogates_trials(scale: Scale, eps: float) -> dict[str, Trial]:
    """By row: the strong attacks, APGD through each backward pass, AutoAttack on fewer images."""
    steps, (usual, worst) = scale.surrogate_steps, scale.strong
    names = {f"apgd-margin{name}-{steps}": text for name, text in NAMES.items()}
    names[f"apgd-margin@soft-{steps}+{4 * steps}"] = f"soft round, then {4 * steps} queries"
    through = {text: Trial(scale, name, eps) for name, text in names.items()}
    checked = replace(scale, few=scale.standard_images)
    return {
        f"straight-through, {attack_text(usual)}": Trial(scale, usual, eps),
        **through,
        attack_text(worst): Trial(scale, worst, eps),
        f"{attack_text(worst)}, {images_text(checked.few)}": Trial(checked, worst, eps),
        f"Standard, {images_text(checked.few)}": Trial(checked, "standard", eps),
    }


def surrogates_cells(scale: Scale) -> list[Cell]:
    """Every network under every attack; those on fewer images only at some bits."""
    cells = []
    for networks in surrogates_networks(scale).values():
        for network in networks.values():
            cells.append(clean(scale, network))
            for eps in scale.hard_eps:
                cells += [trial.cell(network) for trial in _asked(scale, eps, network).values()]
    return cells


def _asked(scale: Scale, eps: float, network: Network) -> dict[str, Trial]:
    every = surrogates_trials(scale, eps)
    bits, model = network.model.bits, network.model.model
    checked = eps == scale.hard_eps[0] and bits in scale.standard_bits and model == scale.wrn
    return {k: t for k, t in every.items() if t.scale == scale or checked}


def surrogates(scale: Scale, results: Results) -> Section:
    """Accuracy by backward pass, and how much more the usual attack leaves than the worst case."""
    at = {eps: _at(scale, results, eps) for eps in scale.hard_eps}
    first = at[scale.hard_eps[0]]
    return section(
        "surrogates",
        "Beyond the paper: what the straight-through gradient overstates",
        [*_about(scale, results), *(_words(scale, n, m) for n, m in first.items())],
        surrogates_cells(scale),
        results,
        images=(scale.data, "cifar10"),
        tables=[make(scale, eps, at[eps]) for eps in at for make in (_table, _overstated)],
        panels=[_panel(scale, eps, name, found) for eps in at for name, found in at[eps].items()],
    )


Measured = dict[int | None, dict[str, Number]]
"""By bits and row."""


def _at(scale: Scale, results: Results, eps: float) -> dict[str, Measured]:
    """By network."""
    return {
        name: {bits: _measured(scale, results, eps, n) for bits, n in networks.items()}
        for name, networks in surrogates_networks(scale).items()
    }


def _measured(scale: Scale, results: Results, eps: float, network: Network) -> dict[str, Number]:
    trials = {"clean": Trial(scale)} | _asked(scale, eps, network)
    return {name: number(results, [trial.cell(network)]) for name, trial in trials.items()}


def _table(scale: Scale, eps: float, measured: dict[str, Measured]) -> Table:
    rows: list[tuple[Entry, ...]] = []
    for name, found in measured.items():
        for row in ("clean", *surrogates_trials(scale, eps)):
            numbers = [found.get(bits, {}).get(row) for bits in BITS]
            if any(number is not None for number in numbers):
                rows.append((name, row, *numbers))
    caption = (
        f"Accuracy at {eps_text(eps)} by activation bits and by the attack's loss and backward "
        "pass."
    )
    return Table(("Network", "Attack", *_heads()), tuple(rows), caption)


def _overstated(scale: Scale, eps: float, measured: dict[str, Measured]) -> Table:
    rows = [(name, *_gaps(scale, found)) for name, found in measured.items()]
    usual, worst = map(attack_text, scale.strong)
    caption = (
        f"Overstated: {usual} through the straight-through gradient minus {worst}, at "
        f"{eps_text(eps)}."
    )
    return Table(("Network", *_heads()), tuple(rows), caption)


def _gaps(scale: Scale, found: Measured) -> list[Number | None]:
    """By `BITS`, the usual attack minus the worst case; None where it is not asked for."""
    usual, worst = _ends(scale)
    here = (found.get(bits) for bits in BITS)
    return [difference(own[usual], own[worst]) if own else None for own in here]


def _ends(scale: Scale) -> tuple[str, str]:
    """The rows of the usual attack and of the worst case."""
    return f"straight-through, {attack_text(scale.strong[0])}", attack_text(scale.strong[1])


def _heads() -> Sequence[str]:
    return ["Full prec." if bits is None else bits_text(bits) for bits in BITS]


def _panel(scale: Scale, eps: float, name: str, found: Measured) -> Panel:
    """Without the clip-free pass, so weak here that it would set the axis."""
    order = sorted(found, key=lambda bits: 99 if bits is None else bits)
    trials = surrogates_trials(scale, eps).items()
    rows = [row for row, t in trials if t.scale == scale and row != NAMES["@clipfree"]]
    lines = [Line(row, tuple((place(b), found[b][row]) for b in order), row) for row in rows]
    short = name.partition(" at ")[0]
    title = short if len(scale.hard_eps) == 1 else f"{short}, {eps_text(eps)}"
    return Panel(title, "activation bits", "accuracy", tuple(lines))


def _about(scale: Scale, results: Results) -> list[str]:
    usual, worst = map(attack_text, scale.strong)
    names = listed(surrogates_networks(scale))
    start = setting(names, "", scale.train, scale.data, surrogates_cells(scale), results)
    return [
        f"{start[:1].upper()}{start[1:]}{usual} goes through the straight-through gradient, "
        f"{worst} takes the worst case for each image over losses, backward passes and a search by "
        "queries, in less than 3 times the time of one PGD of its steps; the rows between are one "
        f"APGD of {scale.surrogate_steps} steps each. "
        "Standard is AutoAttack's worst case, without surrogates but with a search that needs no "
        "gradient.",
    ]


def _words(scale: Scale, name: str, found: Measured) -> str:
    parts = [
        f"{signed(gap.mean)} points at {bits_text(bits)}"
        for bits, gap in zip(BITS, _gaps(scale, found), strict=True)
        if gap is not None and gap.mean is not None
    ]
    usual, worst = map(attack_text, scale.strong)
    words = f"{name[:1].upper()}{name[1:]}: {usual} leaves, against {worst}, {listed(parts)}."
    return words if parts else ""
