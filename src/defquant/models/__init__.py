"""Networks: plain modules with `bits=`, `high=`, `convex=`, and their names on the command line."""

from defquant.models.nets import VGG, ResNet, WideResNet, build, resnet18, vgg16, wide_resnet
from defquant.models.squeezing import FeatureSqueezing

__all__ = [
    "VGG", "FeatureSqueezing", "ResNet", "WideResNet", "build", "resnet18", "vgg16", "wide_resnet",
]  # fmt: skip
