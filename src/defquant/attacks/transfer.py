"""Black-box attack through a substitute network (section 5.1 of the paper)."""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from defquant.attacks.gradient import FirstOrder

__all__ = ["Transfer"]


@dataclass(frozen=True)
class Transfer:
    """Adversarial examples of `attack` on `substitute`, for whatever model is called with.

    The last iterate is used: an example that stops at the substitute's boundary transfers badly.
    `source` names the substitute in the results.
    """

    attack: FirstOrder
    substitute: nn.Module = field(repr=False)
    source: str = ""

    @property
    def eps(self) -> float:
        return self.attack.eps

    @property
    def name(self) -> str:
        """The attack's name followed by (B), as in Tables 2 and 3."""
        return f"{self.attack.name}(B)"

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
        return self.attack.last(self.substitute, x, y, generator=generator, ids=ids)
