"""What an attack raises: cross-entropy, and losses whose gradient does not vanish."""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

__all__ = [
    "LOSSES", "Loss", "LossName", "cross_entropy", "difference", "dlr", "dlr_targeted", "margin",
    "scaled_cross_entropy",
]  # fmt: skip

LossName = Literal["ce", "scaled-ce", "margin", "dlr", "dlr-targeted"]

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(logits (n, classes), labels (n,), targets (n,)) to what the attack raises, (n,)."""


def cross_entropy(logits: Tensor, y: Tensor, target: Tensor) -> Tensor:
    """-log softmax(z)_y. On a confident network it underflows, and its gradient with it."""
    return nn.functional.cross_entropy(logits, y, reduction="none")


def margin(logits: Tensor, y: Tensor, target: Tensor) -> Tensor:
    """max_{i≠y} z_i - z_y: positive where the model is fooled (Carlini & Wagner 2017)."""
    label = nn.functional.one_hot(y, logits.shape[1]).bool()
    return logits.masked_fill(label, -torch.inf).amax(1) - _at(logits, y)


def difference(logits: Tensor, y: Tensor, target: Tensor) -> Tensor:
    """z_t - z_y, for the target class t."""
    return _at(logits, target) - _at(logits, y)


def dlr(logits: Tensor, y: Tensor, target: Tensor) -> Tensor:
    """(max_{i≠y} z_i - z_y) / (z_π1 - z_π3), π the classes by falling logit (Croce & Hein 2020).

    Where the label is itself π3 this is 1 whatever the image; there it keeps its value and takes
    the margin's gradient. With fewer than 3 classes it is the margin.
    """
    if logits.shape[1] < 3:
        return margin(logits, y, target)
    top, order = logits.topk(3, dim=1)
    plain = margin(logits, y, target)
    ratio = plain / (top[:, 0] - top[:, 2] + 1e-12)
    return torch.where(order[:, 2] == y, ratio.detach() + (plain - plain.detach()), ratio)


def dlr_targeted(logits: Tensor, y: Tensor, target: Tensor) -> Tensor:
    """(z_t - z_y) / (z_π1 - (z_π3 + z_π4)/2) (Croce & Hein 2020).

    With fewer than 4 classes it is z_t - z_y.
    """
    if logits.shape[1] < 4:
        return difference(logits, y, target)
    top = logits.topk(4, dim=1).values
    return difference(logits, y, target) / (top[:, 0] - (top[:, 2] + top[:, 3]) / 2 + 1e-12)


def scaled_cross_entropy(logits: Tensor, y: Tensor, target: Tensor) -> Tensor:
    """The margin's value, with the gradient of the cross-entropy of z / (z_π1 - z_π2).

    The gap z_π1 - z_π2 is held constant (PGD++, Gupta & Ajanthan 2022), so that the gradient
    neither underflows nor depends on the scale of the logits. Scaled cross-entropies of two images
    cannot be compared, which is why the value is another.
    """
    gap = logits.detach().topk(2, dim=1).values.diff(dim=1).neg().clamp_min(1e-12)
    scaled = cross_entropy(logits / gap, y, target)
    return margin(logits.detach(), y, target) + (scaled - scaled.detach())


LOSSES: dict[LossName, Loss] = {
    "ce": cross_entropy,
    "scaled-ce": scaled_cross_entropy,
    "margin": margin,
    "dlr": dlr,
    "dlr-targeted": dlr_targeted,
}


def _at(logits: Tensor, classes: Tensor) -> Tensor:
    return logits.gather(1, classes[:, None]).squeeze(1)
