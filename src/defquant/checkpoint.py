"""Checkpoints: one safetensors file whose header holds one JSON text. Loading runs no code."""

import json
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from defquant.config import DataConfig, ModelConfig, TrainConfig
from defquant.distributed import place
from defquant.errors import UserError, shown
from defquant.files import write_bytes
from defquant.models import build
from defquant.typed import from_mapping, parse_json

__all__ = [
    "Checkpoint", "Facts", "find", "load", "load_model", "load_on", "read_tensors", "restore",
    "save", "stamp", "versions", "write_companions",
]  # fmt: skip

FORMAT = 1
NAME = "checkpoint.safetensors"
_CPU_LIMITS = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA")  # what PyTorch and oneDNN may use


@dataclass(frozen=True)
class Facts:
    """Everything about a run but its tensors.

    Attributes:
        model, data, train: the configuration, whole.
        num_classes, in_channels: shape of the network's ends.
        classes: names of the classes.
        data_name, fingerprint: of the training images.
        history: one record of metrics per epoch done.
        versions: as `versions` gives them; those of a resumed run, each: `2.12.0 then 2.13.0`.
    """

    model: ModelConfig
    data: DataConfig
    train: TrainConfig
    num_classes: int
    in_channels: int
    classes: tuple[str, ...]
    data_name: str
    fingerprint: str
    history: tuple[Mapping[str, float], ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.num_classes != len(self.classes) or self.num_classes < 2 or self.in_channels < 1:
            raise UserError(
                "a network needs a channel, two classes and a name for each; found "
                f"{self.in_channels}, {self.num_classes} and {len(self.classes)} names"
            )

    @property
    def method(self) -> str:
        """`float`, `vanilla` (quantised) or `DQ` (convex sums or penalty), then what is unusual.

        Then what is added to it: `+ squeezing`, `+ W8` (weights of 8 bits), `+ deployable`,
        `+ RFGSM` (adversarial training). Networks of one
        method differ in bits, beta and seed alone.
        """
        model, train = self.model, self.train
        penalised, defended = train.beta > 0, train.beta > 0 or model.convex
        words = {
            "DQ" if defended else "float" if model.bits is None else "vanilla": True,
            "plain-sums": penalised and not model.convex,
            "convex-only": model.convex and not penalised,
            "Parseval": penalised and train.penalty == "parseval",
            "tanh": model.activation == "tanh",
            f"ReLU{model.high:g}": model.activation != "tanh" and model.high != 6,
            "+ squeezing": model.squeeze is not None,
            f"{model.squeeze}-bit": model.squeeze not in (None, 5),
            f"+ W{model.weight_bits}": model.weight_bits is not None,
            "+ deployable": model.deployable,
            "+ rounded sums": model.round_sums,
            f"+ {train.attack.upper()}": train.attack != "none",
        }
        return " ".join(word for word, holds in words.items() if holds)


@dataclass(frozen=True)
class Checkpoint:
    """`facts`, the network's state dict and the optimiser's momentum by parameter name."""

    facts: Facts
    weights: dict[str, Tensor]
    momentum: dict[str, Tensor]


def stamp(device: torch.device) -> dict[str, Any]:
    """Versions, machine and command: what every number is stored with."""
    return {"versions": versions(device), "command": shlex.join(["defquant", *sys.argv[1:]])}


def versions(device: torch.device) -> dict[str, str]:
    """Versions and machine, the evidence beside every number; all that may change its last bits."""
    import numpy as np

    from defquant import __version__

    return {
        "defquant": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "machine": platform.machine(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "instructions": torch.backends.cpu.get_cpu_capability(),
        **{name: os.environ[name] for name in _CPU_LIMITS if os.environ.get(name)},
        **_fixed(),
        "threads": str(torch.get_num_threads()),
        "processes": str(place().world),
    }


@cache
def _fixed() -> dict[str, str]:
    """The processor's model and the commit of this code, where they can be told."""
    found = {"processor": "", "commit": ""}
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
        found["processor"] = next(names, "")
        root = Path(__file__).parents[2]
        if (root / ".git").exists() and (root / "src" / "defquant").is_dir():  # no installed copy
            git = ("git", "-C", root, "describe", "--always", "--dirty", "--abbrev=40", "--match=")
            said = subprocess.run(git, capture_output=True, text=True, timeout=10, check=True)
            found["commit"] = said.stdout.strip()
    except (OSError, subprocess.SubprocessError):
        pass  # evidence that is not to be had stops no measurement
    return {name: value for name, value in found.items() if value}


def save(folder: Path, checkpoint: Checkpoint) -> Path:
    """Write `checkpoint.safetensors`, then `write_companions`, into `folder`, each file whole."""
    tensors = {f"model.{name}": value for name, value in checkpoint.weights.items()}
    tensors |= {f"momentum.{name}": value for name, value in checkpoint.momentum.items()}
    header = {"defquant": json.dumps({"format": FORMAT, **asdict(checkpoint.facts)})}
    whole = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    write_bytes(folder / NAME, safetensors.torch.save(whole, metadata=header))
    write_companions(folder, checkpoint.facts)
    return folder / NAME


def write_companions(folder: Path, facts: Facts) -> None:
    """Bring the files for people to what the checkpoint's header says: a kill may have parted them.

    `config.json` holds the configuration, `log.jsonl` one line per epoch.
    """
    config = asdict(facts)
    log = "".join(json.dumps(record) + "\n" for record in config.pop("history"))
    for name, text in (("config.json", json.dumps(config, indent=1) + "\n"), ("log.jsonl", log)):
        content, path = text.encode(), folder / name
        if not path.is_file() or path.read_bytes() != content:
            write_bytes(path, content)


def find(path: Path | str) -> Path:
    """The checkpoint file of a run's folder, or `path` if it is one. `UserError` for none."""
    path = Path(path) / NAME if Path(path).is_dir() else Path(path)
    if not path.is_file():
        raise UserError(f"no checkpoint at {path}: give the folder of a run of `defquant train`")
    return path


def load(path: Path | str) -> Checkpoint:
    """Read a run's folder, or its `checkpoint.safetensors`.

    Raises `UserError` where the file is missing, cut, not one of ours, or of a newer version.
    """
    path = find(path)
    metadata, tensors = read_tensors(path)
    header = metadata.get("defquant")
    if header is None:
        raise UserError(f"{path} holds tensors but no defquant header: it is another program's")
    weights, momentum = (
        {name.removeprefix(part): v for name, v in tensors.items() if name.startswith(part)}
        for part in ("model.", "momentum.")
    )
    return Checkpoint(_facts(path, header), weights, momentum)


def read_tensors(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata and tensors of any safetensors file. Raises `UserError` where it is broken."""
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return file.metadata() or {}, tensors
    except (SafetensorError, OSError, ValueError) as error:
        reason = shown(str(error), 200)
        raise UserError(f"{path} is not a whole safetensors file ({reason})") from None


def restore(model: nn.Module, weights: Mapping[str, Tensor], source: str = "checkpoint") -> None:
    """Load `weights` into `model`; raises `UserError` for another architecture's weights."""
    own = model.state_dict()
    wrong = [
        name
        for name in own.keys() | weights.keys()
        if name not in own or name not in weights or own[name].shape != weights[name].shape
    ]
    if wrong:
        raise UserError(
            f"{source} is of another architecture than {type(model).__name__}: {len(wrong)} of "
            f"{len(own)} tensors differ, first {shown(min(wrong))}"
        )
    model.load_state_dict(weights)


def load_model(path: Path | str) -> tuple[nn.Module, Facts]:
    """The trained network of a run's folder or checkpoint, in eval mode on the CPU.

    Its weights lie in the order of memory in which it was trained (`TrainConfig.channels_last`).
    """
    checkpoint = load(path)
    facts, weights = checkpoint.facts, checkpoint.weights
    try:
        if _least(facts) > sum(tensor.numel() for tensor in weights.values()):
            raise UserError(
                f"{path} says that it is a {shown(facts.model.model)} of {facts.num_classes} "
                "classes and holds far fewer weights: it is damaged"
            )
        model = build(facts.model, num_classes=facts.num_classes, in_channels=facts.in_channels)
    except (ArithmeticError, RuntimeError, TypeError) as error:
        raise UserError(f"{path} has a header that is not ours ({shown(error)})") from None
    restore(model, weights, str(path))
    layout = torch.channels_last if facts.train.channels_last else torch.contiguous_format
    return model.to(memory_format=layout).eval(), facts  # type: ignore[call-overload]


def _least(facts: Facts) -> float:
    """Weights that the network has at the least: a header may claim any size, and `build` obeys."""
    wrn = re.match(r"wrn-(\d+)-(\d+)", facts.model.model)
    scale = re.search(r"x(\d*\.?\d+)$", facts.model.model)
    blocks, channels = (float(wrn[1]) - 4) / 6 if wrn else 1, 512 * float(scale[1] if scale else 1)
    channels = 64 * float(wrn[2]) if wrn else int(channels)
    convolutions = blocks * 9 * channels * channels  # those between as many channels
    return max(convolutions, channels * facts.num_classes, 9 * float(facts.in_channels))


def load_on(run: Path, device: torch.device) -> tuple[nn.Module, Facts]:
    """The network of a run on `device`. Raises `UserError` for an unfinished or broken run."""
    model, facts = load_model(run)
    if len(facts.history) < facts.train.epochs:
        raise UserError(
            f"{run} has done {len(facts.history)} of {facts.train.epochs} epochs: finish it with "
            "`defquant train --resume`"
        )
    return model.to(device), facts


def _facts(path: Path, header: str) -> Facts:
    found = parse_json(header, f"the header of {path}")
    version = found.get("format") if isinstance(found, dict) else None
    if not isinstance(version, int):
        raise UserError(f"{path} has a header that is not ours: it names no format")
    if version > FORMAT:
        raise UserError(
            f"{path} has format {version}, this defquant reads up to {FORMAT}: upgrade defquant"
        )
    return from_mapping(Facts, found, f"the header of {path}: ")
