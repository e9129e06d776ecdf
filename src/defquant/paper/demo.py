"""The main job, small: how quantisation changes robustness, and what DQ does about it."""

from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path

from defquant.config import DataConfig, ModelConfig, TrainConfig
from defquant.files import owned_folder, write_json
from defquant.paper.grid import Network
from defquant.paper.workers import cores, each

__all__ = ["networks", "run_demo"]

BETA = 0.05  # short trainings need a larger beta than the paper's 2e-3 over 200 epochs
# unclipped, a 1-bit network's batch norms grow past the range at once and its gradients vanish
TRAINING = TrainConfig(epochs=15, batch_size=64, lr=0.1, clip=1.0, device="cpu")
ATTACKS = ("random", "fgsm", "pgd-20", "adaptive-20")
EPS = (8 / 255, 16 / 255, 24 / 255, 32 / 255, 48 / 255)


def networks(seeds: int, *, smoke: bool = False) -> dict[str, Network]:
    """Float, vanilla 4-bit and 1-bit, and their DQ twins by their folders; `seeds` of each.

    `smoke`: one epoch and few images, to see that all of it runs.
    """
    training = replace(TRAINING, epochs=1) if smoke else TRAINING
    data = DataConfig("digits", train_images=256 if smoke else None)
    return {
        f"{'dq' if beta else 'vanilla'}-{f'{bits}bit' if bits else 'float'}-s{seed}": Network(
            ModelConfig("wrn-10-1", bits=bits, convex=beta > 0),
            data,
            replace(training, beta=beta, seed=seed),
        )
        for seed, beta, bits in product(range(seeds), (0.0, BETA), (None, 4, 1))
    }


def run_demo(out: Path, *, seeds: int = 3, smoke: bool = False) -> list[Path]:
    """Train and attack the demo's networks into `out`, one process per core; returns the runs.

    A run that is there already is not made again, so a demo that was stopped goes on. Raises
    `UserError`, before any work, where it was made with other settings.
    """
    from defquant.checkpoint import NAME, load
    from defquant.runs import check_settings

    todo = {out / name: network for name, network in networks(seeds, smoke=smoke).items()}
    with owned_folder(out):
        for run, network in todo.items():
            if (run / NAME).exists():
                check_settings(load(run).facts, network.settings, out)
        images = 40 if smoke else None
        jobs = [(run.name, partial(_make, run, network, images)) for run, network in todo.items()]
        for _ in each("demo", jobs, min(cores(), len(todo))):
            pass
    return list(todo)


def _make(run: Path, network: Network, limit: int | None) -> None:
    """Train and attack; a finished run is only compared with what is asked for."""
    import torch

    from defquant.attacks.names import parse_attack
    from defquant.measure import examples, load_on, measure
    from defquant.runs import test_images, train_run

    train_run(*network.settings, run, resume=True, show=False)
    if (run / "examples.json").exists():
        return  # written last, so all else is there
    model, facts = load_on(run, torch.device("cpu"))
    images = test_images(facts, limit=limit)
    attacks = [parse_attack(name, eps) for name in ATTACKS for eps in EPS]
    (run / "results.jsonl").unlink(missing_ok=True)
    for _ in measure(run, model, facts, images, attacks):
        pass
    shown = [examples(run, model, facts, images, parse_attack("pgd-20", e)) for e in EPS[::2]]
    write_json(run / "examples.json", shown)
