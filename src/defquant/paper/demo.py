"""The main job, small: how quantisation changes robustness, and what DQ does about it."""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from defquant.config import DataConfig, ModelConfig, TrainConfig
from defquant.files import owned_folder, write_json
from defquant.paper.workers import cores, each

__all__ = ["Network", "networks", "run_demo"]

BETA = 0.05  # short trainings need a larger beta than the paper's 2e-3 over 200 epochs
# unclipped, a 1-bit network's batch norms grow past the range at once and its gradients vanish
TRAINING = TrainConfig(epochs=15, batch_size=64, lr=0.1, clip=1.0, device="cpu")
ATTACKS = ("random", "fgsm", "pgd-20", "adaptive-20")
EPS = (8 / 255, 16 / 255, 24 / 255, 32 / 255, 48 / 255)


@dataclass(frozen=True)
class Network:
    """One network of the demo."""

    name: str  # of its folder
    model: ModelConfig
    train: TrainConfig
    images: int | None = None  # attacked test images; all when None

    @property
    def settings(self) -> tuple[ModelConfig, DataConfig, TrainConfig]:
        data = DataConfig("digits", train_images=256 if self.images else None)
        return self.model, data, self.train


def networks(seeds: int, *, smoke: bool = False) -> list[Network]:
    """Float, vanilla 4-bit and 1-bit, and their DQ twins; `seeds` of each.

    `smoke`: one epoch and few images, to see that all of it runs.
    """
    training = replace(TRAINING, epochs=1) if smoke else TRAINING
    return [
        Network(
            f"{'dq' if beta else 'vanilla'}-{'float' if bits is None else f'{bits}bit'}-s{seed}",
            ModelConfig("wrn-10-1", bits=bits, convex=beta > 0),
            replace(training, beta=beta, seed=seed),
            images=40 if smoke else None,
        )
        for seed in range(seeds)
        for beta in (0.0, BETA)
        for bits in (None, 4, 1)
    ]


def run_demo(out: Path, *, seeds: int = 3, smoke: bool = False) -> list[Path]:
    """Train and attack the demo's networks into `out`, one process per core; returns the runs.

    A run that is there already is not made again, so a demo that was stopped goes on. Raises
    `UserError`, before any work, where it was made with other settings.
    """
    from defquant.checkpoint import NAME, load
    from defquant.runs import check_settings

    todo = networks(seeds, smoke=smoke)
    with owned_folder(out):
        for network in todo:
            if (out / network.name / NAME).exists():
                check_settings(load(out / network.name).facts, network.settings, out)
        jobs = [(network.name, partial(_train_and_attack, out, network)) for network in todo]
        for _ in each("demo", jobs, min(cores(), len(todo))):
            pass
    return [out / network.name for network in todo]


def _train_and_attack(out: Path, network: Network) -> None:
    import torch

    from defquant.attacks.names import parse_attack
    from defquant.measure import examples, load_on, measure
    from defquant.runs import test_images, train_run

    run = out / network.name
    # a finished run is only compared with what is asked for
    train_run(*network.settings, run, resume=True, show=False)
    if (run / "examples.json").exists():
        return  # written last, so all else is there
    model, facts = load_on(run, torch.device("cpu"))
    images = test_images(facts, limit=network.images)
    attacks = [parse_attack(name, eps) for name in ATTACKS for eps in EPS]
    (run / "results.jsonl").unlink(missing_ok=True)
    for _ in measure(run, model, facts, images, attacks):
        pass
    shown = examples(run, model, facts, images, parse_attack("pgd-20", EPS[2]))
    write_json(run / "examples.json", shown)
