"""Is what ships as hard to fool as what was trained? Adversarial images replayed on both."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from defquant.attacks.base import untouched
from defquant.attacks.engine import perturb
from defquant.attacks.pixels import to_pixels
from defquant.attacks.single import Single
from defquant.data import Dataset, to_unit
from defquant.evaluate import correct, right
from defquant.results import Score

__all__ = ["replayed"]


def replayed(
    trained: nn.Module,
    deployed: nn.Module,
    images: Dataset,
    attack: Single,
    *,
    seed: int = 0,
    batch_size: int = 256,
) -> tuple[Score, Score]:
    """Robust accuracy of both networks against images that `attack` makes on `trained`.

    The best iterate of every example, rounded to 8 bits inside its ball (`to_pixels`), is shown to
    both; an example counts where the network is right on it and on its clean image. Both scores are
    of the same images, so they differ only where the two networks do.
    """
    standing = [correct(network, images, batch_size=batch_size) for network in (trained, deployed)]
    for start, (x, y, adversarial) in enumerate(
        _made(trained, images, attack, seed=seed, batch_size=batch_size)
    ):
        rows = slice(start * batch_size, start * batch_size + len(x))
        for network, stands in zip((trained, deployed), standing, strict=True):
            with untouched(network), torch.no_grad():
                stands[rows] &= right(network, adversarial, y).to(stands.device)
    first, second = (Score(int(stands.sum()), len(stands)) for stands in standing)
    return first, second


def _made(
    model: nn.Module, images: Dataset, attack: Single, *, seed: int, batch_size: int
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """(images, labels, adversarial images of 8 bits), a batch at a time."""
    device = next(model.parameters()).device
    for start in range(0, len(images), batch_size):
        ids = torch.arange(start, min(start + batch_size, len(images)))
        pixels, y = images.take(ids)
        x, y = to_unit(pixels.to(device)), y.to(device)
        made = perturb(
            model, x, y, attack.kernel, attack.eps, seed=seed, ids=ids.to(device), keep="best"
        )
        yield x, y, to_pixels(made, x, attack.eps)
