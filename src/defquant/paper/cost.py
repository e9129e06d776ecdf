"""What experiments cost, in image passes, and how long a pass takes here.

A pass is an image forward and fully backward; a short probe of training steps measures its time.
"""

import math
import re
import time
from collections.abc import Iterable, Mapping
from dataclasses import replace
from statistics import NormalDist

from defquant.paper.grid import Cell, Network, by_network

__all__ = ["hours", "passes_by_model", "rates"]

PROBE_SECONDS = 10.0
STEPS = 4  # of a probe, in two epochs: the first also pays for what is made once
_SHAPES = {"digits": (1, 8), "cifar10": (3, 32), "svhn": (3, 32)}  # channels, side

Passes = Mapping[Network, tuple[float, float]]
"""Of a network, those of its training and those of its measurements."""


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
    steps = _gradients(cell)
    return images * (FORWARD + INPUT_GRADIENT * steps * (STANDING if steps > 1 else 1))


def _gradients(cell: Cell) -> float:
    """Gradients of one image that stands, two queries for one: of `pgd-50x10`, `apgd@soft-9+40`."""
    kind, *numbers = re.split(r"-(?=\d)|[x+](?=\d)", cell.attack)
    if kind in WORST:
        return WORST[kind] * int(*numbers or [50])
    if not numbers:
        return 1.0 if kind in ("fgsm", "rfgsm") else _paper_steps(255 * cell.eps)
    queries = int(numbers.pop()) if "+" in cell.attack else 0
    return math.prod(map(int, numbers)) + queries * FORWARD / INPUT_GRADIENT


def passes_by_model(cells: Iterable[Cell]) -> Passes:
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


# --- time ---------------------------------------------------------------------------------


def rates(networks: Iterable[Network]) -> dict[tuple[str, str], float]:
    """Image passes a second of each model and data set, in one process of one thread or on the
    GPU: from about ten seconds of training steps on random images.
    """
    kinds = {_kind(network): network for network in networks}
    share = PROBE_SECONDS / max(1, len(kinds))
    return {kind: _rate(network, share) for kind, network in kinds.items()}


def hours(passes: Passes, found: Mapping[tuple[str, str], float], jobs: int) -> float:
    """On this machine, as if `jobs` processes of the CPU did not slow each other down."""
    from defquant.distributed import pick_device

    on_gpu = any(pick_device(network.train.device).type == "cuda" for network in passes)
    seconds = sum(sum(both) / found[_kind(network)] for network, both in passes.items())
    return seconds / (1 if on_gpu else min(jobs, max(1, len(passes)))) / 3600


def _kind(network: Network) -> tuple[str, str]:
    return network.model.model, network.data.data


def _rate(network: Network, seconds: float) -> float:
    """Image passes a second, at the batch size of the training where `seconds` allow for it."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        size, end = 2, float("inf")
        while True:
            rate = _steps(network, size)
            end = min(end, time.perf_counter() + seconds)  # the first one pays for imports, too
            larger = min(network.train.batch_size, int((end - time.perf_counter()) * rate / STEPS))
            if larger <= size:
                return rate
            size = larger
    finally:
        torch.set_num_threads(threads)


def _steps(network: Network, size: int) -> float:
    import torch

    from defquant.data import Dataset
    from defquant.models import build
    from defquant.training import train

    channels, side = _SHAPES[network.data.data]
    generator = torch.Generator().manual_seed(0)
    shape = (STEPS // 2 * size, channels, side, side)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    data = Dataset(images, torch.arange(len(images)) % 10, tuple("0123456789"), "probe")
    config = replace(network.train, epochs=2, batch_size=size, attack="none")
    history = train(build(network.model, num_classes=10, in_channels=channels), data, config)
    return history[-1]["images_per_second"]
