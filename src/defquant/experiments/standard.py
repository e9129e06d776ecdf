"""The measurements that several tables share."""

from collections.abc import Sequence

from defquant.experiments.cells import Cell, Network
from defquant.experiments.scales import Scale

__all__ = ["SUBSTITUTE_SEED", "attacked", "clean", "dq", "hard", "substitute", "vanilla"]

ONE_STEP = ("clean", "random", "fgsm", "rfgsm")
SUBSTITUTE_SEED = 1000  # no seed of the networks that are attacked through it


def vanilla(scale: Scale, bits: int | None, seed: int | None = None) -> Network:
    """The Wide ResNet without penalty, its residual sums plain; float for no bits."""
    return scale.network(bits=bits, seed=seed)


def dq(
    scale: Scale, bits: int | None, beta: float | None = None, seed: int | None = None
) -> Network:
    """The Wide ResNet with the penalty and convex sums; `scale.beta` where none is given."""
    return scale.network(bits=bits, beta=scale.beta if beta is None else beta, seed=seed)


def substitute(scale: Scale) -> Network:
    """The full-precision VGG of section 5.1 through which black-box attacks go."""
    return scale.network(scale.vgg, seed=SUBSTITUTE_SEED)


def clean(scale: Scale, network: Network) -> Cell:
    return Cell(network, images=scale.many)


def attacked(
    scale: Scale,
    network: Network,
    attack: str,
    *,
    through: Network | None = None,
    unaware: bool = False,
    eps: Sequence[float] | None = None,
) -> list[Cell]:
    """`attack` at every radius: one-step attacks on many images, others on few."""
    images = scale.many if attack in ONE_STEP else scale.few
    return [
        Cell(network, "accuracy", attack, radius, images, substitute=through, unaware=unaware)
        for radius in (scale.eps if eps is None else eps)
    ]


def hard(scale: Scale, network: Network) -> list[Cell]:
    """The strong attacks beside the paper's."""
    eps = scale.hard_eps
    return [cell for name in scale.strong for cell in attacked(scale, network, name, eps=eps)]
