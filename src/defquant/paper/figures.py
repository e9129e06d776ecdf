"""Figures made of other measurements than accuracies, and every section by its name. No torch."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from defquant.config import DataConfig, TrainConfig
from defquant.paper import tables
from defquant.paper.ask import Ask, Found, Shown, ask_all, panel, pivot
from defquant.paper.grid import Cell, Network, Results, Scale, Trial
from defquant.paper.section import (
    Number,
    Section,
    Table,
    attack_text,
    bits_text,
    eps_number,
    eps_text,
    listed,
    method_text,
    model_text,
    rate,
    without_paper,
)
from defquant.paper.surrogates import show_surrogates, surrogates
from defquant.paper.tables import chosen_beta

__all__ = ["EXPERIMENTS", "WORDS", "cells_of", "fig3_cells", "fig7_cells", "render"]

IMAGES = 128  # of Figure 3


# --- error amplification: Figure 3 --------------------------------------------------------


def fig3_cells(scale: Scale) -> dict[str, list[Cell]]:
    """`first`: after the first block of the float Wide ResNet, FGSM at eps 1 to 8; `vgg`: at every
    layer of VGGs of each bit width; `wrn` (not in the paper): of the Wide ResNet at 4 bits, vanilla
    and DQ.
    """
    vggs = [scale.network(scale.vgg, bits=bits) for bits in scale.bits]
    wrns = [scale.network(bits=4, beta=beta) for beta in (0.0, scale.beta)]
    first, layers = scale.network(), partial(_cell, "layers", scale.paper_eps)
    return {
        "first": [_cell("first-block", eps / 255, first) for eps in range(1, 9)],
        "vgg": [layers(network) for network in vggs],
        "wrn": [layers(network) for network in wrns],
    }


def _cell(kind: Any, eps: float, network: Network) -> Cell:
    return Cell(network, kind, "fgsm", eps, IMAGES)


def show_fig3(scale: Scale, results: Results) -> Shown:
    cells = fig3_cells(scale)
    first = [pair for cell in cells["first"] for pair in _sides(cell, results.value(cell))]
    few_last = sorted(cells["vgg"], key=lambda cell: -(cell.network.model.bits or 99))
    vgg = {bits_text(cell.network.model.bits): cell for cell in few_last}
    wrn = {f"{method_text(cell.network.train.beta)} at 4 bits": cell for cell in cells["wrn"]}
    title, x = "(a) first activation, Wide ResNet", "ε · 255"
    means = [pair for pair in first if "batch" not in pair[0].at["name"]]
    shown = [(first, means, title, x, "eps", "side")]
    for title, every in {"(b) VGG-16": vgg, "Wide ResNet (not in the paper)": wrn}.items():
        found = [pair for name, cell in every.items() for pair in _layers(name, cell, results)]
        shown += [(found, found, title, "Layer", "index", "name")] * bool(found)
    tables = [pivot(found, {x: _at("row")}, _at("name")) for found, _, _, x, _, _ in shown]
    panels = [
        panel(title, x.lower(), drawn, _at(line), _at(place), _at("kind"))
        for _, drawn, title, x, place, line in shown
    ]
    return (
        [replace(table, percent=False) for table in tables],
        [replace(one, y="D", percent=False) for one in panels],
    )


def _at(label: str) -> Callable[[Ask], str]:
    return lambda ask: str(ask.at[label])


def _sides(cell: Cell, found: Any) -> Iterator[tuple[Ask, Number]]:
    """D after the first block at one eps, as it is and rounded: mean, and of the batch."""
    eps = f"{255 * cell.eps:.3g}"
    sides = (("plain", "As it is", "full precision"), ("quantized", "3 bits", "3 bits"))
    for batch, (side, name, kind) in product((False, True), sides):
        line = "as it is" if side == "plain" else "rounded to 3 bits"
        at = {"row": eps, "eps": eps, "name": name + ", batch" * batch, "kind": kind, "side": line}
        yield Ask(at, (), Trial()), _distance(cell, (found or {}).get(side), batch)


def _layers(name: str, cell: Cell, results: Results) -> Iterator[tuple[Ask, Number]]:
    """D at each layer's input."""
    for i, record in enumerate(results.value(cell) or ()):
        at = {"row": f"{i} {record['layer']}", "index": i, "name": name, "kind": name}
        yield Ask(at, (), Trial()), _distance(cell, record["distance"])


def _distance(cell: Cell, found: Any, batch: bool = False) -> Number:
    """D over the examples, with their standard deviation; of the `batch` as one vector."""
    if found is None:
        return Number(None)
    mean, spread = (found["whole"], 0.0) if batch else (found["mean"], found["spread"])
    count = found["examples"] - found["left_out"]
    return Number(mean, spread=spread, images=count, seeds=1, cells=(cell.key,))


# --- feature squeezing as a detector: Tables 2 and 3 --------------------------------------


def detector_cells(scale: Scale, table: int) -> list[Cell]:
    """On the undefended network."""
    network = tables.defended(scale, table)[0][1]
    kinds = ("fgsm", "pgd")
    return [Cell(network, "detector", a, eps, scale.few) for a in kinds for eps in scale.eps]


def show_detector(scale: Scale, results: Results, table: int) -> Shown:
    rows = []
    for cell in detector_cells(scale, table):
        found = results.value(cell) or {}
        named = (found.get("detected"), found.get("false_positives"))
        numbers = [
            entry for counts in named for entry in (rate(counts, cell.key), _counted(counts))
        ]
        rows.append((f"{attack_text(cell.attack)} {eps_text(cell.eps)}", *numbers))
    heads = ("Attack", "Detected", "of the fooling images", "False positives", "of clean images")
    return [Table(heads, tuple(rows))], []


def _counted(counts: Any) -> str | None:
    return f"{counts[0]:,} of {counts[1]:,}" if counts else None


# --- pictures with predictions: Figure 7 --------------------------------------------------


def fig7_cells(scale: Scale) -> list[Cell]:
    """FGSM on full precision, vanilla and DQ at 4 bits; the paper does not name its attack."""
    networks = (scale.network(), scale.network(bits=4), scale.network(bits=4, beta=scale.beta))
    return [Cell(network, "examples", "fgsm", scale.hard_eps[0]) for network in networks]


def _pictures(scale: Scale, results: Results) -> dict[str, Any]:
    """By the paper's names, where they were made."""
    made = zip(("FP", "VQ", "DQ"), map(results.value, fig7_cells(scale)), strict=True)
    return {name: record for name, record in made if record}


def show_fig7(scale: Scale, results: Results) -> Shown:
    rows = [
        (name, *(_right(record["examples"], kind) for kind in ("clean", "adversarial")))
        for name, record in _pictures(scale, results).items()
    ]
    return [Table(("Network", "Clean pictures", "Attacked"), tuple(rows))] if rows else [], []


def _right(examples: Sequence[Any], kind: str) -> str:
    return f"{sum(e[kind]['prediction'] == e['label'] for e in examples)} of {len(examples)}"


# --- every section ------------------------------------------------------------------------


@dataclass(frozen=True)
class Experiment:
    """What to measure: questions, and `probes` of other kinds than accuracies; how it is shown."""

    asks: Callable[[Scale], list[Ask]] = lambda scale: []
    show: Callable[[Scale, Found], Shown] = lambda scale, found: ([], [])
    probes: Callable[[Scale], list[Cell]] = lambda scale: []
    show_probes: Callable[[Scale, Results], Shown] = lambda scale, results: ([], [])

    def cells(self, scale: Scale) -> list[Cell]:
        """Each once; the first seed of everything before the second."""
        rows = [ask.cells for ask in self.asks(scale)]
        turns = range(max(map(len, rows), default=0))
        asked = [row[i] for i in turns for row in rows if i < len(row)]
        return list(dict.fromkeys(asked + self.probes(scale)))


def _fig3_cells(scale: Scale) -> list[Cell]:
    return [cell for cells in fig3_cells(scale).values() for cell in cells]


def _with_detector(table: int, asks: Callable[[Scale], list[Ask]]) -> Experiment:
    probes, shown = partial(detector_cells, table=table), partial(show_detector, table=table)
    return Experiment(asks, tables.show_defended, probes, shown)


EXPERIMENTS: Mapping[str, Experiment] = {
    "fig1": Experiment(tables.fig1, tables.show_fig1),
    "fig3": Experiment(probes=_fig3_cells, show_probes=show_fig3),
    "table1": Experiment(tables.table1, tables.show_table1),
    "fig5": Experiment(tables.fig5, tables.show_fig5),
    "table2": _with_detector(2, tables.table2),
    "table3": _with_detector(3, tables.table3),
    "table4": Experiment(tables.table4, tables.show_ranges),
    "table5": Experiment(tables.table5, tables.show_boxes),
    "table6": Experiment(tables.table6, tables.show_boxes),
    "fig6": Experiment(tables.fig6, tables.show_beta),
    "fig7": Experiment(probes=fig7_cells, show_probes=show_fig7),
    "surrogates": Experiment(surrogates, show_surrogates),
}


def cells_of(names: Iterable[str], scale: Scale) -> list[Cell]:
    """The union of the experiments' cells, each once."""
    return list(dict.fromkeys(cell for name in names for cell in EXPERIMENTS[name].cells(scale)))


@dataclass(frozen=True)
class Words:
    """What people wrote of a section: see the head of `text.md`."""

    what: str
    title: str
    text: tuple[str, ...]
    captions: tuple[str, ...]


def _words(part: str) -> tuple[str, Words]:
    head, *blocks = re.split(r"\n\n+", part.strip())
    name, what, title = head.split(" | ")
    joined = [" ".join(block.split()) for block in blocks]
    said = tuple(block for block in joined if not block.startswith("> "))
    captions = tuple(block[2:] for block in joined if block.startswith("> "))
    return name, Words(what, title, said, captions)


WORDS = dict(
    map(
        _words,
        Path(__file__).with_name("text.md").read_text(encoding="utf-8").split("\n# ")[1:],
    )
)


def render(name: str, scale: Scale, results: Results) -> Section:
    """The section `name` of what is there; panels without a point are left out."""
    experiment, words = EXPERIMENTS[name], WORDS[name]
    found = ask_all(experiment.asks(scale), results)
    shown, drawn = experiment.show(scale, found)
    probed, seen = experiment.show_probes(scale, results)
    svhn = name == "table2"
    cells = experiment.cells(scale)
    facts = _facts(scale, svhn, cells, results) | {"chosen": chosen_beta(found) or "none yet"}
    captions = [caption.format(**facts) for caption in words.captions]
    data = scale.svhn if svhn else scale.data
    whole = Section(
        name=name,
        title=words.title,
        text=tuple(paragraph.format(**facts) for paragraph in words.text),
        tables=_captioned([*shown, *probed], captions, scale),
        panels=(*drawn, *seen),
        pictures=tuple(_pictures(scale, results).items()) if name == "fig7" else (),
        missing=len(results.missing(cells)),
    )
    section = whole if data.data == ("svhn" if svhn else "cifar10") else without_paper(whole)
    return replace(section, panels=tuple(one for one in section.panels if one.drawn))


def _captioned(shown: Sequence[Table], captions: Sequence[str], scale: Scale) -> tuple[Table, ...]:
    """Tables with their captions in order; the first captions stand once for each radius, `EPS`."""
    every = [c for c in captions if "EPS" in c]
    rest = [c for c in captions if "EPS" not in c]
    radii = scale.eps if len(every) == 1 else scale.hard_eps
    each = [c.replace("EPS", eps_text(eps)) for eps in radii for c in every] if every else []
    return tuple(replace(t, caption=c) for t, c in zip(shown, each + rest, strict=False))


_DATA = {"cifar10": "CIFAR-10", "svhn": "SVHN", "digits": "handwritten digits"}


def _facts(
    scale: Scale, svhn: bool, cells: Sequence[Cell], results: Results
) -> dict[str, str | float]:
    """What the words of `text.md` may name in braces."""
    train = scale.svhn_train if svhn else scale.train
    data = scale.svhn if svhn else scale.data
    usual, worst = map(attack_text, scale.strong)
    sigma = 255 * float(scale.adversarial["attack_sigma"])
    madry = replace(train, **scale.madry)  # type: ignore[arg-type]
    return {
        "wrn": model_text(scale.svhn_wrn if svhn else scale.wrn),
        "vgg": model_text(scale.vgg),
        "resnet": model_text(scale.resnet),
        "trained": _trained(train, data, cells, results),
        "madry_trained": _trained(madry, data, cells, results),
        "madry_eps": eps_text(float(scale.madry["attack_eps"])),
        "random_eps": f"clip(|N(0, {sigma:g})|, 0, {2 * sigma:g})/255",
        "eps": _radii(scale.eps),
        "hard": _radii(scale.hard_eps),
        "first_hard": eps_text(scale.hard_eps[0]),
        "many": _images(scale.many),
        "few": _images(scale.few),
        "usual": usual,
        "worst": worst,
        "beta": f"{scale.beta:g}",
        "betas": listed(f"{beta:g}" for beta in scale.table1_betas),
        "largest_beta": f"{max(scale.table1_betas):g}",
        "defense_bits": listed(map(bits_text, scale.defense_bits)),
        "steps": scale.surrogate_steps,
    }


def _trained(train: TrainConfig, data: DataConfig, cells: Sequence[Cell], results: Results) -> str:
    """`5 epochs on 20,000 training images of CIFAR-10`, by the name under which it was measured."""
    scores = (results.score(cell) for cell in cells if cell.split == "test")
    names = {m.data for m in scores if m is not None}
    images = "all" if data.train_images is None else f"{data.train_images:,}"
    held = f" but {data.validation_images:,}" * (images == "all" and data.validation_images > 0)
    name = listed(sorted(names)) if names else _DATA.get(data.data, data.data)
    epochs = f"{train.epochs} epoch{'s' * (train.epochs > 1)}"
    return f"{epochs} on {images}{held} training images of {name}"


def _images(images: int | None) -> str:
    return "all test images" if images is None else f"the first {images:,} test images"


def _radii(eps: Sequence[float]) -> str:
    return listed(map(eps_number, eps)) + "/255"
