"""Error amplification: Figure 3."""

from defquant.experiments.cells import Cell, Network
from defquant.experiments.compose import section
from defquant.experiments.distances import (
    Layers,
    against_width,
    first_panel,
    first_table,
    first_words,
    growth,
    layers_panel,
    layers_table,
    lower_at,
    read_first,
    read_layers,
)
from defquant.experiments.scales import Scale, pixels
from defquant.experiments.section import Section
from defquant.experiments.standard import clean, vanilla
from defquant.experiments.store import Results
from defquant.experiments.words import bits_text, data_text, method_text, model_text, training_text

__all__ = ["fig3", "fig3_cells", "fig3_defended_cells", "fig3a_cells", "fig3b_cells"]

IMAGES = 128


def fig3a_cells(scale: Scale) -> list[Cell]:
    """After the first block of the full-precision Wide ResNet, FGSM at eps 1 to 8."""
    network = vanilla(scale, None)
    return [Cell(network, "first-block", "fgsm", eps, IMAGES) for eps in pixels(*range(1, 9))]


def fig3b_cells(scale: Scale) -> list[Cell]:
    """At every layer's input of vanilla VGGs of every bit width, FGSM at eps 8."""
    return [Cell(n, "layers", "fgsm", scale.paper_eps, IMAGES) for n in fig3b_networks(scale)]


def fig3b_networks(scale: Scale) -> list[Network]:
    return [scale.network(scale.vgg, bits=bits) for bits in scale.bits]


def fig3_cells(scale: Scale) -> list[Cell]:
    return fig3a_cells(scale) + fig3b_cells(scale) + fig3_defended_cells(scale)


def fig3_defended_cells(scale: Scale) -> list[Cell]:
    """Not in the paper: the layers of the Wide ResNet at 4 bits, vanilla and DQ."""
    networks = [vanilla(scale, 4), scale.network(bits=4, beta=scale.beta)]
    return [Cell(n, "layers", "fgsm", scale.paper_eps, IMAGES) for n in networks]


def fig3(scale: Scale, results: Results) -> Section:
    """(a) what rounding does after the first block, (b) D from layer to layer, and DQ's."""
    first = read_first(results, fig3a_cells(scale))
    widths = dict(zip(scale.bits, fig3b_cells(scale), strict=True))
    falling = sorted(widths, key=lambda bits: bits or 99, reverse=True)
    vgg = read_layers(results, {bits_text(bits): widths[bits] for bits in falling})
    names = [f"{method_text(beta)} at 4 bits" for beta in (0.0, scale.beta)]
    wrn = read_layers(results, dict(zip(names, fig3_defended_cells(scale), strict=True)))
    by_layer = {"(b) VGG-16": vgg, "Wide ResNet (not in the paper)": wrn}
    found = [(title, every) for title, every in by_layer.items() if any(every.values())]
    return section(
        "fig3",
        "Figure 3: error amplification",
        [*_about(scale, results), first_words(first), _vgg_words(vgg), _wrn_words(wrn)],
        fig3_cells(scale),
        results,
        images=(scale.data, "cifar10"),
        tables=[first_table(first), *(layers_table(*titled) for titled in found)],
        panels=[first_panel(first), *(layers_panel(*titled) for titled in found)],
    )


def _about(scale: Scale, results: Results) -> list[str]:
    named_by = [clean(scale, vanilla(scale, None))]  # distances do not carry the data's name
    data = data_text(scale.data, named_by, results)
    training = training_text(scale.train, scale.data, data)
    return [
        f"{model_text(scale.wrn)} and {model_text(scale.vgg)} (the paper: WRN-28-10 and VGG-16, "
        f"200 epochs), trained for {training}. FGSM on the first {IMAGES} test images, made on "
        "each network for itself: (a) at 1 to 8/255, (b) at 8/255. D is the normalised distance "
        "between clean and attacked activations, mean over the images.",
        "The paper: (a) rounding to 3 bits lowers D up to ε = 3/255 and raises it beyond; (b) D "
        "grows from layer to layer, the more the fewer the bits. Of (b) its caption says that "
        "full- and low-precision activations are compared, its section 3 that clean and attacked "
        "ones are, at each bit width: this follows section 3. For (a) its caption names VGG-16, "
        "its section 3 the Wide ResNet, as here.",
        "Rounding erases noise that stays within a cell of the grid and widens all other noise to "
        "a whole cell. Values spread evenly over their cells gain from that in the norm, most "
        "where the noise is small; only values that keep away from the edges of their cells, as "
        "zeros do, let D fall.",
    ]


def _vgg_words(vgg: Layers) -> str:
    words = [words for words in (growth(vgg), against_width(vgg)) if words]
    return f"Ours (b): {' '.join(words)}" if words else ""


def _wrn_words(wrn: Layers) -> str:
    vanilla_4, dq_4 = wrn
    words = [words for words in (growth(wrn), lower_at(wrn, dq_4, vanilla_4)) if words]
    return f"Wide ResNet at 4 bits: {' '.join(words)}" if words else ""
