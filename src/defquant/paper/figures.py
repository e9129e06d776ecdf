"""Figures made of other measurements than accuracies, and every section by its name. No torch."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import product, zip_longest
from typing import Any

from defquant.config import TrainConfig
from defquant.paper import tables
from defquant.paper.ask import Ask, Found, Shown, ask_all, panel, pivot, select
from defquant.paper.grid import Cell, Results, Scale, Trial
from defquant.paper.section import (
    Number,
    Section,
    Table,
    attack_text,
    bits_text,
    difference,
    eps_number,
    eps_text,
    listed,
    method_text,
    model_text,
)  # fmt: skip
from defquant.typed import written

__all__ = ["EXPERIMENTS", "WORDS", "cells_of", "fig3", "fig7", "render", "surrogates"]


# --- error amplification: Figure 3 --------------------------------------------------------


def fig3(scale: Scale) -> list[Ask]:
    """`first`: after the first block of the float Wide ResNet, FGSM at eps 1 to 8; `vgg`: at every
    layer of VGGs of each bit width; `wrn` (not in the paper): of the Wide ResNet at 4 bits, vanilla
    and DQ.
    """
    block = [Trial("fgsm", eps / 255, 128, kind="first-block") for eps in range(1, 9)]
    layers = [Trial("fgsm", 8 / 255, 128, kind="layers")]
    every = [("first", "", scale.network(), block)]
    every += [("vgg", bits_text(b), scale.network(scale.vgg, bits=b), layers) for b in scale.bits]
    for beta in (0.0, scale.beta):
        name, network = f"{method_text(beta)} at 4 bits", scale.network(bits=4, beta=beta)
        every.append(("wrn", name, network, layers))
    return [
        Ask({"part": part, "name": name, "bits": n.model.bits, "beta": n.train.beta}, (n,), trial)
        for part, name, n, trials in every
        for trial in trials
    ]


SIDES = (
    ("plain", "As it is", "as it is", "full precision"),
    ("quantized", "3 bits", "rounded to 3 bits", "3 bits"),
)


def distances(found: Found) -> Iterator[tuple[Ask, Number]]:
    """D of each measurement: after the first block as it is and rounded, and both of the batch as
    one vector; or at the input of each layer, `place` -1 being the last.
    """
    for ask, value in found:
        if ask.trial.kind == "first-block":
            eps = f"{255 * ask.trial.eps:.3g}"
            for batch in (False, True):
                for side, name, line, colour in SIDES:
                    at = {"row": eps, "place": eps, "name": name + ", batch" * batch, "line": line}
                    d = (value or {}).get(side)
                    yield _distance(ask, at | {"colour": colour, "batch": batch}, d)
        else:
            name, layers = ask.at["name"], value or ()
            if not layers:
                yield replace(ask, at={**ask.at, "last": True}), Number(None)
            for i, record in enumerate(layers):
                at = {"row": f"{i} {record['layer']}", "name": name, "line": name, "colour": name}
                more = {"place": i, "last": i == len(layers) - 1}
                yield _distance(ask, at | more, record["distance"])


def _distance(ask: Ask, at: Mapping[str, Any], d: Any) -> tuple[Ask, Number]:
    """D over the examples, with their standard deviation; of the batch as one vector."""
    whole = replace(ask, at={**ask.at, "batch": False, **at})
    if d is None:
        return whole, Number(None)
    mean, spread = (d["whole"], 0.0) if whole.at["batch"] else (d["mean"], d["spread"])
    count, keys = d["examples"] - d["left_out"], (ask.cells[0].key,)
    return whole, Number(mean, spread=spread, images=count, seeds=1, cells=keys)


def show_fig3(scale: Scale, found: Found) -> Shown:
    found = [(ask, n) for ask, n in found if "row" in ask.at]
    vgg = sorted(select(found, part="vgg"), key=lambda pair: -(pair[0].at["bits"] or 99))
    parts = (
        ("(a) first activation, Wide ResNet", "ε · 255", select(found, part="first")),
        ("(b) VGG-16", "Layer", vgg),
        ("Wide ResNet (not in the paper)", "Layer", select(found, part="wrn")),
    )
    shown = [
        (
            replace(pivot(own, {x: "row"}, "name"), percent=False),
            panel(title, x.lower(), select(own, batch=False), "line", "place", "colour"),
        )
        for title, x, own in parts
        if own
    ]
    return [t for t, _ in shown], [replace(p, y="D", percent=False) for _, p in shown]


# --- pictures with predictions: Figure 7 --------------------------------------------------


def fig7(scale: Scale) -> list[Ask]:
    """FGSM on full precision, vanilla and DQ at 4 bits by the paper's names; it does not name its
    attack.
    """
    dq = scale.network(bits=4, beta=scale.beta)
    networks = {"FP": scale.network(), "VQ": scale.network(bits=4), "DQ": dq}
    trial = Trial("fgsm", scale.hard_eps[0], kind="examples")
    return [Ask({"name": name}, (network,), trial) for name, network in networks.items()]


def show_fig7(scale: Scale, found: Found) -> Shown:
    rows = []
    for name, every in ((ask.label("name"), value["examples"]) for ask, value in found if value):
        kinds = (
            [e[k]["prediction"] == e["label"] for e in every] for k in ("clean", "adversarial")
        )
        rows.append((name, *(f"{sum(right)} of {len(right)}" for right in kinds)))
    return [Table(("Network", "Clean pictures", "Attacked"), tuple(rows))] if rows else [], []


# --- beyond the paper: what the straight-through gradient overstates ----------------------

CLIPFREE = "clip-free, margin"
PASSES = {
    "": "straight-through, margin", "@soft": "soft round, margin", "@twin": "float twin, margin",
    "@clipfree": CLIPFREE,
}  # fmt: skip


def surrogates(scale: Scale) -> list[Ask]:
    """By bits 1 to 8, the Wide ResNet vanilla and with DQ; the VGG of Figure 1."""
    every: tuple[int | None, ...] = (None, *range(1, 9))
    judged = list(product(scale.hard_eps[:1], [scale.wrn], scale.standard_bits))
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
        if trial.images == scale.few or row == "clean" or (eps, model, bits) in judged
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


def show_surrogates(scale: Scale, found: Found) -> Shown:
    """For each radius the accuracies, and the usual attack minus the worst case; panels without
    the clip-free pass, so weak here that it would set the axis.
    """
    tables, panels = [], []
    for eps in scale.hard_eps:
        here = select(found, eps=eps)
        tables.append(pivot(here, {"Network": "name", "Attack": "row"}, "bits"))
        ends = [select(here, trial=scale.trial(attack, eps)) for attack in scale.strong]
        gaps = [(ask, difference(n, least)) for (ask, n), (_, least) in zip(*ends, strict=True)]
        tables.append(pivot(gaps, {"Network": "name"}, "bits"))
        for name in dict.fromkeys(ask.at["name"] for ask, _ in here):
            own = [
                (a, n) for a, n in select(here, name=name)
                if a.trial.images == scale.few and a.at["row"] not in ("clean", CLIPFREE)
            ]  # fmt: skip
            short = name.partition(" at ")[0]
            title = short if len(scale.hard_eps) == 1 else f"{short}, {eps_text(eps)}"
            panels.append(panel(title, "activation bits", own, "row", "width", "row"))
    return tables, panels


# --- every section ------------------------------------------------------------------------


@dataclass(frozen=True)
class Experiment:
    """Its questions, how their answers are shown, and which rows each answer has."""

    asks: Callable[[Scale], list[Ask]]
    show: Callable[[Scale, Found], Shown]
    rows: Callable[[Found], Iterable[tuple[Ask, Any]]] = list

    def found(self, scale: Scale, results: Results) -> Found:
        return list(self.rows(ask_all(self.asks(scale), results)))

    def cells(self, scale: Scale) -> list[Cell]:
        """Each once; the first seed of everything before the second."""
        turns = zip_longest(*(ask.cells for ask in self.asks(scale)))
        return list(dict.fromkeys(cell for turn in turns for cell in turn if cell))


EXPERIMENTS: Mapping[str, Experiment] = {
    "fig1": Experiment(tables.fig1, tables.show_fig1),
    "fig3": Experiment(fig3, show_fig3, distances),
    "table1": Experiment(tables.table1, tables.show_table1),
    "fig5": Experiment(tables.fig5, tables.show_fig5),
    "table2": Experiment(partial(tables.beside_defences, table="table2"), tables.show_defended),
    "table3": Experiment(partial(tables.beside_defences, table="table3"), tables.show_defended),
    "table4": Experiment(tables.table4, tables.show_ranges),
    "table5": Experiment(tables.table5, tables.show_boxes),
    "table6": Experiment(tables.table6, tables.show_boxes),
    "fig6": Experiment(tables.fig6, tables.show_beta),
    "fig7": Experiment(fig7, show_fig7),
    "surrogates": Experiment(surrogates, show_surrogates),
}


def cells_of(names: Iterable[str], scale: Scale) -> list[Cell]:
    """The union of the experiments' cells, each once."""
    return list(dict.fromkeys(cell for name in names for cell in EXPERIMENTS[name].cells(scale)))


WORDS: Mapping[str, Any] = written(__file__, "text.yaml")
"""What people wrote of each section: see there."""


def render(name: str, scale: Scale, results: Results) -> Section:
    """The section `name` of what is there; panels without a point are left out."""
    experiment, words, own = EXPERIMENTS[name], WORDS[name], scale.on(name)
    found, cells = experiment.found(scale, results), experiment.cells(scale)
    shown, panels = experiment.show(scale, found)
    runs = {cell.network.name for cell in cells}  # scored, whatever is asked of them here
    scored = Results({key: m for key, m in results.scores.items() if m.run in runs})
    images = sorted({name for name, *_ in scored.data}) or [DATA[own.data.data]]
    facts = _facts(own, listed(images), tables.chosen_beta(found))
    note = "The images are not the paper's, so its numbers do not stand beside ours."
    captions = [caption.format(**facts) for caption in words["captions"]]
    every = [c for c in captions if "EPS" in c]  # the first ones, once for each radius
    radii = scale.eps if len(every) == 1 else scale.hard_eps
    each = [c.replace("EPS", eps_text(eps)) for eps in radii for c in every]
    captioned = zip(shown, each + captions[len(every) :], strict=False)
    return Section(
        name=name,
        title=words["title"],
        text=(*(text.format(**facts) for text in words["text"]), *[note] * (not own.papers)),
        tables=tuple(replace(table, caption=caption) for table, caption in captioned),
        panels=tuple(panel for panel in panels if panel.drawn),
        pictures=tuple((a.at["name"], v) for a, v in select(found, kind="examples") if v),
        missing=len(results.missing(cells)),
        command=f"defquant reproduce {name} {scale.flags}",
    )


DATA = {"cifar10": "CIFAR-10", "svhn": "SVHN", "digits": "handwritten digits"}


def _facts(scale: Scale, images: str, chosen: float | None) -> dict[str, Any]:
    """What the words of `text.yaml` may name in braces, beside fields of the `scale`."""

    def trained(train: TrainConfig) -> str:
        """`5 epochs on 20,000 training images of CIFAR-10`."""
        count, held = scale.data.train_images, scale.data.validation_images
        some = f"all but {held:,}" if held else "all"
        epochs = f"{train.epochs} epoch{'s' * (train.epochs > 1)}"
        return f"{epochs} on {some if count is None else f'{count:,}'} training images of {images}"

    def first(count: int | None) -> str:
        return "all test images" if count is None else f"the first {count:,} test images"

    usual, worst = map(attack_text, scale.strong)
    sigma = 255 * float(scale.adversarial["attack_sigma"])
    return {
        "scale": scale,
        "wrn": model_text(scale.wrn),
        "vgg": model_text(scale.vgg),
        "resnet": model_text(scale.resnet),
        "trained": trained(scale.train),
        "madry_trained": trained(scale.adversarially("pgd", scale.madry)),
        "madry_eps": eps_text(float(scale.madry["attack_eps"])),
        "random_eps": f"clip(|N(0, {sigma:g})|, 0, {2 * sigma:g})/255",
        "eps": listed(map(eps_number, scale.eps)) + "/255",
        "hard": listed(map(eps_number, scale.hard_eps)) + "/255",
        "first_hard": eps_text(scale.hard_eps[0]),
        "many": first(scale.many),
        "few": first(scale.few),
        "usual": usual,
        "worst": worst,
        "betas": listed(f"{beta:g}" for beta in scale.table1_betas),
        "largest_beta": f"{max(scale.table1_betas):g}",
        "defense_bits": listed(map(bits_text, scale.defense_bits)),
        "chosen": chosen or "none yet",
    }
