"""Scores: clean and robust accuracy, and sweeps over eps in which the fallen stay fallen."""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor, nn

from defquant.attacks import contract
from defquant.attacks.access import differentiable, gradient, untouched
from defquant.attacks.contract import Attack, Target, Tick, eps_of, name_of, told
from defquant.attacks.lint import lint_answer, lint_attack, lint_images, lint_model, suspect
from defquant.config import positive
from defquant.data import Dataset, Images, to_unit
from defquant.errors import UserError
from defquant.records import MASKED, Score, blind

__all__ = [
    "Images", "Scored", "Watch", "accuracy", "answers", "correct", "device_of", "lint_classes",
    "linted", "on_device", "robust", "robust_accuracy", "sweep", "vanishing",
]  # fmt: skip

Watch = Callable[[Attack], AbstractContextManager[Tick]]
"""Opened around each attack of a sweep, to show how far it is; see `defquant.progress`."""


@dataclass(frozen=True)
class Scored:
    """One measurement of a sweep: the attack (None for clean), its score, its seconds.

    `survivors` is bool (n,): which examples neither this nor a weaker eps of its family broke;
    `carried` are those radii, rising. `vanishing`, of the model, is that of the examples that
    are right clean; `masked`, whether the attack was blind, so that the score proves nothing.
    """

    attack: Attack | None
    score: Score
    seconds: float
    survivors: Tensor
    carried: tuple[float, ...] = ()
    vanishing: float | None = None

    @property
    def masked(self) -> bool:
        return self.attack is not None and blind(name_of(self.attack), self.vanishing) > MASKED


def accuracy(model: nn.Module, data: Images, *, batch_size: int = 256) -> Score:
    """Clean accuracy of `model` in eval mode; the model is left as it was found."""
    return Score.of(correct(model, data, batch_size=batch_size))


def robust_accuracy(
    model: nn.Module, data: Images, attack: Attack, *, batch_size: int = 256, seed: int = 0
) -> Score:
    """Share of examples that `attack` never gets misclassified.

    An example counts only if the model is right on it clean, and no iterate of any restart fools
    the model.

    Args:
        model: any module that maps images in [0, 1] to logits; left as it was found.
        data: images and labels.
        attack: one of `defquant.attacks`, or any function of that signature.
        batch_size: rows at a time, at most; the score does not depend on it.
        seed: of the attack's draws.

    Raises:
        UserError: images outside [0, 1], labels or logits of the wrong shape, no attack.
    """
    lint_attack(attack)
    clean = _checked(model, data, batch_size, dead=True)
    return Score.of(robust(model, data, attack, batch_size=batch_size, seed=seed, standing=clean))


def correct(model: nn.Module, data: Images, *, batch_size: int = 256) -> Tensor:
    """Which examples are classified rightly: bool (n,), on the model's device."""
    images, labels = linted(model, data, batch_size)
    return answers(model, (images, labels), batch_size=batch_size) == labels


def answers(model: nn.Module, data: Images, *, batch_size: int = 256) -> Tensor:
    """The class that the model takes each image for, int64 (n,); -1 where its output has a NaN."""
    images, labels = on_device(model, data)
    top, found = int(labels.max()), []
    with untouched(model), torch.no_grad():
        for x in images.split(batch_size):
            logits = model(to_unit(x))
            lint_answer(logits, len(x), top)
            found.append(told(logits))
    return torch.cat(found)


def robust(
    model: nn.Module,
    data: Images,
    attack: Attack,
    *,
    batch_size: int = 256,
    seed: int = 0,
    standing: Tensor | None = None,
    tick: Tick | None = None,
) -> Tensor:
    """Which examples `attack` never breaks: bool (n,).

    `standing`: examples not yet broken by a clean pass or an earlier attack; only they are
    attacked. Without it the clean pass is made here. `tick` is told how far the attack is.
    """
    lint_attack(attack)
    target = Target(model, *on_device(model, data), seed, batch_size, tick)
    found = correct(model, data, batch_size=batch_size) if standing is None else standing.clone()
    ids = found.nonzero().squeeze(1)
    if len(ids):
        found[ids] = contract.standing(attack, target, ids)
    return found


def vanishing(
    model: nn.Module, data: Images, standing: Tensor, *, batch_size: int = 256
) -> float | None:
    """Share of the `standing` examples whose loss gradient is exactly zero at every pixel.

    Gradient attacks are blind there, and robustness against them means nothing (Athalye et al.
    2018). None where no example stands, or the model gives no gradient at all.
    """
    images, labels = on_device(model, data)
    ids = standing.nonzero().squeeze(1)
    flat = 0
    with untouched(model):
        for some in ids.split(batch_size):
            x = to_unit(images[some]).detach().requires_grad_()
            try:
                with differentiable():
                    z, y = model(x).float(), labels[some]
                    loss = nn.functional.cross_entropy(z, y, reduction="sum")
                    grad = gradient(loss, x).nan_to_num(0.0)
            except UserError:
                return None
            flat += int((grad.abs().amax((1, 2, 3)) == 0).sum())
    return flat / len(ids) if len(ids) else None


def sweep(
    model: nn.Module,
    data: Images,
    attacks: Iterable[Attack],
    *,
    batch_size: int = 256,
    seed: int = 0,
    watch: Watch | None = None,
) -> Iterator[Scored]:
    """Clean accuracy first, then each attack, in order of its family's eps; each under `watch`.

    Within a family (the attacks of one name) eps rises, and an example that fell stays fallen:
    curves never rise, and no work is done on it again.
    """
    attacks = [attacks] if callable(attacks) or isinstance(attacks, str) else list(attacks)
    for attack in attacks:
        lint_attack(attack)
    start = time.perf_counter()
    clean = _checked(model, data, batch_size, dead=False)
    seconds = time.perf_counter() - start
    flat = vanishing(model, data, clean, batch_size=batch_size)
    yield Scored(None, Score.of(clean), seconds, clean, vanishing=flat)
    families: dict[str, list[Attack]] = {}
    for attack in attacks:
        families.setdefault(name_of(attack), []).append(attack)
    for family in families.values():
        standing, carried = clean, tuple[float, ...]()
        for attack in sorted(family, key=eps_of):
            start = time.perf_counter()
            with nullcontext() if watch is None else watch(attack) as tick:
                standing = robust(
                    model, data, attack, batch_size=batch_size, seed=seed, standing=standing,
                    tick=tick,
                )  # fmt: skip
            seconds = time.perf_counter() - start
            yield Scored(attack, Score.of(standing), seconds, standing, carried, flat)
            carried += (eps_of(attack),)


def _checked(model: nn.Module, data: Images, batch_size: int, *, dead: bool) -> Tensor:
    """`correct`; warns where a usual mistake explains that it is so little."""
    right = correct(model, data, batch_size=batch_size)
    images, labels = on_device(model, data)
    suspect(model, images, labels, right, dead=dead, batch_size=batch_size)
    return right


def device_of(model: nn.Module, default: torch.device) -> torch.device:
    """Where the first parameter or buffer lies; `default` for a model that has neither."""
    tensor = next(chain(model.parameters(), model.buffers()), None)
    return default if tensor is None else tensor.device


def linted(model: nn.Module, data: Images, batch_size: int) -> tuple[Tensor, Tensor]:
    """Images, uint8 or float, and labels on the model's device. Raises `UserError` for bad ones.

    Also for a model that cannot be scored on them; warns of one that is easily misread.
    """
    positive(batch_size=batch_size)
    images, labels = on_device(model, data)
    lint_model(model, to_unit(images[: min(8, batch_size)]), labels)
    return images, labels


def lint_classes(model: nn.Module, data: Images, classes: int, source: str) -> None:
    """Raise `UserError` unless the model knows as many classes as `source`, of these few images."""
    images, labels = on_device(model, data)
    with untouched(model), torch.no_grad():
        logits = model(to_unit(images))
    if isinstance(logits, Tensor) and logits.ndim == 2 and logits.shape[1] != classes:
        raise UserError(
            f"the model knows {logits.shape[1]} classes, {source} {classes}: use what belongs "
            "together"
        )
    lint_model(model, to_unit(images), labels)


def on_device(model: nn.Module, data: Images) -> tuple[Tensor, Tensor]:
    """Images and labels on the model's device; `UserError` for bad ones."""
    pair = (data.images, data.labels) if isinstance(data, Dataset) else data
    if not isinstance(pair, tuple | list) or len(pair) != 2:
        raise UserError(
            f"data is a Dataset or a pair (images, labels); found a {type(data).__name__}: put its "
            "images into one tensor, its labels into another"
        )
    images, labels = lint_images(*pair)
    device = device_of(model, images.device)
    return images.to(device), labels.to(device)
