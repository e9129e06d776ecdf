"""Pieces that all networks share: activation factory, residual sum, initialisation."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from defquant.lipschitz import ConvexSum
from defquant.quantize import Quantizer

__all__ = [
    "Classifier", "FirstConv", "MakeActivation", "Sum", "conv3x3", "initialize", "join", "scaled",
]  # fmt: skip

MakeActivation = Callable[[], Quantizer]


class Sum(nn.Module):
    """Plain residual sum."""

    def forward(self, x: Tensor, branch: Tensor) -> Tensor:
        return x + branch


class Classifier(nn.Module):
    """Global average pooling and a linear layer; (n, c, h, w) -> (n, num_classes)."""

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        self.fc = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.mean((2, 3)))  # type: ignore[no-any-return]


def join(convex: bool) -> nn.Module:
    """A residual sum of two inputs: convex (section 4 of the paper) or plain."""
    return ConvexSum(2) if convex else Sum()


def conv3x3(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    """3x3 convolution, padding 1, no bias."""
    return nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)


class FirstConv(nn.Conv2d):
    """3x3 convolution of the pixels, padding 1, no bias: in float32 under autocast, too.

    bfloat16 rounds pixels near 1 to 1/256, the size of an attack's step. Parameters and state dict
    are those of `nn.Conv2d`.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        kind = x.device.type
        if not (torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)):
            return super().forward(x)
        with torch.autocast(kind, enabled=False):
            return super().forward(x.to(self.weight.dtype))


def initialize(model: nn.Module) -> None:
    """He initialisation (fan-out, ReLU) of convolutions, zero bias of the linear layer."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)
            bound = module.in_features**-0.5
            with torch.no_grad():
                module.weight.uniform_(-bound, bound)


def scaled(channels: int, width: float) -> int:
    """`channels` times `width`, to the nearest multiple of 8 and at least 8.

    Strided 1x1 convolutions of other widths write out of bounds in the backward pass of oneDNN,
    channels last (torch 2.13 on a CPU): some runs crash, others may be wrong.
    """
    return max(8, 8 * round(channels * width / 8))
