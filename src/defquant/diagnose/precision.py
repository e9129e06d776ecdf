"""Between precisions: what fools one and not another, where curves cross, how gradients differ."""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from defquant.attacks import Attack, untouched
from defquant.attacks.access import differentiable, gradient, leaf
from defquant.attacks.contract import Target, attacked, called
from defquant.attacks.diva import DIVA
from defquant.attacks.lint import lint_attack
from defquant.config import check_bits
from defquant.data import to_unit
from defquant.errors import UserError
from defquant.evaluate import Images, answers, linted, sweep
from defquant.quantize import set_bits
from defquant.records import Score

__all__ = [
    "Cosine", "Crossing", "TransferMatrix", "at_bits", "crossing", "evasive", "finite",
    "gradient_cosine", "gradient_cosines", "last_made", "smallest_broken", "transfer_matrix",
]  # fmt: skip


@dataclass(frozen=True)
class TransferMatrix:
    """`cells[s][t]`: of the images that networks s and t have right, how many made on s fool t.

    None where no image is right for both. `Score.correct` counts the fooled; its interval is
    Wilson's.
    """

    names: tuple[str, ...]
    attack: str
    cells: tuple[tuple[Score | None, ...], ...]


@dataclass(frozen=True)
class Cosine:
    """Mean cosine of two networks' input gradients, with its 95 % interval by Student's t.

    `left_out` images have a gradient that is zero or not finite in one of the two, and no cosine;
    where none is left the numbers are None. One image bounds nothing: its interval is [-1, 1].
    """

    mean: float | None
    low: float | None
    high: float | None
    left_out: int
    examples: int


@dataclass(frozen=True)
class Crossing:
    """The first eps at which the curve that was above goes below the other.

    Attributes:
        eps: of the crossing, between the grid's points by straight lines; None: they never cross.
        low, high: 95 % bootstrap interval; an end of None, where `eps` is not, lies beyond the
            grid. Both None where the curves do not cross.
        above: which curve is above first; None where they are equal all along.
        share: of the bootstrap samples, those whose curves cross in that direction (of any, where
            `eps` is None).
        examples: images.
    """

    eps: float | None
    low: float | None
    high: float | None
    above: str | None
    share: float
    examples: int


def at_bits(model: nn.Module, bits: int | None) -> nn.Module:
    """A copy of `model` whose activations have `bits` (None: full precision), weights as they are.

    Raises `UserError` for bits outside 1 to 8 or a model without quantisers.
    """
    check_bits(bits)
    return set_bits(copy.deepcopy(model), bits)


def transfer_matrix(
    models: Mapping[str, nn.Module],
    data: Images,
    attack: Attack,
    *,
    batch_size: int = 256,
    seed: int = 0,
) -> TransferMatrix:
    """Attack every network, and show every network the images that fooled, or failed to fool, it.

    Of a `FirstOrder` attack the last iterate is used, as `Transfer` does, on the diagonal too: the
    best one would stop at its own network's boundary and could not be compared. Every network is
    left as it was found; draws are keyed by the image's place in `data`.

    Args:
        models: by name, all of the same classes; `at_bits` makes those of other bits.
        data: images and labels.
        attack: one of `defquant.attacks` (PGD with 20 steps, say), or a function of that signature.
        batch_size: images at a time; the answer does not depend on it.
        seed: of the attack's draws.

    Raises:
        UserError: no networks, networks of different classes or images, bad images.
    """
    lint_attack(attack)
    if not models:
        raise UserError("a transfer matrix needs one network or more; found none")
    x, y = _same_images(models, data, batch_size)
    clean = torch.stack([_right(model, x, y, batch_size) for model in models.values()])
    rows = []
    for i, source in enumerate(models.values()):
        moved = last_made(source, x, y, attack, batch_size, seed)
        fooled = torch.stack([~_right(model, moved, y, batch_size) for model in models.values()])
        rows.append(tuple(_share(f, clean[i] & c) for f, c in zip(fooled, clean, strict=True)))
    return TransferMatrix(tuple(models), repr(attack), tuple(rows))


def evasive(
    model: nn.Module, data: Images, attack: DIVA, *, batch_size: int = 256, seed: int = 0
) -> Score | None:
    """Of the images that `model` and the attack's twin have right: how many fool `model` alone.

    The top-1 evasive success of Hao et al. 2022; `Score.correct` counts successes. None where no
    image is right for both. Errors as in `transfer_matrix`.
    """
    x, y = _same_images({"the network": model, "its twin": attack.twin}, data, batch_size)
    both = _right(model, x, y, batch_size) & _right(attack.twin, x, y, batch_size)
    moved = last_made(model, x, y, attack, batch_size, seed)
    fooled = ~_right(model, moved, y, batch_size) & _right(attack.twin, moved, y, batch_size)
    return _share(fooled, both)


def gradient_cosine(
    first: nn.Module, second: nn.Module, data: Images, *, batch_size: int = 256
) -> Cosine:
    """cos of the two networks' gradients of the cross-entropy at each image, averaged.

    1 for equal networks. Quantised gradients are the straight-through ones. Both are left as
    they were found. Raises `UserError` as `transfer_matrix` does.
    """
    from scipy.special import stdtrit

    x, y = _same_images({"the first": first, "the second": second}, data, batch_size)
    a, b = (_gradients(model, x, y, batch_size) for model in (first, second))
    cosines = (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))
    kept = cosines[cosines.isfinite()]
    left_out = len(cosines) - len(kept)
    if not len(kept):
        return Cosine(None, None, None, left_out, len(cosines))
    mean, df, error = kept.mean().item(), len(kept) - 1, 2.0
    if df:
        error = float(stdtrit(df, 0.975)) * kept.std().item() / len(kept) ** 0.5
    return Cosine(mean, max(-1.0, mean - error), min(1.0, mean + error), left_out, len(cosines))


def gradient_cosines(
    model: nn.Module, data: Images, bits: Sequence[int], *, batch_size: int = 256
) -> dict[int, Cosine]:
    """`gradient_cosine` of `model` at each of `bits` against itself at full precision."""
    whole = at_bits(model, None)
    return {b: gradient_cosine(at_bits(model, b), whole, data, batch_size=batch_size) for b in bits}


def smallest_broken(
    model: nn.Module,
    data: Images,
    attack: Callable[[float], Attack],
    radii: Sequence[float],
    *,
    batch_size: int = 256,
    seed: int = 0,
) -> Tensor:
    """The smallest of `radii` at which `attack(eps)` breaks each image: float64 (n,).

    0 where the clean image is misclassified, inf where none breaks it. What fell stays fallen
    (`sweep`), so that #{images with a value above eps} / n is the robust accuracy at eps.
    Raises `UserError` for radii that do not rise from above 0.
    """
    _check_radii(radii)
    clean, *scored = sweep(
        model, data, [attack(eps) for eps in radii], batch_size=batch_size, seed=seed
    )
    broken = torch.where(clean.survivors, torch.inf, 0.0).double()
    for eps, point in zip(reversed(radii), reversed(scored), strict=True):
        broken = torch.where(clean.survivors & ~point.survivors, eps, broken)
    return broken.cpu()


_Turn = tuple[float, int]


def crossing(
    first: Tensor,
    second: Tensor,
    radii: Sequence[float],
    *,
    samples: int = 2000,
    seed: int = 0,
) -> Crossing:
    """Where the robust accuracies r(eps) = mean(broken > eps) of two networks cross.

    On the grid 0, *radii, with straight lines between. The interval is the paired percentile
    bootstrap over images: each sample draws the same images for both. Samples that do not cross
    in the direction of the whole count as crossing beyond the grid where they end in the first
    order, as crossing at 0 where they have the later order throughout.

    Args:
        first, second: (n,), `smallest_broken` of the same images in the same order.
        radii: rising, in (0, 1].
        samples: bootstrap samples.
        seed: of the draws.

    Raises:
        UserError: unequal or no images, or radii that do not rise from above 0.
    """
    _check_radii(radii)
    if first.shape != second.shape or first.ndim != 1 or not len(first):
        raise UserError(
            f"curves are compared on the same images; found {[*first.shape]} and {[*second.shape]}"
        )
    grid = torch.tensor([0.0, *radii], dtype=torch.float64)
    after = grid + 1e-6  # so that a value rounded to float32 is still the grid's
    ahead = (first[:, None] > after).double() - (second[:, None] > after).double()
    points, draws = grid.tolist(), _draws(len(first), samples, seed)
    turns, end = _turns(ahead.sum(0).tolist(), points)
    start = turns[0][1] if turns else end
    drawn = [_turns(difference, points) for difference in (draws @ ahead).tolist()]
    above = {0: None, 1: "first", -1: "second"}[start]
    if not turns:
        share = sum(bool(found) for found, _ in drawn) / samples
        return Crossing(None, None, None, above, share, len(first))
    beyond = {start: math.inf, -start: 0.0}  # of a sample that does not turn so, by its last sign
    places = sorted(
        next((place for place, before in found if before == start), beyond[last])
        for found, last in drawn
        if last
    )
    low, high = (places[round(q * (len(places) - 1))] for q in (0.025, 0.975))
    share = sum(any(before == start for _, before in found) for found, _ in drawn) / samples
    return Crossing(turns[0][0], finite(low), finite(high), above, share, len(first))


def _turns(difference: Sequence[float], grid: Sequence[float]) -> tuple[list[_Turn], int]:
    """Where it changes its sign, with the sign before; and its last sign, 0 if zero all along.

    On straight lines between the grid's points; the middle of a stretch where it is zero.
    """
    signed, turns = [i for i, d in enumerate(difference) if d], []
    for i, j in pairwise(signed):
        a, b = difference[i], difference[j]
        if a * b < 0:
            straight = grid[i] + (grid[j] - grid[i]) * a / (a - b)
            place = straight if j == i + 1 else (grid[i + 1] + grid[j - 1]) / 2
            turns.append((place, 1 if a > 0 else -1))
    return turns, int(math.copysign(1, difference[signed[-1]])) if signed else 0


def finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _draws(n: int, samples: int, seed: int) -> Tensor:
    """How often each sample drew each image: (samples, n), rows of sum n."""
    generator = torch.Generator().manual_seed(seed)
    counts = torch.zeros(samples, n, dtype=torch.float64)
    for row in counts:
        row += torch.randint(n, (n,), generator=generator).bincount(minlength=n)
    return counts


def _check_radii(radii: Sequence[float]) -> None:
    if not radii or any(b <= a for a, b in pairwise([0.0, *radii])):
        raise UserError(f"radii must rise from above 0; found {[*radii]}")


def _same_images(
    models: Mapping[str, nn.Module], data: Images, batch_size: int
) -> tuple[Tensor, Tensor]:
    """The images, where all networks take them and answer with the same number of classes."""
    x, y = linted(next(iter(models.values())), data, batch_size)
    x = to_unit(x)
    classes = {}
    for name, model in models.items():
        with untouched(model), torch.no_grad():
            try:
                classes[name] = model(x[:1]).shape[-1]
            except RuntimeError as error:
                line = str(error).split("\n")[0]
                raise UserError(
                    f"networks must take the same images; {name} does not: {line}"
                ) from None
    first, *others = classes
    for name in others:
        if classes[name] != classes[first]:
            raise UserError(
                f"networks must know the same classes; {first} knows {classes[first]}, {name} "
                f"{classes[name]}: compare networks of one data set"
            )
    return x, y


def last_made(
    model: nn.Module, x: Tensor, y: Tensor, attack: Attack, batch_size: int, seed: int
) -> Tensor:
    """Images that `attack` makes of `x`, in [0, 1]: the last iterates where it knows them."""
    target = Target(model, x, y, seed, batch_size)
    return torch.cat([made for _, made in attacked(called(attack, target, last=True), target)])


def _right(model: nn.Module, x: Tensor, y: Tensor, batch_size: int) -> Tensor:
    return answers(model, (x, y), batch_size=batch_size) == y


def _gradients(model: nn.Module, x: Tensor, y: Tensor, batch_size: int) -> Tensor:
    """Of each image's cross-entropy, (n, c h w), in float64."""
    parts = []
    with untouched(model), differentiable():
        for at, labels in zip(x.split(batch_size), y.split(batch_size), strict=True):
            at = leaf(at).requires_grad_()
            loss = nn.functional.cross_entropy(model(at), leaf(labels), reduction="sum")
            parts.append(gradient(loss, at).flatten(1).double())
    return torch.cat(parts)


def _share(hits: Tensor, among: Tensor) -> Score | None:
    total = int(among.sum())
    return Score(int((hits & among).sum()), total) if total else None
