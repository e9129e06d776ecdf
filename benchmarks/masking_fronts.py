"""What stands before, in or behind a network of the zoo, and hides its gradient (or does not)."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from defquant.quantize import QuantReLU
from defquant.rounding import fake_quantize


class Scaled(nn.Module):
    """Logits times a constant: the cross-entropy underflows."""

    def __init__(self, model: nn.Module, factor: float) -> None:
        super().__init__()
        self.model, self.factor = model, factor

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.model(x)
        return logits * self.factor


class Fronted(nn.Module):
    """A fixed function of the image in front of a network."""

    def __init__(self, front: Callable[[Tensor], Tensor], model: nn.Module) -> None:
        super().__init__()
        self.front, self.model = front, model

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.model(self.front(x))
        return logits


class Dead(nn.Module):
    """Rounding without a straight-through gradient."""

    def __init__(self, quantizer: QuantReLU) -> None:
        super().__init__()
        self.levels, self.high = 2 ** int(quantizer.bits or 1) - 1, quantizer.high

    def forward(self, x: Tensor) -> Tensor:
        codes = (x.clamp(0, self.high) * (self.levels / self.high)).round()
        grid: Tensor = codes * (self.high / self.levels)
        return grid


def noise(x: Tensor) -> Tensor:
    return x + 0.2 * torch.randn_like(x)


def coarse(x: Tensor) -> Tensor:
    return (x * 3).round() / 3


def thermometer(x: Tensor) -> Tensor:
    """Ten channels x > 0.05, 0.15, ... (Buckman et al. 2018), without a gradient."""
    steps = torch.arange(0.05, 1, 0.1).view(1, -1, 1, 1)
    return (x > steps).to(x.dtype)


def _dct() -> Tensor:
    n = torch.arange(8)
    basis = torch.cos(math.pi * (2 * n[None] + 1) * n[:, None] / 16) / 2
    basis[0] /= math.sqrt(2)
    return basis


def jpeg(x: Tensor) -> Tensor:
    """The 8 x 8 image's cosine coefficients rounded to multiples of 0.25: a JPEG's loss."""
    basis = _dct()
    kept: Tensor = basis.T @ ((basis @ x @ basis.T) / 0.25).round() * 0.25 @ basis
    return kept


def ripple(x: Tensor) -> Tensor:
    """A fine wave on every pixel: its slope, not the image's, is what a gradient sees."""
    return x + 0.02 * torch.sin(1500 * x)


class _Scrambled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> Tensor:
        return grad[0].flip(-1).roll(3, -2)


def scrambled(x: Tensor) -> Tensor:
    out: Tensor = _Scrambled.apply(x)  # type: ignore[no-untyped-call]
    return out


class Saturated(nn.Module):
    """A tanh quantiser far out on its flat ends, where its slope is all but zero."""

    def __init__(self, quantizer: nn.Module, gain: float) -> None:
        super().__init__()
        self.quantizer, self.gain = quantizer, gain

    def forward(self, x: Tensor) -> Tensor:
        rounded: Tensor = self.quantizer(self.gain * x)
        return rounded


def replaced(model: nn.Module, kind: type[nn.Module], put: Callable[[Any], nn.Module]) -> nn.Module:
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, kind):
                setattr(module, name, put(child))
    return model


def straight(x: Tensor) -> Tensor:
    """Rounding to 8 levels whose gradient passes straight through."""
    return fake_quantize(x, 3, 1.0)
