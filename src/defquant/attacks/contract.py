"""What every attack keeps to: one signature, the model left as it was, draws per example."""

import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any, ClassVar, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from defquant.attacks.access import leaf, untouched
from defquant.attacks.lint import kind_of, lint_images
from defquant.config import check_eps
from defquant.data import to_unit
from defquant.errors import UserError

__all__ = [
    "Ask", "Attack", "Draws", "Ids", "InBall", "Target", "Tick", "Witness", "attacked", "called",
    "confirmed", "draw_seed", "eight_bit", "eps_of", "made_by", "name_of", "pixels", "right",
    "seed_of", "standing", "to_pixels", "told", "uniform",
]  # fmt: skip

Ask = Callable[[], tuple[float, int]]
"""The share of an attack that is done, at a guess, and how many examples stand. Waits for a GPU."""

Tick = Callable[[Ask], object]
"""What an attack calls after every look; it asks only where someone wants to know."""

Witness = Callable[[Tensor, Tensor], Tensor]
"""Asked for examples by `ids` (n,) and what an attack made of them: which are fooled, bool (n,)."""

Draws = torch.Generator | None
Ids = Tensor | None
"""int64 (n,): the examples' places in the data set, by which their draws are told apart."""

Make = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(images in [0, 1], labels, ids) of a batch to its adversarial images."""


class Attack(Protocol):
    """Any function that returns adversarial examples within its own eps of `x`.

    `x` holds images in [0, 1], (n, c, h, w); `y` their true labels, (n,). What else an attack may
    have: `eps`, its radius in [0, 1]; `name`, of its family; `by_id`, which marks that it takes
    `ids` and that its answer depends on no batch; `last`, called as it is, for the last iterate;
    `standing` and `eight_bit`: how it is scored and saved (see the functions of these names).
    """

    def __call__(
        self, model: nn.Module, x: Tensor, y: Tensor, *, generator: Draws = None
    ) -> Tensor: ...


class Target(NamedTuple):
    """What is attacked: `images`, uint8 or float in [0, 1], and `labels`, on the model's device.

    `seed`: of the draws; `batch_size`: rows at a time, at most; `tick`: told how far it is;
    `witness`: whom every image that fools the model must fool, too.
    """

    model: nn.Module
    images: Tensor
    labels: Tensor
    seed: int = 0
    batch_size: int = 256
    tick: Tick | None = None
    witness: "Witness | None" = None


@dataclass(frozen=True, repr=False)
class InBall:
    """What this library's attacks share: `eps` in [0, 1], draws told apart by `ids`, a repr.

    The repr is what results are stored under: eps, then the `settings`, less those that are none,
    0 or a single start.
    """

    by_id: ClassVar[bool] = True

    eps: float

    def __post_init__(self) -> None:
        check_eps(self.eps)

    @property
    def name(self) -> str:
        """Name of the family as the tables show it."""
        return type(self).__name__

    @property
    def settings(self) -> Mapping[str, Any]:
        """What is set beside eps, as its repr shows it."""
        return {f.name: getattr(self, f.name) for f in fields(self)[1:] if f.repr}

    def __call__(
        self, model: nn.Module, x: Tensor, y: Tensor, *, generator: Draws = None, ids: Ids = None
    ) -> Tensor:
        """What is made of one batch, within `eps` and in [0, 1]; `ids` are else 0, 1, ..."""
        x, y = lint_images(x, y)
        ids = torch.arange(len(x), device=x.device) if ids is None else ids
        return self.made(model, to_unit(x), y, ids, seed=draw_seed(generator))

    def made(self, model: nn.Module, x: Tensor, y: Tensor, ids: Tensor, *, seed: int) -> Tensor:
        """Its adversarial images, of `x` float in [0, 1]."""
        raise NotImplementedError

    def __repr__(self) -> str:
        shown = {
            name: f"{value:g}" if isinstance(value, float) else value
            for name, value in self.settings.items()
            if value is not None and value != 0 and (name, value) not in _ONCE
        }
        parts = [f"eps={pixels(self.eps)}", *(f"{name}={value}" for name, value in shown.items())]
        return f"{type(self).__name__}({', '.join(parts)})"


_ONCE = (("restarts", 1), ("samples", 1))


def pixels(value: float) -> str:
    return f"{round(value * 255, 3):g}/255"


def made_by(
    attack: Attack,
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    generator: Draws,
    ids: Ids = None,
    last: bool = False,
) -> Tensor:
    """What any `attack` makes of one batch in [0, 1], checked before it is believed.

    The attack is handed copies without a graph, and the model as in `untouched`. Where it draws
    from the global state of torch, NumPy or Python, that is seeded from the next draw of
    `generator` and the first of `ids`, and restored after. `last`: the last iterate of an attack
    that knows one. Returns images of the type and device of `x`, without a graph.

    Raises `UserError` unless they are float, of the shape of `x`, finite, in [0, 1] and within the
    attack's `eps` (beyond rounding).
    """
    make: Callable[..., Tensor] = getattr(attack, "last", attack) if last else attack
    named = {"ids": ids} if ids is not None and _by_id(attack) else {}
    batch = 0 if ids is None or not len(ids) else int(ids[0])
    with untouched(model), _seeded(seed_of(_next_draw(generator), batch), x.device):
        made = make(model, leaf(x).clone(), leaf(y).clone(), generator=generator, **named)
    return _checked(made, x.detach(), attack)


def called(attack: Attack, target: Target, *, last: bool = False) -> Make:
    """`made_by` with the draws of each batch: of an attack by id the same, for ids tell apart."""

    def make(x: Tensor, y: Tensor, ids: Tensor) -> Tensor:
        place = 0 if _by_id(attack) else int(ids[0])
        draw = torch.Generator().manual_seed(seed_of(target.seed, place))
        return made_by(attack, target.model, x, y, generator=draw, ids=ids, last=last)

    return make


def attacked(make: Make, target: Target, ids: Ids = None) -> Iterator[tuple[Tensor, Tensor]]:
    """Batch by batch (ids, what `make` makes of them), of `ids`, places in the target, or all."""
    images, labels = target.images, target.labels
    ids = torch.arange(len(images), device=images.device) if ids is None else ids
    for some in ids.split(target.batch_size):
        yield some, make(to_unit(images[some]), labels[some], some)


def standing(attack: Attack, target: Target, ids: Tensor) -> Tensor:
    """Which of the examples `ids` `attack` never breaks: bool (len(ids),).

    An attack says itself how it is scored, by a method of this name and of these arguments. Of any
    other what it makes of a batch is shown to the model.
    """
    own = getattr(attack, "standing", None)
    if own is not None:
        found: Tensor = own(target, ids)
        return found
    kept, done = torch.ones_like(ids, dtype=torch.bool), 0
    for some, made in attacked(called(attack, target), target, ids):
        fooled = ~right(target.model, made, target.labels[some])
        kept[done : done + len(some)] = ~confirmed(target, some, made, fooled)
        done += len(some)
        if target.tick is not None:
            target.tick(lambda done=done: (done / len(ids), int(kept.sum())))  # type: ignore[misc]
    return kept


def confirmed(target: Target, ids: Tensor, made: Tensor, fooled: Tensor) -> Tensor:
    """Which of the `fooled`, bool (n,), fool the witness, too, where there is one."""
    if target.witness is None or not bool(fooled.any()):
        return fooled
    found = fooled.clone()
    found[fooled] = target.witness(ids[fooled], made[fooled])
    return found


def eight_bit(
    attack: Attack, model: nn.Module, x: Tensor, y: Tensor, ids: Tensor, *, seed: int
) -> Tensor:
    """What `attack` makes of one batch as a file can hold it, k / 255, drawn as for its score.

    By the attack's own method of this name. Raises `UserError` where it has none.
    """
    own = getattr(attack, "eight_bit", None)
    if own is None:
        raise UserError(f"only attacks of this library are saved; found {attack!r}")
    made: Tensor = own(model, x, y, ids, seed=seed)
    return made


def right(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Which answers are right."""
    with untouched(model), torch.no_grad():
        return told(model(x)) == y


def told(logits: Tensor) -> Tensor:
    """The class of each row, -1 where a NaN stands in it: no answer, so a wrong one."""
    return logits.argmax(1).masked_fill(logits.isnan().any(1), -1)


def name_of(attack: Attack) -> str:
    """Name of the family as the tables show it."""
    return str(getattr(attack, "name", getattr(attack, "__name__", repr(attack))))


def eps_of(attack: Attack) -> float:
    """The radius that it names; 0 where it names none."""
    return float(getattr(attack, "eps", 0.0))


def _by_id(attack: Attack) -> bool:
    return hasattr(attack, "by_id")


def _checked(made: object, x: Tensor, attack: Attack) -> Tensor:
    if not isinstance(made, Tensor) or made.shape != x.shape or not made.is_floating_point():
        found = f"{tuple(made.shape)}, {made.dtype}" if isinstance(made, Tensor) else kind_of(made)
        raise UserError(
            f"{attack!r} must return float images {tuple(x.shape)}, as it was given; found {found}"
        )
    made = made.detach().to(x)
    eps = getattr(attack, "eps", None)
    low, high = made.aminmax()
    distance, low, high = torch.stack([(made - x).abs().max(), low, high]).tolist()
    if not (low >= -1e-6 and high <= 1 + 1e-6):  # nor is NaN
        raise UserError(f"{attack!r} returned images outside [0, 1]: [{low:.3g}, {high:.3g}]")
    if eps is not None and not distance <= eps + 1e-5:
        raise UserError(f"{attack!r} moved a pixel by {distance:.4g}, further than its eps {eps:g}")
    return made.clamp(0, 1)


def _next_draw(generator: Draws) -> int:
    """What `draw_seed` would give, without taking it away."""
    if generator is None:
        return 0
    copy = torch.Generator(generator.device)
    return draw_seed(copy.set_state(generator.get_state()))


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """The global random states that a foreign attack may draw from, seeded; then as before."""
    gpus = [device] if device.type == "cuda" else []
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(gpus):
        try:
            torch.default_generator.manual_seed(seed)
            for gpu in gpus:
                with torch.cuda.device(gpu):
                    torch.cuda.manual_seed(seed)
            random.seed(seed)
            np.random.seed(seed % 2**32)
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


def seed_of(seed: int, place: int) -> int:
    """The seed of what comes in that place: the first, 0, has the seed itself."""
    return (seed + place * 0x9E3779B97F4A7C15) % 2**62


def draw_seed(generator: Draws) -> int:
    """A seed drawn from `generator`; 0 without one, so that nothing depends on global state."""
    if generator is None:
        return 0
    return int(torch.randint(2**62, (), generator=generator, device=generator.device))


def uniform(seed: int | Tensor, ids: Tensor, restart: Tensor, shape: torch.Size) -> Tensor:
    """Uniform draws in [0, 1) that depend on (seed, example id, restart, position) alone.

    A counter hashed by splitmix64 (Steele, Lea, Flood 2014): the same numbers on every device,
    for every batch size and order. `ids` and `restart` are int64 (n,); returns float32 (n, *shape).
    """
    key = _mix(_mix(_mix(torch.zeros_like(ids) + seed) ^ ids) + restart)
    counter = torch.arange(1, shape.numel() + 1, device=ids.device)
    bits = _mix(key[:, None] + counter * _signed(0x9E3779B97F4A7C15))
    return _shift(bits, 40).float().mul_(2.0**-24).view(len(ids), *shape)


def _mix(z: Tensor) -> Tensor:
    z = (z ^ _shift(z, 30)) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ _shift(z, 27)) * _signed(0x94D049BB133111EB)
    return z ^ _shift(z, 31)


def _shift(z: Tensor, by: int) -> Tensor:
    return (z >> by) & ((1 << (64 - by)) - 1)  # logical: torch's shift drags the sign along


def _signed(word: int) -> int:
    return word - 2**64


def to_pixels(adversarial: Tensor, x: Tensor, eps: float) -> Tensor:
    """`adversarial` on the 8-bit grid, k / 255, and still within `eps` of `x`.

    Each pixel goes to the nearest level among those in the ball, [x - eps, x + eps] and [0, 1]; so
    an image leaves the ball by rounding only where no level lies in it. Both are float in [0, 1]
    and of one shape.

    >>> to_pixels(torch.tensor([0.5]), torch.tensor([100 / 255]), eps=8 / 255) * 255
    tensor([108.])
    """
    # 1e-4 of a level: x and eps are levels themselves, up to the rounding of a division by 255
    low = ((x - eps).clamp(min=0) * 255 - 1e-4).ceil()
    high = ((x + eps).clamp(max=1) * 255 + 1e-4).floor()
    return torch.minimum(torch.maximum((adversarial * 255).round(), low), high).div(255)
