"""Claims on error amplification: sections 1, 3 and 4, Figure 3. No torch."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from defquant.experiments.amplification import fig3_defended_cells, fig3a_cells, fig3b_cells
from defquant.experiments.cells import Cell
from defquant.experiments.claims.contrasts import Sample, Spread, trend
from defquant.experiments.claims.questions import Asked, Claim, Contrast, Question, Term
from defquant.experiments.scales import Scale
from defquant.experiments.words import bits_text

__all__ = ["CLAIMS"]

WITHIN = Spread(0.0, 1.0)  # all distances come from one network: its training plays no part
TOLD = "distances D, not accuracies"


def _rounding(scale: Scale) -> Iterator[Asked]:
    by_eps = {round(255 * cell.eps): cell for cell in fig3a_cells(scale)}
    small = _rounded(by_eps[1], sign=-1)
    yield Question("FGSM 1/255", f"D minus D rounded to 3 bits; {TOLD}", (small,))
    large = tuple(_rounded(by_eps[eps], sign=1) for eps in range(4, 9))
    yield Question("FGSM 4/255 to 8/255", f"D rounded to 3 bits minus D; {TOLD}", large)


def _rounded(cell: Cell, sign: int) -> Contrast:
    terms = [
        Term(weight, (cell,), partial(_sample, WITHIN, partial(_side, name)))
        for name, weight in (("quantized", sign), ("plain", -sign))
    ]
    return Contrast(f"eps {255 * cell.eps:.0f}/255", tuple(terms))


def _amplified(scale: Scale) -> Iterator[Asked]:
    cells = zip(scale.bits, fig3b_cells(scale), strict=True)
    read = partial(_sample, WITHIN, _layers)
    contrasts = [
        Contrast(bits_text(b), (Term(1.0, (cell,), read),), blind="either") for b, cell in cells
    ]
    what = f"line fitted to D over the layers, last minus first, at each bit width; {TOLD}"
    yield Question("FGSM 8/255", what, tuple(contrasts))


def _amplified_more(scale: Scale) -> Iterator[Asked]:
    cells = dict(zip(scale.bits, fig3b_cells(scale), strict=True))
    few = sorted((bits for bits in scale.bits if bits is not None), reverse=True)
    weights = zip(trend(len(few)), few, strict=True)
    terms = [Term(weight, (cells[bits],), _at_the_end) for weight, bits in weights if weight]
    what = f"line fitted to D at the last layer over bits, its value at 1 minus at 5; {TOLD}"
    yield Question("FGSM 8/255", what, (Contrast("trend", tuple(terms), blind="either"),))


def _amplified_less(scale: Scale) -> Iterator[Asked]:
    vanilla, dq = fig3_defended_cells(scale)
    terms = (Term(1.0, (vanilla,), _at_the_end), Term(-1.0, (dq,), _at_the_end))
    what = f"D at the last layer of the Wide ResNet at 4 bits, vanilla minus DQ; {TOLD}"
    yield Question("FGSM 8/255", what, (Contrast("4 bits", terms, blind="either"),))


def _sample(
    spread: Spread | None, pick: Callable[[Any], Sequence[Any]], value: Any
) -> Sample | None:
    """The only distance that `pick` finds, or last minus first of the line fitted to several.

    The variance is that of means over examples: sum w^2 spread^2 / examples.
    """
    found = pick(value)
    weights = trend(len(found)) if len(found) > 1 else (1.0,)
    if any(d["mean"] is None for d in found):
        return None
    pairs = list(zip(weights, found, strict=True))
    squares = [(w * d["spread"]) ** 2 / (d["examples"] - d["left_out"]) for w, d in pairs]
    return Sample(sum(w * d["mean"] for w, d in pairs), sum(squares), 1, spread)


def _side(name: str, value: Any) -> Sequence[Any]:
    return [value[name]]


def _layers(value: Any) -> Sequence[Any]:
    return [layer["distance"] for layer in value]


def _last(value: Any) -> Sequence[Any]:
    return _layers(value)[-1:]


_at_the_end = partial(_sample, None, _last)

CLAIMS = (
    Claim(
        "rounding-threshold",
        "sections 1 and 3, Figure 3a",
        "Activation quantization reduces the distance between clean and adversarial activations "
        "when eps is small, and enlarges it when eps is larger than 3.",
        "Figure 3a: a drawing; the threshold is 3",
        "fig3",
        _rounding,
        "Rounding widens small distances on average; it narrows them only where activations keep "
        "away from the thresholds.",
    ),
    Claim(
        "noise-amplified",
        "sections 1 and 3, Figure 3b",
        "The noise is amplified with the layer index.",
        "Figure 3b: a drawing",
        "fig3",
        _amplified,
        "Figure 3b's caption speaks of full-precision against low-precision activations, the "
        "text of clean against adversarial ones; this is the latter.",
    ),
    Claim(
        "fewer-bits-amplify",
        "section 3, Figure 3b",
        "The fewer bits in the quantized model, the more severe the amplification effect.",
        "Figure 3b: a drawing",
        "fig3",
        _amplified_more,
    ),
    Claim(
        "penalty-suppresses-noise",
        "section 4",
        "The regularization suppresses the noise amplification effect.",
        "no number",
        "fig3",
        _amplified_less,
    ),
)
