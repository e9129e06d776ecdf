"""Figures made of other measurements than accuracies, and every section by its name. No torch."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from defquant.config import DataConfig, TrainConfig
from defquant.paper import tables
from defquant.paper.grid import Cell, Network, Results, Scale
from defquant.paper.section import (
    Entry,
    Line,
    Number,
    Panel,
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
from defquant.paper.tables import Ask, Found, Shown, ask_all, chosen_beta

__all__ = ["EXPERIMENTS", "WORDS", "Experiment", "cells_of", "fig3_cells", "fig7_cells", "render"]

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
    few_last = sorted(cells["vgg"], key=lambda cell: -(cell.network.model.bits or 99))
    vgg = {bits_text(c.network.model.bits): _keyed(results, c, []) for c in few_last}
    wrn = {
        f"{method_text(c.network.train.beta)} at 4 bits": _keyed(results, c, [])
        for c in cells["wrn"]
    }
    layers = {"(b) VGG-16": vgg, "Wide ResNet (not in the paper)": wrn}
    there = {title: every for title, every in layers.items() if any(every.values())}
    first = {f"{255 * c.eps:.3g}": _keyed(results, c, {}) for c in cells["first"]}
    return (
        [_first_table(first), *(_layers_table(every) for every in there.values())],
        [_first_panel(first), *(_layers_panel(t, every) for t, every in there.items())],
    )


def _keyed(results: Results, cell: Cell, nothing: Any) -> Any:
    """What the cell found, each record with its key."""

    def keyed(found: Any) -> Any:
        if isinstance(found, list):
            return [keyed(part) for part in found]
        if isinstance(found, dict):
            return {"cell": cell.key} | {name: keyed(part) for name, part in found.items()}
        return found

    return keyed(results.value(cell)) or nothing


def _distance(found: Any, batch: bool = False) -> Number:
    """D over the examples, with their standard deviation; of the `batch` as one vector."""
    if found is None:
        return Number(None)
    count, cells = found["examples"] - found["left_out"], (found["cell"],)
    if batch:
        return Number(found["whole"], images=count, seeds=1, cells=cells)
    return Number(found["mean"], spread=found["spread"], images=count, seeds=1, cells=cells)


def _first_table(first: Mapping[str, Any]) -> Table:
    heads = ("ε · 255", "As it is", "3 bits", "As it is, batch", "3 bits, batch")
    sides = [(side, batch) for batch in (False, True) for side in ("plain", "quantized")]
    rows: Iterator[tuple[Entry, ...]] = (
        (e, *(_distance(v.get(side), batch) for side, batch in sides)) for e, v in first.items()
    )
    return Table(heads, tuple(rows), percent=False)


def _first_panel(first: Mapping[str, Any]) -> Panel:
    sides = (
        ("plain", "as it is", "full precision"),
        ("quantized", "rounded to 3 bits", "3 bits"),
    )
    lines = [
        Line(label, tuple((eps, _distance(v.get(side))) for eps, v in first.items()), kind)
        for side, label, kind in sides
    ]
    return Panel("(a) first activation, Wide ResNet", "ε · 255", "D", tuple(lines), percent=False)


def _layers_table(every: Mapping[str, Sequence[Any]]) -> Table:
    """A row for each layer, a column for each network."""
    longest = max(every.values(), key=len)
    rows: Iterator[tuple[Entry, ...]] = (
        (f"{i} {record['layer']}", *(_layer(records, i) for records in every.values()))
        for i, record in enumerate(longest)
    )
    return Table(("Layer", *every), tuple(rows), percent=False)


def _layers_panel(title: str, every: Mapping[str, Sequence[Any]]) -> Panel:
    depth = max(map(len, every.values()))
    lines = (
        Line(name, tuple((str(i), _layer(records, i)) for i in range(depth)), kind=name)
        for name, records in every.items()
    )
    return Panel(title, "layer", "D", tuple(lines), percent=False)


def _layer(records: Sequence[Any], index: int) -> Number:
    return _distance(records[index]["distance"]) if index < len(records) else Number(None)


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
    "surrogates": Experiment(tables.surrogates, tables.show_surrogates),
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
    return replace(section, panels=tuple(panel for panel in section.panels if panel.drawn))


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
