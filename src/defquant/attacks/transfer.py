"""Black-box attack through a substitute network (section 5.1 of the paper)."""

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from defquant.attacks.base import Attack, made_by, name_of
from defquant.attacks.gradient import FirstOrder
from defquant.data import to_unit
from defquant.errors import UserError

__all__ = ["Replay", "Transfer"]


@dataclass(frozen=True)
class Transfer:
    """Adversarial examples of `attack` on `substitute`, for whatever model is called with.

    The last iterate of a `FirstOrder` is used: an example that stops at the substitute's boundary
    transfers badly. Of any other attack, what it returns. `source` names the substitute in the
    results.
    """

    by_id: ClassVar[bool] = True

    attack: Attack
    substitute: nn.Module = field(repr=False)
    source: str = ""

    @property
    def eps(self) -> float:
        return float(self.attack.eps)  # type: ignore[attr-defined]

    @property
    def name(self) -> str:
        """The attack's name followed by (B), as in Tables 2 and 3."""
        return f"{name_of(self.attack)}(B)"

    def __call__(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        *,
        generator: torch.Generator | None = None,
        ids: Tensor | None = None,
    ) -> Tensor:
        """Images (n, c, h, w) in [0, 1]; `model` is never asked. `ids` as in `perturb`."""
        x, substitute = to_unit(x), self.substitute
        return made_by(self.attack, substitute, x, y, generator=generator, ids=ids, last=True)


@dataclass(frozen=True, eq=False, repr=False)
class Replay:
    """What a `Transfer` made of a whole data set, given again: `images[ids]` for whatever model.

    Attributes:
        attack: that made the images, on a substitute.
        images: float32 in [0, 1], (n, c, h, w): its last iterates, by example id.
        source: names the substitute in the results, where it cannot be told from that `Transfer`.
    """

    by_id: ClassVar[bool] = True

    attack: FirstOrder
    images: Tensor
    source: str = ""

    @property
    def eps(self) -> float:
        return self.attack.eps

    @property
    def name(self) -> str:
        """The attack's name followed by (B), as in Tables 2 and 3."""
        return f"{self.attack.name}(B)"

    def __repr__(self) -> str:
        return f"Transfer(attack={self.attack!r}, source={self.source!r})"

    def __call__(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        *,
        generator: torch.Generator | None = None,
        ids: Tensor | None = None,
    ) -> Tensor:
        """The images kept for `ids`, int64 (n,), on the device of `x`; nothing is computed.

        Raises `UserError` without `ids`, for an id that is not kept, and where `x` is further than
        eps from the images kept: those were made of another data set.
        """
        if ids is None:
            raise UserError("kept adversarial images are found by ids: score them with sweep")
        low, high = ids.aminmax()
        if low < 0 or high >= len(self.images):
            raise UserError(
                f"{self!r} is kept for {len(self.images):,} images; found ids {low} to {high}: "
                "replay it on the images it was made of"
            )
        kept = self.images[ids.to(self.images.device)].to(x.device)
        if kept.shape != x.shape or not (kept - to_unit(x)).abs().max() <= self.eps + 1e-5:
            raise UserError(
                f"{self!r} is kept for other images than these: replay it on those it was made of"
            )
        return kept
