"""What the folders hold beside the results: settings, training logs, pictures, exported models.

All of it is untrusted: wrong types are dropped, pictures must be PNG, and a file that cannot be
read becomes a note on the page.
"""

import base64
import binascii
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from defquant.config import check_bits, check_eps
from defquant.errors import UserError, shown, visible
from defquant.files import read_json, read_lines, read_text
from defquant.paper.section import eps_text
from defquant.report.names import Family, Series, attack_order, bits_text
from defquant.results import Measurement, Score, run_name
from defquant.typed import convert, from_mapping, parse_json

__all__ = [
    "BROKEN", "INTEGER", "KIND", "Cost", "Deployed", "Example", "Latency", "Pair", "Parity",
    "Prediction", "Run", "Strip", "StripTable", "flatten", "of_pictures", "of_runs",
    "read_deployed", "read_runs", "read_strip",
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


# --- pictures side by side (Figure 7) -----------------------------------------------------

ROWS = 8
COLUMNS = 8
BYTES = 350_000
UNKNOWN = {"method": "", "model": "", "data": "", "seed": 0, "attack": "", "eps": 0.0}


@dataclass(frozen=True)
class Column:
    """The pictures of one network under its name."""

    name: str
    note: str
    strip: Strip


@dataclass(frozen=True)
class StripTable:
    """The pictures of one attack: networks side by side, one test image per row."""

    where: str
    columns: list[Column]
    images: list[str]
    left_out: int

    def holders(self, image: str) -> list[Column]:
        return [column for column in self.columns if image in column.strip.examples]


def of_pictures(pictures: Iterable[tuple[str, Any]]) -> tuple[list[StripTable], list[str]]:
    """The pictures of a section by their networks' names; notes on what is no such record."""
    columns, notes = [], []
    for name, record in pictures:
        try:
            strip = read_strip({**UNKNOWN, **record})
            note = str(strip.series) if strip.series.method else ""
            columns.append(Column(name, note, strip))
        except BROKEN as error:
            notes.append(f"{name}: no pictures ({type(error).__name__})")
    groups: dict[str, list[Column]] = {}
    for column in columns:
        groups.setdefault(_where(column.strip), []).append(column)
    return [_table(where, own, len(groups)) for where, own in groups.items()], notes


def of_runs(strips: Sequence[Strip]) -> list[StripTable]:
    """Per architecture and data set the attack that most networks share, first seeds only."""
    groups: dict[tuple[str, str, str, float], dict[Series, Strip]] = {}
    for strip in sorted(strips, key=lambda item: item.seed):
        name = (strip.data, strip.model, strip.attack, strip.eps)
        groups.setdefault(name, {}).setdefault(strip.series, strip)
    largest: dict[tuple[str, str], tuple[str, str, str, float]] = {}
    for name in sorted(groups, key=lambda item: -len(groups[item])):
        largest.setdefault(name[:2], name)
    found = [_columns(list(groups[name].values())) for name in largest.values()]
    return [_table(_where(columns[0].strip), columns, len(found)) for columns in found]


def _columns(strips: Sequence[Strip]) -> list[Column]:
    """Full precision and 4 bits first, as the paper's Figure 7, where not all columns fit."""
    ordered = sorted(strips, key=lambda s: (s.series.bits not in (None, 4), s.series.order))
    shown = sorted(ordered[:COLUMNS], key=lambda s: s.series.order)
    rest = [strip for strip in ordered if strip not in shown]
    return [Column(strip.series.short, _note(strip), strip) for strip in (*shown, *rest)]


def _note(strip: Strip) -> str:
    """What the network's short name leaves out."""
    beta = f"β = {strip.series.beta:g}" if strip.series.shows_beta else ""
    return ", ".join(filter(None, [beta, f"seed {strip.seed}"]))


def _where(strip: Strip) -> str:
    attack = f"{strip.attack} at {eps_text(strip.eps)}" if strip.attack else ""
    place = f"{strip.model} on {strip.data}" if strip.model and strip.data else ""
    return ", ".join(filter(None, [attack, place]))


def _table(where: str, every: Sequence[Column], share: int) -> StripTable:
    """The first images that most networks have; `share` tables divide what a page may weigh."""
    columns = list(every[:COLUMNS])
    counts: dict[str, int] = {}
    for image in (image for column in columns for image in column.strip.examples):
        counts[image] = counts.get(image, 0) + 1
    images, size = [], 0
    for image in sorted(counts, key=lambda item: -counts[item])[:ROWS]:
        found = [c.strip.examples[image] for c in columns if image in c.strip.examples]
        size += len(found[0].clean_png) + sum(len(example.adversarial_png) for example in found)
        if size > BYTES / share:
            break
        images.append(image)
    return StripTable(where, columns, images, len(every) - len(columns))


# --- exported models: what `defquant export` wrote beside its ONNX files -------------------

KIND = "defquant deployed model"
INTEGER = "onnxruntime integer"  # the engine that runs what ships; the others stand beside it
ENGINES = {"torch": "PyTorch float32", "onnxruntime": "onnxruntime float32", "integer": INTEGER}
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
