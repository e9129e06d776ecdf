"""An attack that is one kernel."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from defquant.attacks.base import draw_seed, lint_images
from defquant.attacks.engine import perturb
from defquant.attacks.kernel import Kernel
from defquant.config import check_eps
from defquant.data import to_unit
from defquant.errors import UserError

__all__ = ["Single", "pixels", "positive"]


@dataclass(frozen=True, repr=False)
class Single:
    """An L-infinity attack that is one `Kernel`. `eps` lies in [0, 1]; 0 returns the images.

    Calling it returns the best iterate of every example (see `perturb`), in the ball of radius
    `eps` around `x` and in [0, 1]. Raises `UserError` for images outside [0, 1].
    """

    by_id: ClassVar[bool] = True

    eps: float

    def __post_init__(self) -> None:
        check_eps(self.eps)

    @property
    def kernel(self) -> Kernel:
        raise TypeError(f"{type(self).__name__} is abstract: use FGSM, PGD, APGD, ...")

    @property
    def name(self) -> str:
        """Name of the family as the tables show it."""
        return type(self).__name__

    def __call__(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        *,
        generator: torch.Generator | None = None,
        ids: Tensor | None = None,
    ) -> Tensor:
        x, y = lint_images(x, y)
        seed = draw_seed(generator)
        made = perturb(model, to_unit(x), y, self.kernel, self.eps, seed=seed, ids=ids)
        if self.kernel.bounded:
            return made
        far = (made - to_unit(x)).abs().amax((1, 2, 3), keepdim=True) > self.eps
        return torch.where(far, to_unit(x), made)


def pixels(value: float) -> str:
    return f"{round(value * 255, 3):g}/255"


def positive(name: str, value: int) -> None:
    if value < 1:
        raise UserError(f"{name} must be 1 or more; found {value}")
