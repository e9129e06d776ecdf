"""What an experiment asks for: networks to train and measurements to make, as plain data."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from defquant.config import DataConfig, ModelConfig, TrainConfig, digest

__all__ = ["Cell", "Kind", "Network", "by_network"]

Kind = Literal["accuracy", "layers", "first-block", "detector", "examples"]


@dataclass(frozen=True)
class Network:
    """A network to train: all that `defquant train` is told but the folder."""

    model: ModelConfig
    data: DataConfig
    train: TrainConfig

    @property
    def name(self) -> str:
        """Its folder: what a reader looks for, then a hash of the whole configuration."""
        model, train = self.model, self.train
        words = [model.model, "float" if model.bits is None else f"{model.bits}bit"]
        words += [f"beta{train.beta:g}"] * (train.beta > 0)
        words += ["tanh"] * (model.activation == "tanh")
        words += [f"relu{model.high:g}"] * (model.high != 6) + ["squeezed"] * bool(model.squeeze)
        words += [train.attack] * (train.attack != "none") + [f"s{train.seed}", digest(self)[:8]]
        return "_".join(words)


@dataclass(frozen=True)
class Cell:
    """One measurement of one network.

    Attributes:
        network: the network.
        kind: `accuracy` under `attack`; `layers` and `first-block`, the distances of Figure 3
            between clean and attacked images; `detector`, what feature squeezing detects;
            `examples`, pictures with predictions (Figure 7).
        attack: as the command line has it: `clean`, `fgsm`, `pgd-50x10`, ...
        eps: its radius in [0, 1].
        images: the first so many of the split; all when None.
        split: `test`, or `validation` where something is chosen.
        substitute: network whose adversarial examples are used (black box).
        unaware: attack the network behind a feature squeezing as if that were not there.
    """

    network: Network
    kind: Kind = "accuracy"
    attack: str = "clean"
    eps: float = 0.0
    images: int | None = None
    split: Literal["test", "validation"] = "test"
    substitute: Network | None = None
    unaware: bool = False

    @property
    def key(self) -> str:
        """The name under which its result is kept: 16 hex digits."""
        return digest(self)[:16]

    @property
    def family(self) -> tuple[object, ...]:
        """Cells of one family differ in eps alone and are measured together."""
        rest = (self.kind, self.attack, self.images, self.split, self.substitute, self.unaware)
        return (self.network, *rest)


def by_network(cells: Iterable[Cell]) -> dict[Network, list[Cell]]:
    """Each network once, with its cells; substitutes before the networks they attack."""
    groups: dict[Network, list[Cell]] = {}
    every = list(dict.fromkeys(cells))
    for substitute in (cell.substitute for cell in every):
        if substitute is not None:
            groups.setdefault(substitute, [])
    for cell in every:
        groups.setdefault(cell.network, []).append(cell)
    return groups
