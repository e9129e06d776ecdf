"""VGG-16 with batch normalisation (Simonyan & Zisserman 2014) for small images."""

from torch import Tensor, nn

from defquant.config import Activation
from defquant.models.blocks import (
    Classifier,
    FirstConv,
    MakeActivation,
    conv3x3,
    initialize,
    scaled,
)
from defquant.quantize import activation as make_activation

__all__ = ["VGG", "vgg16"]

_GROUPS = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))  # channels, convolutions


class VGG(nn.Module):
    """See `vgg16`."""

    def __init__(
        self, act: MakeActivation, num_classes: int, in_channels: int, width: float
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        c_in = in_channels
        for channels, count in _GROUPS:
            for _ in range(count):
                c_out = scaled(channels, width)
                conv = conv3x3(c_in, c_out) if layers else FirstConv(c_in, c_out)
                layers += [conv, nn.BatchNorm2d(c_out), act()]
                c_in = c_out
            # ceil_mode keeps a 1x1 map 1x1, so that images from 8x8 up pass all five poolings
            layers.append(nn.MaxPool2d(2, ceil_mode=True))
        self.features = nn.Sequential(*layers)
        self.classifier = Classifier(c_in, num_classes)
        initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x))  # type: ignore[no-any-return]


def vgg16(
    *,
    bits: int | None = None,
    high: float = 6.0,
    convex: bool = False,
    activation: Activation = "relu",
    num_classes: int = 10,
    in_channels: int = 3,
    width: float = 1.0,
) -> VGG:
    """VGG-16-BN with one linear layer: images in [0, 1], (n, in_channels, h, w) with h, w >= 8.

    Conv -> BN -> ReLU6 -> quantiser, 13 times, with five max-poolings (of quantised values, which
    stay on the grid), then average pooling. It has no residual sum, so `convex` changes nothing.
    Arguments as in `wide_resnet`; `width` scales all channels, to multiples of 8.
    """
    return VGG(lambda: make_activation(activation, bits, high), num_classes, in_channels, width)
