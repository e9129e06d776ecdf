"""What the folders hold beside the results: settings, training logs and pictures.

All of it is untrusted: pictures must be PNG, and a file that cannot be read is a note on the page.
"""

import base64
import io
import json
import math
from array import array
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from defquant.config import check_bits, check_eps
from defquant.errors import UserError, shown
from defquant.files import read_json, read_lines
from defquant.paper.section import eps_text
from defquant.records import Measurement, run_name
from defquant.report.names import Series
from defquant.typed import convert, from_mapping

__all__ = [
    "Diagnosis", "Example", "Run", "Strip", "StripTable", "flatten", "of_pictures", "of_runs",
    "read_runs",
]  # fmt: skip

PNG = b"\x89PNG\r\n\x1a\n"
LARGEST_PICTURE, LARGEST_SIDE = 100_000, 512
ROWS = COLUMNS = 8  # of a table of pictures
BYTES = 350_000  # of all pictures of a page


@dataclass(frozen=True)
class Diagnosis:
    """The masking verdict of `defquant diagnose`."""

    verdict: str
    eps: float
    images: int

    def __post_init__(self) -> None:
        check_eps(self.eps)


@dataclass(frozen=True)
class Run:
    """The settings of one run, flat; its epochs, and their finite numbers by name."""

    name: str
    config: Mapping[str, str]
    epochs: int
    curves: Mapping[str, Sequence[float]]
    diagnosis: Diagnosis | None = None


def read_runs(
    folder: Path, measurements: Sequence[Measurement] = ()
) -> tuple[list[Run], list["Strip"], list[str]]:
    """Runs, example strips and notes on what could not be read, everywhere below `folder`.

    A run is called by its path from there; the network of an experiment, which lies in
    `networks/NAME`, by its own name, as its measurements are.
    """
    experiment = any(m.cell for m in measurements)
    names = ("config.json", "log.jsonl", "examples.json", "diagnosis.json")
    folders = sorted({path.parent for name in names for path in folder.rglob(name)})
    runs, strips, notes = [], [], []
    for place in folders:
        mine = experiment and place.parent.name == "networks"
        name = place.name if mine else run_name(place, folder)
        config, log, examples, asked = (
            path if path.exists() else None for path in map(place.joinpath, names)
        )
        try:
            told = from_mapping(Diagnosis, read_json(asked), "diagnosis: ") if asked else None
            flat = flatten(read_json(config)) if config else {}
            runs.append(Run(name, flat, *_log(log), told))
            found = read_json(examples) if examples else []
            own = found if isinstance(found, list) else [found]  # one of each eps
            strips += [from_mapping(Strip, one, "examples: ") for one in own]
        except UserError as error:
            notes.append(f"{name}: left out in part ({shown(str(error), 200)})")
    return runs, strips, notes


def flatten(value: object, prefix: str = "") -> dict[str, str]:
    """Nested mappings as dotted names: {"model": {"bits": 4}} -> {"model.bits": "4"}."""
    if not isinstance(value, Mapping):
        text = value if isinstance(value, str) else json.dumps(value, default=str)
        return {prefix: text} if prefix else {}
    found: dict[str, str] = {}
    for key, item in value.items():
        found |= flatten(item, f"{prefix}.{key}" if prefix else str(key))
    return found


def _log(path: Path | None) -> tuple[int, dict[str, "array[float]"]]:
    epochs, curves = 0, dict[str, "array[float]"]()
    for where, record in read_lines(path) if path else ():
        for name, value in convert(dict[str, Any], record, f"{where}an epoch").items():
            if (number := _finite(value)) is not None:
                curves.setdefault(name, array("d")).append(number)
        epochs += 1
    return epochs, curves


def _finite(value: object) -> float | None:
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if number else None  # type: ignore[arg-type]


# --- pictures -----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Said:
    prediction: int
    confidence: Any = None


@dataclass(frozen=True)
class Example:
    """One test image; a picture is base64 of a PNG, or empty where it was none."""

    id: int | str
    label: int
    clean: _Said
    adversarial: _Said
    clean_png: Any = ""
    adversarial_png: Any = ""

    def __post_init__(self) -> None:
        for name in ("clean_png", "adversarial_png"):
            object.__setattr__(self, name, _png(getattr(self, name)))


@dataclass(frozen=True)
class Strip:
    """The examples of one network, as `defquant.measure.examples` makes them."""

    examples: tuple[Example, ...]
    method: str = ""
    data: str = ""
    model: str = ""
    attack: str = ""
    eps: float = 0.0
    seed: int = 0
    bits: int | None = None
    beta: float = 0.0
    classes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_eps(self.eps)
        check_bits(self.bits)

    @cached_property
    def by_id(self) -> dict[str, Example]:
        return {str(example.id): example for example in self.examples}

    @property
    def series(self) -> Series:
        return Series(self.method, self.bits, self.beta)

    @property
    def gain(self) -> int:
        """How many times the perturbation is magnified."""
        return max(1, round(0.4 / self.eps)) if self.eps else 8

    def change(self, image: str) -> str:
        """A picture of 0.5 + gain (attacked - clean); empty where one of the two is none."""
        own = self.by_id[image]
        try:
            clean, moved = (_pixels(png) for png in (own.clean_png, own.adversarial_png))
            shown = (127.5 + self.gain * (moved - clean)).clip(0, 255).astype("uint8")
        except (OSError, ValueError, SyntaxError):  # none, cut, or of two shapes
            return ""
        packed = io.BytesIO()
        Image.fromarray(shown).save(packed, "PNG")
        return base64.b64encode(packed.getvalue()).decode()

    @property
    def where(self) -> str:
        attack = f"{self.attack} at {eps_text(self.eps)}" if self.attack else ""
        place = f"{self.model} on {self.data}" if self.model and self.data else ""
        return ", ".join(filter(None, [attack, place]))

    def name(self, label: int) -> str:
        return self.classes[label] if 0 <= label < len(self.classes) else str(label)

    def answers(self, image: str) -> dict[str, tuple[str, str, str]]:
        """What the network says of an image: (`✓` or `✗`, class, `93%`), clean and attacked."""
        own = self.by_id[image]
        return {
            kind: (
                "✓" if said.prediction == own.label else "✗", self.name(said.prediction),
                "" if (sure := _finite(said.confidence)) is None else f"{100 * sure:.0f}%",
            )
            for kind, said in (("clean", own.clean), ("attacked", own.adversarial))
        }  # fmt: skip


def _pixels(png: str) -> "np.ndarray[Any, np.dtype[np.float64]]":
    with Image.open(io.BytesIO(base64.b64decode(png)), formats=["PNG"]) as found:
        if max(found.size) > LARGEST_SIDE:
            raise ValueError
        return np.asarray(found.convert("L" if found.mode == "L" else "RGB"), float)


def _png(text: object) -> str:
    try:
        picture = base64.b64decode(text if isinstance(text, str) else "", validate=True)
    except ValueError:
        return ""
    small = len(picture) <= LARGEST_PICTURE
    return base64.b64encode(picture).decode() if small and picture.startswith(PNG) else ""


Column = tuple[str, str, Strip]
"""The pictures of one network under its name, with a note."""


@dataclass(frozen=True)
class StripTable:
    """The pictures of one attack (Figure 7): networks side by side, one test image per row."""

    where: str
    columns: Sequence[Column]
    images: Sequence[str]
    left_out: int

    def first(self, image: str) -> tuple[Example, str]:
        """The image as the first network has it that does, and its class."""
        strip = next(strip for _, _, strip in self.columns if image in strip.by_id)
        return strip.by_id[image], strip.name(strip.by_id[image].label)


def of_pictures(pictures: Iterable[tuple[str, Any]]) -> tuple[list[StripTable], list[str]]:
    """The pictures of a section by their networks' names; notes on what is no such record."""
    groups, notes = dict[str, list[Column]](), []
    for name, record in pictures:
        try:
            strip = from_mapping(Strip, record, "examples: ")
        except UserError as error:
            notes.append(f"{name}: no pictures ({shown(str(error), 200)})")
        else:
            note = str(strip.series) if strip.method else ""
            groups.setdefault(strip.where, []).append((name, note, strip))
    return [_table(own, len(groups)) for own in groups.values()], notes


def of_runs(strips: Sequence[Strip]) -> list[StripTable]:
    """Per architecture and data set the attack that most networks share, a table for each eps;
    first seeds only.
    """
    groups: dict[tuple[str, str, str], dict[float, dict[Series, Strip]]] = {}
    for strip in sorted(strips, key=lambda item: item.seed):
        of_eps = groups.setdefault((strip.data, strip.model, strip.attack), {})
        of_eps.setdefault(strip.eps, {}).setdefault(strip.series, strip)
    largest: dict[tuple[str, str], dict[float, dict[Series, Strip]]] = {}
    for name in sorted(groups, key=lambda item: -max(map(len, groups[item].values()))):
        largest.setdefault(name[:2], groups[name])
    found = [own for of_eps in largest.values() for _, own in sorted(of_eps.items())]
    return [_table([_column(s) for s in _fitting([*own.values()])], len(found)) for own in found]


def _column(strip: Strip) -> Column:
    note = ", ".join(filter(None, [strip.series.family.shown_beta, f"seed {strip.seed}"]))
    return strip.series.short, note, strip


def _fitting(strips: Sequence[Strip]) -> list[Strip]:
    """Full precision and 4 bits first, as the paper's Figure 7, where not all columns fit."""
    ordered = sorted(strips, key=lambda s: (s.bits not in (None, 4), s.series.order))
    return sorted(ordered[:COLUMNS], key=lambda s: s.series.order) + ordered[COLUMNS:]


def _table(every: Sequence[Column], share: int) -> StripTable:
    """The first images that most networks have; `share` tables divide what a page may weigh."""
    columns = every[:COLUMNS]
    counts = Counter(image for *_, strip in columns for image in strip.by_id)
    images, size = [], 0
    for image, _ in counts.most_common(ROWS):
        found = [strip.by_id[image] for *_, strip in columns if image in strip.by_id]
        size += len(found[0].clean_png) + sum(len(example.adversarial_png) for example in found)
        if size > BYTES / share:
            break
        images.append(image)
    return StripTable(every[0][2].where, columns, images, len(every) - len(columns))
