"""What is asked of which network: presets, networks, measurements as plain data, and their results.

A measurement is a `Cell`; its key, a hash of all that was asked, names its result. No torch.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from defquant.config import DataConfig, ModelConfig, TrainConfig, digest
from defquant.errors import UserError
from defquant.files import append_line, read_lines
from defquant.paper.section import attack_text, eps_number, eps_text, listed
from defquant.records import Measurement, append, read_jsonl
from defquant.typed import from_mapping, written

__all__ = [
    "SCALES", "SCORES", "VALUES", "Cell", "Kind", "Network", "Results", "Scale", "Trial",
    "by_network", "keep", "lock_of", "read",
]  # fmt: skip

Kind = Literal["accuracy", "layers", "first-block", "detector", "examples"]
Split = Literal["test", "validation"]

SCORES, VALUES = "results.jsonl", "probes.jsonl"
_ONE_STEP = ("clean", "random", "fgsm", "rfgsm")


# --- networks and cells -------------------------------------------------------------------


@dataclass(frozen=True)
class Network:
    """A network to train: all that `defquant train` is told but the folder."""

    model: ModelConfig
    data: DataConfig
    train: TrainConfig

    @property
    def settings(self) -> tuple[ModelConfig, DataConfig, TrainConfig]:
        return self.model, self.data, self.train

    @cached_property
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
class Trial:
    """What a network is put to.

    Its kind: `accuracy` under `attack`; `layers` and `first-block`, the distances of Figure 3
    between clean and attacked images; `detector`, what feature squeezing detects; `examples`,
    pictures with predictions (Figure 7).
    """

    attack: str = "clean"  # as the command line has it: `fgsm`, `pgd-50x10`, ...
    eps: float = 0.0  # its radius in [0, 1]
    images: int | None = None  # the first so many of the split; all when None
    substitute: Network | None = None  # whose adversarial examples are used (black box)
    unaware: bool = False  # attack what is behind a feature squeezing as if that were not there
    split: Split = "test"  # `validation` where something is chosen
    kind: Kind = "accuracy"

    @property
    def name(self) -> str:
        """`clean`, `FGSM 8/255`, `FGSM(B) 8/255` through a substitute."""
        words = "clean" if self.attack == "clean" else f"{self.column} {eps_text(self.eps)}"
        return words + ", validation" * (self.split == "validation")

    @property
    def column(self) -> str:
        """Without the radius: `Clean`, `FGSM`, `FGSM(B)`, `FGSM (unaware)`."""
        return attack_text(self.attack) + self.ways

    @property
    def mark(self) -> str:
        """As in `numbers.yaml`: `clean`, `fgsm@8`, `fgsm(B)@8`."""
        radius = "" if self.attack == "clean" else f"@{eps_number(self.eps)}"
        return self.attack + self.ways + radius

    @property
    def ways(self) -> str:
        return "(B)" * (self.substitute is not None) + " (unaware)" * self.unaware

    def cell(self, network: Network) -> "Cell":
        return Cell(network=network, **{f.name: getattr(self, f.name) for f in fields(Trial)})


@dataclass(frozen=True)
class Cell(Trial):
    """One measurement of one network."""

    network: Network = field(kw_only=True)

    @cached_property
    def key(self) -> str:
        """The name under which its result is kept: 16 hex digits."""
        return digest(self)[:16]

    @property
    def family(self) -> "Cell":
        """Equal for cells that differ in eps alone; they are measured together."""
        return replace(self, eps=0.0)


def by_network(cells: Iterable[Cell]) -> dict[Network, list[Cell]]:
    """Each network once, with its cells; substitutes before the networks they attack."""
    every = list(dict.fromkeys(cells))
    groups: dict[Network, list[Cell]] = {c.substitute: [] for c in every if c.substitute}
    for cell in every:
        groups.setdefault(cell.network, []).append(cell)
    return groups


def lock_of(out: Path, network: Network) -> Path:
    """The file that whoever works on `network` in the folder `out` holds."""
    return out / "locks" / f"{network.name}.lock"


# --- presets ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scale:
    """What a preset fixes for every experiment; the presets are in `presets.yaml`."""

    name: str
    about: str  # one line for people
    data: DataConfig  # images and training of all but Table 2
    train: TrainConfig
    svhn: DataConfig  # those of Table 2
    svhn_train: TrainConfig
    wrn: str  # networks, as in `ModelConfig`
    vgg: str
    resnet: str
    svhn_wrn: str
    table1_betas: tuple[float, ...]  # the three weights of Table 1's DQ rows
    betas: tuple[float, ...]  # those of Figure 6, without 0
    beta: float  # the weight everywhere else, chosen on validation images
    defense_bits: tuple[int | None, ...]  # of the DQ rows of Tables 2 and 3; the paper's are 1
    seeds: tuple[int, ...]  # of the trainings of Table 1; all else has the first
    eps: tuple[float, ...]  # radii of the tables and curves; 8/255, the paper's, among them
    hard_eps: tuple[float, ...]  # radii of the strong attacks
    adversarial: Mapping[str, float | int | str]  # what adversarial training changes in `train`
    madry: Mapping[str, float | int | str]  # and the PGD training of Table 5, of a fixed radius
    many: int | None = None  # test images of one-step attacks; all when None
    few: int | None = 1000  # and of long ones
    # beside the paper's: its own many times over, the worst case over losses and backward passes
    strong: tuple[str, ...] = ("pgd-50x10", "adaptive")
    bits: tuple[int | None, ...] = (None, 1, 2, 3, 4, 5)
    surrogate_steps: int = 50  # of APGD through each backward pass
    standard_images: int = 250  # test images on which AutoAttack's worst case is measured
    standard_bits: tuple[int | None, ...] = (None, 1, 2, 4)  # of its Wide ResNets
    changes: str = ""  # the flags that made it another than its preset

    @property
    def flags(self) -> str:
        """What `reproduce` must be told to have it: `--preset small --epochs 2`."""
        return f"--preset {self.name}{self.changes}"

    @property
    def paper_eps(self) -> float:
        return 8 / 255

    def on(self, table: str) -> "Scale":
        """With the images, training and Wide ResNet of that section: Table 2 has its own."""
        if table != "table2":
            return self
        return replace(self, data=self.svhn, train=self.svhn_train, wrn=self.svhn_wrn)

    @property
    def papers(self) -> bool:
        """Whether the images are those of the paper's experiment."""
        return self.data.data != "digits"

    def network(
        self,
        model: str | None = None,
        *,
        beta: float = 0.0,
        seed: int | None = None,
        train: TrainConfig | None = None,
        **options: Any,
    ) -> Network:
        """The `model`, `wrn` when None; DQ, with penalty and convex sums, where `beta` > 0."""
        chosen = ModelConfig(model or self.wrn, convex=beta > 0, **options)
        first = self.seeds[0] if seed is None else seed
        training = replace(train or self.train, beta=beta, seed=first)
        return Network(chosen, self.data, training)

    def adversarially(
        self, attack: str, changes: Mapping[str, float | int | str] | None = None
    ) -> TrainConfig:
        """The training on images of `attack`."""
        changed = self.adversarial if changes is None else changes
        return replace(self.train, **{"attack": attack, **changed})  # type: ignore[arg-type]

    def by_seed(self, bits: int | None, beta: float) -> tuple[Network, ...]:
        """The Wide ResNet of Table 1, once for each seed."""
        return tuple(self.network(bits=bits, beta=beta, seed=seed) for seed in self.seeds)

    def substitute(self, train: TrainConfig | None = None) -> Network:
        """The full-precision VGG of section 5.1 through which black-box attacks go."""
        return self.network(self.vgg, seed=1000, train=train)  # no seed of those it attacks

    def trial(self, attack: str = "clean", eps: float = 0.0, **options: Any) -> Trial:
        """One-step attacks on many images, others on few."""
        images = self.many if attack in _ONE_STEP else self.few
        return Trial(attack, eps, images, **options)

    @property
    def strong_trials(self) -> list[Trial]:
        """Each strong attack at each of its radii."""
        return [self.trial(attack, eps) for attack in self.strong for eps in self.hard_eps]

    @property
    def trials(self) -> list[Trial]:
        """Clean, FGSM at the paper's radius and then the others, the strong attacks."""
        radii = sorted(self.eps, key=lambda eps: eps != self.paper_eps)
        return [self.trial(), *(self.trial("fgsm", eps) for eps in radii), *self.strong_trials]

    def placed(self, data_root: str | None, svhn_root: str | None, device: str) -> "Scale":
        """The same with its data sets at these places and its trainings on `device`.

        On digits, Table 2 without `svhn_root` is made on the images of Table 3.
        """
        data = replace(self.data, data_root=data_root)
        svhn = replace(self.svhn, data_root=svhn_root)
        if data.data == "digits" and svhn_root is None:
            svhn = data
        trainings = [replace(train, device=device) for train in (self.train, self.svhn_train)]
        return replace(self, data=data, svhn=svhn, train=trainings[0], svhn_train=trainings[1])

    def changed(self, seeds: Sequence[int] | None, epochs: int | None) -> "Scale":
        """With these `seeds` of Table 1, and with every training that many `epochs` long.

        Other epochs are other networks with other keys: no result of them counts as the preset's.
        Raises `UserError` for a seed twice or below 0, and for less than one epoch.
        """
        scale = self
        if seeds is not None and tuple(seeds) != self.seeds:
            if not seeds or min(seeds) < 0 or len({*seeds}) < len(seeds):
                raise UserError(f"--seeds are numbers from 0, each once; found {listed(seeds)}")
            flags = f" --seeds {' '.join(map(str, seeds))}"
            scale = replace(scale, seeds=tuple(seeds), changes=scale.changes + flags)
        if epochs is not None:
            long: dict[str, Any] = {
                name: replace(getattr(self, name), epochs=epochs)
                for name in ("train", "svhn_train")
            }
            long |= {
                name: {**own, "epochs": epochs}
                for name in ("adversarial", "madry")
                if "epochs" in (own := getattr(self, name))
            }
            if any(getattr(self, name) != value for name, value in long.items()):
                scale = replace(scale, **long, changes=f"{scale.changes} --epochs {epochs}")
        return scale


_RADII = ("eps", "hard_eps", "attack_eps", "attack_sigma")


def _in_unit(key: str, value: Any) -> Any:
    """Radii in [0, 1], which the file has in 255ths."""
    if isinstance(value, dict):
        return {name: _in_unit(name, one) for name, one in value.items()}
    if isinstance(value, list):
        return [_in_unit(key, one) for one in value]
    return value / 255 if key in _RADII else value


SCALES: Mapping[str, Scale] = {
    name: from_mapping(Scale, {"name": name, **_in_unit("", entry)}, f"{name}: ")
    for name, entry in written(__file__, "presets.yaml").items()
}


# --- results ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Results:
    """What was measured, by the cells' keys: scores, and the values of the other kinds."""

    scores: Mapping[str, Measurement] = field(default_factory=dict)
    values: Mapping[str, Any] = field(default_factory=dict)

    def of(self, cell: Cell) -> Any | None:
        """Its measurement, or what a cell of another kind found (see `paper.run`)."""
        return (self.scores if cell.kind == "accuracy" else self.values).get(cell.key)

    @property
    def data(self) -> set[tuple[str, str]]:
        """Name and hash of what was measured on, held-out training images aside."""
        every = {(m.data, *m.source) for m in self.scores.values()}
        return {own for own in every if not own[0].endswith(", validation")}

    def missing(self, cells: Iterable[Cell]) -> list[Cell]:
        return [cell for cell in dict.fromkeys(cells) if self.of(cell) is None]


@dataclass(frozen=True)
class _Value:
    """A line of the values: what a cell found."""

    cell: str
    values: Any


def read(out: Path) -> Results:
    """All results of the folder; the latest of each cell. Raises `UserError` for broken lines."""
    scores, values = out / SCORES, out / VALUES
    measured = read_jsonl(scores) if scores.exists() else []
    lines = read_lines(values) if values.exists() else []
    found = [from_mapping(_Value, record, where) for where, record in lines]
    return Results({m.cell: m for m in measured if m.cell}, {v.cell: v.values for v in found})


def keep(out: Path, cell: Cell, found: Any, evidence: Mapping[str, Any] | None = None) -> None:
    """Append the measurement of `cell`, or the values that it found with what was asked."""
    if cell.kind == "accuracy":
        append(out / SCORES, replace(found, run=cell.network.name, cell=cell.key))
        return
    asked = {"kind": cell.kind, "run": cell.network.name, "attack": cell.attack, "eps": cell.eps}
    line = {"cell": cell.key, **asked, "network": asdict(cell.network), "values": found}
    append_line(out / VALUES, line | {"evidence": dict(evidence or {})})
