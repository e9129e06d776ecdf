"""The paper's tables and curves as lists of questions: cells, numbers and panels follow from them.

To add a table: a list of `Ask` and how it is shown, here; a line in `EXPERIMENTS` of `figures.py`;
its words in `text.md`, and the paper's numbers in `numbers.yaml`. No torch.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import yaml

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
    tried,
)
from defquant.paper.grid import Network, Scale, Trial
from defquant.paper.section import (
    Number,
    Panel,
    attack_text,
    difference,
    eps_text,
    listed,
    method_text,
)

__all__ = [
    "NUMBERS", "chosen_beta", "defended", "defense", "fig1", "fig5", "fig6", "show_beta",
    "show_boxes", "show_defended", "show_fig1", "show_fig5", "show_ranges",
    "show_table1", "table1", "table2", "table3", "table4", "table5", "table6",
]  # fmt: skip


# --- the paper's numbers ------------------------------------------------------------------

NUMBERS: Mapping[str, Any] = yaml.safe_load(
    Path(__file__).with_name("numbers.yaml").read_text(encoding="utf-8")
)
_DEFENDED = ("random", "fgsm", "rfgsm", "pgd", "fgsm(B)", "pgd(B)")  # at eps 2, 8, 16


def _at(eps: float, pixels: float = 8) -> bool:
    return abs(255 * eps - pixels) < 0.02


def _table1(row: int, trial: Trial, bits: int | None) -> float | None:
    """`row` 0 is vanilla, 1 to 3 are DQ in order of beta; clean, or FGSM at 8 as a white box."""
    rows = list(NUMBERS["table1"].values())
    known = trial.attack == "clean" or (trial.attack == "fgsm" and _at(trial.eps))
    if row >= len(rows) or (bits or 0) > 5 or trial.through or not known:
        return None
    return float(rows[row][trial.attack][bits or 0]) / 100


def _table1_end(row: int, trial: Trial, end: str) -> float | None:
    rows = list(NUMBERS["table1"].values())
    if row >= len(rows) or trial.attack != "fgsm" or not _at(trial.eps):
        return None
    return float(rows[row]["ends"][end]) / 100


def defense(line: str) -> tuple[float, dict[str, tuple[int, ...]]]:
    """A row of Tables 2 and 3: clean, and by attack the numbers at eps 2, 8, 16."""
    clean, *triples = line.split()
    values = (tuple(map(int, triple.split("/"))) for triple in triples)
    return float(clean), dict(zip(_DEFENDED, values, strict=True))


def _defense(table: int, row: str, trial: Trial) -> float | None:
    clean, attacks = defense(NUMBERS[f"table{table}"][row])
    if trial.attack == "clean":
        return clean / 100
    values = attacks.get(trial.attack + "(B)" * (trial.through is not None), ())
    found = [v for v, pixels in zip(values, (2, 8, 16), strict=False) if _at(trial.eps, pixels)]
    return found[0] / 100 if found and not trial.unaware else None


# --- accuracy against bits: Figure 1, Table 1, Figure 5 -----------------------------------


def fig1(scale: Scale) -> list[Ask]:
    """Vanilla VGG and Wide ResNet, clean and attacked."""
    models = {"VGG-16": scale.vgg, "Wide ResNet": scale.wrn}
    return [
        Ask(
            {"name": name, "bits": bits},
            (scale.network(model, bits=bits),),
            trial,
            _table1(0, trial, bits) if name == "Wide ResNet" else None,
        )
        for trial, (name, model), bits in product(scale.trials, models.items(), scale.bits)
    ]


def show_fig1(scale: Scale, found: Found) -> Shown:
    rows = {"Network": named, "Images": tried}
    return [pivot(found, rows, bits_head, {"5 bits − full": _fifth})], _bit_panels(found)


def _fifth(row: Found) -> Number:
    """5 bits minus full precision, beside the loss that the paper's section 3 gives."""
    ask = row[0][0]
    lost = NUMBERS["loss_at_5_bits"][ask.at["name"]]
    known = ask.trial.attack == "fgsm" and _at(ask.trial.eps)
    five, full = (next((n for a, n in row if a.at["bits"] == b), Number(None)) for b in (5, None))
    return difference(five, full, -lost / 100 if known else None)


def _bit_panels(found: Found) -> list[Panel]:
    """One for each trial."""
    trials = dict.fromkeys(ask.trial for ask, _ in found)
    per_trial = ((trial.name, by_bits(select(found, trial=trial))) for trial in trials)
    return [panel(t, "activation bits", own, named, bits_place, named) for t, own in per_trial]


def table1(scale: Scale) -> list[Ask]:
    """Vanilla and DQ of three betas, over the seeds."""
    betas = enumerate((0.0, *scale.table1_betas))
    return [
        Ask(_method(row, beta, bits), scale.by_seed(bits, beta), trial, _table1(row, trial, bits))
        for (row, beta), trial, bits in product(betas, scale.trials, scale.bits)
    ]


def _method(row: int, beta: float, bits: int | None) -> dict[str, Any]:
    return {"name": method_text(beta), "row": row, "beta": beta, "bits": bits}


def show_table1(scale: Scale, found: Found) -> Shown:
    ends = {"Quantize Gain": _gain, "Best": _best}
    return [pivot(found, {"Network": named, "Images": tried}, bits_head, ends)], []


def _gain(row: Found) -> Number | None:
    """The best of the bit widths minus full precision; None for clean images, as in the paper."""
    ask = row[0][0]
    if ask.trial.attack == "clean":
        return None
    printed = _table1_end(ask.at["row"], ask.trial, "gain")
    if any(n.mean is None for _, n in row):
        return Number(None, points=True, paper=printed)
    full = next(n for a, n in row if a.at["bits"] is None)
    return difference(_highest(n for a, n in row if a.at["bits"] is not None), full, printed)


def _best(row: Found) -> Number | None:
    """The best of the row, full precision among it."""
    ask = row[0][0]
    if ask.trial.attack == "clean":
        return None
    whole = all(n.mean is not None for _, n in row)
    found = _highest(n for _, n in row) if whole else Number(None)
    return replace(found, paper=_table1_end(ask.at["row"], ask.trial, "best"))


def _highest(numbers: Iterable[Number]) -> Number:
    return max(numbers, key=lambda n: -1.0 if n.mean is None else n.mean)


def fig5(scale: Scale) -> list[Ask]:
    """White box and black box, vanilla and DQ at the largest beta of Table 1: it names none."""
    throughs = (None, scale.substitute())
    both = [scale.trial("fgsm", e, through=t) for e, t in product(scale.eps, throughs)]
    betas = ((0, 0.0), (3, max(scale.table1_betas)))
    return [
        Ask(_method(row, beta, bits), scale.by_seed(bits, beta), trial, _table1(row, trial, bits))
        for trial, (row, beta), bits in product((scale.trial(), *both), betas, scale.bits)
    ]


def show_fig5(scale: Scale, found: Found) -> Shown:
    return [pivot(found, {"Network": named, "Images": tried}, bits_head)], _bit_panels(found)


# --- other defences: Tables 2 and 3 -------------------------------------------------------

SQUEEZED = 5  # bits of colour


def defended(scale: Scale, table: int) -> list[tuple[dict[str, Any], Network]]:
    """The rows of Table 2 or 3 in the paper's order by their labels; "Normal" is full precision."""
    data, train, model = (
        (scale.svhn, scale.svhn_train, scale.svhn_wrn)
        if table == 2
        else (scale.data, scale.train, scale.wrn)
    )
    techniques: dict[str, tuple[int | None, dict[str, Any]]] = {
        "Normal": (None, {}),
        "Feature Squeezing": (SQUEEZED, {}),
        "Adversarial R+FGSM": (None, {"attack": "rfgsm", **scale.adversarial}),
    }
    if table == 3:
        techniques["Adversarial PGD"] = (None, {"attack": "pgd", **scale.adversarial})
    rows = []
    for technique, (squeeze, changes) in techniques.items():
        # PGD is the dearest training: the paper's bits alone
        widths = scale.defense_bits[:1] if technique == "Adversarial PGD" else scale.defense_bits
        for dq, bits in ((False, None), *((True, bits) for bits in widths)):
            network = scale.network(
                model, bits=bits, beta=scale.beta if dq else 0.0, data=data, squeeze=squeeze,
                train=replace(train, **changes),
            )  # fmt: skip
            suffix = {1: "", None: " (full precision)"}.get(bits, f" ({bits}-bit)")
            name = f"{technique} + DQ{suffix}" if dq else technique
            rows.append(({"name": name, "technique": technique, "dq": dq, "bits": bits}, network))
    return rows


def _defended(scale: Scale, table: int) -> list[Ask]:
    """The paper's columns at every radius, the strong attacks, and those blind to a squeezing."""
    on = {"train": scale.svhn_train, "data": scale.svhn} if table == 2 else {}
    through = scale.substitute(**on)
    asks = []
    for at, network in defended(scale, table):
        trials = [scale.trial()]
        for eps in scale.eps:
            trials += [scale.trial(attack, eps) for attack in ("random", "fgsm", "rfgsm", "pgd")]
            trials += [scale.trial(attack, eps, through=through) for attack in ("fgsm", "pgd")]
            trials += [trial for trial in scale.strong_trials if trial.eps == eps]
            if network.model.squeeze:
                trials += [scale.trial(a, eps, unaware=True) for a in ("fgsm", "pgd")]
        row = at["technique"] + " + DQ" * at["dq"]
        known = not at["dq"] or at["bits"] == 1  # the paper's bits
        asks += [Ask(at, (network,), t, _defense(table, row, t) if known else None) for t in trials]
    return asks


def table2(scale: Scale) -> list[Ask]:
    """On SVHN, or on the images of Table 3 where SVHN is not at hand."""
    return _defended(scale, 2)


def table3(scale: Scale) -> list[Ask]:
    """On CIFAR-10."""
    return _defended(scale, 3)


def show_defended(scale: Scale, found: Found) -> Shown:
    """A table for each radius, clean images beside it; then the squeezed rows, aware and not."""
    tables = []
    for eps in scale.eps:
        here = [(a, n) for a, n in found if a.trial.eps in (0.0, eps) and not a.trial.unaware]
        tables.append(pivot(here, {"Training technique": named}, lambda ask: ask.trial.column))
    squeezed = [
        (a, replace(n, paper=None))  # it does not say which of the two it has
        for a, n in found
        if a.at["technique"] == "Feature Squeezing" and a.trial.through is None
        if a.trial.attack in ("fgsm", "pgd")
    ]
    columns = sorted(squeezed, key=lambda pair: (pair[0].at["name"], pair[0].trial.attack))
    rows = {"Training technique": named, "ε": lambda ask: eps_text(ask.trial.eps)}
    return [*tables, pivot(columns, rows, lambda ask: ask.trial.column)], []


# --- the range of activations: Table 4 ----------------------------------------------------


def table4(scale: Scale) -> list[Ask]:
    """ResNet-18 at 4 bits, vanilla and DQ, cut at 1 and at 6; clean as in the paper, then FGSM."""
    trials = [trial for trial in scale.trials if trial.attack not in scale.strong]
    return [
        Ask(
            {"name": method_text(beta), "dq": beta > 0, "high": high},
            (scale.network(scale.resnet, bits=4, beta=beta, high=high),),
            trial,
            _ranges(beta, trial)[i],
        )
        for trial, beta, (i, high) in product(trials, (0.0, scale.beta), enumerate((1.0, 6.0)))
    ]


def _ranges(beta: float, trial: Trial) -> list[float | None]:
    """The paper's for ReLU1, ReLU6 and their difference."""
    printed = NUMBERS["table4"]["DQ" if beta else "vanilla"]
    return [value / 100 if trial.attack == "clean" else None for value in printed]


def show_ranges(scale: Scale, found: Found) -> Shown:
    def gap(row: Found) -> Number:
        ask = row[0][0]
        return difference(row[0][1], row[1][1], _ranges(ask.at["dq"], ask.trial)[2])

    rows = {"Quantisation": named, "Images": tried}
    return [pivot(found, rows, lambda ask: f"ReLU{ask.at['high']:g}", {"Difference": gap})], []


# --- white box beside black box: Tables 5 and 6 -------------------------------------------


def _boxes(
    scale: Scale,
    table: int,
    networks: Mapping[str, Network],
    attack: str,
    through: Network,
    others: Sequence[str] = (),
) -> Iterator[Ask]:
    """Every network at every radius; the strong attacks where the scale asks for them."""
    for (name, network), eps in product(networks.items(), scale.eps):
        clean, white, black = (v / 100 for v in NUMBERS[f"table{table}"][name])
        shown = attack_text(attack)
        boxes = [
            ("Clean", scale.trial(), clean),
            (f"White box {shown}", scale.trial(attack, eps), white if _at(eps) else None),
            (
                f"Black box {shown}",
                scale.trial(attack, eps, through=through),
                black if _at(eps) else None,
            ),
        ]
        more = [*(scale.trial(o, eps) for o in others), *scale.strong_trials]
        boxes += [(trial.column, trial, None) for trial in more if trial.eps == eps]
        for head, trial, printed in boxes:
            yield Ask({"name": name, "eps": eps, "head": head}, (network,), trial, printed)


def table5(scale: Scale) -> list[Ask]:
    """ResNet-18 after PGD training at a fixed eps; the black box through a VGG trained alike."""
    train = replace(scale.train, **{"attack": "pgd", **scale.madry})  # type: ignore[arg-type]
    networks = {
        "Full-Precision": scale.network(scale.resnet, train=train),
        "Tanh Quantized": scale.network(scale.resnet, train=train, bits=2, tanh=True),
        "ReLU6 Quantized": scale.network(scale.resnet, train=train, bits=2),
    }
    return list(_boxes(scale, 5, networks, "pgd-20", scale.substitute(train=train)))


def table6(scale: Scale) -> list[Ask]:
    """The Wide ResNet after FGSM and R+FGSM training; PGD, from which masking hides less."""
    networks = {
        f"Adversarial {attack_text(attack)}": scale.network(
            train=replace(scale.train, **{"attack": attack, **scale.adversarial})  # type: ignore[arg-type]
        )
        for attack in ("fgsm", "rfgsm")
    }
    return list(_boxes(scale, 6, networks, "fgsm", scale.substitute(), ["pgd"]))


def show_boxes(scale: Scale, found: Found) -> Shown:
    def gap(row: Found) -> Number:
        white, black = row[1][1], row[2][1]
        printed = None if white.paper is None or black.paper is None else white.paper - black.paper
        return difference(white, black, printed)

    rows = {"Network": named, "ε": lambda ask: eps_text(ask.at["eps"])}
    return [pivot(found, rows, lambda ask: str(ask.at["head"]), {"White − black": gap})], []


# --- the weight of the penalty: Figure 6 --------------------------------------------------


def fig6(scale: Scale) -> list[Ask]:
    """4 bits, vanilla at beta 0; last the validation images that choose beta, where held out."""
    held_out = min(scale.data.validation_images, 2 * (scale.few or 1000))
    judge = Trial("pgd-20", scale.hard_eps[0], held_out, split="validation")
    trials = [*scale.trials, *[judge] * (held_out > 0)]
    rows = list(NUMBERS["table1"])
    return [
        Ask(
            {"name": f"{beta:g}", "beta": beta},
            (scale.network(bits=4, beta=beta),),
            trial,
            _table1(rows.index(beta), trial, 4) if beta in rows else None,
        )
        for beta, trial in product((0.0, *scale.betas), trials)
    ]


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

    def kind(ask: Ask) -> str:
        return eps_text(ask.trial.eps) if ask.trial.attack == "fgsm" else ask.trial.name

    test = [(a, n) for a, n in found if a.trial.split == "test"]
    strong = [pair for pair in test if pair[0].trial.attack in scale.strong]
    usual = [pair for pair in test if pair not in strong]
    titles = {"clean and FGSM": usual, listed(map(attack_text, scale.strong)): strong}
    panels = [panel(t, "β", own, tried, named, kind) for t, own in titles.items()]
    return [pivot(found, {"β": named}, tried)], panels
