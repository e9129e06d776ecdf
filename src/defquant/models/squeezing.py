"""Feature squeezing in front of a network: fewer colours, then a median (Xu et al. 2017)."""

from typing import Any

import torch
from torch import Tensor, nn

from defquant.config import check_bits
from defquant.errors import UserError
from defquant.rounding import WHOLE, whole_operation

__all__ = ["FeatureSqueezing", "check_images", "median_2x2", "reduce_depth", "squeeze"]


def reduce_depth(x: Tensor, bits: int | None = 5) -> Tensor:
    r"""round(n x) / n,  n = 2^bits - 1,  ties to even: colours of `bits` bits (Xu et al. 2017).

    The gradient is that of the identity, at 0 and 1 too, where `fake_quantize` has none: an
    attack could not move black and white pixels. `x` is images (n, c, h, w), float in [0, 1];
    `bits` 1 to 8, or None for no rounding. Raises `UserError` for other bits, shapes or types.

    >>> reduce_depth(torch.tensor([0.0, 0.4, 0.6, 1.0]).view(1, 1, 2, 2), bits=1).flatten()
    tensor([0., 0., 1., 1.])
    """
    check_bits(bits)
    check_images(x)
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
    check_images(x)
    if WHOLE.on:
        return _median_2x2(x)  # type: ignore[no-any-return]
    chosen: Tensor = _Median.apply(x)  # type: ignore[no-untyped-call]
    return chosen


@whole_operation
def _median_2x2(x: Tensor) -> Tensor:
    return _median(x)[1]


def _median(x: Tensor) -> tuple[Tensor, Tensor]:
    """The padded images and the medians."""
    padded = nn.functional.pad(x, (1, 0, 1, 0), mode="replicate")
    above, below = padded[:, :, :-1], padded[:, :, 1:]
    p, q = torch.maximum(above, below), torch.minimum(above, below)
    upper = torch.minimum(p[..., :-1], p[..., 1:])
    return padded, torch.maximum(torch.maximum(q[..., :-1], q[..., 1:]), upper)


class _Median(torch.autograd.Function):
    """Autograd through the minima and maxima would cost several times this backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        padded, chosen = _median(x)
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


def check_images(x: Tensor) -> None:
    """Raise `UserError` unless `x` is float images (n, c, h, w)."""
    if x.ndim != 4 or not x.is_floating_point():
        raise UserError(f"images are float (n, c, h, w); found {x.dtype} {tuple(x.shape)}")
