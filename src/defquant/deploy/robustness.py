"""Is what ships as hard to fool as what was trained? Adversarial images replayed on both."""

from functools import partial

from torch import nn

from defquant.attacks.contract import Target, attacked, right
from defquant.attacks.engine import Single
from defquant.data import Dataset
from defquant.evaluate import correct
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
    networks = (trained, deployed)
    standing = [correct(network, images, batch_size=batch_size) for network in networks]
    there = images.to(next(trained.parameters()).device)
    target = Target(trained, there.images, there.labels, seed, batch_size)
    make = partial(attack.eight_bit, trained, seed=seed)
    for ids, adversarial in attacked(make, target):
        for network, stands in zip(networks, standing, strict=True):
            found = right(network, adversarial, there.labels[ids])
            stands[ids.to(stands.device)] &= found.to(stands.device)
    first, second = (Score(int(stands.sum()), len(stands)) for stands in standing)
    return first, second
