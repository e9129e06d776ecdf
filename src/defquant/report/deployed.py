"""What `defquant export` wrote beside its ONNX files, read and put in order.

As all that the folders hold it is untrusted: a number of a wrong type, or one that is not finite,
makes a file a broken one.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from defquant.config import check_bits, check_eps
from defquant.errors import UserError, shown, visible
from defquant.files import read_text
from defquant.report.names import Family, Series, attack_order, bits_text
from defquant.report.sources import BROKEN
from defquant.results import Score
from defquant.typed import convert, from_mapping, parse_json

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
    unoptimised_agreement: float | None = None
    openvino_agreement: float | None = None


@dataclass(frozen=True)
class Latency:
    """Milliseconds of one engine at one batch size."""

    median_ms: float
    low_ms: float
    high_ms: float

    def __post_init__(self) -> None:
        if not self.median_ms > 0:
            raise UserError(f"a latency must be positive; found {self.median_ms:g} ms")


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
        place, text = visible(str(path.relative_to(folder))), ""
        try:
            text = read_text(path)
            if KIND not in text and not path.with_suffix(".onnx").exists():
                continue
            record = parse_json(text, place)
            if isinstance(record, dict) and record.get("kind") == KIND:
                models.append(_deployed(record, place))
        except (UserError, *BROKEN) as error:
            if text or path.with_suffix(".onnx").exists():
                notes.append(f"{place}: left out ({shown(str(error), 200)})")
    return sorted(models, key=lambda model: model.order), notes


def _deployed(record: Mapping[str, Any], place: str) -> Deployed:
    if record["format"] != 1:
        raise ValueError(f"format {record['format']!r} is none that this version reads")
    texts = ("run", "method", "model", "data", "fingerprint", "input", "command")
    calibrated = record.get("calibrated")
    integer, every = (_whole(value) for value in record["convolutions"])
    return Deployed(
        place=place,
        **{name: convert(str, record[name], name) for name in texts},
        bits=check_bits(_whole(record["bits"])) or 0,
        weight_bits=check_bits(_whole(record["weight_bits"]), "weight_bits") or 0,
        beta=convert(float, record["beta"], "beta"),
        seed=convert(int, record["seed"], "seed"),
        calibrated=None if calibrated is None else _whole(calibrated),
        convolutions=(integer, every),
        parity=from_mapping(Parity, record["parity"], "parity."),
        scores=sorted(map(_pair, record["scores"]), key=lambda pair: pair.order),
        cost=_cost(record["cost"]),
        versions={str(name): str(value) for name, value in record["versions"].items()},
    )


def _pair(record: Mapping[str, Any]) -> Pair:
    trained = record.get("trained")
    return Pair(
        attack=str(record["attack"]),
        eps=check_eps(convert(float, record["eps"], "eps")),
        settings=str(record.get("settings", "")),
        trained=None if trained is None else _score(trained),
        deployed=_score(record["deployed"]),
    )


def _score(record: Sequence[Any]) -> Score:
    return Score(*convert(tuple[int, int], record, "a score"))


def _cost(record: dict[str, Any]) -> Cost:
    counts = (
        "file_bytes", "float_file_bytes", "macs", "bops", "float_bops", "peak_activation_bytes",
        "uint8_peak_activation_bytes", "float_peak_activation_bytes",
    )  # fmt: skip
    timed = record.get("latency") or {}
    latency = {
        int(batch): {
            ENGINES.get(name, str(name)): from_mapping(Latency, own, "latency.")
            for name, own in engines.items()
        }
        for batch, engines in timed.get("batches", timed).items()
    }
    around = record | timed
    return Cost(
        **{name: _amount(record[name], name) for name in counts},
        float_macs=_whole(record.get("float_macs", 0)),
        latency=dict(sorted(latency.items())),
        threads=_whole(around.get("threads", 0)),
        repeats=_whole(around.get("repeats", 0)),
    )


def _whole(value: object, name: str = "a count") -> int:
    number: int = convert(int, value, name)
    if number < 0:
        raise UserError(f"{name} must not be negative; found {number}")
    return number


def _amount(value: object, name: str) -> int:
    """Of bytes or operations: packed codes may end within a byte."""
    amount: float = convert(float, value, name)
    if amount <= 0:
        raise UserError(f"{name} must be positive; found {amount:g}")
    return round(amount)
