"""ResNet-18 (He et al. 2016) in its form for small images: 3x3 stem, no first pooling."""

from torch import Tensor, nn

from defquant.config import Activation
from defquant.models.blocks import Parts, initialize, scaled

__all__ = ["ResNet", "resnet18"]


class _Block(nn.Module):
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


class ResNet(nn.Module):
    """See `resnet18`."""

    def __init__(self, parts: Parts, num_classes: int, in_channels: int, width: float) -> None:
        super().__init__()
        c_in = scaled(64, width)
        self.stem = nn.Sequential(parts.first(in_channels, c_in), nn.BatchNorm2d(c_in), parts.act())
        blocks: list[nn.Module] = []
        for group in range(4):
            c_out = scaled(64, width) * 2**group
            for index in range(2):
                stride = 2 if group > 0 and index == 0 else 1
                blocks.append(_Block(parts, c_in, c_out, stride))
                c_in = c_out
        self.blocks = nn.Sequential(*blocks)
        self.classifier = parts.classifier(c_in, num_classes)
        initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.blocks(self.stem(x)))  # type: ignore[no-any-return]


def resnet18(
    *,
    bits: int | None = None,
    high: float = 6.0,
    convex: bool = False,
    activation: Activation = "relu",
    weight_bits: int | None = None,
    deployable: bool = False,
    num_classes: int = 10,
    in_channels: int = 3,
    width: float = 1.0,
) -> ResNet:
    """ResNet-18: images in [0, 1], (n, in_channels, h, w) with h, w >= 8.

    The residual sum enters the next block's activation, so the stream is quantised after each
    sum. Arguments as in `wide_resnet`; `width` scales all channels, to multiples of 8.
    """
    parts = Parts(bits, high, convex, activation, weight_bits, deployable)
    return ResNet(parts, num_classes, in_channels, width)
