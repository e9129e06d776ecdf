"""Beyond the paper: what the straight-through gradient overstates, by bits 1 to 8. No torch."""

from dataclasses import replace
from itertools import product
from typing import Any

from defquant.paper.ask import (
    Ask,
    Found,
    Shown,
    bits_head,
    bits_place,
    by_bits,
    named,
    panel,
    pivot,
    select,
)
from defquant.paper.grid import Scale, Trial
from defquant.paper.section import (
    Number,
    Table,
    attack_text,
    difference,
    eps_text,
    method_text,
    model_text,
)

__all__ = ["show_surrogates", "surrogates"]

PASSES = {
    "": "straight-through, margin",
    "@soft": "soft round, margin",
    "@twin": "float twin, margin",
    "@clipfree": "clip-free, margin",
}


def surrogates(scale: Scale) -> list[Ask]:
    """By bits 1 to 8, the Wide ResNet vanilla and with DQ; the VGG of Figure 1."""
    every: tuple[int | None, ...] = (None, *range(1, 9))
    wrn, vgg = model_text(scale.wrn), model_text(scale.vgg)
    kinds = (
        (f"vanilla {wrn}", scale.wrn, 0.0, every),
        (f"{wrn} with {method_text(scale.beta)}", scale.wrn, scale.beta, every),
        (f"vanilla {vgg}", scale.vgg, 0.0, scale.bits),
    )
    return [
        Ask(
            {"name": name, "bits": bits, "eps": eps, "row": row},
            (scale.network(model, bits=bits, beta=beta),),
            trial,
        )
        for eps, (name, model, beta, widths) in product(scale.hard_eps, kinds)
        for row, trial in {"clean": scale.trial(), **_passes(scale, eps)}.items()
        for bits in widths
        if trial.images == scale.few or row == "clean" or _checked(scale, eps, model, bits)
    ]


def _passes(scale: Scale, eps: float) -> dict[str, Trial]:
    """By row: the strong attacks, APGD through each backward pass, AutoAttack on fewer images."""
    steps, (usual, worst) = scale.surrogate_steps, scale.strong
    names = {f"apgd-margin{name}-{steps}": text for name, text in PASSES.items()}
    names[f"apgd-margin@soft-{steps}+{4 * steps}"] = f"soft round, then {4 * steps} queries"
    fewer = f"the first {scale.standard_images:,} test images"
    few = [replace(scale.trial(a, eps), images=scale.standard_images) for a in (worst, "standard")]
    return {
        f"straight-through, {attack_text(usual)}": scale.trial(usual, eps),
        **{text: scale.trial(name, eps) for name, text in names.items()},
        attack_text(worst): scale.trial(worst, eps),
        **{f"{attack_text(trial.attack)}, {fewer}": trial for trial in few},
    }


def _checked(scale: Scale, eps: float, model: str, bits: int | None) -> bool:
    return eps == scale.hard_eps[0] and bits in scale.standard_bits and model == scale.wrn


def show_surrogates(scale: Scale, found: Found) -> Shown:
    """For each radius the accuracies, and the usual attack minus the worst case; panels without
    the clip-free pass, so weak here that it would set the axis.
    """
    usual, worst = scale.strong
    tables, panels = [], []
    for eps in scale.hard_eps:
        here = select(found, eps=eps)
        tables.append(pivot(here, {"Network": named, "Attack": _row}, bits_head))
        ends = [p for p in here if p[0].trial in (scale.trial(usual, eps), scale.trial(worst, eps))]
        tables.append(_overstated(ends))
        for name in dict.fromkeys(ask.at["name"] for ask, _ in here):
            own = [
                p for p in select(here, name=name)
                if p[0].trial.images == scale.few and _row(p[0]) != PASSES["@clipfree"]
                if p[0].trial.attack != "clean"
            ]  # fmt: skip
            short = name.partition(" at ")[0]
            title = short if len(scale.hard_eps) == 1 else f"{short}, {eps_text(eps)}"
            panels.append(panel(title, "activation bits", by_bits(own), _row, bits_place, _row))
    return tables, panels


def _row(ask: Ask) -> str:
    return str(ask.at["row"])


def _overstated(ends: Found) -> Table:
    """The first of two attacks minus the second, for each network and bit width."""
    pairs: dict[tuple[str, Any], list[tuple[Ask, Number]]] = {}
    for ask, answer in ends:
        pairs.setdefault((named(ask), ask.at["bits"]), []).append((ask, answer))
    gaps = [(pair[0][0], difference(pair[0][1], pair[1][1])) for pair in pairs.values()]
    return pivot(gaps, {"Network": named}, bits_head)
