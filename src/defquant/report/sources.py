"""What the folders hold beside the results: settings, training logs, example pictures.

All of it is untrusted: wrong types are dropped, pictures must be PNG, and a file that cannot be
read becomes a note on the page.
"""

import base64
import binascii
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from defquant.config import check_bits, check_eps
from defquant.errors import UserError, shown
from defquant.files import read_json, read_lines
from defquant.report.names import Series
from defquant.results import Measurement, run_name
from defquant.typed import convert, from_mapping

__all__ = [
    "BROKEN", "Example", "Prediction", "Run", "Strip", "flatten", "read_runs",
    "read_strip",
]  # fmt: skip

PNG = b"\x89PNG\r\n\x1a\n"
LARGEST_PICTURE = 100_000
BROKEN = (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError)


@dataclass(frozen=True)
class Run:
    """The settings of one run, flat, and its epochs' finite numbers."""

    name: str
    config: Mapping[str, str]
    log: Sequence[Mapping[str, float]]

    def curve(self, field: str) -> list[float]:
        return [line[field] for line in self.log if field in line]


@dataclass(frozen=True)
class Prediction:
    name: str
    confidence: float | None
    right: bool


@dataclass(frozen=True)
class Example:
    """One test image; a picture is base64 of a PNG, or empty where it was none."""

    label: str
    clean_png: str
    adversarial_png: str
    clean: Prediction
    adversarial: Prediction


@dataclass(frozen=True)
class Strip:
    """The examples of one run, by the image's name."""

    series: Series
    seed: int
    data: str
    model: str
    attack: str
    eps: float
    examples: Mapping[str, Example]


def read_runs(
    folder: Path, measurements: Sequence[Measurement] = ()
) -> tuple[list[Run], list[Strip], list[str]]:
    """Runs, example strips and notes on what could not be read, everywhere below `folder`.

    A run is called by its path from there; the network of an experiment, which lies in
    `networks/NAME`, by its own name, as its measurements are.
    """
    experiment = any(m.cell for m in measurements)
    names = ("config.json", "log.jsonl", "examples.json")
    folders = sorted({path.parent for name in names for path in folder.rglob(name)})
    runs, strips, notes = [], [], []
    for place in folders:
        mine = experiment and place.parent.name == "networks"
        name = place.name if mine else run_name(place, folder)
        try:
            config = read_json(place / names[0]) if (place / names[0]).exists() else {}
            runs.append(Run(name, flatten(config), _log(place / names[1])))
            if (place / names[2]).exists():
                strips.append(read_strip(read_json(place / names[2])))
        except (UserError, *BROKEN) as error:
            notes.append(f"{name}: left out in part ({shown(str(error), 200)})")
    return runs, strips, notes


def flatten(value: object, prefix: str = "") -> dict[str, str]:
    """Nested mappings as dotted names: {"model": {"bits": 4}} -> {"model.bits": "4"}."""
    if not isinstance(value, Mapping):
        if prefix == "":
            return {}
        return {prefix: value if isinstance(value, str) else json.dumps(value, default=str)}
    found: dict[str, str] = {}
    for key, item in value.items():
        found |= flatten(item, f"{prefix}.{key}" if prefix else str(key))
    return found


def _log(path: Path) -> list[dict[str, float]]:
    """The finite numbers of each epoch."""
    if not path.exists():
        return []
    lines = read_lines(path)
    epochs = [convert(dict[str, Any], record, f"{where}an epoch") for where, record in lines]
    finite = [{name: _finite(value) for name, value in epoch.items()} for epoch in epochs]
    return [{k: v for k, v in epoch.items() if v is not None} for epoch in finite]


@dataclass(frozen=True)
class _Said:
    prediction: int
    confidence: Any = None


@dataclass(frozen=True)
class _Image:
    id: int | str
    label: int
    clean: _Said
    adversarial: _Said
    clean_png: Any = None
    adversarial_png: Any = None


@dataclass(frozen=True)
class _Record:
    """What `defquant.measure.examples` makes."""

    method: str
    data: str
    model: str
    attack: str
    eps: float
    seed: int
    examples: tuple[_Image, ...]
    bits: int | None = None
    beta: float = 0.0
    classes: tuple[str, ...] = ()


def read_strip(record: Any) -> Strip:
    """The examples of `record`, as `defquant.measure.examples` makes it. Raises `UserError`."""
    r = from_mapping(_Record, record, "examples: ")
    check_eps(r.eps)
    series = Series(r.method, check_bits(r.bits), r.beta)
    examples = {str(item.id): _example(item, r.classes) for item in r.examples}
    return Strip(series, r.seed, r.data, r.model, r.attack, r.eps, examples)


def _example(item: _Image, names: Sequence[str]) -> Example:
    return Example(
        _name(item.label, names),
        _png(item.clean_png),
        _png(item.adversarial_png),
        _prediction(item.clean, item.label, names),
        _prediction(item.adversarial, item.label, names),
    )


def _prediction(item: _Said, label: int, names: Sequence[str]) -> Prediction:
    name = _name(item.prediction, names)
    return Prediction(name, _finite(item.confidence), item.prediction == label)


def _name(number: int, names: Sequence[str]) -> str:
    return names[number] if 0 <= number < len(names) else str(number)


def _png(text: object) -> str:
    try:
        picture = base64.b64decode(text if isinstance(text, str) else "", validate=True)
    except (binascii.Error, ValueError):
        return ""
    small = len(picture) <= LARGEST_PICTURE
    return base64.b64encode(picture).decode() if small and picture.startswith(PNG) else ""


def _finite(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)
