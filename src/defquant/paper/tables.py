"""The paper's tables and curves as lists of questions: cells, numbers and panels follow from them.

To add a table: a list of `Ask` and how it is shown, here; a line in `EXPERIMENTS` of `figures.py`;
its words in `text.md`, and the paper's numbers in `numbers.yaml`. No torch.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import yaml

from defquant.paper.ask import Ask, Found, Shown, by_bits, panel, pivot, select
from defquant.paper.grid import Network, Scale, Trial
from defquant.paper.section import (
    Entry,
    Number,
    Table,
    attack_text,
    difference,
    eps_text,
    listed,
    method_text,
    model_text,
    rate,
)  # fmt: skip

__all__ = [
    "NUMBERS", "beside_defences", "chosen_beta", "defended", "defense", "fig1", "fig5", "fig6",
    "show_beta", "show_boxes", "show_defended", "show_fig1", "show_fig5", "show_ranges",
    "show_surrogates", "show_table1", "surrogates", "table1", "table4", "table5", "table6",
]  # fmt: skip

Ends = Mapping[str, Callable[[Found], Entry]]
Show = Callable[[Scale, Found], Shown]


def _table(rows: Mapping[str, str], column: str, ends: Ends) -> Show:
    return lambda scale, found: ([pivot(found, rows, column, ends)], [])


def _over_bits(ends: Ends) -> Show:
    """A table over bits, and a panel for each trial."""

    def show(scale: Scale, found: Found) -> Shown:
        trials = dict.fromkeys(ask.trial for ask, _ in found)
        own = {trial.name: by_bits(select(found, trial=trial)) for trial in trials}
        panels = [panel(t, "activation bits", f, "name", "width", "name") for t, f in own.items()]
        return [pivot(found, {"Network": "name", "Images": "trial"}, "bits", ends)], panels

    return show


# --- the paper's numbers ------------------------------------------------------------------

NUMBERS: Mapping[str, Any] = yaml.safe_load(
    Path(__file__).with_name("numbers.yaml").read_text(encoding="utf-8")
)
_DEFENDED = ("random", "fgsm", "rfgsm", "pgd", "fgsm(B)", "pgd(B)")  # at eps 2, 8, 16
_TABLE1 = list(NUMBERS["table1"].values())  # vanilla, then DQ in order of beta


def _at(eps: float, pixels: float = 8) -> bool:
    return abs(255 * eps - pixels) < 0.02


def _table1(row: int, trial: Trial, place: int | str | None) -> float | None:
    """Of Table 1 at these bits or one of its `ends`: clean, or FGSM at 8 as a white box."""
    known = trial.attack == "clean" or (trial.attack == "fgsm" and _at(trial.eps))
    if row >= len(_TABLE1) or trial.through or not known:
        return None
    if isinstance(place, str):
        return float(_TABLE1[row]["ends"][place]) / 100
    printed = dict(enumerate(_TABLE1[row][trial.attack]))
    return printed[place or 0] / 100 if (place or 0) in printed else None


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


def _fifth(row: Found) -> Number:
    """5 bits minus full precision, beside the loss that the paper's section 3 gives."""
    ask = row[0][0]
    lost = NUMBERS["loss_at_5_bits"][ask.at["name"]]
    known = ask.trial.attack == "fgsm" and _at(ask.trial.eps)
    five, full = (next((n for a, n in row if a.at["bits"] == b), Number(None)) for b in (5, None))
    return difference(five, full, -lost / 100 if known else None)


show_fig1 = _over_bits({"5 bits − full": _fifth})


def table1(scale: Scale) -> list[Ask]:
    """Vanilla and DQ of three betas, over the seeds."""
    betas = enumerate((0.0, *scale.table1_betas))
    return [ask for row, trial in product(betas, scale.trials) for ask in _row(scale, trial, *row)]


def fig5(scale: Scale) -> list[Ask]:
    """White box and black box, vanilla and DQ at the largest beta of Table 1: it names none."""
    throughs = (None, scale.substitute())
    both = [scale.trial("fgsm", e, through=t) for e, t in product(scale.eps, throughs)]
    rows = ((0, 0.0), (3, max(scale.table1_betas)))
    pairs = product((scale.trial(), *both), rows)
    return [ask for trial, row in pairs for ask in _row(scale, trial, *row)]


def _row(scale: Scale, trial: Trial, row: int, beta: float) -> list[Ask]:
    at = {"name": method_text(beta), "row": row, "beta": beta}
    return [
        Ask(at | {"bits": b}, scale.by_seed(b, beta), trial, _table1(row, trial, b))
        for b in scale.bits
    ]


def _gain(row: Found) -> Number | None:
    """The best of the bit widths minus full precision; None for clean images, as in the paper."""
    found = _best([pair for pair in row if pair[0].at["bits"] is not None])
    if found is None:
        return None
    printed = _table1(row[0][0].at["row"], row[0][0].trial, "gain")
    full = next(n for a, n in row if a.at["bits"] is None)
    if found.mean is None or full.mean is None:
        return Number(None, points=True, paper=printed)
    return difference(found, full, printed)


def _best(row: Found) -> Number | None:
    """The best of the row, full precision among it."""
    ask, numbers = row[0][0], {n.mean: n for _, n in reversed(row)}
    if ask.trial.attack == "clean":
        return None
    known = [mean for mean in numbers if mean is not None]
    best = numbers[max(known)] if len(known) == len(numbers) else Number(None)
    return replace(best, paper=_table1(ask.at["row"], ask.trial, "best"))


show_table1 = _table(
    {"Network": "name", "Images": "trial"}, "bits", {"Quantize Gain": _gain, "Best": _best}
)
show_fig5 = _over_bits({})


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


def beside_defences(scale: Scale, table: int) -> list[Ask]:
    """Table 2, on SVHN or the images of Table 3 where it is not at hand, or Table 3.

    The paper's columns at every radius, the strong attacks, and those blind to a squeezing; last
    what a squeezing detects before the undefended network.
    """
    on = {"train": scale.svhn_train, "data": scale.svhn} if table == 2 else {}
    through = scale.substitute(**on)
    asks, rows = [], defended(scale, table)
    for at, network in rows:
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
    probes = product(("fgsm", "pgd"), scale.eps)
    trials = [Trial(a, eps, scale.few, kind="detector") for a, eps in probes]
    return asks + [Ask({}, (rows[0][1],), trial) for trial in trials]


def show_defended(scale: Scale, found: Sequence[tuple[Ask, Any]]) -> Shown:
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
        if a.trial.through is None and a.trial.attack in ("fgsm", "pgd")
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
            _ranges(beta > 0, trial)[i],
        )
        for trial, beta, (i, high) in product(trials, (0.0, scale.beta), enumerate((1.0, 6.0)))
    ]


def _ranges(dq: bool, trial: Trial) -> list[float | None]:
    """The paper's for ReLU1, ReLU6 and their difference."""
    printed = NUMBERS["table4"]["DQ" if dq else "vanilla"]
    return [value / 100 if trial.attack == "clean" else None for value in printed]


def _lost_at_1(row: Found) -> Number:
    (ask, relu1), (_, relu6) = row
    return difference(relu1, relu6, _ranges(ask.at["dq"], ask.trial)[2])


show_ranges = _table({"Quantisation": "name", "Images": "trial"}, "cut", {"Difference": _lost_at_1})


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
    shown = attack_text(attack)
    for (name, network), eps in product(networks.items(), scale.eps):
        clean, white, black = (v / 100 for v in NUMBERS[f"table{table}"][name])
        boxes = [
            ("Clean", scale.trial(), clean),
            (f"White box {shown}", scale.trial(attack, eps), white),
            (f"Black box {shown}", scale.trial(attack, eps, through=through), black),
        ]
        more = [*(scale.trial(o, eps) for o in others), *scale.strong_trials]
        boxes += [(trial.column, trial, None) for trial in more if trial.eps == eps]
        for head, trial, printed in boxes:
            known = trial.attack == "clean" or _at(eps)
            at = {"name": name, "eps": eps, "head": head}
            yield Ask(at, (network,), trial, printed if known else None)


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


def _masked(row: Found) -> Number:
    """White minus black box."""
    white, black = row[1][1], row[2][1]
    printed = difference(Number(white.paper), Number(black.paper))
    return difference(white, black, printed.mean)


show_boxes = _table({"Network": "name", "ε": "eps"}, "head", {"White − black": _masked})


# --- the weight of the penalty: Figure 6 --------------------------------------------------


def fig6(scale: Scale) -> list[Ask]:
    """4 bits, vanilla at beta 0; last the validation images that choose beta, where held out."""
    held_out = min(scale.data.validation_images, 2 * (scale.few or 1000))
    judge = Trial("pgd-20", scale.hard_eps[0], held_out, split="validation")
    trials = [*scale.trials, *[judge] * (held_out > 0)]
    rows = list(NUMBERS["table1"])

    def radius(trial: Trial) -> str:
        return eps_text(trial.eps) if trial.attack == "fgsm" else trial.name

    return [
        Ask(
            {"name": f"{beta:g}", "beta": beta, "colour": radius(trial)},
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
    test = [(a, n) for a, n in found if a.trial.split == "test"]
    strong = [pair for pair in test if pair[0].trial.attack in scale.strong]
    usual = [pair for pair in test if pair not in strong]
    titles = {"clean and FGSM": usual, listed(map(attack_text, scale.strong)): strong}
    panels = [panel(t, "β", own, "trial", "name", "colour") for t, own in titles.items()]
    return [pivot(found, {"β": "name"}, "trial")], panels


# --- beyond the paper: what the straight-through gradient overstates ----------------------

PASSES = {
    "": "straight-through, margin",
    "@soft": "soft round, margin",
    "@twin": "float twin, margin",
    "@clipfree": "clip-free, margin",
}


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
    usual, worst = scale.strong
    tables, panels = [], []
    for eps in scale.hard_eps:
        here = select(found, eps=eps)
        tables.append(pivot(here, {"Network": "name", "Attack": "row"}, "bits"))
        ends = (select(here, trial=scale.trial(attack, eps)) for attack in (usual, worst))
        gaps = [(ask, difference(n, least)) for (ask, n), (_, least) in zip(*ends, strict=True)]
        tables.append(pivot(gaps, {"Network": "name"}, "bits"))
        for name in dict.fromkeys(ask.at["name"] for ask, _ in here):
            own = [
                (a, n) for a, n in select(here, name=name)
                if a.trial.images == scale.few and a.trial.attack != "clean"
                if a.at["row"] != PASSES["@clipfree"]
            ]  # fmt: skip
            short = name.partition(" at ")[0]
            title = short if len(scale.hard_eps) == 1 else f"{short}, {eps_text(eps)}"
            panels.append(panel(title, "activation bits", by_bits(own), "row", "width", "row"))
    return tables, panels
