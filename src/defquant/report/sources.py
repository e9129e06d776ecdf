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

from defquant.errors import UserError
from defquant.files import read_json
from defquant.report.names import Series
from defquant.results import Measurement, run_name

__all__ = [
    "BROKEN", "Example", "Prediction", "Run", "Strip", "check_types", "flatten", "read_runs",
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
            notes.append(f"{name}: left out in part ({type(error).__name__}: {error})")
    return runs, strips, notes


def check_types(measurements: Sequence[Measurement]) -> None:
    """Raise `UserError` where a measurement's fields have the wrong types."""
    for m in measurements:
        texts = (m.run, m.method, m.model, m.data, m.attack, m.fingerprint, m.settings)
        numbers = (m.beta, m.eps, m.seconds)
        right = all(isinstance(text, str) for text in texts) and isinstance(m.seed, int)
        right = right and all(_finite(number) is not None for number in numbers)
        if not right or not (m.bits is None or isinstance(m.bits, int)):
            raise UserError(f"a measurement of run {str(m.run)[:80]!r} has fields of wrong types")


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
    if not path.exists():
        return []
    epochs = []
    lines = path.read_text(encoding="utf-8").split("\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError:
            if number == len(lines):  # the run was killed or is still writing
                break
            raise
        finite = {str(key): _finite(value) for key, value in record.items()}
        epochs.append({key: value for key, value in finite.items() if value is not None})
    return epochs


def read_strip(record: Any) -> Strip:
    """The examples of `record`, as `defquant.measure.examples` makes it. Raises one of `BROKEN`."""
    bits = None if record.get("bits") is None else int(record["bits"])
    beta, eps = float(record.get("beta", 0)), float(record["eps"])
    if not (math.isfinite(beta) and math.isfinite(eps)):
        raise ValueError("beta and eps must be finite")
    series = Series(str(record["method"]), bits, beta)
    names = [str(name) for name in record.get("classes", ())]
    examples = {str(item["id"]): _example(item, names) for item in record["examples"]}
    data, model, attack = (str(record[key]) for key in ("data", "model", "attack"))
    return Strip(series, int(record["seed"]), data, model, attack, eps, examples)


def _example(item: Any, names: Sequence[str]) -> Example:
    label = int(item["label"])
    return Example(
        _name(label, names),
        _png(item.get("clean_png")),
        _png(item.get("adversarial_png")),
        _prediction(item["clean"], label, names),
        _prediction(item["adversarial"], label, names),
    )


def _prediction(item: Any, label: int, names: Sequence[str]) -> Prediction:
    number = int(item["prediction"])
    confidence = _finite(item.get("confidence"))
    return Prediction(_name(number, names), confidence, number == label)


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
