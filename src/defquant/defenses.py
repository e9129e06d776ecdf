"""What feature squeezing faces and what it detects (Xu et al. 2017): `Unaware` and `Detector`.

The squeezing itself is `defquant.models.squeezing`; its names can be imported from here, too.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from defquant.attacks import FirstOrder, untouched
from defquant.attacks.compose import Elsewhere
from defquant.attacks.contract import Draws, Ids, Target, attacked, made_by
from defquant.checkpoint import Facts, stamp
from defquant.data import Dataset, as_labels, in_unit, to_unit
from defquant.errors import UserError
from defquant.evaluate import correct
from defquant.files import write_json
from defquant.measure import about, subject_of
from defquant.models.squeezing import (
    FeatureSqueezing,
    check_images,
    median_2x2,
    reduce_depth,
    squeeze,
)
from defquant.records import UNAWARE, Score

__all__ = [
    "CALIBRATION", "Detection", "Detector", "FeatureSqueezing", "Squeezer", "Unaware", "detect",
    "detection", "median_2x2", "reduce_depth", "squeeze", "squeezing_distance",
]  # fmt: skip

CALIBRATION = 1000  # training images on which the threshold of `detection` is fitted
RATE = 0.05  # of them, flagged at most

Squeezer = Callable[[Tensor], Tensor]
"""Images (n, c, h, w) in [0, 1] to images of the same shape and range."""


@dataclass(frozen=True)
class Unaware(Elsewhere):
    """`attack` on the network inside a `FeatureSqueezing`, by someone who ignores the squeezing.

    Standing up to it shows little: print the score of `attack` itself beside it. As in `Transfer`,
    the last iterate is used.
    """

    where: ClassVar[str] = UNAWARE

    def made(self, model: nn.Module, x: Tensor, y: Tensor, draws: Draws, ids: Ids) -> Tensor:
        """Raises `UserError` where `model` is no `FeatureSqueezing`."""
        if not isinstance(model, FeatureSqueezing):
            found = type(model).__name__
            raise UserError(f"Unaware attacks a FeatureSqueezing; found {found}: drop Unaware")
        return made_by(self.attack, model.model, x, y, generator=draws, ids=ids, last=True)


def squeezing_distance(
    model: nn.Module,
    x: Tensor,
    squeezers: Sequence[Squeezer] = (reduce_depth, median_2x2),
    batch_size: int = 256,
) -> Tensor:
    """How far squeezing moves the answer: max over s of ||p(x) - p(s(x))||_1 (Xu et al. 2017).

    p is the softmax of `model`, the bare network, which is left as it was found. `x` is images
    (n, c, h, w), float in [0, 1] or uint8, on its device. Returns (n,) in [0, 2], inf where the
    model returns NaN. Raises `UserError` for no squeezer, no images or others than these.
    """
    plain, squeezed = _answers(model, x, squeezers, batch_size)
    return (squeezed - plain).abs().sum(2).amax(0).nan_to_num(torch.inf)


@dataclass(frozen=True)
class Detection:
    """Images flagged, of the adversarial (None where none was left to count) and of the clean."""

    detected: Score | None
    false_positives: Score


@dataclass(frozen=True)
class Detector:
    """Tells adversarial images from clean ones by what squeezing does to the model's answer.

    Attributes:
        rule: `distance`: `squeezing_distance` above the threshold (Xu et al. 2017); `prediction`:
            a squeezed image changes class, with `(squeeze,)` as in section 2.2.2 of the paper.
        squeezers: one or more.
        threshold: of the distance, as `fit` chose it.
    """

    rule: Literal["distance", "prediction"] = "distance"
    squeezers: tuple[Squeezer, ...] = (reduce_depth, median_2x2)
    threshold: float | None = None

    def fit(
        self,
        model: nn.Module,
        clean: Tensor,
        false_positive_rate: float = 0.05,
        batch_size: int = 256,
    ) -> "Detector":
        """The same with the lowest threshold that flags at most this share of `clean`.

        Measure its rates on other images. Raises `UserError` for the rule `prediction`, a rate
        outside [0, 1), or what `squeezing_distance` refuses.
        """
        if self.rule == "prediction":
            raise UserError("the rule `prediction` has no threshold to fit: use it as it is")
        if not 0 <= false_positive_rate < 1:
            raise UserError(f"a false positive rate lies in [0, 1); found {false_positive_rate:g}")
        distance = squeezing_distance(model, clean, self.squeezers, batch_size)
        flagged = math.floor(false_positive_rate * len(distance))
        return replace(self, threshold=float(distance.topk(flagged + 1).values[-1]))

    def flags(self, model: nn.Module, x: Tensor, batch_size: int = 256) -> Tensor:
        """Which images it takes for adversarial: bool (n,). Raises `UserError` before `fit`."""
        if self.rule == "prediction":
            plain, squeezed = _answers(model, x, self.squeezers, batch_size)
            return (squeezed.argmax(2) != plain.argmax(1)).any(0)
        if self.threshold is None:
            raise UserError("the detector has no threshold yet: call fit with clean images first")
        return squeezing_distance(model, x, self.squeezers, batch_size) > self.threshold

    def rates(
        self,
        model: nn.Module,
        clean: Tensor,
        adversarial: Tensor,
        labels: Tensor | None = None,
        batch_size: int = 256,
    ) -> Detection:
        """Detection rate on `adversarial` and false positives on `clean`, images (n, c, h, w).

        With the true `labels` (n,) only those adversarial images count that fool the model (Xu et
        al. 2017). The rate holds for the attack that made them: one that knows the detector may
        evade it (He et al. 2017). Raises `UserError` as `flags` does.
        """
        flags, false = (self.flags(model, x, batch_size) for x in (adversarial, clean))
        if labels is not None:
            taken_for = _probabilities(model, adversarial, batch_size).argmax(1)
            flags = flags[taken_for != as_labels(labels, len(adversarial)).to(flags.device)]
        detected = Score.of(flags) if len(flags) else None
        return Detection(detected, Score.of(false))


def _answers(
    model: nn.Module, x: Tensor, squeezers: Sequence[Squeezer], batch_size: int
) -> tuple[Tensor, Tensor]:
    """Probabilities (n, classes) on the images, and (squeezers, n, classes) on squeezed ones."""
    if not squeezers or len(x) == 0:
        raise UserError(f"detection needs squeezers and images; found {len(squeezers)}, {len(x)}")
    check_images(to_unit(x[:1]))
    squeezed = [_probabilities(model, x, batch_size, squeezer) for squeezer in squeezers]
    return _probabilities(model, x, batch_size), torch.stack(squeezed)


def _probabilities(
    model: nn.Module, x: Tensor, batch_size: int, squeezer: Squeezer = lambda x: x
) -> Tensor:
    x = in_unit(x)
    with untouched(model), torch.no_grad():
        logits = [model(squeezer(to_unit(part))) for part in x.split(batch_size)]
    return torch.cat(logits).float().softmax(1)


def detection(
    model: nn.Module,
    data: Dataset,
    calibration: Dataset,
    attack: FirstOrder,
    *,
    seed: int = 0,
    batch_size: int = 256,
) -> Detection:
    """What a `Detector` flags of the images that `attack` makes of `data`, and of `data` itself.

    The detector is Xu et al.'s: the larger of the two distances ||p(x) - p(s(x))||_1, s the depth
    of 5 bits and the 2x2 median, above the lowest threshold that flags at most 5 % of the clean
    images of `calibration`, others than those of `data`. The attack, whose best iterates are taken
    and whose draws belong to an image's place in `data`, does not know of it: an adaptive one may
    evade it. Of a `FeatureSqueezing` the network inside is attacked and watched: the detector
    squeezes the images itself. The model is left as it was found.

    Returns:
        `detected` of the images that the network had right and the attack got wrong (Xu et al.
        count so), `false_positives` of all clean images.
    """
    network = model.model if isinstance(model, FeatureSqueezing) else model
    device = next(network.parameters(), data.images).device
    data = data.to(device)
    detector = Detector().fit(network, calibration.to(device).images, RATE, batch_size)
    target = Target(network, data.images, data.labels, seed, batch_size)
    made = partial(attack.made, network, seed=seed)  # the draws of `evaluate.robust`
    images = torch.cat([part for _, part in attacked(made, target)])
    with untouched(network):
        right = correct(network, data, batch_size=batch_size)
    if not right.any():
        flagged = detector.flags(network, data.images, batch_size)
        return Detection(None, Score.of(flagged))
    return detector.rates(network, data.images, images[right], data.labels[right], batch_size)


def detect(
    run: Path,
    model: nn.Module,
    facts: Facts,
    images: Dataset,
    calibration: Dataset,
    attacks: Sequence[FirstOrder],
    *,
    seed: int = 0,
    batch_size: int = 256,
) -> Iterator[dict[str, Any]]:
    """`detection` for each attack: a record of counts and settings, in the run's `detector.json`.

    `detected` of `fooling` adversarial images, `false_positives` of `clean` ones. The file is made
    anew, and holds what is finished after every attack.
    """
    records: list[dict[str, Any]] = []
    for attack in attacks:
        start = time.perf_counter()
        found = detection(model, images, calibration, attack, seed=seed, batch_size=batch_size)
        caught, false = found.detected, found.false_positives
        records.append(about(run, subject_of(facts), images) | {
            "rule": "distance", "squeezers": ["depth of 5 bits", "2x2 median"],
            "false_positive_rate": RATE,
            "calibration": {"fingerprint": calibration.fingerprint, "images": len(calibration)},
            "detected": caught.correct if caught else 0, "fooling": caught.total if caught else 0,
            "false_positives": false.correct, "clean": false.total,
            "attack": attack.name, "eps": attack.eps, "settings": repr(attack),
            "attack_seed": seed, "seconds": round(time.perf_counter() - start, 3),
            "evidence": stamp(next(model.parameters()).device),
        })  # fmt: skip
        write_json(run / "detector.json", records)
        yield records[-1]
