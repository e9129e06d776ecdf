"""Black-box attack through a substitute network (section 5.1 of the paper)."""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from defquant.attacks.base import draw_seed, lint_images
from defquant.attacks.engine import perturb
from defquant.attacks.gradient import FirstOrder
from defquant.data import to_unit

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
        self, model: nn.Module, x: Tensor, y: Tensor, *, generator: torch.Generator | None = None
    ) -> Tensor:
        """Images (n, c, h, w) in [0, 1]; `model` is never asked."""
        ids = torch.arange(len(x), device=x.device)
        return self.examples(x, y, seed=draw_seed(generator), ids=ids)

    def examples(self, x: Tensor, y: Tensor, *, seed: int, ids: Tensor) -> Tensor:
        """The same for examples with names `ids`, which alone, with `seed`, decide the draws."""
        lint_images(x, y)
        walk, eps = self.attack.walk, self.attack.eps
        x = to_unit(x)
        return perturb(self.substitute, x, y, walk, eps, seed=seed, ids=ids, keep="last")
