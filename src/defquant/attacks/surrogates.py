"""Backward passes for quantised networks: the answers stay exact, the gradients are others'."""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from defquant.attacks.engine import Forward
from defquant.config import check_bits, positive
from defquant.errors import UserError
from defquant.quantize import Quantizer, set_bits
from defquant.rounding import full_precision

__all__ = [
    "EOT", "ClipFree", "FloatTwin", "Precisions", "SoftRound", "staircase_slope", "twin_of",
]  # fmt: skip


def staircase_slope(bits: int) -> float:
    """12 · (3 / (2^bits - 1))^(1/4), the slope of `SoftRound`: 16, 12, 9.7, 8 at 1 to 4 bits.

    The noise that is averaged over must be of the size by which the attack moves activations.
    A fixed one would give slopes in proportion to the width Δ of a cell, one that scales with the
    cells the same slope for all bits; the best slopes lie between, and nearer to the second.
    Chosen by robust accuracy of wrn-10-1 on CIFAR-10 (JPEG) at 2/255 (250 test images, APGD of 40
    steps, one seed): the best were 11 to 24 at 1 bit, 11 to 18 at 2, 9 to 11 at 3, 9 at 4 and 7 at
    5 (docs/surrogates.md; `benchmarks/adaptive_attack.py --slopes`).
    """
    return 12 * float((3 / (2**bits - 1)) ** 0.25)


@dataclass(frozen=True)
class ClipFree:
    """Every activation function passes the gradient on unchanged, also where it clips."""

    def __call__(self, model: nn.Module) -> AbstractContextManager[tuple[Forward, ...]]:
        return _backward(model, lambda quantizer, x: torch.ones_like(x))


@dataclass(frozen=True, repr=False)
class SoftRound:
    """Rounding has the gradient of a smooth staircase, steep where the rounded value turns.

    With u = x/Δ, the cell k = clamp(floor(u), 0, 2^bits - 2) and its threshold k + 1/2:
    backward of k + 1/2 + tanh(slope · (u - k - 1/2) / 2) / (2 tanh(slope / 4)), a stair that rises
    by one in each cell (as in differentiable soft quantization, Gong et al. 2019). Its steepness
    is the density of logistic noise of scale 1/slope cells, cut at the cell's ends: what rounding
    under such noise does on average. So the gradient says what a small change of *many*
    activations does: how many cross a threshold. It decays outside the range instead of ending
    there. A quantiser at full precision keeps its own gradient.

    Attributes:
        slope: positive; small ones come near the straight-through gradient without its clip,
            large ones see only the activations next to a threshold. When none, `staircase_slope`
            of each quantiser's bits.
    """

    slope: float | None = None

    def __post_init__(self) -> None:
        if self.slope is not None and not self.slope > 0:
            raise UserError(
                f"slope, the staircase's steepness, must be positive; found {self.slope:g}"
            )

    def __repr__(self) -> str:
        return "SoftRound()" if self.slope is None else f"SoftRound(slope={self.slope:g})"

    def __call__(self, model: nn.Module) -> AbstractContextManager[tuple[Forward, ...]]:
        return _backward(model, self._derivative)

    def _derivative(self, quantizer: Quantizer, x: Tensor) -> Tensor | None:
        cells = quantizer.cells(x)
        if cells is None or quantizer.bits is None:
            return None
        slope = self.slope or staircase_slope(quantizer.bits)
        cell = cells.scaled.floor().clamp_(cells.first, cells.last)
        stair = torch.sigmoid(cells.scaled.sub_(cell).sub_(0.5).mul_(slope))
        steep = stair.mul(1 - stair).mul_(slope / math.tanh(slope / 4))
        return steep if cells.rate is None else steep.mul_(cells.rate)


@dataclass(frozen=True)
class FloatTwin:
    """The backward pass of the same weights at full precision (BPDA, Athalye et al. 2018)."""

    def __call__(self, model: nn.Module) -> AbstractContextManager[tuple[Forward, ...]]:
        return nullcontext((partial(_through, twin_of(model), None),))


@dataclass(frozen=True)
class EOT:
    """Logits and gradients averaged over `passes` forward passes of a random network.

    Expectation over transformation (Athalye et al. 2018).
    """

    passes: int = 10

    def __post_init__(self) -> None:
        positive(passes=self.passes)

    def __call__(self, model: nn.Module) -> AbstractContextManager[tuple[Forward, ...]]:
        return nullcontext((model,) * self.passes)


@dataclass(frozen=True)
class Precisions:
    """The network's own answers, with gradients averaged over its activations at other `bits`."""

    bits: tuple[int | None, ...] = (2, 4, None)

    def __post_init__(self) -> None:
        if not self.bits:
            raise UserError("bits, the precisions to average over, must name one at least")
        for width in self.bits:
            check_bits(width)

    def __call__(self, model: nn.Module) -> AbstractContextManager[tuple[Forward, ...]]:
        return nullcontext(tuple(partial(_through, twin_of(model), width) for width in self.bits))


class _Graft(torch.autograd.Function):
    """`value`, whose gradient goes to `carrier`, times `rate` where there is one."""

    @staticmethod
    def forward(ctx: Any, carrier: Tensor, value: Tensor, rate: Tensor | None) -> Tensor:
        ctx.save_for_backward(rate)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> tuple[Tensor, None, None]:
        (rate,) = ctx.saved_tensors
        return grad[0] if rate is None else grad[0] * rate, None, None


def _graft(carrier: Tensor, value: Tensor, rate: Tensor | None) -> Tensor:
    grafted: Tensor = _Graft.apply(carrier, value, rate)  # type: ignore[no-untyped-call]
    return grafted


Derivative = Callable[[Quantizer, Tensor], Tensor | None]


@contextmanager
def _backward(model: nn.Module, derivative: Derivative) -> Iterator[tuple[Forward, ...]]:
    """Every quantiser of `model` with dQ/dx = derivative(quantizer, x), elementwise, till the end.

    Where that is None the quantiser keeps its own. Weights, buffers and answers stay as they are.
    """
    with ExitStack() as restore:
        for module in twin_of(model).modules():
            if isinstance(module, Quantizer):
                former = module.__dict__.get("forward")
                module.__dict__["forward"] = _replaced(module, module.forward, derivative)
                restore.callback(_put_back, module, former)
        yield (twin_of(model),)


def twin_of(model: nn.Module) -> nn.Module:
    """The network whose quantisers are known; someone else's keeps one as `defquant_twin`."""
    twin: nn.Module = getattr(model, "defquant_twin", model)
    return twin


def _replaced(quantizer: Quantizer, own: Forward, derivative: Derivative) -> Forward:
    def forward(x: Tensor) -> Tensor:
        rate = None
        if torch.is_grad_enabled() and x.requires_grad:
            with torch.no_grad():
                rate = derivative(quantizer, full_precision(x))
        return own(x) if rate is None else _graft(x, own(x.detach()), rate)

    return forward


def _put_back(module: nn.Module, former: Forward | None) -> None:
    del module.__dict__["forward"]
    if former is not None:
        module.__dict__["forward"] = former


def _through(model: nn.Module, bits: int | None, x: Tensor) -> Tensor:
    """The answers of `model`, with the gradient it has at activations of `bits`."""
    if not (torch.is_grad_enabled() and x.requires_grad):
        answer: Tensor = model(x)
        return answer
    with torch.no_grad():
        own = model(x.detach())
    former = [(m, m.bits) for m in model.modules() if isinstance(m, Quantizer)]
    try:
        if former:
            set_bits(model, bits)
        return _graft(model(x), own, None)
    finally:
        for quantizer, width in former:
            quantizer.bits = width
