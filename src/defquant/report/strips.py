"""Example pictures side by side (Figure 7), of runs and of sections."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from defquant.report.names import Series, eps_text
from defquant.report.sources import BROKEN, Strip, read_strip

__all__ = ["Column", "StripTable", "of_pictures", "of_runs"]

ROWS = 8
COLUMNS = 8
BYTES = 350_000
UNKNOWN = {"method": "", "model": "", "data": "", "seed": 0, "attack": "", "eps": 0.0}


@dataclass(frozen=True)
class Column:
    """The pictures of one network under its name; `css` is the class of its colour."""

    name: str
    note: str
    css: str
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
            columns.append(Column(name, note, "", strip))
        except BROKEN as error:
            notes.append(f"{name}: no pictures ({type(error).__name__})")
    groups: dict[str, list[Column]] = {}
    for column in columns:
        groups.setdefault(_where(column.strip), []).append(column)
    return [_table(where, own, len(groups)) for where, own in groups.items()], notes


def of_runs(strips: Sequence[Strip], classes: Mapping[Series, str]) -> list[StripTable]:
    """Per architecture and data set the attack that most networks share, first seeds only."""
    groups: dict[tuple[str, str, str, float], dict[Series, Strip]] = {}
    for strip in sorted(strips, key=lambda item: item.seed):
        name = (strip.data, strip.model, strip.attack, strip.eps)
        groups.setdefault(name, {}).setdefault(strip.series, strip)
    largest: dict[tuple[str, str], tuple[str, str, str, float]] = {}
    for name in sorted(groups, key=lambda item: -len(groups[item])):
        largest.setdefault(name[:2], name)
    found = [_columns(list(groups[name].values()), classes) for name in largest.values()]
    return [_table(_where(columns[0].strip), columns, len(found)) for columns in found]


def _columns(strips: Sequence[Strip], classes: Mapping[Series, str]) -> list[Column]:
    """Full precision and 4 bits first, as the paper's Figure 7, where not all columns fit."""
    ordered = sorted(strips, key=lambda s: (s.series.bits not in (None, 4), s.series.order))
    shown = sorted(ordered[:COLUMNS], key=lambda s: s.series.order)
    rest = [strip for strip in ordered if strip not in shown]
    return [
        Column(strip.series.short, _note(strip), classes[strip.series], strip)
        for strip in (*shown, *rest)
    ]


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
