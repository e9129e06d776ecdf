"""What `defquant export` wrote beside its ONNX files, read and put in order.

As all that the folders hold it is untrusted: a number of a wrong type, or one that is not finite,
makes a file a broken one.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from defquant.errors import UserError
from defquant.files import read_bytes
from defquant.report.names import Family, Series, attack_order, bits_text
from defquant.report.sources import BROKEN
from defquant.results import Score

__all__ = [
    "INTEGER",
    "KIND",
    "SINGLE",
    "Cost",
    "Deployed",
    "Latency",
    "Pair",
    "Parity",
    "read_deployed",
]

KIND = "defquant deployed model"
INTEGER = "onnxruntime integer"  # the engine that runs what ships; the others stand beside it
SINGLE = "onnxruntime float32"
ENGINES = {"torch": "PyTorch float32", "onnxruntime": SINGLE, "integer": INTEGER}
BITS_PART = re.compile(r"W\d|deployable")  # of a method; said by the table's head


@dataclass(frozen=True)
class Pair:
    """One attack's score on the trained network, where it was run there, and on the file."""

    attack: str
    eps: float
    settings: str
    trained: Score | None
    deployed: Score

    @property
    def order(self) -> tuple[tuple[int, int, str], float]:
        return (attack_order(self.attack), self.eps)

    @property
    def outside(self) -> str:
        """`below` or `above` where the file's accuracy leaves the trained one's interval."""
        if self.trained is None:
            return ""
        low, high = self.trained.interval
        accuracy = self.deployed.accuracy
        return "below" if accuracy < low else "above" if accuracy > high else ""


@dataclass(frozen=True)
class Parity:
    """How far the file is from the network; None where an engine was not there."""

    images: int
    agreement: float
    flipped_codes: float
    logit_error: float
    reference_mismatches: int
    unoptimised_agreement: float | None
    openvino_agreement: float | None


@dataclass(frozen=True)
class Latency:
    """Milliseconds of one engine at one batch size."""

    median_ms: float
    low_ms: float
    high_ms: float


@dataclass(frozen=True)
class Cost:
    """Bytes, operations and milliseconds; `float` is the same network in float32.

    `float_macs` are those that stay in floats. The peak of activations as packed codes, as a byte
    each, and in float32. `latency` by batch size and engine.
    """

    file_bytes: int
    float_file_bytes: int
    macs: int
    float_macs: int
    bops: int
    float_bops: int
    peak_activation_bytes: int
    uint8_peak_activation_bytes: int
    float_peak_activation_bytes: int
    latency: Mapping[int, Mapping[str, Latency]]
    threads: int
    repeats: int


@dataclass(frozen=True)
class Deployed:
    """One exported model; `place` is its JSON's path from the report's folder."""

    place: str
    run: str
    method: str
    model: str
    bits: int
    weight_bits: int
    beta: float
    seed: int
    data: str
    fingerprint: str
    input: str
    calibrated: int | None
    convolutions: tuple[int, int]
    parity: Parity
    scores: Sequence[Pair]
    cost: Cost
    versions: Mapping[str, str]
    command: str

    @property
    def family(self) -> Family:
        """Its row in the paper's tables: the method without what the bits already say."""
        parts = [part for part in self.method.split(" + ") if not BITS_PART.fullmatch(part)]
        return Series(" + ".join(parts), self.bits, self.beta).family

    @property
    def precision(self) -> str:
        """`4-bit activations, 8-bit weights`."""
        return f"{bits_text(self.bits)} activations, {bits_text(self.weight_bits)} weights"

    @property
    def order(self) -> tuple[Any, ...]:
        """Equal bits stand together, vanilla before DQ."""
        precision = (self.bits, -self.weight_bits)
        return (self.data, self.model, *precision, self.family.order, self.seed, self.place)


def read_deployed(folder: Path) -> tuple[list[Deployed], list[str]]:
    """The exported models everywhere below `folder`, in order, and notes on the broken ones.

    A JSON file is ours by its `kind`; one that does not parse, by the ONNX file beside it.
    """
    models, notes = [], []
    for path in sorted(folder.rglob("*.json")):
        place = str(path.relative_to(folder))
        try:
            text = read_bytes(path).decode()
            if KIND not in text and not path.with_suffix(".onnx").exists():
                continue
            record = json.loads(text)
            if isinstance(record, dict) and record.get("kind") == KIND:
                models.append(_deployed(record, place))
        except (UserError, *BROKEN) as error:
            if path.with_suffix(".onnx").exists() or not isinstance(error, OSError | UnicodeError):
                notes.append(f"{place}: left out ({type(error).__name__}: {error})")
    return sorted(models, key=lambda model: model.order), notes


def _deployed(record: Mapping[str, Any], place: str) -> Deployed:
    if record["format"] != 1:
        raise ValueError(f"format {record['format']!r} is none that this version reads")
    texts = ("run", "method", "model", "data", "fingerprint", "input", "command")
    calibrated = record.get("calibrated")
    integer, every = (_whole(value) for value in record["convolutions"])
    return Deployed(
        place=place,
        **{name: str(record[name]) for name in texts},
        bits=_whole(record["bits"]),
        weight_bits=_whole(record["weight_bits"]),
        beta=_finite(record["beta"]),
        seed=_whole(record["seed"]),
        calibrated=None if calibrated is None else _whole(calibrated),
        convolutions=(integer, every),
        parity=_parity(record["parity"]),
        scores=sorted(map(_pair, record["scores"]), key=lambda pair: pair.order),
        cost=_cost(record["cost"]),
        versions={str(name): str(value) for name, value in record["versions"].items()},
    )


def _parity(record: Mapping[str, Any]) -> Parity:
    counts = {name: _whole(record[name]) for name in ("images", "reference_mismatches")}
    shares = {name: _finite(record[name]) for name in ("agreement", "flipped_codes", "logit_error")}
    others = {name: record.get(name) for name in ("unoptimised_agreement", "openvino_agreement")}
    engines = {name: None if v is None else _finite(v) for name, v in others.items()}
    return Parity(**counts, **shares, **engines)  # type: ignore[arg-type]


def _pair(record: Mapping[str, Any]) -> Pair:
    trained = record.get("trained")
    return Pair(
        attack=str(record["attack"]),
        eps=_finite(record["eps"]),
        settings=str(record.get("settings", "")),
        trained=None if trained is None else _score(trained),
        deployed=_score(record["deployed"]),
    )


def _score(record: Sequence[Any]) -> Score:
    correct, total = (_whole(value) for value in record)
    return Score(correct, total)


def _cost(record: dict[str, Any]) -> Cost:
    counts = (
        "file_bytes", "float_file_bytes", "macs", "bops", "float_bops", "peak_activation_bytes",
        "uint8_peak_activation_bytes", "float_peak_activation_bytes",
    )  # fmt: skip
    timed = record.get("latency") or {}
    latency = {
        int(batch): {ENGINES.get(name, str(name)): _latency(own) for name, own in engines.items()}
        for batch, engines in timed.get("batches", timed).items()
    }
    around = record | timed
    return Cost(
        **{name: _amount(record[name]) for name in counts},
        float_macs=_whole(record.get("float_macs", 0)),
        latency=dict(sorted(latency.items())),
        threads=_whole(around.get("threads", 0)),
        repeats=_whole(around.get("repeats", 0)),
    )


def _latency(record: Mapping[str, Any]) -> Latency:
    median, low, high = (_finite(record[name]) for name in ("median_ms", "low_ms", "high_ms"))
    if median <= 0:
        raise ValueError(f"a latency of {median} ms")
    return Latency(median, low, high)


def _whole(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{value!r:.40} is no count")
    return value


def _amount(value: object) -> int:
    """Of bytes or operations: packed codes may end within a byte."""
    if (amount := _finite(value)) <= 0:
        raise ValueError(f"{value!r:.40} is no amount")
    return round(amount)


def _finite(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{value!r:.40} is no finite number")
    return float(value)
