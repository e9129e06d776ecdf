"""Claims on the masking of other methods: appendix A, Tables 5 and 6. No torch."""

from collections.abc import Iterator
from dataclasses import replace

from defquant.experiments.claims.questions import MARGIN, Asked, Claim, Question, versus
from defquant.experiments.claims.rows import black_box
from defquant.experiments.compose import Trial, strong_trials
from defquant.experiments.masking import MADRY, table5_networks, table5_substitute, table6_networks
from defquant.experiments.scales import Scale

__all__ = ["CLAIMS"]


def _madry(scale: Scale) -> list[Trial]:
    """Table 5's black box through its own, PGD-trained substitute."""
    through = table5_substitute(scale)
    radii = dict.fromkeys((scale.paper_eps, scale.hard_eps[0]))
    return [Trial(scale, MADRY, eps, through) for eps in radii]


def _direct(trial: Trial) -> Trial:
    """The same attack as a white box."""
    return replace(trial, through=None)


def _tanh_masks(scale: Scale) -> Iterator[Asked]:
    networks = table5_networks(scale)
    tanh, full = networks["Tanh Quantized"], networks["Full-Precision"]
    boxes = [(_direct(black), black) for black in _madry(scale)]
    boxes += [(hard, replace(boxes[0][1], eps=hard.eps)) for hard in strong_trials(scale)]
    for white, black in boxes:
        ours = [(white.cell(tanh),)]
        above = versus("tanh", ours, [(black.cell(tanh),)], blind="none")
        yield Question(
            f"{white.name}, against the black box", "tanh, white minus black box", (above,)
        )
        gain = versus("tanh", ours, [(white.cell(full),)], blind="none")
        what = "white box, tanh minus full precision"
        yield Question(f"{white.name}, against full precision", what, (gain,))


def _tanh_worse(scale: Scale) -> Iterator[Asked]:
    networks = table5_networks(scale)
    for trial in _madry(scale):
        full, tanh = ((trial.cell(networks[n]),) for n in ("Full-Precision", "Tanh Quantized"))
        contrast = versus("tanh", [full], [tanh])
        yield Question(trial.name, "black box, full precision minus tanh", (contrast,))


def _relu6_no_gain(scale: Scale) -> Iterator[Asked]:
    networks = table5_networks(scale)
    through = _madry(scale)
    for trial in [*map(_direct, through), *through, *strong_trials(scale)]:
        full, relu6 = ((trial.cell(networks[n]),) for n in ("Full-Precision", "ReLU6 Quantized"))
        contrast = versus("ReLU6", [full], [relu6], margin=MARGIN)
        yield Question(trial.name, "full precision minus ReLU6 at 2 bits", (contrast,))


def _fgsm_masks(scale: Scale) -> Iterator[Asked]:
    network = table6_networks(scale)["Adversarial FGSM"]
    for black in black_box(scale):
        white = _direct(black)
        pair = versus("FGSM", [(white.cell(network),)], [(black.cell(network),)], blind="none")
        yield Question(white.name, "after FGSM training, white minus black box", (pair,))


def _rfgsm_fixes(scale: Scale) -> Iterator[Asked]:
    networks = table6_networks(scale)
    fgsm, rfgsm = networks["Adversarial FGSM"], networks["Adversarial R+FGSM"]
    for black in black_box(scale):
        white = _direct(black)
        pair = versus("box", [(black.cell(rfgsm),)], [(white.cell(rfgsm),)], blind="any")
        yield Question(white.name, "after R+FGSM training, black minus white box", (pair,))
    for trial in [*black_box(scale), *strong_trials(scale)]:
        pair = versus("training", [(trial.cell(rfgsm),)], [(trial.cell(fgsm),)])
        yield Question(trial.name, "R+FGSM training minus FGSM training", (pair,))


CLAIMS = (
    Claim(
        "tanh-masks",
        "section 2.1, appendix A.1, Table 5",
        "Tanh quantization masks gradients: it keeps more accuracy in the white box than in the "
        "black box, and than full precision in the white box.",
        "tanh 71.03% white box, 61.57 black box; full precision 50.51 white box",
        "table5",
        _tanh_masks,
        "The text speaks of a black-box success rate below the white box's; Table 5 has it the "
        "other way round.",
    ),
    Claim(
        "tanh-worse",
        "section 2.1, appendix A.1, Table 5",
        "Under the black box, tanh quantization is worse than full precision.",
        "61.57% against 65.58",
        "table5",
        _tanh_worse,
    ),
    Claim(
        "relu6-no-gain",
        "appendix A.1, Table 5",
        "After PGD training, ReLU6 quantization brings no improvement in robustness.",
        "white box 48.90% against 50.51, black box 59.44 against 65.58",
        "table5",
        _relu6_no_gain,
    ),
    Claim(
        "fgsm-training-masks",
        "appendix A.2, Table 6",
        "Adversarial FGSM training leads to gradient masking: the white box is the weaker attack.",
        "94.18% white box, 51.65 black box",
        "table6",
        _fgsm_masks,
        "51.65 stands in two cells of Table 6.",
    ),
    Claim(
        "rfgsm-training-fixes",
        "appendix A.2, Table 6",
        "R+FGSM training fixes it: the white box is the stronger attack again, and more is left "
        "under the black box than after FGSM training.",
        "R+FGSM: 51.65% white box, 87.39 black box; FGSM: 51.65 black box",
        "table6",
        _rfgsm_fixes,
        "51.65 stands in two cells of Table 6.",
    ),
)
