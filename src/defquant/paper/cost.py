"""What experiments cost, in image passes: one is an image forward and fully backward."""

import math
import re
from collections.abc import Iterable
from statistics import NormalDist

from defquant.paper.grid import Cell, Network, by_network

__all__ = ["cell_passes", "passes_by_model", "training_passes"]

FORWARD, INPUT_GRADIENT = 1 / 3, 2 / 3  # of a pass, whose backward is twice its forward
WORST = {"adaptive": 2.2, "standard": 44.0}  # times the time of a PGD of its steps, or of 50
STANDING = 0.5  # share of images that long attacks work on, for those that fell cost nothing
_IMAGES = {"cifar10": (50_000, 10_000), "svhn": (73_257, 26_032), "digits": (1_347, 450)}


def training_passes(network: Network) -> float:
    """Image passes of a training, those of its attack among them."""
    images, train = _images(network), network.train
    steps = 0.0
    if train.attack in ("fgsm", "rfgsm"):
        steps = 1.0
    elif train.attack == "pgd":
        eps = train.attack_eps
        steps = _mean_steps(train.attack_sigma) if eps is None else _paper_steps(255 * eps)
    return images * train.epochs * (1 + INPUT_GRADIENT * steps * train.mix)


def cell_passes(cell: Cell) -> float:
    """Image passes of one measurement; of a black box, only the answers."""
    data = cell.network.data
    split = data.validation_images if cell.split == "validation" else _IMAGES[data.data][1]
    images = min(split, cell.images or split)
    if cell.substitute is not None or cell.attack in ("clean", "random"):
        return images * FORWARD
    steps = _steps(cell)
    return images * (FORWARD + INPUT_GRADIENT * steps * (STANDING if steps > 1 else 1))


def _steps(cell: Cell) -> float:
    """Gradients of one image that stands, two queries for one: of `pgd-50x10`, `apgd@soft-9+40`."""
    kind, *numbers = re.split(r"-(?=\d)|[x+](?=\d)", cell.attack)
    if kind in WORST:
        return WORST[kind] * int(*numbers or [50])
    if not numbers:
        return 1.0 if kind in ("fgsm", "rfgsm") else _paper_steps(255 * cell.eps)
    queries = int(numbers.pop()) if "+" in cell.attack else 0
    return math.prod(map(int, numbers)) + queries * FORWARD / INPUT_GRADIENT


def passes_by_model(cells: Iterable[Cell]) -> dict[Network, tuple[float, float]]:
    """Training and measuring passes of each network that `cells` need."""
    groups = by_network(cells)
    return {n: (training_passes(n), sum(map(cell_passes, own))) for n, own in groups.items()}


def _images(network: Network) -> int:
    data = network.data
    every = _IMAGES[data.data][0] - data.validation_images
    return min(every, data.train_images or every)


def _paper_steps(pixels: float) -> int:
    return max(1, math.floor(min(pixels + 4, 1.25 * pixels) + 1e-6))


def _mean_steps(sigma: float) -> float:
    """Mean of the paper's steps over eps = clip(|N(0, sigma)|, 0, 2 sigma), by 999 quantiles."""
    draws = (abs(255 * NormalDist(0, sigma).inv_cdf(q / 1000)) for q in range(1, 1000))
    return sum(_paper_steps(min(eps, 510 * sigma)) for eps in draws) / 999
