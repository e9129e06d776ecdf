"""Adversarial images as a file can hold them: 8 bits a pixel."""

import torch
from torch import Tensor

__all__ = ["to_pixels"]


def to_pixels(adversarial: Tensor, x: Tensor, eps: float) -> Tensor:
    """`adversarial` on the 8-bit grid, k / 255, and still within `eps` of `x`.

    Each pixel goes to the nearest level among those in the ball, [x - eps, x + eps] and [0, 1]; so
    an image leaves the ball by rounding only where no level lies in it. Both are float in [0, 1]
    and of one shape.

    >>> to_pixels(torch.tensor([0.5]), torch.tensor([100 / 255]), eps=8 / 255) * 255
    tensor([108.])
    """
    # 1e-4 of a level: x and eps are levels themselves, up to the rounding of a division by 255
    low = ((x - eps).clamp(min=0) * 255 - 1e-4).ceil()
    high = ((x + eps).clamp(max=1) * 255 + 1e-4).floor()
    return torch.minimum(torch.maximum((adversarial * 255).round(), low), high).div(255)
