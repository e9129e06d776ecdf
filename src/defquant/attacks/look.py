"""A look at the model: what the engine asks, and how it is run again and again.

On a CPU the rows are padded to sizes for which convolution kernels are there; a size that stays is
run as it is. On a GPU a model of known modules is asked at a few sizes, a size that stays by a CUDA
graph; the gradient, which only points, is made in TensorFloat-32 there. The answer is float32, but
for the search on a network that is `smooth`: channels last and in TensorFloat-32; what then seems
to fool it is looked at again in float32.
"""

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from defquant.attacks.access import differentiable, untouched
from defquant.attacks.access import gradient as gradient_at
from defquant.attacks.contract import told
from defquant.attacks.graphs import alike, recorded, tensor_float
from defquant.attacks.lint import lint_answer
from defquant.attacks.losses import Loss, cross_entropy
from defquant.quantize import Quantizer

__all__ = [
    "Forward", "Look", "Looks", "Plan", "Radius", "State", "Surrogate", "at_once", "count", "look",
    "opened", "searchable", "smooth",
]  # fmt: skip

_log = logging.getLogger(__name__)

OFTEN = 4
"""Looks at one size after which it gets kernels, or a graph, of its own."""

Radius = float | Tensor
"""Of the ball: one, or one for each example, (n, 1, 1, 1)."""

State = dict[str, Tensor]
"""The rows in play; every tensor has one row for each.

The engine gives `x` (clean images), `y`, `target` (the label itself where the attack has no
targets), `id`, `start` (one number for each target and restart), `restart`, `row`, `step` (0),
`early` (no). An attack adds `at`, where the model is looked at next, and what else it must
remember; `step` rises to `Plan.steps`; `early` are rows that likely fool there and then move
without a gradient.
"""

Forward = Callable[[Tensor], Tensor]
"""Images to logits."""

Surrogate = Callable[[nn.Module], AbstractContextManager[tuple[Forward, ...]]]
"""Opens a model to attack: forwards that give its logits, and gradients that need not be its own.

Where there are several, logits and gradients are averaged over them.
"""


class Look(NamedTuple):
    """What the model answers at the rows' `at`: loss (n,), fooled (n,), gradient, shaped as `at`.

    The loss is not NaN (it is inf there), nor is the gradient (0 there).
    """

    loss: Tensor
    fooled: Tensor
    grad: Tensor


class Plan(NamedTuple):
    """How the engine runs an attack.

    Attributes:
        climbs: steps that need the gradient.
        queries: steps after them for which logits are enough, as they are for the look at the end.
        loss: what the attack raises.
        restarts: independent starts (of each target).
        targets: attack so many classes in turn, those of the highest clean logits; 0 for none.
        surrogate: how the model is opened; None for the model as it is.
        bounded: whether every iterate lies in the ball; else only those that do count.
        retreats: calls of `advance` that raise no `step`, at most.
        ahead: whether a look that neither fools nor is above the rows' `best_loss` changes their
            `step` and `at` alone: the next ones can then be taken together with it.
    """

    climbs: int
    queries: int = 0
    loss: Loss = cross_entropy
    restarts: int = 1
    targets: int = 0
    surrogate: Surrogate | None = None
    bounded: bool = True
    retreats: int = 0
    ahead: bool = False

    @property
    def steps(self) -> int:
        """A row has ended when its `step` has come so far and its `at` was looked at."""
        return self.climbs + self.queries

    @property
    def looks(self) -> int:
        return self.steps + self.retreats


@contextmanager
def opened(model: nn.Module, plan: Plan, x: Tensor) -> Iterator[tuple[Forward, ...]]:
    """The model's forwards as the plan wants them; it is left as it was found.

    Nothing outside of `look` is differentiated.
    """
    through = nullcontext((model,)) if plan.surrogate is None else plan.surrogate(model)
    exact = torch.autocast(x.device.type, enabled=False)
    with untouched(model), torch.no_grad(), exact, through as forwards:
        yield forwards


def look(
    forwards: Sequence[Forward],
    rows: State,
    plan: Plan,
    *,
    gradient: bool = True,
    room: int = 0,
    top: int = -1,
    rough: bool = False,
) -> Look:
    """Loss, whether the model is fooled, and the gradient, at the rows' `at`.

    The model sees `room` rows at least; on a CPU some at a time (`at_once`). Over several forwards
    loss and gradient are averaged, and the mean of the logits decides. `top`: the highest label, if
    it is known. `rough`: the backward pass in TensorFloat-32.
    """
    y, n, at = rows["y"], len(rows["y"]), rows["at"].detach()
    some = at_once(at)
    if n > some:
        split = zip(*(rows[name].split(some) for name in ("at", "y", "target")), strict=True)
        seen = [
            look(
                forwards, {"at": a, "y": y, "target": t}, plan, gradient=gradient,
                room=min(some, room - i * some), top=top, rough=rough,
            )
            for i, (a, y, t) in enumerate(split)
        ]  # fmt: skip
        return Look(*map(torch.cat, zip(*seen, strict=True)))
    if room > n:
        at = torch.cat([at, at.new_zeros(room - n, *at.shape[1:])])
    logits, losses, grads = [], [], []
    with differentiable() if gradient else torch.no_grad():
        at = at.requires_grad_(gradient)
        for forward in forwards:
            given = forward(at)
            lint_answer(given, len(at), top)
            answer = given[:n].float()
            value = plan.loss(answer, y, rows["target"])
            if gradient:
                with tensor_float(rough or None):
                    grads.append(gradient_at(value, at)[:n])
            logits.append(answer.detach())
            losses.append(value.detach())
    grad = _mean(grads).nan_to_num(0.0) if gradient else at.new_zeros(()).expand_as(at[:n])
    return Look(_mean(losses).nan_to_num(torch.inf), told(_mean(logits)) != y, grad)


def at_once(at: Tensor) -> int:
    """How many of the images `at` a CPU is given at a time: what lies in its caches.

    65,536 pixels, 64 images of 32x32; 16 images for each of its threads where these are many.
    """
    if at.device.type != "cpu":
        return len(at)
    pixels = at[:1, :1].numel()
    return max(8, max(64, 16 * torch.get_num_threads()) * 1024 // max(pixels, 1))


def _mean(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.stack(list(parts)).mean(0)


def searchable(model: nn.Module, plan: Plan, device: torch.device) -> bool:
    """Whether a GPU may record the looks: at a model of known modules, by a known surrogate."""
    own = plan.surrogate is None or type(plan.surrogate).__module__.startswith("defquant.")
    return device.type == "cuda" and own and alike(model)


_SMOOTH = ("defquant.models.nets", "defquant.weights", "defquant.lipschitz")


def smooth(model: nn.Module, plan: Plan) -> bool:
    """Whether no staircase is in the model or its surrogate: else no other arithmetic may search.

    What TensorFloat-32 changes in the last digits a rounding turns into a step, and the search goes
    astray. On an H100, of 1,000 images at 0.5/255, PGD-20 and the adaptive worst case left the same
    635 and 622 of a float network standing, but 561 and 480 of a 4-bit one, where float32 left 515
    and 401. Modules of which this is not known count as staircases.
    """

    def even(module: nn.Module) -> bool:
        home = type(module).__module__
        if isinstance(module, Quantizer):
            return module.bits is None
        whole = getattr(module, "weight_bits", None) is None
        return home.startswith("torch.nn.") or (home in _SMOOTH and whole)

    return getattr(plan.surrogate, "bits", None) is None and all(map(even, model.modules()))


class Looks:
    """`look` at `most` rows or fewer, for one attack on one model.

    `fast`: at fixed sizes, recorded; `rough`: those in TensorFloat-32 that are not `exact`.
    """

    def __init__(
        self,
        forwards: Sequence[Forward],
        plan: Plan,
        most: int,
        top: int,
        *,
        fast: bool = False,
        rough: bool = False,
    ) -> None:
        self._forwards, self._plan, self._most, self._top = forwards, plan, most, top
        self.fast, self.rough = fast, fast and rough
        self._met: Counter[int] = Counter()
        self._sized: dict[tuple[int, bool, bool], _Sized] = {}
        self._pool = torch.cuda.graph_pool_handle() if fast and torch.cuda.is_available() else None

    def __call__(self, rows: State, *, gradient: bool, exact: bool = False) -> Look:
        n = count(rows)
        if not self.fast:
            self._met[n] += 1
            room = n if self._met[n] > OFTEN else min(round_up(n), self._most)
            how: Any = {"gradient": gradient, "room": room, "rough": rows["at"].is_cuda}
            return look(self._forwards, rows, self._plan, top=self._top, **how)
        exact = exact or not self.rough
        key = min(fixed(n), self._most), gradient, exact
        if key not in self._sized:
            ask = partial(
                look, self._forwards, plan=self._plan, gradient=gradient, top=self._top, rough=True
            )
            self._sized[key] = _Sized(ask, rows, key[0], exact, self._pool)
        return self._sized[key](rows)


class _Sized:
    """A look at a fixed number of rows, in tensors that stay; recorded when it comes often."""

    def __init__(
        self, ask: Callable[..., Look], rows: State, room: int, exact: bool, pool: Any
    ) -> None:
        layout = torch.contiguous_format if exact else torch.channels_last
        at = rows["at"].new_zeros(room, *rows["at"].shape[1:]).contiguous(memory_format=layout)
        self._static = {"at": at, **{n: rows[n].new_zeros(room) for n in ("y", "target")}}
        self._ask, self._exact, self._pool, self._times = ask, exact, pool, 0
        self._replay: Callable[[], None] | None = None

    def _body(self) -> None:
        with tensor_float(not self._exact):
            self._seen = self._ask(rows=self._static)

    def __call__(self, rows: State) -> Look:
        n = count(rows)
        for name, part in self._static.items():
            part[:n].copy_(rows[name])
        self._times += 1
        if self._times == OFTEN:
            self._record()
        (self._replay or self._body)()
        return Look(*(part[:n].clone() for part in self._seen))

    def _record(self) -> None:
        device = self._static["at"].device
        try:
            self._replay = recorded(self._body, [], device, warm=1, pool=self._pool)
        except Exception as error:  # what refuses to be recorded goes on as it is
            _log.info("a look at %d rows is not recorded: %s", len(self._static["y"]), error)


def count(rows: State) -> int:
    return len(rows["row"])


def round_up(n: int) -> int:
    """`n` up to the next of 1, 2, 4, 8, 16, 32, 48, 64, ...

    A batch that shrinks row by row would have convolution kernels made for every size it has.
    """
    return 1 << (n - 1).bit_length() if n < 16 else -(-n // 16) * 16


def fixed(n: int) -> int:
    """`n` up to the next of 16, 32, 48, 64, 96, 128, 192, ...: the sizes of a GPU."""
    whole = max(16, 1 << (n - 1).bit_length())
    return whole * 3 // 4 if n <= whole * 3 // 4 and whole > 32 else whole
