"""Networks and measurements over activation bits: Figure 1, Table 1 and Figure 5."""

from defquant.experiments.cells import Cell, Network
from defquant.experiments.scales import Scale
from defquant.experiments.standard import attacked, clean, dq, hard, substitute, vanilla

__all__ = [
    "fig1_cells", "fig1_networks", "fig5_beta", "fig5_cells", "table1_cells", "table1_networks",
]  # fmt: skip


def fig1_networks(scale: Scale) -> dict[str, list[Network]]:
    """Vanilla VGG and Wide ResNet in order of `scale.bits`."""
    return {
        "VGG-16": [scale.network(scale.vgg, bits=bits) for bits in scale.bits],
        "Wide ResNet": [vanilla(scale, bits) for bits in scale.bits],
    }


def fig1_cells(scale: Scale) -> list[Cell]:
    """Clean and under FGSM."""
    networks = [network for row in fig1_networks(scale).values() for network in row]
    return [
        cell
        for network in networks
        for cell in (
            clean(scale, network),
            *attacked(scale, network, "fgsm"),
            *hard(scale, network),
        )
    ]


def table1_networks(scale: Scale, seed: int) -> dict[float, list[Network]]:
    """By beta (0 for vanilla), in order of `scale.bits`."""
    rows = {0.0: [vanilla(scale, bits, seed) for bits in scale.bits]}
    for beta in scale.table1_betas:
        rows[beta] = [dq(scale, bits, beta, seed) for bits in scale.bits]
    return rows


def table1_cells(scale: Scale) -> list[Cell]:
    """Clean, under FGSM and under the strong attack, for every seed."""
    return [
        cell
        for seed in scale.seeds
        for row in table1_networks(scale, seed).values()
        for network in row
        for cell in (
            clean(scale, network),
            *attacked(scale, network, "fgsm"),
            *hard(scale, network),
        )
    ]


def fig5_cells(scale: Scale) -> list[Cell]:
    """White box and black box against bits, vanilla and DQ at the largest beta of Table 1."""
    through = substitute(scale)
    rows = [(seed, table1_networks(scale, seed)) for seed in scale.seeds]
    networks = [n for _, row in rows for beta in (0.0, fig5_beta(scale)) for n in row[beta]]
    return [
        cell
        for network in networks
        for cell in (
            clean(scale, network),
            *attacked(scale, network, "fgsm"),
            *attacked(scale, network, "fgsm", through=through),
        )
    ]


def fig5_beta(scale: Scale) -> float:
    """The largest of Table 1; the paper does not say which it drew."""
    return max(scale.table1_betas)
