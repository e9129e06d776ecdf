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
from defquant.paper.ask import Ask, Shown, ask_all, panel, pivot, select
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
    without_paper,
)  # fmt: skip

__all__ = ["EXPERIMENTS", "WORDS", "cells_of", "fig3", "fig7", "render"]

IMAGES = 128  # of Figure 3

Values = Sequence[tuple[Ask, Any]]


# --- error amplification: Figure 3 --------------------------------------------------------


def fig3(scale: Scale) -> list[Ask]:
    """`first`: after the first block of the float Wide ResNet, FGSM at eps 1 to 8; `vgg`: at every
    layer of VGGs of each bit width; `wrn` (not in the paper): of the Wide ResNet at 4 bits, vanilla
    and DQ.
    """

    def ask(part: str, name: str, network: Network, kind: Any = "layers", eps: float = 8) -> Ask:
        at = {"part": part, "name": name, "bits": network.model.bits}
        return Ask(at, (network,), Trial("fgsm", eps / 255, IMAGES, kind=kind))

    first = [ask("first", "", scale.network(), "first-block", eps) for eps in range(1, 9)]
    vgg = [ask("vgg", bits_text(b), scale.network(scale.vgg, bits=b)) for b in scale.bits]
    wrn = [
        ask("wrn", f"{method_text(beta)} at 4 bits", scale.network(bits=4, beta=beta))
        for beta in (0.0, scale.beta)
    ]
    return first + vgg + wrn


def show_fig3(scale: Scale, found: Values) -> Shown:
    vgg = sorted(select(found, part="vgg"), key=lambda pair: -(pair[0].at["bits"] or 99))
    parts = [
        ("(a) first activation, Wide ResNet", "ε · 255", _sides(select(found, part="first"))),
        ("(b) VGG-16", "Layer", _layers(vgg)),
        ("Wide ResNet (not in the paper)", "Layer", _layers(select(found, part="wrn"))),
    ]
    tables, panels = [], []
    for title, x, numbers in ((title, x, list(numbers)) for title, x, numbers in parts):
        if numbers:
            drawn = [pair for pair in numbers if "batch" not in pair[0].at["name"]]
            tables.append(replace(pivot(numbers, {x: "row"}, "name"), percent=False))
            one = panel(title, x.lower(), drawn, "line", "place", "colour")
            panels.append(replace(one, y="D", percent=False))
    return tables, panels


def _sides(found: Values) -> Iterator[tuple[Ask, Number]]:
    """D after the first block at one eps, as it is and rounded: mean, and of the batch."""
    sides = (
        ("plain", "As it is", "as it is", "full precision"),
        ("quantized", "3 bits", "rounded to 3 bits", "3 bits"),
    )
    for (ask, value), batch, (side, name, line, colour) in product(found, (False, True), sides):
        eps = f"{255 * ask.trial.eps:.3g}"
        at = {"row": eps, "place": eps, "name": name + ", batch" * batch, "line": line}
        yield _distance(ask, at | {"colour": colour}, (value or {}).get(side), batch)


def _layers(found: Values) -> Iterator[tuple[Ask, Number]]:
    """D at each layer's input."""
    for ask, value in found:
        name = ask.at["name"]
        for i, record in enumerate(value or ()):
            at = {"row": f"{i} {record['layer']}", "place": i, "name": name, "line": name}
            yield _distance(ask, at | {"colour": name}, record["distance"])


def _distance(ask: Ask, at: Mapping[str, Any], d: Any, batch: bool = False) -> tuple[Ask, Number]:
    """D over the examples, with their standard deviation; of the `batch` as one vector."""
    if d is None:
        return Ask(at), Number(None)
    mean, spread = (d["whole"], 0.0) if batch else (d["mean"], d["spread"])
    count, keys = d["examples"] - d["left_out"], (ask.cells[0].key,)
    return Ask(at), Number(mean, spread=spread, images=count, seeds=1, cells=keys)


# --- pictures with predictions: Figure 7 --------------------------------------------------


def fig7(scale: Scale) -> list[Ask]:
    """FGSM on full precision, vanilla and DQ at 4 bits by the paper's names; it does not name its
    attack.
    """
    dq = scale.network(bits=4, beta=scale.beta)
    networks = {"FP": scale.network(), "VQ": scale.network(bits=4), "DQ": dq}
    trial = Trial("fgsm", scale.hard_eps[0], kind="examples")
    return [Ask({"name": name}, (network,), trial) for name, network in networks.items()]


def show_fig7(scale: Scale, found: Values) -> Shown:
    rows = [
        (a.label("name"), *(_right(record["examples"], kind) for kind in ("clean", "adversarial")))
        for a, record in found
        if record
    ]
    return [Table(("Network", "Clean pictures", "Attacked"), tuple(rows))] if rows else [], []


def _right(examples: Sequence[Any], kind: str) -> str:
    return f"{sum(e[kind]['prediction'] == e['label'] for e in examples)} of {len(examples)}"


# --- every section ------------------------------------------------------------------------


@dataclass(frozen=True)
class Experiment:
    """Its questions, and how their answers are shown."""

    asks: Callable[[Scale], list[Ask]]
    show: Callable[[Scale, Values], Shown]

    def cells(self, scale: Scale) -> list[Cell]:
        """Each once; the first seed of everything before the second."""
        rows = [ask.cells for ask in self.asks(scale)]
        turns = range(max(map(len, rows)))
        return list(dict.fromkeys(row[i] for i in turns for row in rows if i < len(row)))


EXPERIMENTS: Mapping[str, Experiment] = {
    "fig1": Experiment(tables.fig1, tables.show_fig1),
    "fig3": Experiment(fig3, show_fig3),
    "table1": Experiment(tables.table1, tables.show_table1),
    "fig5": Experiment(tables.fig5, tables.show_fig5),
    "table2": Experiment(partial(tables.beside_defences, table=2), tables.show_defended),
    "table3": Experiment(partial(tables.beside_defences, table=3), tables.show_defended),
    "table4": Experiment(tables.table4, tables.show_ranges),
    "table5": Experiment(tables.table5, tables.show_boxes),
    "table6": Experiment(tables.table6, tables.show_boxes),
    "fig6": Experiment(tables.fig6, tables.show_beta),
    "fig7": Experiment(fig7, show_fig7),
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


def _words() -> Iterator[tuple[str, Words]]:
    text = Path(__file__).with_name("text.md").read_text(encoding="utf-8")
    for part in text.split("\n# ")[1:]:
        head, *blocks = re.split(r"\n\n+", part.strip())
        name, what, title = head.split(" | ")
        joined = [" ".join(block.split()) for block in blocks]
        said = tuple(block for block in joined if not block.startswith("> "))
        yield name, Words(what, title, said, tuple(b[2:] for b in joined if b.startswith("> ")))


WORDS = dict(_words())


def render(name: str, scale: Scale, results: Results) -> Section:
    """The section `name` of what is there; panels without a point are left out."""
    experiment, words = EXPERIMENTS[name], WORDS[name]
    found = ask_all(experiment.asks(scale), results)
    shown, panels = experiment.show(scale, found)
    svhn = name == "table2"
    cells = experiment.cells(scale)
    facts = _facts(scale, svhn, cells, results)
    facts["chosen"] = tables.chosen_beta(found) or "none yet"
    captions = [caption.format(**facts) for caption in words.captions]
    pictures = [(ask.at["name"], v) for ask, v in select(found, kind="examples") if v]
    whole = Section(
        name=name,
        title=words.title,
        text=tuple(paragraph.format(**facts) for paragraph in words.text),
        tables=_captioned(shown, captions, scale),
        panels=tuple(panels),
        pictures=tuple(pictures),
        missing=len(results.missing(cells)),
    )
    data, paper = (scale.svhn, "svhn") if svhn else (scale.data, "cifar10")
    section = whole if data.data == paper else without_paper(whole)
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
