"""Feature squeezing (Xu et al. 2017): fewer colours and a median filter, to defend or to detect."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from defquant.attacks import FirstOrder, untouched
from defquant.config import check_bits
from defquant.data import to_unit
from defquant.errors import UserError
from defquant.results import Score

__all__ = [
    "Detection", "Detector", "FeatureSqueezing", "Squeezer", "Unaware", "median_2x2",
    "reduce_depth", "squeeze", "squeezing_distance",
]  # fmt: skip

Squeezer = Callable[[Tensor], Tensor]
"""Images (n, c, h, w) in [0, 1] to images of the same shape and range."""


def reduce_depth(x: Tensor, bits: int | None = 5) -> Tensor:
    r"""round(n x) / n,  n = 2^bits - 1,  ties to even: colours of `bits` bits (Xu et al. 2017).

    The gradient is that of the identity, at 0 and 1 too, where `fake_quantize` has none: an
    attack could not move black and white pixels. `x` is images (n, c, h, w), float in [0, 1];
    `bits` 1 to 8, or None for no rounding. Raises `UserError` for other bits, shapes or types.

    >>> reduce_depth(torch.tensor([0.0, 0.4, 0.6, 1.0]).view(1, 1, 2, 2), bits=1).flatten()
    tensor([0., 0., 1., 1.])
    """
    check_bits(bits)
    _check_images(x)
    if bits is None:
        return x
    levels, value = 2**bits - 1, x.detach()
    return value.mul(levels).round_().div_(levels) + (x - value)  # + 0, which has the gradient


def median_2x2(x: Tensor) -> Tensor:
    r"""Each pixel's upper median over itself, its left, its upper and its upper left neighbour.

    The third smallest of the four, per channel, the first row and column repeated at the edge:
    exactly `scipy.ndimage.median_filter(size=2, mode="reflect")` (Xu et al. 2017). With p, q the
    larger and the smaller of the left column and r, s of the right: max(min(p, r), q, s).
    The gradient goes to the pixel chosen, in equal shares where several tie for it.
    `x` is images (n, c, h, w), float; their memory format is kept. `UserError` for others.
    """
    _check_images(x)
    chosen: Tensor = _Median.apply(x)  # type: ignore[no-untyped-call]
    return chosen


class _Median(torch.autograd.Function):
    """Autograd through the minima and maxima would cost several times this backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        padded = nn.functional.pad(x, (1, 0, 1, 0), mode="replicate")
        above, below = padded[:, :, :-1], padded[:, :, 1:]
        p, q = torch.maximum(above, below), torch.minimum(above, below)
        upper = torch.minimum(p[..., :-1], p[..., 1:])
        chosen = torch.maximum(torch.maximum(q[..., :-1], q[..., 1:]), upper)
        ctx.save_for_backward(padded, chosen)
        return chosen

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> Tensor:
        padded, chosen = ctx.saved_tensors
        # eq into floats: a bool mask would be converted, at the cost of a further pass each
        ties = [torch.eq(near, chosen, out=torch.empty_like(chosen)) for near in _windows(padded)]
        share = grad[0] / (ties[0] + ties[1]).add_(ties[2]).add_(ties[3])
        total = torch.zeros_like(padded)
        for part, tie in zip(_windows(total), ties, strict=True):
            part.addcmul_(tie, share)
        total[:, :, 1] += total[:, :, 0]
        total[:, :, :, 1] += total[:, :, :, 0]
        return total[:, :, 1:, 1:]


def _windows(padded: Tensor) -> list[Tensor]:
    h, w = padded.shape[2] - 1, padded.shape[3] - 1
    return [padded[:, :, i : i + h, j : j + w] for i in (0, 1) for j in (0, 1)]


def squeeze(x: Tensor, bits: int | None = 5, median: bool = True) -> Tensor:
    """`reduce_depth`, then `median_2x2`: the squeezed image of section 2.2.2 of the paper.

    Rounding is monotone, so the other order gives the same images; in this one, pixels of one
    colour share the median's gradient. Arguments and errors as in those two.
    """
    x = reduce_depth(x, bits)
    return median_2x2(x) if median else x


class FeatureSqueezing(nn.Module):
    """`model` behind `squeeze`, in training and in test (section 5.2 of the paper).

    Attacks on it go through it: straight-through for the depth, a sub-gradient for the median;
    `Unaware` makes those that do not. `bits` is the depth of the images (`set_bits` changes the
    activations of `model` alone). Raises `UserError` for bits outside 1 to 8.
    """

    def __init__(self, model: nn.Module, bits: int | None = 5, median: bool = True) -> None:
        super().__init__()
        self.model, self.bits, self.median = model, check_bits(bits), median
        self.training = model.training

    def forward(self, x: Tensor) -> Tensor:
        return self.model(squeeze(x, self.bits, self.median))  # type: ignore[no-any-return]

    def extra_repr(self) -> str:
        return f"bits={self.bits}, median={self.median}"


@dataclass(frozen=True)
class Unaware:
    """`attack` on the network inside a `FeatureSqueezing`, by someone who ignores the squeezing.

    Standing up to it shows little: print the score of `attack` itself beside it. As in `Transfer`,
    the last iterate is used.
    """

    attack: FirstOrder

    @property
    def eps(self) -> float:
        return self.attack.eps

    @property
    def name(self) -> str:
        return f"{self.attack.name} (unaware)"

    def __call__(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        *,
        generator: torch.Generator | None = None,
        ids: Tensor | None = None,
    ) -> Tensor:
        """As every `Attack`; `ids` as in `perturb`.

        Raises `UserError` where `model` is no `FeatureSqueezing`.
        """
        if not isinstance(model, FeatureSqueezing):
            found = type(model).__name__
            raise UserError(f"Unaware attacks a FeatureSqueezing; found {found}: drop Unaware")
        return self.attack.last(model.model, x, y, generator=generator, ids=ids)


def squeezing_distance(
    model: nn.Module, x: Tensor, squeezers: Sequence[Squeezer] = (reduce_depth, median_2x2)
) -> Tensor:
    """How far squeezing moves the answer: max over s of ||p(x) - p(s(x))||_1 (Xu et al. 2017).

    p is the softmax of `model`, the bare network, which is left as it was found. `x` is images
    (n, c, h, w), float in [0, 1] or uint8, on its device. Returns (n,) in [0, 2], inf where the
    model returns NaN. Raises `UserError` for no squeezer, no images or others than these.
    """
    plain, squeezed = _answers(model, x, squeezers)
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

    def fit(self, model: nn.Module, clean: Tensor, false_positive_rate: float = 0.05) -> "Detector":
        """The same with the lowest threshold that flags at most this share of `clean`.

        Measure its rates on other images. Raises `UserError` for the rule `prediction`, a rate
        outside [0, 1), or what `squeezing_distance` refuses.
        """
        if self.rule == "prediction":
            raise UserError("the rule `prediction` has no threshold to fit: use it as it is")
        if not 0 <= false_positive_rate < 1:
            raise UserError(f"a false positive rate lies in [0, 1); found {false_positive_rate:g}")
        distance = squeezing_distance(model, clean, self.squeezers)
        flagged = math.floor(false_positive_rate * len(distance))
        return replace(self, threshold=float(distance.topk(flagged + 1).values[-1]))

    def flags(self, model: nn.Module, x: Tensor) -> Tensor:
        """Which images it takes for adversarial: bool (n,). Raises `UserError` before `fit`."""
        if self.rule == "prediction":
            plain, squeezed = _answers(model, x, self.squeezers)
            return (squeezed.argmax(2) != plain.argmax(1)).any(0)
        if self.threshold is None:
            raise UserError("the detector has no threshold yet: call fit with clean images first")
        return squeezing_distance(model, x, self.squeezers) > self.threshold

    def rates(
        self, model: nn.Module, clean: Tensor, adversarial: Tensor, labels: Tensor | None = None
    ) -> Detection:
        """Detection rate on `adversarial` and false positives on `clean`, images (n, c, h, w).

        With the true `labels` (n,) only those adversarial images count that fool the model (Xu et
        al. 2017). The rate holds for the attack that made them: one that knows the detector may
        evade it (He et al. 2017). Raises `UserError` as `flags` does.
        """
        flags, false = self.flags(model, adversarial), self.flags(model, clean)
        if labels is not None:
            flags = flags[_probabilities(model, adversarial).argmax(1) != labels.to(flags.device)]
        detected = Score(int(flags.sum()), len(flags)) if len(flags) else None
        return Detection(detected, Score(int(false.sum()), len(false)))


def _answers(model: nn.Module, x: Tensor, squeezers: Sequence[Squeezer]) -> tuple[Tensor, Tensor]:
    """Probabilities (n, classes) on the images, and (squeezers, n, classes) on squeezed ones."""
    if not squeezers or len(x) == 0:
        raise UserError(f"detection needs squeezers and images; found {len(squeezers)}, {len(x)}")
    squeezed = torch.stack([_probabilities(model, x, squeezer) for squeezer in squeezers])
    return _probabilities(model, x), squeezed


def _probabilities(model: nn.Module, x: Tensor, squeezer: Squeezer = lambda x: x) -> Tensor:
    with untouched(model), torch.no_grad():
        logits = [model(squeezer(_in_range(to_unit(part)))) for part in x.split(256)]
    return torch.cat(logits).float().softmax(1)


def _in_range(x: Tensor) -> Tensor:
    _check_images(x)
    low, high = x.aminmax()
    if not (low >= 0 and high <= 1):
        raise UserError(f"images must lie in [0, 1]; found [{low:.3g}, {high:.3g}]")
    return x


def _check_images(x: Tensor) -> None:
    if x.ndim != 4 or not x.is_floating_point():
        raise UserError(f"images are float (n, c, h, w); found {x.dtype} {tuple(x.shape)}")
