"""Gradient masking of other methods: Table 5 (tanh) and Table 6 (FGSM training)."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from defquant.experiments import paper
from defquant.experiments.cells import Cell, Network
from defquant.experiments.compose import section
from defquant.experiments.masked import (
    MaskedRow,
    masked_against,
    masked_rows,
    masked_sign,
    masked_table,
)
from defquant.experiments.scales import Scale
from defquant.experiments.section import Section
from defquant.experiments.standard import SUBSTITUTE_SEED, attacked, clean, hard, substitute
from defquant.experiments.store import Results
from defquant.experiments.words import (
    adversary_text,
    attack_text,
    attacks_text,
    blind,
    model_text,
    setting,
)

__all__ = [
    "table5", "table5_cells", "table5_networks", "table5_substitute", "table6", "table6_cells",
    "table6_networks",
]  # fmt: skip

BITS = 2
MADRY = "pgd-20"  # the attack of Madry et al. 2017 in test


def _madry(scale: Scale, model: str, **options: Any) -> Network:
    changes: dict[str, Any] = {"attack": "pgd", **scale.madry}
    train = replace(scale.train, **changes)
    return scale.network(model, train=train, **options)


def table5_networks(scale: Scale) -> dict[str, Network]:
    """ResNet-18 after PGD training at a fixed eps, by the paper's names."""
    return {
        "Full-Precision": _madry(scale, scale.resnet),
        "Tanh Quantized": _madry(scale, scale.resnet, bits=BITS, tanh=True),
        "ReLU6 Quantized": _madry(scale, scale.resnet, bits=BITS),
    }


def table5_substitute(scale: Scale) -> Network:
    """The PGD-trained VGG of other seed through which the black box goes."""
    return _madry(scale, scale.vgg, seed=SUBSTITUTE_SEED)


def table5_cells(scale: Scale) -> list[Cell]:
    """Clean, white box and black box through a PGD-trained VGG."""
    through = table5_substitute(scale)
    cells = []
    for network in table5_networks(scale).values():
        cells += [clean(scale, network), *attacked(scale, network, MADRY)]
        cells += [*attacked(scale, network, MADRY, through=through), *hard(scale, network)]
    return cells


def table6_networks(scale: Scale) -> dict[str, Network]:
    """The Wide ResNet after FGSM and after R+FGSM training, of random eps as in section 5.2."""

    def network(attack: str) -> Network:
        changes: dict[str, Any] = {"attack": attack, **scale.adversarial}
        return scale.network(train=replace(scale.train, **changes))

    return {"Adversarial FGSM": network("fgsm"), "Adversarial R+FGSM": network("rfgsm")}


def table6_cells(scale: Scale) -> list[Cell]:
    """Clean, FGSM white box and black box, and PGD, which masking cannot hide from as easily."""
    through = substitute(scale)
    cells = []
    for network in table6_networks(scale).values():
        cells += [clean(scale, network), *hard(scale, network)]
        cells += [*attacked(scale, network, "fgsm"), *attacked(scale, network, "pgd")]
        cells += attacked(scale, network, "fgsm", through=through)
    return cells


def table5(scale: Scale, results: Results) -> Section:
    """Clean, white box and black box of PGD-trained networks, tanh among them."""
    networks = table5_networks(scale)
    rows = masked_rows(scale, results, 5, networks, MADRY, table5_substitute(scale))
    return section(
        "table5",
        "Table 5: tanh quantisation",
        [
            *_table5_about(scale, results),
            masked_sign(rows),
            masked_against(rows, "Tanh Quantized", "Full-Precision"),
            _blind(rows),
        ],
        table5_cells(scale),
        results,
        images=(scale.data, "cifar10"),
        tables=[masked_table(scale, rows, MADRY)],
    )


def _table5_about(scale: Scale, results: Results) -> list[str]:
    names = f"{model_text(scale.resnet)}, full precision and {BITS} bits"
    train = table5_networks(scale)["Full-Precision"].train
    attacks = attacks_text(scale, long=[attack_text(MADRY), f"{attack_text(MADRY)}(B)"])
    return [
        setting(names, "ResNet-18", train, scale.data, table5_cells(scale), results)
        + f"Trained on {adversary_text(train)}. {attacks} The black box goes through a "
        f"{model_text(scale.vgg)} of another seed, trained in the same way.",
        "The paper, at 8/255: tanh keeps the most under the white box, less than full precision "
        "under the black box, and more under the white box than under the black box, a sign of "
        "masked gradients. Its appendix A.1 says that the black box succeeds less often than the "
        "white box; its table has it the other way round.",
    ]


def _blind(rows: Sequence[MaskedRow]) -> str:
    return blind((row.name, row.white) for row in rows)


def table6(scale: Scale, results: Results) -> Section:
    """Clean, white box and black box of FGSM- and R+FGSM-trained networks."""
    networks = table6_networks(scale)
    rows = masked_rows(scale, results, 6, networks, "fgsm", substitute(scale), others=["pgd"])
    return section(
        "table6",
        "Table 6: FGSM training",
        [
            *_table6_about(scale, networks, results),
            masked_sign(rows),
            masked_against(rows, *networks),
            _blind(rows),
        ],
        table6_cells(scale),
        results,
        images=(scale.data, "cifar10"),
        tables=[masked_table(scale, rows, "fgsm", others=["pgd"])],
    )


def _table6_about(scale: Scale, networks: Mapping[str, Network], results: Results) -> list[str]:
    train = networks["Adversarial FGSM"].train
    names = f"{model_text(scale.wrn)}, full precision"
    attacks = attacks_text(scale, "FGSM", "FGSM(B)", long=["PGD"])
    (_, white, black), (_, other, _) = paper.TABLE6.values()
    return [
        setting(names, "WRN-28-10, 200 epochs", train, scale.data, table6_cells(scale), results)
        + f"Trained on {adversary_text(train)}, or of R+FGSM. {attacks} The black box goes "
        f"through a full-precision {model_text(scale.vgg)} of another seed.",
        f"The paper, at 8/255: FGSM training keeps {white}% under the white box and {black}% under "
        f"the black box, a sign of masked gradients; R+FGSM training shows none. {other} stands in "
        "two cells of its table, the second for the white box of R+FGSM training. There its "
        "Table 3 has 52 too; so if one of them is a slip, it is the first.",
    ]
