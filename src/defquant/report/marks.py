"""What a verdict on a page rests on, in three words: evidence, masked gradients, what ships."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from defquant.paper.section import eps_text
from defquant.records import BLACK
from defquant.report.names import Cell
from defquant.report.sources import Diagnosis

__all__ = ["UNASKED", "UNSHIPPED", "Kind", "Mark", "masking", "missing", "strength"]

Kind = Literal["right", "wrong", "open"]
SIGNS: Mapping[str, tuple[str, Kind]] = {  # of a diagnosis, from the best to the worst
    "PASS": ("no sign", "right"),
    "WARN": ("signs", "open"),
    "OVERSTATED": ("overstated", "wrong"),
    "FAIL": ("masked", "wrong"),
}


@dataclass(frozen=True)
class Mark:
    """One side of the evidence in a word, and what it rests on."""

    name: str
    word: str
    kind: Kind
    text: str


UNASKED = Mark("Masked gradients", "not asked", "open", "defquant diagnose RUN answers")
UNSHIPPED = Mark("What ships", "not exported", "open", "defquant export RUN FILE.onnx measures it")


def strength(cell: Cell) -> Mark:
    """Strong: 5 seeds or more on 400 images or more; fair: 2 seeds or more."""
    seeds = len(set(cell.seeds))
    strong = seeds >= 5 and cell.n.images >= 400
    word, kind = ("strong", "right") if strong else ("fair" if seeds > 1 else "weak", "open")
    text = f"{seeds} seed{'s' * (seeds > 1)}, {cell.n.images:,} images"
    return Mark("Evidence", word, kind, text)  # type: ignore[arg-type]


def masking(cell: Cell, diagnoses: Mapping[str, Diagnosis]) -> Mark:
    """The worst of the diagnoses; or that the attack was blind."""
    order = list(SIGNS)
    if cell.n.masked:
        share = f"no gradient on {cell.vanishing:.1%} of the right images"
        return Mark(UNASKED.name, "masked", "wrong", share)
    known = [(order.index(d.verdict), run, d) for run, d in diagnoses.items() if d.verdict in SIGNS]
    if not known:
        return UNASKED
    _, run, worst = max(known, key=lambda own: own[0])
    about = f"{worst.verdict} of {run} at {eps_text(worst.eps)}, {worst.images:,} images"
    return Mark(UNASKED.name, *SIGNS[worst.verdict], about)


def missing(attacks: Sequence[str], marks: Sequence[Mark], cell: Cell) -> list[str]:
    def any_of(*starts: str) -> bool:
        return any(a.startswith(starts) for a in attacks)

    absent = {
        "an attack made for quantised networks (adaptive)": not any_of("Adaptive", "Standard"),
        "a black box (square, --substitute)":
        not (any_of("Square", "Standard") or any(a.endswith(BLACK) for a in attacks)),
        "other seeds": len(cell.seeds) == 1,
        "masked gradients (diagnose)": UNASKED in marks,
        "what ships (export)": UNSHIPPED in marks,
    }  # fmt: skip
    return [what for what, is_so in absent.items() if is_so]
