"""The signs of masked gradients, example by example: what each attack breaks and another leaves."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from defquant.attacks import APGD, BIM, FGSM, PGD, RFGSM, Adaptive, Attack, Square, Transfer
from defquant.attacks.access import differentiable, gradient, leaf, untouched
from defquant.attacks.engine import perturb
from defquant.attacks.lint import SAME
from defquant.attacks.losses import margin
from defquant.evaluate import answers, robust
from defquant.quantize import Quantizer

__all__ = ["HUGE", "Effort", "Evidence", "evidence", "is_quantized"]

HUGE = 0.5  # within it every image can become the same flat grey: no classifier can stand
TINY = 1 / 16  # of eps: the noise under which the loss must follow its gradient
CALLS = 3  # identical calls that must agree


@dataclass(frozen=True)
class Effort:
    """How hard the attacks try.

    Attributes:
        steps: of the usual attack, PGD; `2 steps` for the doubled one.
        restarts: of both.
        queries: of the random search (Square).
        draws: tiny perturbations of each image.
        seed: of every draw.
        batch_size: rows at a time.
    """

    steps: int = 40
    restarts: int = 2
    queries: int = 500
    draws: int = 16
    seed: int = 0
    batch_size: int = 256


@dataclass(frozen=True)
class Evidence:
    """What `evidence` found of the images that are classified rightly, all bool (right,).

    Attributes:
        images: all of them; `right`: those classified rightly, clean.
        usual: which stand under the usual attack, PGD on the cross-entropy.
        strongest: which stand under every attack made here.
        raised: for each sign, which images show it; a sign that cannot be asked is missing.
        quantized: whether the network rounds activations by a known quantiser.
    """

    images: int
    right: int
    usual: Tensor
    strongest: Tensor
    raised: dict[str, Tensor]
    quantized: bool


class _Connected(nn.Module):
    """The network, whose logits depend on the image for autograd too, with gradient 0 if need be.

    A network that leaves torch, or detaches, has no gradient at all and would stop an attack.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.model(x)
        if torch.is_grad_enabled() and x.requires_grad:
            return logits + (0 * x).flatten(1).sum(1, keepdim=True)
        return logits


@dataclass(frozen=True)
class _Scene:
    """A network and images that it has right."""

    model: nn.Module
    x: Tensor
    y: Tensor
    eps: float
    effort: Effort

    def left(self, standing: Tensor, *attacks: Attack) -> Tensor:
        """Which of `standing` none of `attacks` breaks."""
        for place, attack in enumerate(attacks):
            standing = robust(
                self.model, (self.x, self.y), attack, standing=standing,
                seed=self.effort.seed + place, batch_size=self.effort.batch_size,
            )  # fmt: skip
        return standing

    def wrong(self, x: Tensor) -> Tensor:
        """Which of the images `x`, in the place of the scene's, are classified wrongly."""
        found = answers(self.model, (x, self.y), batch_size=self.effort.batch_size)
        return found != self.y


def is_quantized(model: nn.Module) -> bool:
    """Whether a quantiser of `model` rounds activations."""
    return any(isinstance(m, Quantizer) and m.bits is not None for m in model.modules())


def evidence(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    eps: float,
    effort: Effort,
    substitute: nn.Module | None = None,
) -> Evidence:
    """Attack the images (n, c, h, w) in [0, 1] that `model` has right, and note what shows a sign.

    The model is left as it was found. Draws are keyed by the image's place among the right ones.
    """
    model = _Connected(model)
    right = ~_Scene(model, x, y, eps, effort).wrong(x)
    scene, known = _Scene(model, x[right], y[right], eps, effort), is_quantized(model)
    everyone = torch.ones_like(scene.y, dtype=torch.bool)
    if not len(scene.y):
        return Evidence(len(x), 0, everyone, everyone, {}, known)
    usual = scene.left(everyone, PGD(eps, steps=effort.steps, restarts=effort.restarts))
    beyond = _beyond(scene, usual, substitute, known)
    strongest = usual & ~torch.stack(list(beyond.values())).any(0)
    huge = {"huge eps": scene.left(everyone, BIM(HUGE, steps=effort.steps))}
    raised = beyond | huge | _paths(scene) | _gradients(scene) | {"randomness": _random(scene)}
    return Evidence(len(x), len(scene.y), usual, strongest, raised, known)


def _beyond(
    scene: _Scene, usual: Tensor, substitute: nn.Module | None, known: bool
) -> dict[str, Tensor]:
    """What other attacks break of the images that the usual one leaves.

    Random search and transfer are held against all gradient attacks together: what a better
    gradient finds too is that gradient's sign.
    """
    eps, steps = scene.eps, scene.effort.steps
    losses = [APGD(eps, steps, loss=loss) for loss in ("margin", "dlr", "scaled-ce")]
    straight = scene.left(usual, *losses)
    white = scene.left(straight, *_surrogates(eps, steps)) if known else straight
    found = {
        "one step": usual & ~scene.left(usual, FGSM(eps), RFGSM(eps)),
        "more steps": usual
        & ~scene.left(usual, PGD(eps, steps=2 * steps, restarts=scene.effort.restarts)),
        "loss": usual & ~straight,
        "random search": white & ~scene.left(white, Square(eps, queries=scene.effort.queries)),
    }
    if known:
        found["surrogate"] = straight & ~white
    if substitute is not None:
        through = Transfer(PGD(eps, steps=20), substitute)
        found["black box"] = white & ~scene.left(white, through)
    return found


def _surrogates(eps: float, steps: int) -> Sequence[Attack]:
    """The parts of `Adaptive` that go through another backward pass, at full steps, unsearched."""
    parts = (part for part in Adaptive(eps, steps).attacks if isinstance(part, APGD))
    return [replace(part, steps=steps, queries=0) for part in parts if part.surrogate is not None]


def _paths(scene: _Scene) -> dict[str, Tensor]:
    """What fell on the way to an attack's last image, and not there."""
    seed, eps, everyone = scene.effort.seed, scene.eps, torch.ones_like(scene.y, dtype=torch.bool)
    path = PGD(eps, steps=scene.effort.steps)
    ends = [
        perturb(scene.model, x, y, path, seed=seed, ids=ids, keep="last")
        for x, y, ids in _parts(scene)
    ]
    whole = ~scene.wrong(torch.cat(ends))
    return {"mid-path": whole & ~scene.left(everyone, path), "noise": _noise(scene)}


def _noise(scene: _Scene) -> Tensor:
    """Where FGSM raises the margin of error less than random signs of the same size on average."""
    attack, found = FGSM(scene.eps), []
    draws = torch.Generator().manual_seed(scene.effort.seed)
    for x, y, ids in _parts(scene):
        moved = perturb(scene.model, x, y, attack, seed=0, ids=ids, keep="last")
        with untouched(scene.model), torch.no_grad():
            total = torch.zeros(len(x), device=x.device)
            for _ in range(scene.effort.draws):
                total += margin(scene.model(_near(x, scene.eps, draws)), y, y)
            found.append(margin(scene.model(moved), y, y) < total / scene.effort.draws)
    return torch.cat(found)


def _near(x: Tensor, size: float, draws: torch.Generator) -> Tensor:
    """`x` moved by ±size at every pixel at random, in [0, 1]."""
    signs = torch.randint(2, x.shape, generator=draws).to(x).mul_(2).sub_(1)
    return (x + signs * size).clamp_(0, 1)


def _parts(scene: _Scene) -> list[tuple[Tensor, Tensor, Tensor]]:
    size, ids = scene.effort.batch_size, torch.arange(len(scene.y), device=scene.y.device)
    return list(zip(scene.x.split(size), scene.y.split(size), ids.split(size), strict=True))


def _gradients(scene: _Scene) -> dict[str, Tensor]:
    """Gradients that are zero or not numbers, and those that say nothing of the loss nearby."""
    dead, jumps = [], []
    draws = torch.Generator().manual_seed(scene.effort.seed)
    for x, y, _ in _parts(scene):
        with untouched(scene.model), differentiable():
            x, y = leaf(x).requires_grad_(), leaf(y)
            logits = scene.model(x)
            loss = nn.functional.cross_entropy(logits, y, reduction="sum")
            grad = gradient(loss, x, keep=True).flatten(1)
            dead.append(~grad.isfinite().all(1) | (grad == 0).all(1))
            before = margin(logits, y, y)
            slope = gradient(before, x).nan_to_num(0.0)
            jumps.append(_jumps(scene, x.detach(), y, before.detach(), slope, draws))
    return {"zero gradient": torch.cat(dead), "jumps": torch.cat(jumps)}


@torch.no_grad()
def _jumps(
    scene: _Scene, x: Tensor, y: Tensor, before: Tensor, slope: Tensor, draws: torch.Generator
) -> Tensor:
    """Where sum (Δm - <g, δ>)² >= sum Δm² over tiny δ, some Δm not 0: g explains nothing of it."""
    rest, whole = torch.zeros_like(before), torch.zeros_like(before)
    for _ in range(scene.effort.draws):
        near = _near(x, TINY * scene.eps, draws)
        change = margin(scene.model(near), y, y) - before
        rest += (change - (slope * (near - x)).flatten(1).sum(1)) ** 2
        whole += change**2
    return (rest >= whole) & (whole > 0)


def _random(scene: _Scene) -> Tensor:
    """Whose logits differ between identical calls."""
    parts = scene.x.split(scene.effort.batch_size)
    with untouched(scene.model), torch.no_grad():
        calls = [torch.cat([scene.model(part) for part in parts]) for _ in range(CALLS)]
    far = (torch.stack(calls[1:]) - calls[0]).abs().amax((0, 2))
    return far > SAME * calls[0].abs().max()
