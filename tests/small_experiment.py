"""An experiment of three small networks, and when two folders of it are the same."""

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import safetensors.torch
import torch

from defquant.config import DataConfig, ModelConfig, TrainConfig
from defquant.paper import grid
from defquant.paper.grid import Network, Trial, by_network
from defquant.paper.run import work

DATA = DataConfig("digits", train_images=96, validation_images=20)
TRAIN = TrainConfig(epochs=3, batch_size=32, lr=0.1, clip=1.0, device="cpu")
FLOAT = Network(ModelConfig("wrn-10-1"), DATA, TRAIN)
DQ = Network(ModelConfig("wrn-10-1", bits=2, convex=True), DATA, replace(TRAIN, beta=0.1))
SUBSTITUTE = Network(ModelConfig("vgg-16x0.0625"), DATA, replace(TRAIN, seed=1000))
FAMILY = [Trial("fgsm", pixels / 255, 100).cell(FLOAT) for pixels in (32, 64, 128)]
TRIALS = (
    *(Trial("fgsm", eps / 255, 40, substitute=SUBSTITUTE) for eps in (8, 24)),
    Trial(images=40),
    Trial("pgd-3", 24 / 255, 20),
    Trial("random", 8 / 255, 10, split="validation"),
    Trial("fgsm", 8 / 255, 8, kind="layers"),
)
CELLS = [*FAMILY, *(trial.cell(network) for network in (FLOAT, DQ) for trial in TRIALS)]


def counts(out: Path) -> dict[str, tuple[int, int, float | None]]:
    scores = grid.read(out).scores
    return {key: (m.correct, m.total, m.vanishing) for key, m in scores.items()}


def same(out: Path, other: Path) -> bool:
    """Same counts and values under the same keys, same weights and momenta in all networks."""
    assert counts(out) == counts(other)
    assert grid.read(out).values == grid.read(other).values
    for network in by_network(CELLS):
        name = Path("networks", network.name, "checkpoint.safetensors")
        mine, theirs = (safetensors.torch.load_file(folder / name) for folder in (out, other))
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[key], theirs[key]) for key in mine)
    return True


def each_once(out: Path) -> bool:
    """Every line is whole, and no cell has two."""
    for name in (grid.SCORES, grid.VALUES):
        keys = [json.loads(line)["cell"] for line in (out / name).read_text().splitlines()]
        assert len(keys) == len(set(keys))
    return not grid.read(out).missing(CELLS)


def make_undisturbed(out: Path) -> Path:
    """All networks one after the other in this process."""
    torch.set_num_threads(1)
    for network, own in by_network(CELLS).items():
        assert work(out, network, own, wait=True) == "done"
    return out


def stamps(out: Path) -> set[tuple[str, int]]:
    """Changes with each checkpoint and each result."""
    paths = [*out.glob("*.jsonl"), *out.glob("networks/*/checkpoint.safetensors")]
    return {(str(path), path.stat().st_mtime_ns) for path in paths if path.stat().st_size}


def until(happened: Callable[[], object], seconds: float) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if happened():
            return True
        time.sleep(0.02)
    return False
