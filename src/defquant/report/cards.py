"""Exported models: the cards that `defquant export` writes beside its ONNX files, as tables."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from string import Formatter
from typing import Annotated, Any

from defquant.config import check_bits, check_eps
from defquant.errors import UserError, shown, visible
from defquant.files import read_text
from defquant.paper.section import Entry, Number, Table, rate, signed
from defquant.paper.verdict import Spread, accuracy, interval
from defquant.records import Score
from defquant.report.answer import Answer
from defquant.report.marks import UNASKED, Mark
from defquant.report.model import NOTHING, WORDS, Chapter, Row, interval_text
from defquant.report.names import Family, Series, attack_at, attack_order, distinct
from defquant.report.plot import differences
from defquant.typed import NOT_NEGATIVE, POSITIVE, from_mapping, parse_json

__all__ = ["KIND", "Card", "answer", "chapters", "read_cards", "rows", "ships"]

KIND = "defquant deployed model"
INTEGER = "onnxruntime, integers"  # the engine that runs what ships; the others stand beside it
ENGINES = {"torch": "PyTorch", "integer": INTEGER}
BITS_PART = re.compile(r"W\d|deployable")  # of a method; said by the table's head
AGREEMENT = 0.995  # `deploy.parity.AGREEMENT`, which needs torch
Counts = tuple[int, int]
Count = Annotated[int, NOT_NEGATIVE]
Size = Annotated[int, POSITIVE]


@dataclass(frozen=True)
class Pair:
    """One attack's [right, images]: the trained network, where it was run there, and the file.

    `reference`: a float network's, of the same attack on itself.
    """

    attack: str
    eps: float
    deployed: Counts
    settings: str = ""
    trained: Counts | None = None
    reference: Counts | None = None

    def __post_init__(self) -> None:
        check_eps(self.eps)
        for counts in filter(None, (self.deployed, self.trained, self.reference)):
            Score(*counts)

    @property
    def order(self) -> tuple[Any, ...]:
        return (attack_order(self.attack), self.eps)

    @property
    def gap(self) -> Number | None:
        """The file's accuracy less the trained one's, where that is known."""
        if self.trained is None:
            return None
        ends = interval([
            (sign, accuracy(k / n, n, 1, Spread(0.0, 1.0)))
            for sign, (k, n) in ((1, self.deployed), (-1, self.trained))
        ])  # fmt: skip
        return Number(ends.effect, 0, 1, self.deployed[1], ends.low, ends.high, points=True)

    @property
    def outside(self) -> str:
        """`✗ below` or `✗ above` where the file leaves the trained one's interval."""
        if self.trained is None:
            return ""
        (low, high), accuracy = Score(*self.trained).interval, Score(*self.deployed).accuracy
        return "✗ below" if accuracy < low else "✗ above" if accuracy > high else ""


@dataclass(frozen=True)
class Parity:
    """How far the file is from the network; None where an engine was not there."""

    images: int
    agreement: float
    flipped_codes: float
    logit_error: float
    reference_mismatches: Count
    unoptimised_agreement: float | None = None
    openvino_agreement: float | None = None


@dataclass(frozen=True)
class Time:
    """Milliseconds of one engine at one batch size."""

    median_ms: Annotated[float, POSITIVE]
    low_ms: Annotated[float, POSITIVE]
    high_ms: Annotated[float, POSITIVE]


@dataclass(frozen=True)
class Latency:
    """By batch size and engine."""

    threads: int = 0
    repeats: int = 0
    batches: Mapping[str, Mapping[str, Time]] = field(default_factory=dict)


@dataclass(frozen=True)
class Cost:
    """Bytes and operations; `float` is the same network in float32, `float_macs` stay in floats.

    The peak of activations as packed codes, as a byte each, and in float32.
    """

    file_bytes: Size
    float_file_bytes: Size
    macs: Size
    bops: Size
    float_bops: Size
    peak_activation_bytes: Size
    uint8_peak_activation_bytes: Size
    float_peak_activation_bytes: Size
    float_macs: Count = 0
    latency: Latency = Latency()


@dataclass(frozen=True)
class Card:
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
    convolutions: tuple[Count, Count]
    parity: Parity
    scores: tuple[Pair, ...]
    cost: Cost
    versions: Mapping[str, str]
    command: str
    calibrated: Count | None = None

    def __post_init__(self) -> None:
        check_bits(self.bits)
        check_bits(self.weight_bits, "weight_bits")

    @property
    def family(self) -> Family:
        """Its row in the paper's tables: the method without what the bits already say."""
        parts = [part for part in self.method.split(" + ") if not BITS_PART.fullmatch(part)]
        return Series(" + ".join(parts), self.bits, self.beta).family

    @property
    def name(self) -> str:
        ranges = ", calibrated" if self.calibrated else ""
        return f"{self.family}, {self.bits}-bit, weights {self.weight_bits}{ranges}"

    @property
    def amiss(self) -> bool:
        """Whether it answers otherwise than its network, or is as robust to something alone."""
        return self.parity.agreement < AGREEMENT or any(pair.outside for pair in self.scores)

    @property
    def order(self) -> tuple[Any, ...]:
        """Equal bits stand together, vanilla before DQ."""
        precision = (self.bits, -self.weight_bits)
        return (self.data, self.model, *precision, self.family.order, self.seed, self.place)

    @property
    def facts(self) -> dict[str, Any]:
        """What its table says, by name."""
        cost, (integer, every) = self.cost, self.convolutions
        return vars(self) | {
            "amiss": "✗ " * (integer < every),
            "ranges": f"measured on {self.calibrated:,} images" if self.calibrated else "learnt",
            "files": cost.file_bytes / cost.float_file_bytes,
            "bops": cost.bops / cost.float_bops,
            "peaks": cost.peak_activation_bytes / cost.float_peak_activation_bytes,
        }


def read_cards(folder: Path) -> tuple[list[Card], list[str]]:
    """The exported models everywhere below `folder`, in order, and notes on the broken ones.

    A JSON file is ours by its `kind`; one that does not parse, by the ONNX file beside it.
    """
    cards, notes = [], []
    for path in sorted(folder.rglob("*.json")):
        place, ours = visible(str(path.relative_to(folder))), path.with_suffix(".onnx").exists()
        try:
            text = read_text(path)
            ours = ours or KIND in text
            record = parse_json(text, place) if ours else None
            if isinstance(record, dict) and record.get("kind") == KIND:
                if record.get("format") != 1:
                    raise UserError(f"format must be 1; found {shown(record.get('format'))}")
                cards.append(from_mapping(Card, record | {"place": place}))
        except UserError as error:
            notes += [f"{place}: left out ({shown(str(error), 200)})"] * ours
    return sorted(cards, key=lambda card: card.order), notes


# --- tables -------------------------------------------------------------------------------

MAIN, FOLDED = ("Integers", "Accuracy", "Cost", "Latency"), ("Parity", "Right", "Times", "Versions")


def chapters(cards: Sequence[Card]) -> list[Chapter]:
    """Per architecture and data set a column per model, so that DQ stands beside vanilla."""
    groups = [list(own) for _, own in groupby(cards, lambda card: (card.data, card.model))]
    return [_chapter(own, f"deployed-{i}") for i, own in enumerate(groups, 1)]


def _chapter(cards: Sequence[Card], name: str) -> Chapter:
    found: dict[str, dict[str, tuple[Any, dict[str, Entry]]]] = {}
    for card in cards:
        for block, order, row, entry in _answers(card):
            found.setdefault(block, {}).setdefault(row, (order, {}))[1][card.place] = entry
    tables = [
        Table(("", "", *(str(card.family) for card in cards)), tuple(
            (block, row, *(entries.get(card.place) for card in cards))
            for block in blocks
            for row, (_, entries) in sorted(found.get(block, {}).items(), key=lambda i: i[1][0])
        ), caption)
        for blocks, caption in ((MAIN, WORDS["shipped"]), (FOLDED, WORDS["card"]))
    ]  # fmt: skip
    return Chapter(
        name, f"Deployed: {cards[0].model} on {cards[0].data}", tables=tables[:1],
        folded=[("Every number: parity, scores, latency, versions", tables[1:])],
        commands=distinct(card.command for card in cards),
    )  # fmt: skip


def _answers(card: Card) -> Iterator[tuple[str, Any, str, Entry]]:
    """Rows of plain columns: block, order within it, what is said, and that."""
    for block, facts in WORDS["facts"].items():
        for i, (name, text) in enumerate(facts.items()):
            yield block, i, name, _Words().format(text, **card.facts)
    for pair in card.scores:
        name = attack_at(pair.attack, pair.eps)
        for i, side in enumerate(("trained", "deployed", "reference")):
            if counts := getattr(pair, side):
                order, share = (*pair.order, i), rate(counts)
                right = f"{counts[0]:,} / {counts[1]:,}, {interval_text(share)}"
                yield "Accuracy", order, f"{name}, {side}", share
                yield "Right", order, f"{pair.settings or pair.attack}, {side}", right
        if pair.outside:
            yield "Accuracy", (*pair.order, 3), f"{name}, against the interval", pair.outside
    for batch, times in card.cost.latency.batches.items():
        every = {ENGINES.get(engine, engine): time for engine, time in times.items()}
        for i, (engine, time) in enumerate(every.items()):
            order, rests = (len(batch), batch, i), vars(time) | vars(card.cost.latency)
            yield (
                "Times",
                order,
                f"Batch {batch}, {engine}",
                _Words().format(WORDS["time"], **rests),
            )
        if own := every.pop(INTEGER, None):
            ratios = [f"{t.median_ms / own.median_ms:.2f}× {e}" for e, t in every.items()]
            said = ", ".join([f"{_digits(own.median_ms)} ms", *ratios])
            yield "Latency", (len(batch), batch), f"Batch {batch}", said
    for name, version in card.versions.items():
        yield "Versions", 0, name, version


# --- the first screen -----------------------------------------------------------------------


def rows(cards: Sequence[Card]) -> list[Row]:
    """Each file beside the network it came from; the images are the same, so the training's chance
    is no part of their difference, and that of the images counts as if they were two lots.
    """
    found = []
    attacked = [p for c in cards for p in c.scores if p.attack != "clean" and p.trained]
    least = min((p.eps for p in attacked), default=0.0)
    near = [p for p in attacked if p.eps == least]
    worst = min(near, key=lambda p: p.deployed[0] / p.deployed[1], default=None)
    for card in cards:
        kind, place = str(card.family), f"{card.model} on {card.data}"
        about = {"Card": card.place, "Run": f"{card.run}, seed {card.seed}"}
        for pair in sorted(card.scores, key=lambda pair: pair.order):
            of, how = (pair.attack, pair.eps), about | {"Attack": pair.settings}
            telling = worst is None or of == (worst.attack, worst.eps)
            sides = {"reference": pair.reference, "trained": pair.trained, "file": pair.deployed}
            for side, counts in sides.items():
                method, bits = (side, None) if side == "reference" else (kind, card.bits)
                gap = pair.gap if side == "file" else None
                if counts:
                    found.append(Row(place, f"{card.name}, {side}", kind, method, bits, *of,
                                     rate(counts), gap, telling, how))  # fmt: skip
    return found


def ships(cards: Sequence[Card]) -> Mark | None:
    """Whether what ships is what was measured; None where nothing was exported."""
    if not cards:
        return None
    bad = [card for card in cards if card.amiss]
    least = min(card.parity.agreement for card in cards)
    text = f"{len(cards) - len(bad)} of {len(cards)} files answer as their networks do, at least "
    text += f"{least:.1%} of the images alike" if bad else f"{least:.2%} of the images"
    return Mark("What ships", "differs" if bad else "the same", "wrong" if bad else "right", text)


def answer(cards: Sequence[Card]) -> Answer:
    """Of exported models alone: do they answer like the networks they came from?"""
    every, ship = rows(cards), ships(cards)
    bad, gaps = [card for card in cards if card.amiss], [row for row in every if row.gap]
    most = max(gaps, key=lambda row: abs(row.gap.mean or 0) if row.gap else 0, default=None)
    images = [card.parity.images for card in cards]
    near = min((row.eps for row in gaps if row.eps), default=0.0)
    sentence = f"{len(cards) - len(bad)} of {len(cards)} files give their network's answers on "
    sentence += f"{AGREEMENT:.1%} of the images or more, and keep its robust accuracy."
    if most and most.gap:
        points = f"{signed(most.gap.mean or 0)} points [{interval_text(most.gap)}]"
        sentence += f" Under attack they differ most by {points}: {most.network}, "
        sentence += f"{attack_at(most.attack, most.eps)}."
    integers = all(card.convolutions[0] == card.convolutions[1] for card in cards)
    codes = sum(card.parity.reference_mismatches for card in cards)
    return Answer(
        "Does what ships answer like what was trained?",
        "Yes" if not bad else "No" if len(bad) == len(cards) else "Not all of it",
        "wrong" if bad else "right", sentence,
        [
            Mark("Evidence", "one seed each", "open", f"{max(images):,} images of each for parity"),
            UNASKED,
            Mark("What ships", "integers" if integers and not codes else "not all in integers",
                 "right" if integers and not codes else "wrong",
                 f"{codes:,} codes differ from the integer reference's")
            if ship else Mark("What ships", "nothing", "open", ""),
        ],
        [f"{card.name}: {card.parity.agreement:.2%} the same answers." for card in bad],
        ["other seeds", "masked gradients (diagnose)", "attacks on the file itself but Square"],
        [differences([r for r in gaps if r.eps <= near], "the trained network")]
        * bool(gaps),
    )  # fmt: skip


class _Words(Formatter):
    """`k` is for three digits with a unit, `71.4 k`, `kB` for bytes, `ms` for times."""

    def format_field(self, value: Any, format_spec: str) -> str:
        if value is None:
            return NOTHING
        if format_spec == "ms":
            return f"{_digits(value)} ms"
        if format_spec in ("k", "kB"):
            units = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
            found = [(size, unit) for size, unit in units if value >= 0.9995 * size]
            text = f"{_digits(value / found[0][0])} {found[0][1]}" if found else f"{value:.0f} "
            return text.strip() if format_spec == "k" else f"{text}B"
        return str(super().format_field(value, format_spec))


def _digits(value: float) -> str:
    """Three of them."""
    return f"{value:.{2 if value < 9.995 else 1 if value < 99.95 else 0}f}"
