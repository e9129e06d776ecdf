"""DIVA: images that fool a quantised network and not its float twin (Hao et al. 2022)."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from defquant.attacks.access import differentiable, gradient, leaf, untouched
from defquant.attacks.contract import InBall, pixels, uniform
from defquant.attacks.engine import better, stepped
from defquant.attacks.lint import lint_answer
from defquant.config import positive
from defquant.errors import UserError

__all__ = ["DIVA"]


@dataclass(frozen=True, repr=False)
class DIVA(InBall):
    """Signed steps up L(x') = p_twin(y | x') - c p_model(y | x'), in the L-infinity ball.

    "A Tale of Two Models: Constructing Evasive Attacks on Edge Models" (Hao et al., MLSys 2022),
    with p the softmax of the logits. Called with the quantised network, it returns of every
    example the iterate with the highest L among those that fool it and not the twin, else the
    highest L of all: an image for whoever looks at the twin alone. `defquant.diagnose.evasive`
    counts them. A uniform start, as in our PGD; draws are keyed by the example's id.

    Attributes:
        eps: radius in [0, 1].
        twin: the network not to be fooled; left as it was found.
        c: weight of the quantised network's probability; 1 in most of their experiments.
        steps: iterations.
        alpha: step size; when none, 2.5 eps / steps.

    Raises:
        UserError: values out of range, images outside [0, 1], or networks of other classes.
    """

    twin: nn.Module = field(repr=False)
    c: float = 1.0
    steps: int = 20
    alpha: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(steps=self.steps)
        if not self.c > 0:
            raise UserError(f"c weighs the quantised network and must be positive; found {self.c}")
        if self.alpha is not None and not 0 < self.alpha <= 1:
            raise UserError(f"alpha is a step size in (0, 1], as 1/255; found {self.alpha:g}")

    @property
    def _size(self) -> float:
        return 2.5 * self.eps / self.steps if self.alpha is None else self.alpha

    @property
    def settings(self) -> Mapping[str, Any]:
        return {**super().settings, "alpha": pixels(self._size)}

    def made(self, model: nn.Module, x: Tensor, y: Tensor, ids: Tensor, *, seed: int) -> Tensor:
        noise = uniform(seed, ids, torch.zeros_like(ids), x.shape[1:]).to(x) * 2 - 1
        at = (x + self.eps * noise).clamp(0, 1)
        best, best_rank = x, x.new_full((len(x),), -torch.inf)
        with (
            untouched(model), untouched(self.twin),
            torch.autocast(x.device.type, enabled=False),
        ):  # fmt: skip
            for step in range(self.steps + 1):
                rank, grad = self._look(model, at, y, climb=step < self.steps)
                best, best_rank = better(best, best_rank, at, rank)
                at = stepped(at, x, grad, self._size, self.eps)
        return best

    def _look(
        self, model: nn.Module, at: Tensor, y: Tensor, *, climb: bool
    ) -> tuple[Tensor, Tensor]:
        """L, raised above all others where `at` fools the model alone, and L's gradient."""
        with differentiable() if climb else torch.no_grad():
            at = leaf(at).requires_grad_(climb)
            edge, float_ = model(at).float(), self.twin(at).float()
            lint_answer(edge, len(at), int(y.max()))
            if edge.shape != float_.shape:
                raise UserError(
                    f"DIVA needs networks of the same classes; found logits {tuple(edge.shape)} "
                    f"and {tuple(float_.shape)}"
                )
            p_edge, p_float = (z.softmax(1).gather(1, y[:, None])[:, 0] for z in (edge, float_))
            loss = p_float - self.c * p_edge
            grad = gradient(loss, at) if climb else torch.zeros_like(at)
        evasive = (edge.argmax(1) != y) & (float_.argmax(1) == y)
        loss = loss.detach().nan_to_num(-torch.inf)
        return torch.where(evasive, loss + 2 * (1 + self.c), loss), grad.nan_to_num(0.0)
