"""Networks: plain modules with `bits=`, `high=`, `convex=`, and their names on the command line."""

import re

import torch
from torch import nn

from defquant.config import ModelConfig
from defquant.errors import UserError
from defquant.models.nets import VGG, Parts, ResNet, WideResNet, resnet18, vgg16, wide_resnet
from defquant.models.squeezing import FeatureSqueezing

__all__ = [
    "VGG", "FeatureSqueezing", "ResNet", "WideResNet", "build", "resnet18", "vgg16", "wide_resnet",
]  # fmt: skip


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
