"""Numbers and settings in words, for the text of sections: computed, short and neutral."""

from collections.abc import Iterable, Sequence

from defquant.config import DataConfig, TrainConfig
from defquant.experiments.cells import Cell
from defquant.experiments.scales import Scale
from defquant.experiments.section import Number
from defquant.experiments.store import Results

__all__ = [
    "CLEARLY",
    "UNTRAINED",
    "adversary_text",
    "against",
    "amount",
    "apart",
    "attack_text",
    "attacks_text",
    "bits_text",
    "blind",
    "data_text",
    "epochs_text",
    "eps_text",
    "images_text",
    "listed",
    "method_text",
    "model_text",
    "percent",
    "place",
    "setting",
    "signed",
    "tally",
    "training_text",
    "untrained",
]  # fmt: skip

Pair = tuple[Number, Number]

_DATA = {"cifar10": "CIFAR-10", "svhn": "SVHN", "digits": "handwritten digits"}
_ATTACKS = {"random": "Random", "fgsm": "FGSM", "rfgsm": "R+FGSM"}


def percent(fraction: float) -> str:
    """`39.2%`."""
    return f"{100 * fraction:.1f}%"


def amount(fraction: float) -> str:
    """Points without a sign: `4.5`."""
    return f"{abs(100 * fraction):.1f}"


def signed(fraction: float) -> str:
    """Points: `+1.4`, `−9.1`."""
    text = f"{100 * fraction:+.1f}"
    return "0.0" if text in ("+0.0", "-0.0") else text.replace("-", "−")


def listed(words: Iterable[object]) -> str:
    """`a`, `a and b`, `a, b and c`; `none` for nothing."""
    *most, last = [str(word) for word in words] or ["none"]
    return f"{', '.join(most)} and {last}" if most else last


def eps_text(eps: float) -> str:
    """`8/255` for 0.03137."""
    return f"{255 * eps:.3g}/255"


def attack_text(attack: str) -> str:
    """As the report has it: `FGSM`, `R+FGSM`, `PGD-50x10`, `Adaptive`."""
    shown = _ATTACKS.get(attack, attack.replace("pgd", "PGD"))
    return shown[:1].upper() + shown[1:]


def place(bits: int | None) -> str:
    """On the axis of bits: `4`, or `full`."""
    return "full" if bits is None else str(bits)


def bits_text(bits: int | None) -> str:
    """`4 bits`, `1 bit`, `full precision`."""
    return "full precision" if bits is None else f"{bits} bit{'s' * (bits > 1)}"


def method_text(beta: float) -> str:
    """`vanilla`, or `DQ (β = 0.1)`."""
    return f"DQ (β = {beta:g})" if beta else "vanilla"


def model_text(model: str) -> str:
    """`WRN-10-1`; `VGG-16 at 0.25 of its width` for `vgg-16x0.25`."""
    name, _, width = model.partition("x")
    shown = name.upper().replace("RESNET", "ResNet")
    return f"{shown} at {width} of its width" if width else shown


def images_text(images: int | None) -> str:
    """How many test images: `all test images`, `the first 1,000 test images`."""
    return "all test images" if images is None else f"the first {images:,} test images"


def data_text(data: DataConfig, cells: Iterable[Cell] = (), results: Results | None = None) -> str:
    """The images by the name under which they were measured, else by that of the data set."""
    test = (cell for cell in cells if cell.split == "test")
    found = {m.data for c in test if results and (m := results.score(c)) is not None}
    return listed(sorted(found)) if found else _DATA.get(data.data, data.data)


def epochs_text(train: TrainConfig) -> str:
    return f"{train.epochs} epoch{'s' * (train.epochs > 1)}"


def training_text(train: TrainConfig, data: DataConfig, name: str) -> str:
    """`5 epochs on 20,000 training images of CIFAR-10`."""
    count = "all" if data.train_images is None else f"{data.train_images:,}"
    held = f" but {data.validation_images:,}" * (count == "all" and data.validation_images > 0)
    return f"{epochs_text(train)} on {count}{held} training images of {name}"


def setting(
    networks: str,
    paper: str,
    train: TrainConfig,
    data: DataConfig,
    cells: Sequence[Cell],
    results: Results,
    *,
    seeds: int = 1,
) -> str:
    """The first sentence of most sections: networks, those of the `paper`, training and images."""
    theirs = f" (the paper: {paper})" if paper else ""
    means = f"; means of {seeds} trainings" * (seeds > 1)
    training = training_text(train, data, data_text(data, cells, results))
    return f"{networks}{theirs}, trained for {training}{means}. "


def attacks_text(scale: Scale, *names: str, long: Sequence[str] = (), strong: bool = True) -> str:
    """The one-step attacks on many images, the `long` and the strong on few, with their radii."""
    groups = ((names, scale.many), (long, scale.few))
    eps = _radii(scale.eps)
    parts = [f"{listed(g)} at {eps} on {images_text(count)}" for g, count in groups if g]
    if strong:
        hard = f"{listed(map(attack_text, scale.strong))} at {_radii(scale.hard_eps)}"
        parts.append(f"{hard} on {images_text(scale.few)}")
    return "; ".join(parts) + "."


def adversary_text(train: TrainConfig) -> str:
    """On which images an adversarial training trains: `R+FGSM images of ε = 8/255`."""
    sigma = 255 * train.attack_sigma
    drawn = f"ε = clip(|N(0, {sigma:g})|, 0, {2 * sigma:g})/255"
    eps = drawn if train.attack_eps is None else f"ε = {eps_text(train.attack_eps)}"
    return f"{attack_text(train.attack)} images of {eps}"


def _radii(eps: Sequence[float]) -> str:
    return listed(f"{255 * radius:.3g}" for radius in eps) + "/255"


def against(gaps: Sequence[float]) -> str:
    """Where numbers lie: `1.2 to 4.5 points below`, `between 1.2 points below and 3.0 above`."""
    low, high = (round(100 * gap, 1) for gap in (min(gaps), max(gaps)))
    if low == high == 0:
        return "level with"
    if low < 0 < high:
        return f"between {-low:.1f} points below and {high:.1f} above"
    near, far = sorted((abs(low), abs(high)))
    span = f"{far:.1f}" if near == far else f"{near:.1f} to {far:.1f}"
    return f"{span} points {'below' if low < 0 else 'above'}"


def apart(a: Number, b: Number) -> bool:
    """Whether the 95 % intervals are disjoint and the gap exceeds both spreads over seeds.

    With one seed this says nothing of the chance in training.
    """
    if a.mean is None or b.mean is None or a.low is None or b.low is None:
        return False
    disjoint = a.low > (b.high or 0.0) or b.low > (a.high or 0.0)
    return disjoint and abs(a.mean - b.mean) > a.spread + b.spread


def tally(pairs: Iterable[Pair]) -> str:
    """How often the first is above the second: `above at 5 of 6 (4 clearly), below at 1 (0
    clearly)`; empty where no pair is whole. `CLEARLY` says what that means.
    """
    there = [(a, b, a.mean - b.mean) for a, b in pairs if a.mean is not None and b.mean is not None]
    above = [apart(a, b) for a, b, gap in there if gap > 0]
    below = [apart(a, b) for a, b, gap in there if gap < 0]
    words = f"above at {len(above)} of {len(there)}{_clearly(above)}, below at {len(below)}"
    return words + _clearly(below) if there else ""


CLEARLY = (
    "“Clearly” means that the 95% intervals over the test images are apart and the gap is larger "
    "than the spreads over seeds together; for networks of one seed each it says nothing of the "
    "chance in training."
)


def _clearly(found: Sequence[bool]) -> str:
    return f" ({sum(found)} clearly)" if found else ""


UNTRAINED = 0.2  # clean accuracy: twice that of a guess among ten classes


def blind(numbers: Iterable[tuple[str, Number]]) -> str:
    """A sentence on networks whose gradients vanish; empty where none do."""
    found: dict[str, float] = {}
    for name, entry in numbers:
        if entry.masked:
            found[name] = max(found.get(name, 0.0), entry.vanishing)
    if not found:
        return ""
    shares = listed(f"{name} ({percent(share)})" for name, share in found.items())
    return (
        "The loss gradient is exactly zero on over 1% of the rightly classified images of "
        f"{shares}: what gradient attacks leave there is masked, not robust."
    )


def untrained(numbers: Iterable[tuple[str, Number]]) -> str:
    """A sentence on networks by their clean accuracy; empty where all have learnt something."""
    found = [name for name, n in numbers if n.mean is not None and n.mean < UNTRAINED]
    if not found:
        return ""
    return (
        f"{listed(found)}: clean accuracy below {percent(UNTRAINED)}, hardly trained. What such a "
        "network keeps under attack is what it answers to any image; it says nothing of robustness."
    )
