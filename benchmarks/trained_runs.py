"""Networks that `defquant train` or `defquant reproduce` left, for the benchmarks of attacks."""

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from defquant.checkpoint import load_on
from defquant.runs import test_images

Trained = tuple[str, int | None, nn.Module, tuple[Tensor, Tensor]]
"""Name, bits, network, the first test images with labels."""


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--runs", nargs="*", default=[], help="folders of trained networks")
    parser.add_argument("--data-root", help="their images, where these have moved")
    parser.add_argument("--eps", type=float, default=2.0, help="for the runs, of 255")


def trained(options: argparse.Namespace) -> Iterator[Trained]:
    for path in map(Path, options.runs):
        model, facts = load_on(path, torch.device("cpu"))
        images = test_images(facts, options.data_root, options.images)
        data = images.take(torch.arange(len(images)))
        yield path.name, facts.model.bits, model, data
