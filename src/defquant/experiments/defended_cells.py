"""Networks and measurements of Table 2 (SVHN) and Table 3 (CIFAR-10)."""

from dataclasses import dataclass, replace
from typing import Any

from defquant.experiments.cells import Cell, Network
from defquant.experiments.scales import Scale
from defquant.experiments.standard import SUBSTITUTE_SEED, attacked, clean, hard

__all__ = [
    "Defended", "detector_cells", "row_cells", "table2_cells", "table3_cells", "table_cells",
    "table_rows", "table_substitute",
]  # fmt: skip

WHITE_BOX = ("random", "fgsm", "rfgsm", "pgd")
BLACK_BOX = ("fgsm", "pgd")
SQUEEZE = 5  # bits of colour


@dataclass(frozen=True)
class Defended:
    """A row: the training technique as the paper names it, DQ's bits, the network."""

    technique: str
    dq: bool
    bits: int | None
    network: Network

    @property
    def name(self) -> str:
        """As in the paper, with the bits where they are not its 1."""
        bits = {1: "", None: " (full precision)"}.get(self.bits, f" ({self.bits}-bit)")
        return f"{self.technique} + DQ{bits}" if self.dq else self.technique


def table_rows(scale: Scale, table: int) -> list[Defended]:
    """The rows of Table 2 or 3 in the paper's order; "Normal" is full precision."""
    adversarial: list[dict[str, Any]] = [{"attack": "rfgsm"}] + [{"attack": "pgd"}] * (table == 3)
    names = {"rfgsm": "Adversarial R+FGSM", "pgd": "Adversarial PGD"}
    settings: list[tuple[str, int | None, dict[str, Any]]]
    settings = [("Normal", None, {}), ("Feature Squeezing", SQUEEZE, {})]
    settings += [(names[a["attack"]], None, a | dict(scale.adversarial)) for a in adversarial]
    rows = []
    for technique, squeeze, changes in settings:
        # PGD is the dearest training: the paper's bits alone
        widths = scale.defense_bits[:1] if technique == "Adversarial PGD" else scale.defense_bits
        for dq, bits in ((False, None), *((True, bits) for bits in widths)):
            network = _network(scale, table, bits, dq, squeeze, changes)
            rows.append(Defended(technique, dq, bits, network))
    return rows


def _network(
    scale: Scale,
    table: int,
    bits: int | None,
    dq: bool,
    squeeze: int | None,
    changes: dict[str, Any],
) -> Network:
    train = replace(scale.svhn_train if table == 2 else scale.train, **changes)
    data = scale.svhn if table == 2 else scale.data
    model = scale.svhn_wrn if table == 2 else scale.wrn
    beta = scale.beta if dq else 0.0
    return scale.network(model, bits=bits, beta=beta, train=train, data=data, squeeze=squeeze)


def table_substitute(scale: Scale, table: int) -> Network:
    """A full-precision VGG of other seed on the table's images."""
    train, data = (scale.svhn_train, scale.svhn) if table == 2 else (scale.train, scale.data)
    return scale.network(scale.vgg, seed=SUBSTITUTE_SEED, train=train, data=data)


def row_cells(scale: Scale, table: int, row: Defended) -> list[Cell]:
    through, network = table_substitute(scale, table), row.network
    cells = [clean(scale, network), *hard(scale, network)]
    for attack in WHITE_BOX:
        cells += attacked(scale, network, attack)
    for attack in BLACK_BOX:
        cells += attacked(scale, network, attack, through=through)
        if network.model.squeeze:
            cells += attacked(scale, network, attack, unaware=True)
    return cells


def detector_cells(scale: Scale, table: int) -> list[Cell]:
    """Feature squeezing as a detector, on the undefended network."""
    network = table_rows(scale, table)[0].network
    kinds = ("fgsm", "pgd")
    return [Cell(network, "detector", a, eps, scale.few) for a in kinds for eps in scale.eps]


def table_cells(scale: Scale, table: int) -> list[Cell]:
    rows = table_rows(scale, table)
    return [c for row in rows for c in row_cells(scale, table, row)] + detector_cells(scale, table)


def table2_cells(scale: Scale) -> list[Cell]:
    return table_cells(scale, 2)


def table3_cells(scale: Scale) -> list[Cell]:
    return table_cells(scale, 3)
