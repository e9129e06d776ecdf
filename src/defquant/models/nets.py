"""Wide ResNet, VGG-16 and ResNet-18 for small images, of pieces that share one precision."""

import re
from dataclasses import dataclass
from typing import TypedDict, Unpack

import torch
from torch import Tensor, nn

from defquant.config import Activation, ModelConfig
from defquant.errors import UserError
from defquant.lipschitz import ConvexSum
from defquant.models.squeezing import FeatureSqueezing
from defquant.quantize import QuantBranch, Quantizer, activation
from defquant.weights import FirstConv, QuantConv2d, QuantLinear

__all__ = ["VGG", "Parts", "ResNet", "WideResNet", "build", "resnet18", "vgg16", "wide_resnet"]


class Precision(TypedDict, total=False):
    """Keyword arguments of all networks; meanings, defaults and ranges as in `ModelConfig`."""

    bits: int | None
    high: float
    convex: bool
    activation: Activation
    weight_bits: int | None
    deployable: bool
    round_sums: bool


@dataclass(frozen=True)
class Parts:
    """The pieces that a network is made of, all of the precision that `config` says."""

    config: ModelConfig

    def act(self) -> Quantizer:
        return activation(self.config.activation, self.config.bits, self.config.high)

    def conv(self, c_in: int, c_out: int, kernel: int = 3, stride: int = 1) -> QuantConv2d:
        """A convolution without bias, padded to keep the size at stride 1."""
        bits = self.config.weight_bits
        # codes of 8 bits times weights of 8 bits overflow the 16-bit sums of AVX2 without VNNI
        bits = 7 if (self.config.bits, bits) == (8, 8) else bits
        return QuantConv2d(
            c_in, c_out, kernel, stride=stride, padding=kernel // 2, bias=False, weight_bits=bits
        )

    def first(self, c_in: int, c_out: int) -> FirstConv:
        """The 3x3 convolution of the pixels, whose codes have 8 bits."""
        bits = 7 if self.config.weight_bits else None
        return FirstConv(c_in, c_out, 3, padding=1, bias=False, weight_bits=bits)

    def classifier(self, channels: int, num_classes: int) -> "Classifier":
        return Classifier(channels, num_classes, 8 if self.config.weight_bits else None)

    def output(self) -> nn.Module:
        """What follows a convolution, or its batch norm, on the way into a residual sum."""
        return QuantBranch() if self.config.deployable else nn.Identity()

    def join(self) -> nn.Module:
        """A residual sum of two inputs: convex (section 4 of the paper) or plain."""
        return ConvexSum(2) if self.config.convex else Sum()

    def total(self) -> nn.Module:
        """What follows a residual sum that no activation quantises."""
        return QuantBranch() if self.config.round_sums else nn.Identity()


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

    Of strided 1x1 convolutions of 3 to 7 input channels oneDNN writes the weights' gradient out of
    bounds, channels last (torch 2.13, AVX2): some runs crash, others may be wrong.
    """
    return max(8, 8 * round(channels * width / 8))


class _Before(nn.Module):
    """BN -> act -> conv -> BN -> act -> conv, joined with the input (pre-activation).

    Where the shape changes, the shortcut is a 1x1 convolution of the first (quantised) activation.
    """

    def __init__(self, parts: Parts, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.bn1, self.act1 = nn.BatchNorm2d(c_in), parts.act()
        self.conv1 = parts.conv(c_in, c_out, stride=stride)
        self.bn2, self.act2 = nn.BatchNorm2d(c_out), parts.act()
        self.conv2, self.out = parts.conv(c_out, c_out), parts.output()
        reshapes = stride != 1 or c_in != c_out
        self.shortcut = parts.conv(c_in, c_out, 1, stride) if reshapes else None
        self.shortcut_out = parts.output() if reshapes else None
        self.join, self.total = parts.join(), parts.total()

    def forward(self, x: Tensor) -> Tensor:
        active = self.act1(self.bn1(x))
        branch = self.out(self.conv2(self.act2(self.bn2(self.conv1(active)))))
        if self.shortcut is not None and self.shortcut_out is not None:
            x = self.shortcut_out(self.shortcut(active))
        return self.total(self.join(x, branch))  # type: ignore[no-any-return]


class _After(nn.Module):
    """conv -> BN -> act -> conv -> BN, joined with the input, then act (post-activation)."""

    def __init__(self, parts: Parts, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = parts.conv(c_in, c_out, stride=stride)
        self.bn1, self.act1 = nn.BatchNorm2d(c_out), parts.act()
        self.conv2, self.bn2 = parts.conv(c_out, c_out), nn.BatchNorm2d(c_out)
        self.out, self.act2 = parts.output(), parts.act()
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or c_in != c_out:
            self.shortcut = nn.Sequential(
                parts.conv(c_in, c_out, 1, stride), nn.BatchNorm2d(c_out), parts.output()
            )
        self.join = parts.join()

    def forward(self, x: Tensor) -> Tensor:
        branch = self.out(self.bn2(self.conv2(self.act1(self.bn1(self.conv1(x))))))
        return self.act2(self.join(self.shortcut(x), branch))  # type: ignore[no-any-return]


def _groups(
    block: type[_Before | _After], parts: Parts, c_in: int, groups: tuple[int, ...], depth: int
) -> nn.Sequential:
    """`depth` blocks of each number of channels; every group but the first halves the image."""
    blocks: list[nn.Module] = []
    for group, c_out in enumerate(groups):
        for index in range(depth):
            blocks.append(block(parts, c_in, c_out, 2 if group and not index else 1))
            c_in = c_out
    return nn.Sequential(*blocks)


class WideResNet(nn.Module):
    """See `wide_resnet`."""

    def __init__(
        self, parts: Parts, depth: int, width: int, num_classes: int, in_channels: int
    ) -> None:
        super().__init__()
        if depth < 10 or (depth - 4) % 6:
            raise UserError(
                f"a Wide ResNet's depth is 6n + 4 (10, 16, 22, 28, 40, ...); found {depth}"
            )
        if width < 1:
            raise UserError(f"a Wide ResNet's width must be 1 or more; found {width}")
        self.stem, self.stem_out = parts.first(in_channels, 16), parts.output()
        groups = 16 * width, 32 * width, 64 * width
        self.blocks = _groups(_Before, parts, 16, groups, (depth - 4) // 6)
        self.bn, self.act = nn.BatchNorm2d(groups[-1]), parts.act()
        self.classifier = parts.classifier(groups[-1], num_classes)
        initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        stream = self.blocks(self.stem_out(self.stem(x)))
        return self.classifier(self.act(self.bn(stream)))  # type: ignore[no-any-return]


def wide_resnet(
    depth: int,
    width: int,
    *,
    num_classes: int = 10,
    in_channels: int = 3,
    **precision: Unpack[Precision],
) -> WideResNet:
    """Wide ResNet `depth`-`width` (Zagoruyko & Komodakis 2016), pre-activation.

    Images in [0, 1], (n, in_channels, h, w) with h, w >= 8, to logits. A quantiser sits after every
    ReLU6, the last one before pooling; the residual stream stays float (Figure 2 of the paper).

    Args:
        depth: 6n + 4.
        width: widening factor; groups of 16, 32 and 64 times `width` channels.
        num_classes: outputs.
        in_channels: of the images.
        precision: `bits`, `high`, `convex`, `activation`, `weight_bits` and `deployable`, as in
            `ModelConfig`; full precision where they are left out.

    Raises `UserError` for a depth that is not 6n + 4, and for what `ModelConfig` refuses.
    """
    parts = Parts(ModelConfig(**precision))
    return WideResNet(parts, depth, width, num_classes, in_channels)


class ResNet(nn.Module):
    """See `resnet18`."""

    def __init__(self, parts: Parts, num_classes: int, in_channels: int, width: float) -> None:
        super().__init__()
        c = scaled(64, width)
        self.stem = nn.Sequential(parts.first(in_channels, c), nn.BatchNorm2d(c), parts.act())
        self.blocks = _groups(_After, parts, c, (c, 2 * c, 4 * c, 8 * c), 2)
        self.classifier = parts.classifier(8 * c, num_classes)
        initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.blocks(self.stem(x)))  # type: ignore[no-any-return]


def resnet18(
    *,
    num_classes: int = 10,
    in_channels: int = 3,
    width: float = 1.0,
    **precision: Unpack[Precision],
) -> ResNet:
    """ResNet-18 (He et al. 2016) in its form for small images: 3x3 stem, no first pooling.

    The residual sum enters the next block's activation, so the stream is quantised after each
    sum. Arguments as in `wide_resnet`; `width` scales all channels, to multiples of 8.
    """
    return ResNet(Parts(ModelConfig(**precision)), num_classes, in_channels, width)


class VGG(nn.Module):
    """See `vgg16`."""

    def __init__(self, parts: Parts, num_classes: int, in_channels: int, width: float) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        c_in = in_channels
        for channels, count in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
            for _ in range(count):
                c_out = scaled(channels, width)
                conv = parts.conv(c_in, c_out) if layers else parts.first(c_in, c_out)
                layers += [conv, nn.BatchNorm2d(c_out), parts.act()]
                c_in = c_out
            # ceil_mode keeps a 1x1 map 1x1, so that images from 8x8 up pass all five poolings
            layers.append(nn.MaxPool2d(2, ceil_mode=True))
        self.features = nn.Sequential(*layers)
        self.classifier = parts.classifier(c_in, num_classes)
        initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x))  # type: ignore[no-any-return]


def vgg16(
    *,
    num_classes: int = 10,
    in_channels: int = 3,
    width: float = 1.0,
    **precision: Unpack[Precision],
) -> VGG:
    """VGG-16-BN with one linear layer (Simonyan & Zisserman 2014).

    Conv -> BN -> ReLU6 -> quantiser, 13 times, with five max-poolings (of quantised values, which
    stay on the grid), then average pooling. It has no residual sum, so `convex` and `deployable`
    change nothing. Arguments as in `wide_resnet`; `width` scales all channels, to multiples of 8.
    """
    return VGG(Parts(ModelConfig(**precision)), num_classes, in_channels, width)


def build(config: ModelConfig, *, num_classes: int, in_channels: int, seed: int = 0) -> nn.Module:
    """The network that `config.model` names: `wrn-DEPTH-WIDTH`, `vgg-16` or `resnet-18`.

    `vgg-16xW` and `resnet-18xW` scale the channels by W (`vgg-16x0.25`). The first weights are
    drawn from `seed`, the global random state is left alone. With `config.squeeze` it stands
    behind a `FeatureSqueezing`, whose `model` it is.
    Raises `UserError` for any other name.
    """
    match = re.fullmatch(r"(wrn)-(\d+)-(\d+)|(vgg-16|resnet-18)(?:x(\d*\.?\d+))?", config.model)
    if match is None:
        raise UserError(
            f"unknown model {config.model!r}: use wrn-DEPTH-WIDTH (as wrn-28-10), vgg-16 or "
            "resnet-18"
        )
    wrn, depth, width, name, scale = match.groups()
    parts, ends, network = Parts(config), (num_classes, in_channels), nn.Module()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if wrn:
            network = WideResNet(parts, int(depth), int(width), *ends)
        else:
            network = (VGG if name == "vgg-16" else ResNet)(parts, *ends, float(scale or 1))
    return network if config.squeeze is None else FeatureSqueezing(network, config.squeeze)
