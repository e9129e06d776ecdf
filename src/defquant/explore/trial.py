"""One picture, several networks, one attack: what each answers, and where the error grows."""

import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from defquant.attacks import Composition, Single, untouched
from defquant.attacks.contract import eight_bit, to_pixels
from defquant.attacks.names import ATTACKS, parse_attack
from defquant.attacks.surrogates import twin_of
from defquant.checkpoint import load
from defquant.data import Dataset, to_unit
from defquant.diagnose.layers import normalized_distance
from defquant.errors import UserError
from defquant.judging.suspects import Suspect, Witnessed, suspect

__all__ = [
    "CHOICES", "STEPS", "Frame", "Network", "Outcome", "answer", "explore", "named", "opened",
    "specs_of",
]  # fmt: skip

STEPS, SECONDS = 200, 60.0
"""At most, of an attack on one network."""
CHOICES = tuple(name for name in ATTACKS if name != "standard")  # which asks 5,000 times and more
_ONE = torch.zeros(1, dtype=torch.int64)


@dataclass(frozen=True)
class Network:
    """A suspect by a short name, and as it is attacked: `view`, images in [0, 1] to logits.

    `kind` is the method and the bits of a run, by which it has its colour and mark.
    """

    name: str
    suspect: Suspect
    view: nn.Module
    kind: str = ""


@dataclass(frozen=True)
class Answer:
    """Of one 8-bit image: the class that the thing itself says, -1 for none; and its softmax."""

    said: int
    sure: tuple[float, ...]


@dataclass(frozen=True)
class Frame:
    """An attack at work: the network, looks so far of about so many, the pixels it looks at."""

    name: str
    looks: int
    planned: int
    at: Tensor
    sure: tuple[float, ...]


@dataclass(frozen=True)
class Outcome:
    """What became of one network.

    Attributes:
        made_on: the network whose image this is, its own or another's.
        clean, attacked: its answers to the picture and to the adversarial image.
        pixels: of the adversarial image, uint8 (c, h, w), within eps of the picture.
        seconds, looks: of the attack; 0 where the image is another's.
        growth: D, Eq. 4, at the input of each convolution and linear layer, in order of the call;
            the first is the image. Nothing where none was seen.
    """

    name: str
    made_on: str
    label: int
    clean: Answer
    attacked: Answer
    pixels: Tensor
    seconds: float
    looks: int
    growth: tuple[float, ...] = ()
    kind: str = ""

    @property
    def grown(self) -> list[float]:
        return [d for d in self.growth if isfinite(d)]

    @property
    def state(self) -> str:
        """`fooled` only where the network itself turned wrong, at the 8-bit image."""
        if self.clean.said != self.label:
            return "wrong before"
        return "holds" if self.attacked.said == self.label else "fooled"


def specs_of(models: Sequence[str]) -> dict[str, str]:
    """Models by short names; a folder of runs stands for each of them."""
    found = []
    for spec in models:
        runs = sorted(Path(spec).glob("*/checkpoint.safetensors")) if Path(spec).is_dir() else []
        whole = (Path(spec) / "checkpoint.safetensors").exists() or not runs
        found += [spec] if whole else [str(run.parent) for run in runs]
    names = [Path(spec).name for spec in found]
    return {n if names.count(n) == 1 else s: s for n, s in zip(names, found, strict=True)}


def opened(
    name: str, spec: "str | nn.Module", data: Dataset, weights: str | None = None
) -> Network:
    """The network that `spec` names (see `suspect`), ready. Raises `UserError` as `suspect`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of scores, which are not made here
        found = suspect(spec, data, weights if ".py:" in str(spec) else None)
    view = Witnessed(found) if found.kind == "ONNX" else found.model
    facts = load(str(spec)).facts if found.kind == "run" else None
    return Network(name, found, view, f"{facts.method} {facts.model.bits}-bit" if facts else "")


def named(attack: str, eps: float, steps: int) -> Single | Composition:
    """One of `CHOICES` at `eps` in [0, 1]; `steps` 1 to 200: draws of random, tens of queries of
    square. Raises `UserError` for another.
    """
    if attack not in CHOICES or not 1 <= steps <= STEPS:
        raise UserError(
            f"explore takes {', '.join(CHOICES)} of 1 to {STEPS} steps; found {attack!r} of {steps}"
        )
    counts = steps * 10 if attack == "square" else steps
    return parse_attack(f"{attack}-{counts}" if ATTACKS[attack][1] else attack, eps)


def answer(network: Network, pixels: Tensor) -> Answer:
    """What it says of `pixels`, uint8 (c, h, w): the file or module itself."""
    with untouched(network.view), torch.no_grad():
        logits: Tensor = network.view(to_unit(pixels[None])).float()
    sure = logits[0].softmax(0).nan_to_num(0.0)
    return Answer(int(network.suspect.answers(pixels[None])[0]), tuple(sure.tolist()))


def explore(
    networks: Sequence[Network],
    pixels: Tensor,
    label: int,
    attack: Single | Composition,
    *,
    on: str | None = None,
    tell: Callable[[Frame], object] | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> Iterator[Outcome]:
    """`attack` on each of `networks`, or on the one called `on` and shown to all, one by one.

    Args:
        networks: of one data set.
        pixels: the picture, uint8 (c, h, w).
        label: its true class.
        attack: made with seed 0; its best iterate counts, rounded to 8 bits within the ball.
        on: name of one of `networks`.
        tell: shown each look that the attack takes.
        stop: asked before each look.

    Raises `UserError` where it was stopped or took more than 60 s.
    """
    x, y = to_unit(pixels[None]), torch.tensor([label])
    makers = [network for network in networks if on in (None, network.name)]
    kept: tuple[Tensor, str, float, int] | None = None
    for network in makers[:1] if on else makers:
        start = time.perf_counter()
        with _watched(network, attack, tell, stop) as looks:
            made = eight_bit(attack, network.view, x, y, _ONE, seed=0)
        at = to_pixels(made, x, attack.eps).mul(255).round().to(torch.uint8)[0]
        kept = at, network.name, time.perf_counter() - start, looks[0]
        for shown in networks if on else [network]:
            yield _outcome(shown, pixels, label, *kept)


def _outcome(
    network: Network, pixels: Tensor, label: int, at: Tensor, made_on: str, seconds: float,
    looks: int,
) -> Outcome:  # fmt: skip
    before, after = (_inputs(network.suspect.model, to_unit(p[None])) for p in (pixels, at))
    alike = [a.shape for a in before] == [a.shape for a in after]
    growth = [float(normalized_distance(*pair)) for pair in zip(before, after, strict=False)]
    own = made_on == network.name
    return Outcome(
        network.name, made_on, label, answer(network, pixels), answer(network, at), at,
        seconds * own, looks * own, tuple(growth) if alike else (), network.kind,
    )  # fmt: skip


class _Layers(TorchDispatchMode):
    """Keeps what convolutions and products are given, flat, whatever module or file they are of."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.given: list[Tensor] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = str(function).split(".")[1]
        if name in ("convolution", "mm", "addmm"):
            self.given.append(args[name == "addmm"].detach().reshape(1, -1).clone())
        return function(*args, **(kwargs or {}))


def _inputs(model: nn.Module, x: Tensor) -> list[Tensor]:
    layers = _Layers()
    with untouched(model), torch.no_grad(), layers:
        model(x)
    return layers.given


@contextmanager
def _watched(
    network: Network,
    attack: Single | Composition,
    tell: Callable[[Frame], object] | None,
    stop: Callable[[], bool],
) -> Iterator[list[int]]:
    """Counts the looks at a network, shows them, and ends them."""
    looks, planned, end = [0], _planned(attack), time.monotonic() + SECONDS

    def before(*_: Any) -> None:
        if stop() or time.monotonic() > end:
            late = f"more than {SECONDS:.0f} s: take fewer steps"
            raise UserError(f"the attack was stopped{'' if stop() else f': {late}'}")

    def after(_: nn.Module, given: tuple[Tensor, ...], logits: Tensor) -> None:
        looks[0] += 1
        if tell is not None:
            sure = tuple(logits[0].detach().float().softmax(0).tolist())
            at = given[0][0].detach().mul(255).round().to(torch.uint8)
            tell(Frame(network.name, looks[0], max(planned, looks[0]), at, sure))

    with ExitStack() as stack:
        for module in dict.fromkeys((network.view, twin_of(network.view))):
            stack.enter_context(module.register_forward_pre_hook(before))
            stack.enter_context(module.register_forward_hook(after))
        yield looks


def _planned(attack: Single | Composition) -> int:
    """Looks that an attack takes, at a guess: it may end before, or look twice at a time."""
    if isinstance(attack, Composition):
        return sum(_planned(part) for part in attack.attacks if isinstance(part, Single))
    plan = attack.plan
    return plan.restarts * max(1, plan.targets) * (plan.looks + 1)
