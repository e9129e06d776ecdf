"""VGG-16 with batch normalisation (Simonyan & Zisserman 2014) for small images."""

from torch import Tensor, nn

from defquant.config import Activation
from defquant.models.blocks import Parts, initialize, scaled

__all__ = ["VGG", "vgg16"]

_GROUPS = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))  # channels, convolutions


class VGG(nn.Module):
    """See `vgg16`."""

    def __init__(self, parts: Parts, num_classes: int, in_channels: int, width: float) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        c_in = in_channels
        for channels, count in _GROUPS:
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
    bits: int | None = None,
    high: float = 6.0,
    convex: bool = False,
    activation: Activation = "relu",
    weight_bits: int | None = None,
    deployable: bool = False,
    num_classes: int = 10,
    in_channels: int = 3,
    width: float = 1.0,
) -> VGG:
    """VGG-16-BN with one linear layer: images in [0, 1], (n, in_channels, h, w) with h, w >= 8.

    Conv -> BN -> ReLU6 -> quantiser, 13 times, with five max-poolings (of quantised values, which
    stay on the grid), then average pooling. It has no residual sum, so `convex` and
    `deployable` change nothing.
    Arguments as in `wide_resnet`; `width` scales all channels, to multiples of 8.
    """
    parts = Parts(bits, high, convex, activation, weight_bits, deployable)
    return VGG(parts, num_classes, in_channels, width)
