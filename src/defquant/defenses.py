"""What feature squeezing faces and what it detects (Xu et al. 2017): `Unaware` and `Detector`.

The squeezing itself is `defquant.models.squeezing`; its names can be imported from here, too.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from defquant.attacks import untouched
from defquant.attacks.compose import Elsewhere
from defquant.attacks.contract import Draws, Ids, made_by
from defquant.data import as_labels, in_unit, to_unit
from defquant.errors import UserError
from defquant.models.squeezing import (
    FeatureSqueezing,
    check_images,
    median_2x2,
    reduce_depth,
    squeeze,
)
from defquant.results import UNAWARE, Score

__all__ = [
    "Detection", "Detector", "FeatureSqueezing", "Squeezer", "Unaware", "median_2x2",
    "reduce_depth", "squeeze", "squeezing_distance",
]  # fmt: skip

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
        detected = Score(int(flags.sum()), len(flags)) if len(flags) else None
        return Detection(detected, Score(int(false.sum()), len(false)))


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
