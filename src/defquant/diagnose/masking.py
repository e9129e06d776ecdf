"""The masking verdict: is the robustness real, or are gradients hidden from the attack?"""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from defquant.attacks import APGD, BIM, FGSM, PGD, RFGSM, Adaptive, Attack, Square, Transfer
from defquant.attacks.access import differentiable, gradient, leaf, untouched
from defquant.attacks.engine import perturb
from defquant.attacks.lint import SAME
from defquant.attacks.losses import margin
from defquant.attacks.surrogates import twin_of
from defquant.config import check_eps
from defquant.data import to_unit
from defquant.errors import DefquantWarning, UserError
from defquant.evaluate import Images, answers, linted, robust
from defquant.quantize import Quantizer
from defquant.records import Score, html_table
from defquant.typed import written

__all__ = ["RULES", "Effort", "Finding", "Rule", "Sign", "Verdict", "judged", "masking_verdict"]

Finding = Literal["PASS", "WARN", "OVERSTATED", "FAIL", "not decided"]

SHARE = 0.05
"""Of the images that are right: what another attack may break beside the usual one. Sound attacks
on one honest float network differ by 1 to 4 points; masked gradients hide tens."""
EXAMPLES = 73  # of fewer images not even 0 has a Wilson interval that ends below `SHARE`
OVERSTATED = 0.10
"""Of all images: what other attacks may break beside the usual one before its number is no number.
The straight-through attack overstates honest networks of 2 bits by 12 points (CIFAR-10)."""
HUGE = 0.5  # within it every image can become the same flat grey: no classifier can stand
TINY = 1 / 16  # of eps: the noise under which the loss must follow its gradient
EXPLAINED = 0.25  # of the margin's change, by its gradient: 0.96 and more on plain float networks
CALLS = 3  # identical calls that must agree


@dataclass(frozen=True)
class Rule:
    """When a sign is raised, and what is said of it, as `docs/flags.md` explains it.

    It WARNs above the share `warn` of the images, and `fails` where the interval lies above that:
    `surely`, `if broken` by other attacks (a float network's alone), or `never`.
    `rounded` is the share for a FAIL of quantised networks, which show some signs by rounding
    alone: `noise` on 14 % of the images of an honest 2-bit network; a gradient worth no more than
    noise on a quarter is none.
    """

    means: str
    do: str
    warn: float = SHARE
    fails: Literal["surely", "if broken", "never"] = "surely"
    rounded: float | None = None


RULES: Mapping[str, Rule] = {
    name: Rule(**row) for name, row in written(__file__, "signs.yaml").items()
}


@dataclass(frozen=True)
class Effort:
    """How hard the attacks try.

    `steps` and `restarts` of the usual attack, PGD (and twice the steps); `queries` of the random
    search; `draws` of tiny noise for each image; `seed` of all; `batch_size` rows at a time.
    """

    steps: int = 40
    restarts: int = 2
    queries: int = 500
    draws: int = 16
    seed: int = 0
    batch_size: int = 256


@dataclass(frozen=True)
class Sign:
    """A sign: `finding` counts the images that show it, of those that are right."""

    name: str
    finding: Score
    verdict: Finding
    means: str
    do: str


@dataclass(frozen=True)
class Verdict:
    """What `masking_verdict` found at `eps`, in [0, 1].

    Robust accuracy of all images under PGD on the cross-entropy (`usual`) and under every attack
    made here (`strongest`); whether the network rounds its activations (`quantized`); and the signs
    in the order of `docs/flags.md`, without those that cannot be asked.
    """

    eps: float
    usual: Score
    strongest: Score
    quantized: bool
    signs: tuple[Sign, ...]

    @property
    def overstated(self) -> Score:
        """The images that the usual attack leaves and another breaks, of all."""
        return Score(self.usual.correct - self.strongest.correct, self.usual.total)

    @property
    def overall(self) -> Finding:
        """The worst of the signs; `not decided` counts only where no sign is raised.

        Without a FAIL: OVERSTATED, where the interval of `overstated` lies above 10 points.
        """
        found = {sign.verdict for sign in self.signs} or {"not decided"}
        if self.overstated.interval[0] > OVERSTATED:
            found.add("OVERSTATED")
        order: tuple[Finding, ...] = ("FAIL", "OVERSTATED", "WARN", "not decided", "PASS")
        return next(finding for finding in order if finding in found)

    def __str__(self) -> str:
        points = f" by {100 * self.overstated.accuracy:.0f} points"
        return self.overall + points * (self.overall == "OVERSTATED")

    def _repr_html_(self) -> str:
        about = f"Masked gradients? {self} at eps {self.eps * 255:.4g}/255; robust under PGD "
        about += f"{self.usual}, under all {self.strongest}"
        rows = [
            {"sign": s.name, "verdict": s.verdict, "images": s.finding, "means": s.means}
            for s in self.signs
        ]
        return html_table(rows, about)


def masking_verdict(
    model: nn.Module,
    data: Images,
    eps: float,
    *,
    substitute: nn.Module | None = None,
    effort: Effort | None = None,
) -> Verdict:
    """Test `model` for each sign of masked gradients, image by image, at L-infinity radius `eps`.

    The usual attack is PGD on the cross-entropy through the network's own backward pass. Its
    robust accuracy is an upper bound; the signs show that it is a loose one (Athalye et al. 2018,
    section 3.1; Carlini et al. 2019, section 3; Tramer et al. 2020). All of them count images
    that are classified rightly, with Wilson's 95 % interval; `judged` says when one is raised.

    What a verdict means. FAIL: the gradients are hidden, and no gradient attack's number stands.
    OVERSTATED: other attacks break 10 points more than the usual one, beyond chance: quote
    `strongest`, or `Adaptive`. So it is with honest networks of few bits: rounding's true gradient
    is zero, the straight-through one is a guess, and a better guess or another loss breaks more.
    That is a fault of the attack, which the network's maker neither made nor can mend. WARN: a
    sign without that proof.

    The signs `zero gradient`, `huge eps` and `noise` count only images that an attack breaks, or
    whose logits move under random +-eps. Where nothing moves, nothing may be there to hide; `flat`
    counts the others whose margin has no gradient either, and WARNs.

    At least 73 of `data` must be right for a PASS. `substitute`, another network of the same data,
    makes the black box. The model is left as it was found. Raises `UserError` for eps outside
    (0, 1], images outside [0, 1], labels or logits of a wrong shape.
    """
    if not check_eps(eps):
        raise UserError("the masking verdict needs an eps above 0; found 0: write 8/255")
    effort = effort or Effort()
    with warnings.catch_warnings():  # the sign `randomness` tells of it, with numbers
        for seen in ("an example's output depends", "two identical calls"):
            warnings.filterwarnings("ignore", seen, DefquantWarning)
        x, y = linted(model, data, effort.batch_size)
    known = any(isinstance(m, Quantizer) and m.bits is not None for m in twin_of(model).modules())
    connected, images = Connected(model), to_unit(x)
    right = answers(connected, (images, y), batch_size=effort.batch_size) == y
    scene, total = _Scene(connected, images[right], y[right], eps, effort), int(right.sum())
    usual, strongest, raised = _raised(scene, substitute, known) if total else (right, right, {})
    left, best = int(usual.sum()), int(strongest.sum())
    shown = {name: Score(int(raised[name].sum()), total) for name in RULES if name in raised}
    broken = left - best > SHARE * total
    signs = tuple(
        Sign(name, found, judged(name, found, known, broken), RULES[name].means, RULES[name].do)
        for name, found in shown.items()
    )
    return Verdict(eps, Score(left, len(x)), Score(best, len(x)), known, signs)


def judged(name: str, finding: Score, quantized: bool = False, broken: bool = False) -> Finding:
    """By the sign's `Rule`; `not decided` where it is not raised by fewer than 73 images.

    `broken`: whether all attacks together break 5 % more than the usual one.
    """
    rule, (low, _) = RULES[name], finding.interval
    limit = rule.warn if rule.rounded is None or not quantized else rule.rounded
    fails = rule.fails == "surely" or (rule.fails == "if broken" and broken and not quantized)
    if low > limit and fails:
        return "FAIL"
    if finding.accuracy > rule.warn:
        return "WARN"
    return "PASS" if finding.total >= EXAMPLES else "not decided"


class Connected(nn.Module):
    """The network, whose logits depend on the image for autograd too, with gradient 0 if need be.

    A network that leaves torch, or detaches, has no gradient at all and would stop an attack.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        if twin_of(model) is not model:  # through which surrogates attack
            self.defquant_twin = Connected(twin_of(model))

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

    def parts(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Images, labels and places, a batch at a time."""
        size, ids = self.effort.batch_size, torch.arange(len(self.y), device=self.y.device)
        return list(zip(self.x.split(size), self.y.split(size), ids.split(size), strict=True))


def _raised(
    scene: _Scene, substitute: nn.Module | None, known: bool
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Which images stand under the usual attack, and under all, and which show each sign: bool.

    Signs that cannot be asked are missing. Draws go by the image's place among the right ones.
    """
    everyone = torch.ones_like(scene.y, dtype=torch.bool)
    steps = scene.effort.steps
    usual = scene.left(everyone, PGD(scene.eps, steps=steps, restarts=scene.effort.restarts))
    beyond = _beyond(scene, usual, substitute, known)
    strongest = usual & ~torch.stack(list(beyond.values())).any(0)
    huge = {"huge eps": scene.left(everyone, BIM(HUGE, steps=steps))}
    looks = [_looked(scene, known, *part) for part in scene.parts()]
    seen = {name: torch.cat([look[name] for look in looks]) for name in looks[0]}
    moves = seen.pop("moves") | ~strongest  # where nothing does, nothing is hidden
    raised = beyond | huge | {"mid-path": _mid_path(scene)} | seen | {"randomness": _random(scene)}
    only = ("zero gradient", "huge eps", "noise")
    held = {name: raised[name] & moves for name in only} | {"flat": raised["flat"] & ~moves}
    return usual, strongest, raised | held


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
    # the parts of `Adaptive` through another backward pass, at full steps, unsearched
    parts = [part for part in Adaptive(eps, steps).attacks if isinstance(part, APGD)]
    through = [replace(p, steps=steps, queries=0) for p in parts if p.surrogate is not None]
    white = scene.left(straight, *through) if known else straight
    longer = PGD(eps, steps=2 * steps, restarts=scene.effort.restarts)
    found = {
        "one step": usual & ~scene.left(usual, FGSM(eps), RFGSM(eps)),
        "more steps": usual & ~scene.left(usual, longer),
        "loss": usual & ~straight,
        "random search": white & ~scene.left(white, Square(eps, queries=scene.effort.queries)),
    }
    if known:
        found["surrogate"] = straight & ~white
    if substitute is not None:
        box = Transfer(PGD(eps, steps=20), substitute)
        found["black box"] = white & ~scene.left(white, box)
    return found


def _mid_path(scene: _Scene) -> Tensor:
    """What fell on the way to an attack's last image, and not there."""
    seed, everyone = scene.effort.seed, torch.ones_like(scene.y, dtype=torch.bool)
    path = PGD(scene.eps, steps=scene.effort.steps)
    ends = [
        perturb(scene.model, x, y, path, seed=seed, ids=ids, keep="last")
        for x, y, ids in scene.parts()
    ]
    found = answers(scene.model, (torch.cat(ends), scene.y), batch_size=scene.effort.batch_size)
    return (found == scene.y) & ~scene.left(everyone, path)


def _near(x: Tensor, size: float, draws: torch.Generator) -> Tensor:
    """`x` moved by ±size at every pixel at random, in [0, 1]."""
    signs = torch.randint(2, x.shape, generator=draws).to(x).mul_(2).sub_(1)
    return (x + signs * size).clamp_(0, 1)


def _looked(scene: _Scene, known: bool, x: Tensor, y: Tensor, ids: Tensor) -> dict[str, Tensor]:
    """What the gradient at each image says of its surroundings; `moves`: whether the logits do.

    `jumps` where R² = 1 - sum (Δm - <g, δ>)² / sum Δm² over tiny δ is below 1/4, for the gradient g
    of the margin m; below 0 of quantised networks, whose g is a guess. `noise` where FGSM raises m
    less than random signs of the same size on average.
    """
    unexplained = 1.0 if known else 1 - EXPLAINED
    x, y = leaf(x), leaf(y)
    stepped = perturb(scene.model, x, y, FGSM(scene.eps), seed=0, ids=ids, keep="last")
    with untouched(scene.model), differentiable():
        at = x.clone().requires_grad_()
        logits = scene.model(at)
        loss = nn.functional.cross_entropy(logits, y, reduction="sum")
        grad = gradient(loss, at, keep=True).flatten(1)
        before = margin(logits, y, y)
        slope = gradient(before, at).nan_to_num(0.0)
    before, logits = before.detach(), logits.detach()
    moved, rest, whole, raised = (torch.zeros_like(before) for _ in range(4))
    draws = torch.Generator().manual_seed(scene.effort.seed + int(ids[0]))
    with untouched(scene.model), torch.no_grad():
        for _ in range(scene.effort.draws):
            far, near = _near(x, scene.eps, draws), _near(x, TINY * scene.eps, draws)
            z, change = scene.model(far), margin(scene.model(near), y, y) - before
            raised += margin(z, y, y) / scene.effort.draws
            moved = moved.maximum((z - logits).abs().amax(1))
            rest += (change - (slope * (near - x)).flatten(1).sum(1)) ** 2
            whole += change**2
        after = margin(scene.model(stepped), y, y)
    return {
        "zero gradient": ~grad.isfinite().all(1) | (grad == 0).all(1),
        "flat": (slope == 0).flatten(1).all(1),
        "jumps": (rest >= unexplained * whole) & (whole > 0),
        "noise": after < raised,
        "moves": ~(moved <= SAME * logits.abs().amax(1)),
    }  # fmt: skip


def _random(scene: _Scene) -> Tensor:
    """Whose logits differ between identical calls."""
    parts = scene.x.split(scene.effort.batch_size)
    with untouched(scene.model), torch.no_grad():
        calls = [torch.cat([scene.model(part) for part in parts]) for _ in range(CALLS)]
    far = (torch.stack(calls[1:]) - calls[0]).abs().amax((0, 2))
    return far > SAME * calls[0].abs().max()
