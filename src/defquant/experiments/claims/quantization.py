"""Claims on conventional quantisation: section 3, Figure 1, vanilla of Table 1. No torch."""

from collections.abc import Iterable, Iterator

from defquant.experiments.claims.questions import (
    MARGIN,
    Asked,
    Claim,
    Contrast,
    Question,
    fitted,
    versus,
)
from defquant.experiments.claims.rows import Rows, Table, ask, table1, vgg, white_box, widths
from defquant.experiments.compose import Trial
from defquant.experiments.scales import Scale
from defquant.experiments.words import bits_text

__all__ = ["CLAIMS", "losses"]


def losses(rows: Rows) -> Iterable[Contrast]:
    """Full precision minus quantised, at each bit width."""
    return [versus(bits_text(bits), [rows[None]], [rows[bits]]) for bits in widths(rows)]


def _clean_kept(scale: Scale) -> Iterator[Asked]:
    clean = Trial(scale)
    rows = {"Wide ResNet": table1(scale, clean)[0.0], "VGG-16": vgg(scale, clean)}
    for bits in (5, 4):
        contrasts = [versus(n, [r[bits]], [r[None]], margin=MARGIN) for n, r in rows.items()]
        what = f"vanilla at {bits} bits minus full precision"
        yield Question(f"clean, {bits} bits", what, tuple(contrasts))


def _losses(table: Table) -> Iterable[Contrast]:
    return losses(table[0.0])


def _less_robust(scale: Scale) -> Iterator[Asked]:
    what = "full precision minus vanilla, at each of 1 to 5 bits"
    yield from ask(what, _losses)(scale)
    trial = white_box(scale)[0]
    yield Question(f"{trial.name}, VGG-16", what, tuple(losses(vgg(scale, trial))))


def _trend(table: Table) -> Iterable[Contrast]:
    return [fitted("trend", [table[0.0][bits] for bits in widths(table[0.0])])]


CLAIMS = (
    Claim(
        "clean-kept",
        "section 3, Figure 1a",
        "Quantization preserves the accuracy till 4-5 bits on clean images.",
        "Wide ResNet: full precision 94.8%, 5 bits 94.7, 4 bits 93.9",
        "fig1 table1",
        _clean_kept,
        "The caption of Figure 1 says from 5 bits on, section 3 not significantly until 4 bits.",
    ),
    Claim(
        "vanilla-less-robust",
        "abstract, section 3, Figure 1b, Table 1",
        "Conventional quantized models are less robust than full precision, even at 5 bits.",
        "Wide ResNet: full precision 39.3%, 1 to 5 bits 9.0, 8.5, 14.1, 19.0, 30.2; "
        "VGG-16 loses 25.3 points at 5 bits",
        "fig1 table1",
        _less_robust,
        "Section 3 says that the Wide ResNet loses 9.2 points at 5 bits, Table 1 has 9.1.",
    ),
    Claim(
        "fewer-bits-worse",
        "section 5.1, Table 1",
        "Vanilla: the adversarial robustness increases with the number of bits.",
        "1 to 5 bits: 9.0, 8.5, 14.1, 19.0, 30.2%",
        "table1",
        ask("line fitted to vanilla over 1 to 5 bits, its value at 5 minus at 1", _trend),
    ),
)
