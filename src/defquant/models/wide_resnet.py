"""Wide ResNet, pre-activation (Zagoruyko & Komodakis 2016), with quantised activations."""

from torch import Tensor, nn

from defquant.config import Activation
from defquant.errors import UserError
from defquant.models.blocks import Parts, initialize

__all__ = ["WideResNet", "wide_resnet"]


class _Block(nn.Module):
    """BN -> act -> conv -> BN -> act -> conv, joined with the input.

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
        self.join = parts.join()

    def forward(self, x: Tensor) -> Tensor:
        active = self.act1(self.bn1(x))
        branch = self.out(self.conv2(self.act2(self.bn2(self.conv1(active)))))
        if self.shortcut is not None and self.shortcut_out is not None:
            x = self.shortcut_out(self.shortcut(active))
        return self.join(x, branch)  # type: ignore[no-any-return]


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
        blocks: list[nn.Module] = []
        c_in = 16
        self.stem, self.stem_out = parts.first(in_channels, c_in), parts.output()
        for group, c_out in enumerate((16 * width, 32 * width, 64 * width)):
            for index in range((depth - 4) // 6):
                stride = 2 if group > 0 and index == 0 else 1
                blocks.append(_Block(parts, c_in, c_out, stride))
                c_in = c_out
        self.blocks = nn.Sequential(*blocks)
        self.bn, self.act = nn.BatchNorm2d(c_in), parts.act()
        self.classifier = parts.classifier(c_in, num_classes)
        initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        stream = self.blocks(self.stem_out(self.stem(x)))
        return self.classifier(self.act(self.bn(stream)))  # type: ignore[no-any-return]


def wide_resnet(
    depth: int,
    width: int,
    *,
    bits: int | None = None,
    high: float = 6.0,
    convex: bool = False,
    activation: Activation = "relu",
    weight_bits: int | None = None,
    deployable: bool = False,
    num_classes: int = 10,
    in_channels: int = 3,
) -> WideResNet:
    """Wide ResNet `depth`-`width`: images in [0, 1], (n, in_channels, h, w) with h, w >= 8.

    A quantiser sits after every ReLU6, the last one before pooling; the residual stream stays
    float (Figure 2 of the paper in pre-activation form).

    Args:
        depth: 6n + 4.
        width: widening factor; groups of 16, 32 and 64 times `width` channels.
        bits: activation bits 1 to 8, or None.
        high: activation range [0, high].
        convex: residual sums as learned convex combinations.
        activation: `relu` or `tanh`.
        weight_bits: 8, 4 or 2, or None for float weights; see `ModelConfig`.
        deployable: a `QuantBranch` behind the stem, each branch and each 1x1 shortcut.
        num_classes: outputs.
        in_channels: of the images.

    Raises:
        UserError: a depth that is not 6n + 4, or bits outside 1 to 8.
    """
    parts = Parts(bits, high, convex, activation, weight_bits, deployable)
    return WideResNet(parts, depth, width, num_classes, in_channels)
