"""Low clean accuracy that a usual mistake explains: the images or labels are not the model's."""

import warnings
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from defquant.attacks.base import untouched
from defquant.data import to_unit
from defquant.errors import DefquantWarning

__all__ = ["suspect"]

_PROBED = 256
_FEWEST = 32
_NORMS = {
    "ImageNet's": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "CIFAR-10's": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
}


def suspect(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    right: Tensor,
    *,
    dead: bool = True,
    batch_size: int = 64,
) -> None:
    """Warn where `model` is right on few `images` as they are, and on most after a usual repair.

    Tried on up to 256 images that are spread over all: normalisations, pixels of 0..255, the
    colours in reverse, classes numbered otherwise. A repair is named where it makes at least half
    of them right, and three times as many as before (another order of classes: four of five, as
    untrained networks sort a little, too): so no poor network is suspected. Costs a few
    forward passes, and nothing where half of the images are right or there are fewer than 32.
    """
    if len(images) < _FEWEST or 2 * int(right.sum()) > len(images):
        return
    some = torch.linspace(0, len(images) - 1, min(_PROBED, len(images))).round().long()
    some = some.to(images.device)
    x, y, before = to_unit(images[some]), labels[some], int(right[some].sum())
    enough = max(len(y) / 2, 3 * before)
    with untouched(model), torch.no_grad():
        logits = torch.cat([model(part) for part in x[:64].split(batch_size)])
        if (logits == logits[:1]).all() and (x[:64] != x[:1]).any():
            message = (
                "the model gives different images exactly the same output: look for dead layers"
            )
            if dead:  # else the caller knows: short experiments leave dead networks
                _warn(message)
            return
        renamed = _renamed(_answers(model, x, batch_size), y, enough)
        if renamed:
            _say(before, len(y), *renamed, "correct the labels, or the order of the classes")
            return
        tried = {name: int((_answers(model, z, batch_size) == y).sum()) for name, z in _repairs(x)}
    repair, after = max(tried.items(), key=lambda item: item[1])
    if after >= enough:
        _say(before, len(y), after, repair, "put that into the model's forward")


def _answers(model: nn.Module, x: Tensor, batch_size: int) -> Tensor:
    return torch.cat([model(part).argmax(1) for part in x.split(min(64, batch_size))])


def _repairs(x: Tensor) -> Iterator[tuple[str, Tensor]]:
    channels = x.shape[1]
    mean, std = x.mean((0, 2, 3), keepdim=True), x.std((0, 2, 3), keepdim=True).clamp_min(1e-6)
    for name, (means, deviations) in _NORMS.items():
        if channels == 3:
            yield (
                f"normalised with {name} mean and deviation",
                (x - _row(means, x)) / _row(deviations, x),
            )
    yield "scaled to [-1, 1]", 2 * x - 1
    yield "as pixels of 0..255", 255 * x
    yield "inverted, 1 - x", 1 - x
    if channels == 3:
        yield "with the colours in reverse, BGR for RGB", x.flip(1)
    if x.shape[2] == x.shape[3]:
        yield "with rows and columns swapped", x.transpose(2, 3)
    yield "with their own mean and deviation taken out", (x - mean) / std


def _row(values: tuple[float, ...], x: Tensor) -> Tensor:
    return x.new_tensor(values).view(1, -1, 1, 1)


def _renamed(answers: Tensor, labels: Tensor, enough: float) -> tuple[int, str] | None:
    """How many are right when classes are numbered otherwise, and how: off by one or permuted."""
    for step, name in ((1, "one below"), (-1, "one above")):
        right = int((answers == labels + step).sum())
        if right >= enough:
            return right, f"if each label is taken for {name} the model's class"
    known = labels.unique()
    if (
        len(labels) < 8 * len(known) or 0.8 * len(labels) < enough
    ):  # so few that chance finds an order that fits
        return None
    from scipy.optimize import linear_sum_assignment

    size = 1 + int(torch.maximum(answers.max(), labels.max()))
    table = torch.bincount(labels * size + answers, minlength=size * size).view(size, size)
    rows, columns = linear_sum_assignment(table.cpu().numpy(), maximize=True)
    right = int(table[torch.from_numpy(rows), torch.from_numpy(columns)].sum())
    return (right, "if the classes are put in another order") if right >= enough else None


def _say(before: int, total: int, after: int, repair: str, remedy: str) -> None:
    message = (
        f"the model is right on {before} of {total} images as they are, and on {after} {repair}: "
        f"{remedy}"
    )
    _warn(message)


def _warn(message: str) -> None:
    warnings.warn(message, DefquantWarning, stacklevel=5)
