"""How long an experiment takes on this machine: passes times what a short probe measures."""

import time
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch

from defquant.config import ModelConfig
from defquant.data import Dataset
from defquant.distributed import pick_device
from defquant.models import build
from defquant.paper.cost import passes_by_model
from defquant.paper.grid import Cell, Network
from defquant.training import train

__all__ = ["Estimate", "estimate"]

PROBE_SECONDS = 10.0
STEPS = 4  # of a probe, in two epochs: the first also pays for what is made once
_SHAPES = {"digits": (1, 8), "cifar10": (3, 32), "svhn": (3, 32)}  # channels, side


@dataclass(frozen=True)
class Estimate:
    """Networks, cells and image passes still to do, and hours on this machine.

    `rates` are image passes a second of each architecture, in one process of one thread or on
    the GPU; `hours` assumes that `jobs` processes of the CPU do not slow each other down.
    """

    networks: int
    cells: int
    training: float
    measuring: float
    rates: dict[str, float]
    jobs: int
    hours: float


def estimate(cells: Iterable[Cell], jobs: int) -> Estimate:
    """Estimate of `cells`, from about ten seconds of training steps on random images."""
    asked = list(cells)
    passes = passes_by_model(asked)
    kinds = {_kind(network): network for network in passes}
    share = PROBE_SECONDS / max(1, len(kinds))
    rates = {kind: _rate(network, share) for kind, network in kinds.items()}
    on_gpu = any(pick_device(n.train.device).type == "cuda" for n in kinds.values())
    seconds = sum(sum(both) / rates[_kind(n)] for n, both in passes.items())
    parallel = 1 if on_gpu else min(jobs, max(1, len(passes)))
    return Estimate(
        networks=len(passes),
        cells=len(asked),
        training=sum(train for train, _ in passes.values()),
        measuring=sum(measure for _, measure in passes.values()),
        rates={f"{model} on {data}": rate for (model, data), rate in rates.items()},
        jobs=jobs,
        hours=seconds / parallel / 3600,
    )


def _kind(network: Network) -> tuple[str, str]:
    return network.model.model, network.data.data


def _rate(network: Network, seconds: float) -> float:
    """Image passes a second, at the batch size of the training where `seconds` allow for it."""
    channels, side = _SHAPES[network.data.data]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        size, end = 2, float("inf")
        while True:
            rate = _steps(network.model, network, size, channels, side)
            end = min(end, time.perf_counter() + seconds)  # the first one pays for imports, too
            larger = min(network.train.batch_size, int((end - time.perf_counter()) * rate / STEPS))
            if larger <= size:
                return rate
            size = larger
    finally:
        torch.set_num_threads(threads)


def _steps(model: ModelConfig, network: Network, size: int, channels: int, side: int) -> float:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(
        0, 256, (STEPS // 2 * size, channels, side, side), dtype=torch.uint8, generator=generator
    )
    labels = torch.arange(STEPS // 2 * size) % 10
    data = Dataset(images, labels, tuple("0123456789"), "probe")
    config = replace(network.train, epochs=2, batch_size=size, attack="none")
    history = train(build(model, num_classes=10, in_channels=channels), data, config)
    return history[-1]["images_per_second"]
