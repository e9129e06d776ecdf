"""Claims on Defensive Quantization alone: section 5.1, Table 1, Figure 5. No torch.

"DQ" without a beta is that of the largest beta of Table 1, as in Figure 5.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise

from defquant.experiments.claims.evidence import Evidence, Row
from defquant.experiments.claims.quantization import losses
from defquant.experiments.claims.questions import Asked, Claim, Contrast, Question, less, versus
from defquant.experiments.claims.rows import Rows, Table, ask, black_box, table1, widths
from defquant.experiments.compose import Trial
from defquant.experiments.ranges import RANGES, table4_networks
from defquant.experiments.scales import Scale
from defquant.experiments.words import bits_text, listed, signed

__all__ = ["CLAIMS"]


def _betas(table: Table) -> list[float]:
    return sorted(beta for beta in table if beta > 0)


def _quantized(rows: Rows) -> list[Row]:
    return [rows[bits] for bits in widths(rows)]


def _alone(table: Table) -> Iterable[Contrast]:
    vanilla = table[0.0][None]
    return [versus(f"beta {b:g}", [table[b][None]], [vanilla]) for b in _betas(table)]


def _against_vanilla(table: Table) -> Iterable[Contrast]:
    dq, vanilla = table[max(table)], table[0.0]
    return [versus(bits_text(b), [dq[b]], [vanilla[b]]) for b in widths(dq)]


def _means_against_vanilla(table: Table) -> Iterable[Contrast]:
    vanilla = _quantized(table[0.0])
    return [versus(f"beta {b:g}", _quantized(table[b]), vanilla) for b in _betas(table)]


def _against_float(table: Table) -> Iterable[Contrast]:
    dq, vanilla = table[max(table)], table[0.0][None]
    return [versus(bits_text(b), [dq[b]], [vanilla]) for b in widths(dq)]


def _gains(table: Table) -> list[Contrast]:
    rows = {f"beta {beta:g}": table[beta] for beta in _betas(table)}
    return [versus(name, _quantized(row), [row[None]]) for name, row in rows.items()]


def _best_gains(evidence: Evidence, question: Question) -> str:
    """The paper's Quantize Gain of each contrast of `_gains`."""
    words = []
    for contrast in question.contrasts:
        samples = [term.sample(evidence) for term in contrast.terms]
        *quantized, full = [None if s is None else s.mean for s in samples]
        there = [mean for mean in quantized if mean is not None]
        if there and full is not None:
            words.append(f"{signed(max(there) - full)} at {contrast.name}")
    return f"best bits minus full precision, biased upward as a maximum: {listed(words)}"


def _gain_grows(table: Table) -> Iterable[Contrast]:
    gains = _gains(table)
    return [less("change", gains[-1], gains[0])]


def _grows(table: Table) -> Iterable[Contrast]:
    rows = {beta: list(table[beta].values()) for beta in _betas(table)}
    return [versus(f"beta {a:g} to {b:g}", rows[b], rows[a]) for a, b in pairwise(rows)]


def _few_bits(table: Table) -> Iterable[Contrast]:
    most, fewest = max(widths(table[0.0])), min(widths(table[0.0]))
    rows = {beta: table[beta] for beta in _betas(table)}
    return [versus(f"beta {b:g}", [r[fewest]], [r[most]]) for b, r in rows.items()]


def _vanilla_losses(table: Table) -> Iterable[Contrast]:
    return losses(table[0.0])


def _white_below_black(scale: Scale) -> Iterator[Asked]:
    """Both rows are of one network, whose training then moves both: the interval is too wide."""
    what = "DQ, black box minus white box, at full precision and each of 1 to 5 bits"
    for black in black_box(scale):
        through = table1(scale, black)[max(scale.table1_betas)]
        direct = table1(scale, Trial(scale, black.attack, black.eps))[max(scale.table1_betas)]
        contrasts = [
            versus(bits_text(b), [through[b]], [direct[b]], blind="any") for b in scale.bits
        ]
        yield Question(black.name, what, tuple(contrasts))


def _beats_vanilla(scale: Scale) -> Iterator[Asked]:
    yield from ask("DQ minus vanilla, at each of 1 to 5 bits", _against_vanilla)(scale)
    what = "DQ minus vanilla, means over 1 to 5 bits, at each beta of Table 1"
    yield from ask(what, _means_against_vanilla, suffix=", every beta")(scale)


def _clean(scale: Scale) -> Sequence[Trial]:
    return [Trial(scale)]


def _cleaner(scale: Scale) -> Iterator[Asked]:
    yield from ask("DQ minus vanilla, at each of 1 to 5 bits", _against_vanilla, _clean)(scale)
    rows = {key: (Trial(scale).cell(n),) for key, n in table4_networks(scale).items()}
    pairs = [versus(f"ReLU{h:g}", [rows[True, h]], [rows[False, h]]) for h in RANGES]
    what = "ResNet-18 at 4 bits, DQ minus vanilla, with ReLU1 and ReLU6"
    yield Question("clean, ResNet-18", what, tuple(pairs))


CLAIMS = (
    Claim(
        "penalty-alone",
        "section 5.1, Table 1",
        "Lipschitz regularization makes the model robust (full precision).",
        "vanilla 39.3%; beta 3e-4 41.8, 6e-4 45.7, 1e-3 49.1",
        "table1",
        ask("full precision, DQ minus vanilla, at each beta of Table 1", _alone),
    ),
    Claim(
        "dq-above-vanilla",
        "abstract, section 5.1, Table 1",
        "DQ fixes the robustness drop: it is more robust than vanilla quantization.",
        "1 to 5 bits: vanilla 9.0 to 30.2%, DQ 39.3 to 43.2 at beta 3e-4, 49.8 to 51.8 at 1e-3",
        "table1",
        _beats_vanilla,
    ),
    Claim(
        "dq-above-float",
        "abstract, Table 1",
        "DQ quantized models are more robust than the (conventional) full-precision model.",
        "full precision 39.3%; DQ at beta 1e-3 and 1 to 5 bits 51.3, 50.4, 51.3, 49.8, 51.8",
        "table1",
        ask("DQ at each of 1 to 5 bits minus full precision without DQ", _against_float),
    ),
    Claim(
        "quantize-gain",
        "abstract, section 5.1, Table 1",
        "With DQ, the quantized models have better robustness than their own full-precision "
        "counterparts: regularization and quantization make the model even more robust.",
        "Quantize Gain +1.4 at beta 3e-4, +2.6 at 6e-4, +2.7 at 1e-3",
        "table1",
        ask(
            "DQ, mean over 1 to 5 bits minus full precision, at each beta of Table 1",
            _gains,
            extra=_best_gains,
        ),
        "Quantize Gain takes the best of five bit widths, chosen on the test images. The means of "
        "Table 1 over bits give -1.1, 0.0 and +1.8.",
    ),
    Claim(
        "gain-grows",
        "Table 1",
        "The gain from quantization compared to the full-precision model improves with beta.",
        "+1.4 at beta 3e-4, +2.6 at 6e-4, +2.7 at 1e-3",
        "table1",
        ask(
            "mean over 1 to 5 bits minus full precision, at the largest beta minus the same at the "
            "smallest",
            _gain_grows,
        ),
    ),
    Claim(
        "grows-with-beta",
        "section 5.1, Table 1",
        "The robustness generally increases as beta gets larger.",
        "means of the six columns: 40.9% at beta 3e-4, 45.7 at 6e-4, 50.6 at 1e-3",
        "table1",
        ask("mean over full precision and 1 to 5 bits, from each beta to the next", _grows),
    ),
    Claim(
        "fewer-bits-better",
        "section 5.1, Table 1",
        "With DQ the robustness is better when the number of bits is small.",
        "1 bit minus 5 bits: +3.9 at beta 3e-4, +3.7 at 6e-4, -0.5 at 1e-3",
        "table1",
        ask("DQ, 1 bit minus 5 bits, at each beta of Table 1", _few_bits),
        "Table 1 is not monotone: at beta 1e-3 5 bits are best, at 6e-4 5 bits are above 3 and 4.",
    ),
    Claim(
        "dq-clean",
        "abstract, section 5.3, Tables 1 and 4",
        "As a by-product, DQ improves the accuracy of quantized models without attack.",
        "1 to 5 bits: vanilla 42.0, 84.9, 92.8, 93.9, 94.7%, DQ at beta 1e-3 95.8, 95.6, 95.6, "
        "95.8, 95.8; ResNet at 4 bits: +1.65 with ReLU1, +0.68 with ReLU6",
        "table1 table4",
        _cleaner,
    ),
    Claim(
        "vanilla-black-box",
        "section 5.1, Figure 5",
        "Vanilla quantization leads to inferior black-box robustness.",
        "Figure 5: a drawing",
        "fig5",
        ask("full precision minus vanilla, at each of 1 to 5 bits", _vanilla_losses, black_box),
    ),
    Claim(
        "dq-black-box",
        "section 5.1, Figure 5",
        "DQ improves the black-box robustness of quantized models.",
        "Figure 5: a drawing",
        "fig5",
        ask("DQ minus vanilla, at each of 1 to 5 bits", _against_vanilla, black_box),
    ),
    Claim(
        "no-masking",
        "sections 5.1 and 5.2, Figure 5",
        "DQ does not suffer from gradient masking: the black box is not the stronger attack.",
        "Figure 5: a drawing",
        "fig5 table1",
        _white_below_black,
        "In Table 3, Normal + DQ at eps 16 keeps 42% under white-box FGSM and 40 under black-box "
        "FGSM: by this rule a sign of masking.",
    ),
)
