"""The masking verdict: is the robustness real, or are gradients hidden from the attack?"""

import warnings
from dataclasses import dataclass
from typing import Literal

from torch import nn

from defquant.config import check_eps
from defquant.data import to_unit
from defquant.diagnose.signs import Effort, Evidence, evidence
from defquant.diagnose.words import DO, MEANS
from defquant.errors import DefquantWarning, UserError
from defquant.evaluate import Images, linted
from defquant.results import MASKED, Score

__all__ = ["Finding", "Sign", "Verdict", "judged", "masking_verdict"]

Finding = Literal["PASS", "WARN", "FAIL", "not decided"]

SHARE = 0.05
"""Of the images that are right: what another attack may break beside the usual one. Sound attacks
on one honest float network differ by 1 to 4 points; masked gradients hide tens."""
EXAMPLES = 73  # of fewer images not even 0 has a Wilson interval that ends below `SHARE`
COLLAPSE = 0.20
"""Of the images that are right: what a network may lose to a better loss or backward pass. The
straight-through attack overstates honest networks of 2 bits by 12 points (CIFAR-10, WRN-10-1)."""
NOWHERE = 0.5  # the share of images on which the gradient may say nothing of the loss nearby
MIDWAY = 0.10
"""A walk with steps of one size circles the boundary: some of its last images are whole again."""
LIMITS = {"zero gradient": MASKED, "jumps": NOWHERE, "mid-path": MIDWAY}
ROUNDED: dict[str, float] = {"zero gradient": SHARE, "noise": 0.25, "mid-path": 1}
"""Limits of a FAIL for quantised networks, which show these signs by rounding alone: `noise` on
14 %
of the images of an honest 2-bit network; a gradient worth no more than noise on a quarter is none.
"""
ADAPTIVE = ("loss", "more steps", "surrogate")  # signs that `Adaptive` is the answer to
ORDER = (
    "one step", "black box", "huge eps", "random search", "more steps", "zero gradient", "jumps",
    "mid-path", "noise", "loss", "surrogate", "randomness",
)  # fmt: skip


@dataclass(frozen=True)
class Sign:
    """One sign of masked gradients.

    Attributes:
        name: as in `docs/flags.md`.
        finding: images that show it (`correct`), of those that are classified rightly (`total`).
        verdict: see `judged`.
        means: what it says of the network or of the attack.
        do: what to do about it.
    """

    name: str
    finding: Score
    verdict: Finding
    means: str
    do: str


@dataclass(frozen=True)
class Verdict:
    """What `masking_verdict` found.

    Attributes:
        eps: in [0, 1].
        usual: robust accuracy under PGD on the cross-entropy, of all images.
        strongest: the same under every attack of the verdict together.
        quantized: whether the network rounds its activations.
        signs: in the order of `docs/flags.md`; those that cannot be asked are missing.
    """

    eps: float
    usual: Score
    strongest: Score
    quantized: bool
    signs: tuple[Sign, ...]

    @property
    def overall(self) -> Finding:
        """The worst of the signs; `not decided` counts only where no sign is raised."""
        found = {sign.verdict for sign in self.signs} or {"not decided"}
        order: tuple[Finding, ...] = ("FAIL", "WARN", "not decided", "PASS")
        return next(finding for finding in order if finding in found)


def masking_verdict(
    model: nn.Module,
    data: Images,
    eps: float,
    *,
    substitute: nn.Module | None = None,
    effort: Effort | None = None,
) -> Verdict:
    """Test `model` for each sign of masked gradients, image by image, at radius `eps`.

    The usual attack is PGD on the cross-entropy through the network's own backward pass. Its
    robust accuracy is an upper bound; the signs show that it is a loose one (Athalye et al. 2018,
    section 3.1; Carlini et al. 2019, section 3; Tramer et al. 2020). All of them count images
    that are classified rightly, with Wilson's 95 % interval; `judged` says when one is raised.

    What a verdict means. FAIL: the gradients are hidden, and no gradient attack's number stands.
    WARN: the network can be attacked, but the usual attack overstates it: quote `Adaptive`. So it
    is with honest networks of few bits: rounding's true gradient is zero, the straight-through one
    is a guess, and a better guess or another loss breaks more. That is a fault of the attack, which
    the network's maker neither made nor can mend. Nor is it one of a linear network that the margin
    breaks more of than the cross-entropy. Hence the signs `loss`, `more steps` and `surrogate` FAIL
    only where the robust accuracy collapses: all attacks together break more than 20 % of the
    images *and* more than half of what the usual one leaves.

    Args:
        model: any module that maps images in [0, 1] to logits; it is left as it was found.
        data: images and labels. At least 73 of them must be right for a PASS.
        eps: L-infinity radius, in (0, 1].
        substitute: another network of the same data, for the black box.
        effort: of the attacks; when none, `Effort()`.

    Raises:
        UserError: eps outside (0, 1], images outside [0, 1], labels or logits of a wrong shape.
    """
    if not check_eps(eps):
        raise UserError("the masking verdict needs an eps above 0; found 0: write 8/255")
    effort = effort or Effort()
    with warnings.catch_warnings():  # the sign `randomness` tells of it, with numbers
        for seen in ("an example's output depends", "two identical calls"):
            warnings.filterwarnings("ignore", seen, DefquantWarning)
        x, y = linted(model, data, effort.batch_size)
    found = evidence(model, to_unit(x), y, eps, effort, substitute)
    return Verdict(
        eps, Score(int(found.usual.sum()), len(x)), Score(int(found.strongest.sum()), len(x)),
        found.quantized, _signs(found),
    )  # fmt: skip


def judged(name: str, finding: Score, quantized: bool = False, collapsed: bool = False) -> Finding:
    """FAIL where the interval lies wholly above the sign's limit, WARN where only the rate does.

    The limit is 5 % of the images, for the signs of `LIMITS` what stands there. `not decided`
    where neither holds and fewer than 73 images were tested. The signs of `ADAPTIVE` FAIL only
    where the network `collapsed`; of a quantised one those that rounding alone makes have the
    limits of `ROUNDED` for a FAIL, and keep theirs for a WARN. `jumps` never FAILs alone: rounded
    colours with a straight-through gradient make it, too, and can be attacked.
    """
    limit = LIMITS.get(name, SHARE)
    low, _ = finding.interval
    above = low > limit
    if name == "jumps":
        above = False
    elif name in ADAPTIVE:
        above = above and collapsed
    elif quantized:
        above = low > ROUNDED.get(name, limit)
    if above:
        return "FAIL"
    if finding.accuracy > limit:
        return "WARN"
    return "PASS" if finding.total >= EXAMPLES else "not decided"


def _signs(found: Evidence) -> tuple[Sign, ...]:
    signs: list[Sign] = []
    collapsed = found.right > 0 and _collapsed(found)
    for name in ORDER:
        if name in found.raised:
            finding = Score(int(found.raised[name].sum()), found.right)
            verdict = judged(name, finding, found.quantized, collapsed)
            signs.append(Sign(name, finding, verdict, MEANS[name], DO[name]))
    return tuple(signs)


def _collapsed(found: Evidence) -> bool:
    """Whether all attacks leave less than half of what the usual one does, and far less at that."""
    usual, strongest = int(found.usual.sum()), int(found.strongest.sum())
    lost = Score(usual - strongest, found.right)
    return lost.interval[0] > COLLAPSE and 2 * strongest < usual
