"""The paper's tables and curves as lists of questions: cells, numbers and panels follow from them.

To add a table: a list of `Ask` and how it is shown, here; a line in `EXPERIMENTS` of `figures.py`;
its words in `text.yaml`, and the paper's numbers in `numbers.yaml`. No torch.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any

from defquant.paper.ask import Ask, Found, Row, Shown, panel, pivot, printed, select
from defquant.paper.grid import Network, Scale, Trial
from defquant.paper.section import (
    Number,
    Table,
    attack_text,
    difference,
    eps_text,
    listed,
    method_text,
    rate,
)  # fmt: skip

__all__ = [
    "beside_defences", "chosen_beta", "defended", "fig1", "fig5", "fig6", "show_beta",
    "show_boxes", "show_defended", "show_fig1", "show_fig5", "show_ranges", "show_table1", "table1",
    "table4", "table5", "table6",
]  # fmt: skip

Show = Callable[[Scale, Found], Shown]


def _table(
    rows: Mapping[str, str],
    column: str,
    ends: Mapping[str, Callable[[Found], Number | None]] | None = None,
    *,
    drawn: bool = False,
) -> Show:
    """A table; where it is `drawn`, also a panel over bits for each trial."""

    def show(scale: Scale, found: Found) -> Shown:
        trials = dict.fromkeys(ask.trial for ask, _ in found) if drawn else ()
        own = {trial.name: select(found, trial=trial) for trial in trials}
        panels = [panel(t, "activation bits", f, "name", "width", "name") for t, f in own.items()]
        return [pivot(found, rows, column, ends)], panels

    return show


def _minus(key: str, first: object, second: object, column: str = "") -> Callable[[Found], Number]:
    """The entry labelled `first` minus that labelled `second`; the paper's stands in `column`, or
    is the difference of its two.
    """

    def end(row: Found) -> Number:
        a, b = (next(n for ask, n in row if ask.at[key] == label) for label in (first, second))
        theirs = difference(Number(a.paper), Number(b.paper)).mean
        return difference(a, b, row[0][0].row.get(column) if column else theirs)

    return end


# --- accuracy against bits: Figure 1, Table 1, Figure 5 -----------------------------------


def _over(at: Mapping[str, Any], trial: Trial, row: Row, networks: Mapping[Any, Any]) -> list[Ask]:
    """A row over bits."""
    every = networks.items()
    return [Ask({**at, "bits": b}, own, trial, row, str(b or "full")) for b, own in every]


def fig1(scale: Scale) -> list[Ask]:
    """Vanilla VGG and Wide ResNet, clean and attacked; the paper's is Table 1's vanilla row."""
    asks = []
    models = {"VGG-16": scale.vgg, "Wide ResNet": scale.wrn}
    for trial, (name, model) in product(scale.trials, models.items()):
        row = dict(printed(scale, "table1", f"0 {trial.mark}")) if model == scale.wrn else {}
        row |= printed(scale, "fig1", f"{name} {trial.mark}")
        networks = {bits: (scale.network(model, bits=bits),) for bits in scale.bits}
        asks += _over({"name": name}, trial, row, networks)
    return asks


METHODS = {"Network": "name", "Images": "trial"}
lost = {"5 bits − full": _minus("bits", 5, None, "lost")}
show_fig1 = _table(METHODS, "bits", lost, drawn=True)


def _betas(scale: Scale) -> list[tuple[float, str]]:
    """Ours, each with the paper's that stands beside it."""
    theirs = ("0", "0.0003", "0.0006", "0.001")
    return list(zip((0.0, *scale.table1_betas), theirs, strict=True))


def _method(scale: Scale, trial: Trial, beta: float, theirs: str) -> list[Ask]:
    networks = {bits: scale.by_seed(bits, beta) for bits in scale.bits}
    row = printed(scale, "table1", f"{theirs} {trial.mark}")
    return _over({"name": method_text(beta), "beta": beta}, trial, row, networks)


def table1(scale: Scale) -> list[Ask]:
    """Vanilla and DQ of three betas, over the seeds."""
    pairs = product(_betas(scale), scale.trials)
    return [ask for betas, trial in pairs for ask in _method(scale, trial, *betas)]


def fig5(scale: Scale) -> list[Ask]:
    """White box and black box, vanilla and DQ at the largest beta of Table 1: it names none."""
    boxes = product(scale.eps, (None, scale.substitute()))
    trials = [scale.trial(), *(scale.trial("fgsm", e, substitute=s) for e, s in boxes)]
    vanilla, *rest = _betas(scale)
    pairs = product(trials, (vanilla, max(rest)))
    return [ask for trial, betas in pairs for ask in _method(scale, trial, *betas)]


def _best(row: Found) -> Number | None:
    """The best of the row; None for clean images, as in the paper."""
    ask, numbers = row[0][0], [n for _, n in row]
    if ask.trial.attack == "clean":
        return None
    whole = all(n.mean is not None for n in numbers)
    best = max(numbers, key=lambda n: n.mean or 0.0) if whole else Number(None)
    return replace(best, paper=ask.row.get("best"))


def _gain(row: Found) -> Number | None:
    """The best of the bit widths minus full precision."""
    found = _best([pair for pair in row if pair[0].at["bits"]])
    full = next(n for ask, n in row if ask.at["bits"] is None)
    return found and difference(found, full, row[0][0].row.get("gain"))


show_table1 = _table(METHODS, "bits", {"Quantize Gain": _gain, "Best": _best})
show_fig5 = _table(METHODS, "bits", drawn=True)


# --- other defences: Tables 2 and 3 -------------------------------------------------------


def defended(scale: Scale, table: str) -> list[tuple[dict[str, Any], Network]]:
    """The rows of Table 2 or 3 in the paper's order by their labels; "Normal" is full precision."""
    techniques: dict[str, tuple[int | None, str]] = {
        "Normal": (None, "none"),
        "Feature Squeezing": (5, "none"),  # bits of colour
        "Adversarial R+FGSM": (None, "rfgsm"),
        "Adversarial PGD": (None, "pgd"),
    }
    rows = []
    for technique, (squeeze, attack) in list(techniques.items())[: 4 if table == "table3" else 3]:
        train = scale.adversarially(attack) if attack != "none" else scale.train
        # PGD is the dearest training: the paper's bits alone
        widths = scale.defense_bits[: 1 if attack == "pgd" else None]
        for dq, bits in ((False, None), *((True, bits) for bits in widths)):
            beta = scale.beta if dq else 0.0
            network = scale.network(bits=bits, beta=beta, squeeze=squeeze, train=train)
            suffix = {1: "", None: " (full precision)"}.get(bits, f" ({bits}-bit)")
            name = f"{technique} + DQ{suffix}" if dq else technique
            rows.append(({"name": name, "technique": technique, "dq": dq, "bits": bits}, network))
    return rows


def beside_defences(whole: Scale, table: str) -> list[Ask]:
    """Table 2, on SVHN or the images of Table 3 where it is not at hand, or Table 3.

    The paper's columns at every radius, the strong attacks, and those blind to a squeezing; last
    what a squeezing detects before the undefended network.
    """
    scale = whole.on(table)
    asks, rows, through = [], defended(scale, table), scale.substitute()
    for at, network in rows:
        trials = [scale.trial()]
        for eps in scale.eps:
            trials += [scale.trial(attack, eps) for attack in ("random", "fgsm", "rfgsm", "pgd")]
            trials += [scale.trial(attack, eps, substitute=through) for attack in ("fgsm", "pgd")]
            trials += [trial for trial in scale.strong_trials if trial.eps == eps]
            if network.model.squeeze:
                trials += [scale.trial(a, eps, unaware=True) for a in ("fgsm", "pgd")]
        row = printed(scale, table, at["name"])
        asks += [Ask(at, (network,), trial, row, trial.mark) for trial in trials]
    probes = product(("fgsm", "pgd"), scale.eps)
    trials = [Trial(a, eps, scale.few, kind="detector") for a, eps in probes]
    return asks + [Ask({}, (rows[0][1],), trial) for trial in trials]


def show_defended(scale: Scale, found: Found) -> Shown:
    """A table for each radius, clean images beside it; then the squeezed rows, aware and not, and
    what was detected.
    """
    scores, name = select(found, kind="accuracy"), {"Training technique": "name"}
    tables = []
    for eps in scale.eps:
        here = [(a, n) for a, n in scores if a.trial.eps in (0.0, eps) and not a.trial.unaware]
        tables.append(pivot(here, name, "attack"))
    squeezed = [
        (a, replace(n, paper=None))  # it does not say which of the two it has
        for a, n in select(scores, technique="Feature Squeezing")
        if a.trial.substitute is None and a.trial.attack in ("fgsm", "pgd")
    ]
    columns = sorted(squeezed, key=lambda pair: (pair[0].at["name"], pair[0].trial.attack))
    tables.append(pivot(columns, name | {"ε": "eps"}, "attack"))
    rows = []
    for ask, values in select(found, kind="detector"):
        both = [(values or {}).get(which) for which in ("detected", "false_positives")]
        pairs = ((rate(c, ask.cells[0].key), f"{c[0]:,} of {c[1]:,}" if c else None) for c in both)
        rows.append((ask.trial.name, *(entry for pair in pairs for entry in pair)))
    heads = ("Attack", "Detected", "of the fooling images", "False positives", "of clean images")
    return [*tables, Table(heads, tuple(rows))], []


# --- the range of activations: Table 4 ----------------------------------------------------


def table4(scale: Scale) -> list[Ask]:
    """ResNet-18 at 4 bits, vanilla and DQ, cut at 1 and at 6; clean as in the paper, then FGSM."""
    trials = [trial for trial in scale.trials if trial.attack not in scale.strong]
    return [
        Ask(
            {"name": method_text(beta), "dq": beta > 0, "high": high, "cut": f"ReLU{high:g}"},
            (scale.network(scale.resnet, bits=4, beta=beta, high=high),),
            trial,
            printed(scale, "table4", f"{'DQ' if beta else 'vanilla'} {trial.mark}"),
            f"ReLU{high:g}",
        )
        for trial, beta, high in product(trials, (0.0, scale.beta), (1.0, 6.0))
    ]


show_ranges = _table(
    {"Quantisation": "name", "Images": "trial"},
    "cut",
    {"Difference": _minus("high", 1.0, 6.0, "difference")},
)


# --- white box beside black box: Tables 5 and 6 -------------------------------------------


def _boxes(
    scale: Scale,
    table: str,
    networks: Mapping[str, Network],
    attack: str,
    through: Network,
    *others: str,
) -> list[Ask]:
    """Every network at every radius; the strong attacks where the scale asks for them."""
    asks = []
    for (name, network), eps in product(networks.items(), scale.eps):
        white, black = scale.trial(attack, eps), scale.trial(attack, eps, substitute=through)
        more = [*(scale.trial(other, eps) for other in others), *scale.strong_trials]
        heads = [("", scale.trial()), ("White box ", white), ("Black box ", black)]
        heads += [("", trial) for trial in more if trial.eps == eps]
        for box, trial in heads:
            head = box + (attack_text(attack) if box else trial.column)
            at = {"name": name, "eps": eps, "head": head, "box": box}
            asks.append(Ask(at, (network,), trial, printed(scale, table, name), trial.mark))
    return asks


def table5(scale: Scale) -> list[Ask]:
    """ResNet-18 after PGD training at a fixed eps; the black box through a VGG trained alike."""
    train = scale.adversarially("pgd", scale.madry)
    make = partial(scale.network, scale.resnet, train=train)
    networks = {
        "Full-Precision": make(),
        "Tanh Quantized": make(bits=2, activation="tanh"),
        "ReLU6 Quantized": make(bits=2),
    }
    return _boxes(scale, "table5", networks, "pgd-20", scale.substitute(train))


def table6(scale: Scale) -> list[Ask]:
    """The Wide ResNet after FGSM and R+FGSM training; PGD, from which masking hides less."""
    networks = {
        f"Adversarial {attack_text(attack)}": scale.network(train=scale.adversarially(attack))
        for attack in ("fgsm", "rfgsm")
    }
    return _boxes(scale, "table6", networks, "fgsm", scale.substitute(), "pgd")


show_boxes = _table(
    {"Network": "name", "ε": "eps"}, "head",
    {"White − black": _minus("box", "White box ", "Black box ")},
)  # fmt: skip


# --- the weight of the penalty: Figure 6 --------------------------------------------------


def fig6(scale: Scale) -> list[Ask]:
    """4 bits, vanilla at beta 0; last the validation images that choose beta, where held out."""
    held_out = min(scale.data.validation_images, 2 * (scale.few or 1000))
    judge = Trial("pgd-20", scale.hard_eps[0], held_out, split="validation")
    trials = [*scale.trials, *[judge] * (held_out > 0)]
    return [
        Ask(
            {
                "name": f"{beta:g}", "beta": beta,
                "colour": eps_text(trial.eps) if trial.attack == "fgsm" else trial.name,
            },
            (scale.network(bits=4, beta=beta),),
            trial,
            printed(scale, "table1", f"{beta:g} {trial.mark}"),
            "4",
        )
        for beta, trial in product((0.0, *scale.betas), trials)
    ]  # fmt: skip


def chosen_beta(found: Found) -> float | None:
    """The beta with the highest validation accuracy, the smaller of equals; vanilla is no choice.

    None where no images are held out, and until all have been measured.
    """
    judged = [(a.at["beta"], n.mean) for a, n in found if a.trial.split == "validation"]
    known = {beta: mean for beta, mean in sorted(judged) if beta and mean is not None}
    whole = judged and len(known) == len(judged) - 1
    return max(known, key=known.__getitem__) if whole else None


def show_beta(scale: Scale, found: Found) -> Shown:
    """Clean and FGSM as in the paper, then the strong attacks; a colour for each radius."""
    test = [(a, n) for a, n in found if a.trial.split == "test"]
    strong = [pair for pair in test if pair[0].trial.attack in scale.strong]
    usual = [pair for pair in test if pair not in strong]
    titles = {"clean and FGSM": usual, listed(map(attack_text, scale.strong)): strong}
    panels = [panel(t, "β", own, "trial", "name", "colour") for t, own in titles.items()]
    return [pivot(found, {"β": "name"}, "trial")], panels
