"""Pieces that all networks share: layers of one precision, residual sum, initialisation."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from defquant.config import Activation
from defquant.lipschitz import ConvexSum
from defquant.quantize import QuantBranch, Quantizer
from defquant.quantize import activation as make_activation
from defquant.weights import QuantConv2d, QuantLinear

__all__ = ["Classifier", "FirstConv", "Parts", "Sum", "initialize", "scaled"]


@dataclass(frozen=True)
class Parts:
    """The pieces that a network is made of, all of one precision.

    Attributes:
        bits, high, activation: of the activation quantisers.
        convex: residual sums as convex combinations.
        weight_bits: of the weights, as in `ModelConfig`.
        deployable: a `QuantBranch` behind what enters a residual stream.
    """

    bits: int | None = None
    high: float = 6.0
    convex: bool = False
    activation: Activation = "relu"
    weight_bits: int | None = None
    deployable: bool = False

    def act(self) -> Quantizer:
        return make_activation(self.activation, self.bits, self.high)

    def conv(self, c_in: int, c_out: int, kernel: int = 3, stride: int = 1) -> QuantConv2d:
        """A convolution without bias, padded to keep the size at stride 1."""
        # codes of 8 bits times weights of 8 bits overflow the 16-bit sums of AVX2 without VNNI
        bits = 7 if (self.bits, self.weight_bits) == (8, 8) else self.weight_bits
        return QuantConv2d(
            c_in, c_out, kernel, stride=stride, padding=kernel // 2, bias=False, weight_bits=bits
        )

    def first(self, c_in: int, c_out: int) -> "FirstConv":
        """The convolution of the pixels, whose codes have 8 bits."""
        return FirstConv(c_in, c_out, 7 if self.weight_bits else None)

    def classifier(self, channels: int, num_classes: int) -> "Classifier":
        return Classifier(channels, num_classes, 8 if self.weight_bits else None)

    def output(self) -> nn.Module:
        """What follows a convolution, or its batch norm, on the way into a residual sum."""
        return QuantBranch() if self.deployable else nn.Identity()

    def join(self) -> nn.Module:
        """A residual sum of two inputs: convex (section 4 of the paper) or plain."""
        return ConvexSum(2) if self.convex else Sum()


class Sum(nn.Module):
    """Plain residual sum."""

    def forward(self, x: Tensor, branch: Tensor) -> Tensor:
        return x + branch


class Classifier(nn.Module):
    """Global average pooling and a linear layer; (n, c, h, w) -> (n, num_classes)."""

    def __init__(self, channels: int, num_classes: int, weight_bits: int | None = None) -> None:
        super().__init__()
        self.fc = QuantLinear(channels, num_classes, weight_bits=weight_bits)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.mean((2, 3)))  # type: ignore[no-any-return]


class FirstConv(QuantConv2d):
    """3x3 convolution of the pixels, padding 1, no bias: in float32 under autocast, too.

    bfloat16 rounds pixels near 1 to 1/256, the size of an attack's step. Parameters and state dict
    are those of `nn.Conv2d`.
    """

    def __init__(self, c_in: int, c_out: int, weight_bits: int | None = None) -> None:
        super().__init__(c_in, c_out, 3, padding=1, bias=False, weight_bits=weight_bits)

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
