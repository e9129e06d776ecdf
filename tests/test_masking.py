"""The masking verdict: of networks whose masks are known, its rule, and the verb diagnose."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import defquant as dq
from conftest import tiny_images
from defquant import records
from defquant.diagnose import Effort, Sign, Verdict, judged, masking_verdict
from defquant.diagnose.masking import EXAMPLES, RULES, SHARE
from defquant.errors import UserError
from defquant.records import Score

QUICK = Effort(steps=10, restarts=1, queries=60, draws=4)
EPS = 76 / 255  # moves the margin of `Corners` by 152/255: more than any image has


class Corners(nn.Module):
    """The mean of each quadrant, times `scale`: linear, and right on every one of `tiny_images`."""

    def __init__(self, scale: float = 10.0) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(scale))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.avg_pool2d(x.mean(1, keepdim=True), 4).flatten(1) * self.scale


class Fronted(nn.Module):
    def __init__(self, front: Callable[[Tensor], Tensor], model: nn.Module) -> None:
        super().__init__()
        self.front, self.model = front, model

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.model(self.front(x))
        return logits


class Window(nn.Module):
    """Wrong only where the image's mean has risen by `low` to `high`, from a grey of 100/255.

    Its gradient points to the window; or, where it is `blind`, ever upwards.
    """

    def __init__(self, low: float, high: float, *, blind: bool) -> None:
        super().__init__()
        self.low, self.high, self.blind = low, high, blind

    def forward(self, x: Tensor) -> Tensor:
        rise = x.mean((1, 2, 3)) - 100 / 255
        right = (rise - (self.low + self.high) / 2).abs() - (self.high - self.low) / 2
        right = right.detach() + rise.detach() - rise if self.blind else right
        return torch.stack([right, -right], 1) * 100


def flat_images(count: int = 96) -> tuple[Tensor, Tensor]:
    return torch.full((count, 1, 8, 8), 100 / 255), torch.zeros(count, dtype=torch.long)


class _Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> Tensor:
        return -grad[0]


def reverse(x: Tensor) -> Tensor:
    out: Tensor = _Reversed.apply(x)  # type: ignore[no-untyped-call]
    return out


def levels(x: Tensor) -> Tensor:
    return (x * 255).round() / 255  # no gradient


def on_pixels_only(x: Tensor) -> Tensor:
    """A gradient for images of whole pixels alone, as clean ones are and random starts are not."""
    whole = ((x * 255).round() - x * 255).abs().amax((1, 2, 3), keepdim=True) < 1e-3
    return torch.where(whole, x, x.detach())


def detached(x: Tensor) -> Tensor:
    return torch.tensor(x.detach().numpy())


def noisy(x: Tensor) -> Tensor:
    return x + 0.01 * torch.randn_like(x)


def saturated() -> nn.Module:
    """Activations far outside [0, 6]: the clip lets no gradient through."""
    return nn.Sequential(Shift(), dq.QuantReLU(2))


class Shift(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 100 * (nn.functional.avg_pool2d(x, 4).flatten(1) - 0.35)


def examined(
    model: nn.Module, data: Any = None, eps: float = EPS, **options: Any
) -> dict[str, str]:
    found = masking_verdict(
        model.eval(), tiny_images(96) if data is None else data, eps,
        effort=options.pop("effort", QUICK), **options,
    )  # fmt: skip
    verdicts: dict[str, str] = {sign.name: sign.verdict for sign in found.signs}
    return verdicts | {"overall": found.overall}


# ------------------------------------------------------------- known answers


def test_a_linear_network_passes_every_sign_and_its_score_is_exact() -> None:
    data, eps = tiny_images(96), 60 / 255
    x, _ = data.take(torch.arange(96))
    logits = Corners(1.0)(x).sort(1).values
    expected = int((logits[:, -1] - logits[:, -2] > 2 * eps).sum())
    assert 0 < expected < 96
    found = masking_verdict(Corners().eval(), data, eps, effort=QUICK, substitute=Corners().eval())
    assert found.usual == found.strongest == Score(expected, 96)
    assert {sign.verdict for sign in found.signs} == {"PASS"}
    assert (found.overall, found.quantized) == ("PASS", False)
    assert [s.name for s in found.signs] == [name for name in RULES if name != "surrogate"]
    assert all(sign.finding.total == 96 for sign in found.signs)


MASKED: dict[str, tuple[nn.Module, tuple[str, ...]]] = {
    "rounded": (Fronted(levels, Corners()), ("zero gradient", "huge eps")),
    "detached": (Fronted(detached, Corners()), ("zero gradient", "huge eps", "random search")),
    "scaled": (Corners(1e5), ("zero gradient", "huge eps")),
    "random": (Fronted(noisy, Corners()), ("randomness",)),
    "reversed": (Fronted(reverse, Corners()), ("noise", "huge eps")),
    "on pixels only": (Fronted(on_pixels_only, Corners()), ("one step",)),
    "saturated": (saturated(), ("zero gradient", "huge eps")),
}


@pytest.mark.parametrize("name", MASKED)
def test_a_masked_network_raises_its_own_signs(name: str) -> None:
    model, signs = MASKED[name]
    found = examined(model)
    assert {found[sign] for sign in signs} == {"FAIL"}, found
    assert found["overall"] == "FAIL"


def test_huge_eps_starts_at_the_image() -> None:
    """A random start in so large a ball would fool the network without any gradient."""
    still = Fronted(levels, Corners()).eval()
    found = masking_verdict(still, tiny_images(96), 1 / 255, effort=QUICK)
    huge = next(sign for sign in found.signs if sign.name == "huge eps")
    assert huge.finding == Score(96, 96)


def test_a_black_box_breaks_what_the_white_box_leaves() -> None:
    model = Fronted(levels, Corners()).eval()
    few = replace(QUICK, queries=1)
    assert examined(model, substitute=Corners().eval(), effort=few)["black box"] == "FAIL"
    assert "black box" not in examined(model, effort=few)
    away = Fronted(reverse, Corners()).eval()
    assert examined(model, substitute=away, effort=few)["black box"] == "PASS"


def test_too_few_steps_step_over_the_window() -> None:
    eps, two = 0.1, replace(QUICK, steps=2)
    model = Window(0.5 * eps, 0.75 * eps, blind=False)
    assert examined(model, flat_images(), eps, effort=two)["more steps"] == "WARN"
    assert (
        examined(model, flat_images(), eps, effort=replace(two, steps=40))["more steps"] == "PASS"
    )


def test_a_walk_that_crosses_the_window_and_ends_beyond_it() -> None:
    eps = 0.1
    crossed = Window(0.3 * eps, 0.6 * eps, blind=True)
    found = masking_verdict(crossed.eval(), flat_images(), eps, effort=replace(QUICK, steps=40))
    assert found.usual.correct == 0  # the best iterate is kept: the score is right
    shown = {sign.name: sign for sign in found.signs}
    assert shown["mid-path"].finding.correct == 96
    assert shown["mid-path"].verdict == "FAIL"
    at_the_end = Window(0.3 * eps, 1.2 * eps, blind=True)
    assert examined(at_the_end, flat_images(), eps)["mid-path"] == "PASS"


def test_nan_gradients_are_no_gradients() -> None:
    def root(x: Tensor) -> Tensor:
        return x + 0 * (x - x.detach()).sqrt()  # infinity times 0

    assert examined(Fronted(root, Corners()))["zero gradient"] == "FAIL"


def test_a_network_that_is_always_wrong_is_not_decided() -> None:
    x, y = tiny_images(80).take(torch.arange(80))
    found = masking_verdict(Corners().eval(), (x, (y + 1) % 4), EPS, effort=QUICK)
    assert (found.signs, found.overall) == ((), "not decided")


def test_few_images_can_fail_but_not_pass() -> None:
    assert set(examined(Corners(), tiny_images(40)).values()) == {"not decided"}
    few = examined(Corners(1e5), tiny_images(40))
    assert (few["zero gradient"], few["randomness"]) == ("FAIL", "not decided")


def test_the_network_is_left_alone_and_the_batch_does_not_matter() -> None:
    torch.manual_seed(0)
    model = dq.wide_resnet(10, 1, bits=2, in_channels=1, num_classes=4).train()
    model(torch.rand(8, 1, 8, 8))
    model.eval()
    before = [t.clone() for t in model.state_dict().values()]
    found: list[Verdict] = []
    for size in (40, 7):
        state = torch.get_rng_state()
        effort = replace(QUICK, steps=3, queries=5, batch_size=size)
        found.append(masking_verdict(model, tiny_images(40), EPS, effort=effort))
        assert torch.equal(state, torch.get_rng_state())
    assert found[0].usual == found[1].usual
    assert all(map(torch.equal, before, model.state_dict().values()))
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


# ------------------------------------------- gradients that point to the wrong place


def trained(activation: Callable[[], nn.Module]) -> nn.Sequential:
    torch.manual_seed(0)
    convs = nn.Conv2d(1, 16, 3, padding=1), nn.Conv2d(16, 32, 3, padding=1, stride=2)
    model = nn.Sequential(
        convs[0], activation(), convs[1], activation(), nn.Flatten(), nn.Linear(512, 10)
    )
    digits = dq.load("digits", split="train")
    x, y = digits.take(torch.arange(len(digits)))
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for rows in (rows for _ in range(6) for rows in torch.randperm(len(x)).split(64)):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
        optimizer.step()
    return model.eval()


@pytest.fixture(scope="module")
def honest() -> nn.Sequential:
    return trained(nn.ReLU)


class _Back(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.change = change
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> tuple[Tensor, None]:
        return ctx.change(grad[0]), None


def smaller_half(grad: Tensor) -> Tensor:
    size = grad.flatten(1).abs()
    kept = size <= size.median(1, keepdim=True).values
    masked: Tensor = grad * kept.view_as(grad)
    return masked


def drowned(grad: Tensor) -> Tensor:
    each = grad.flatten(1).norm(dim=1).view(-1, 1, 1, 1) / 8
    noisy_grad: Tensor = grad + 3 * each * torch.randn_like(grad)
    return noisy_grad


def half_detached(x: Tensor) -> Tensor:
    return torch.cat([x[:, ::2].detach(), x[:, 1::2]], 1)


class Winners(nn.Module):
    """The largest fifth of all activations (Xiao et al. 2020)."""

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(1)
        least = flat.topk(flat.shape[1] // 5, 1).values[:, -1:]
        return (flat * (flat >= least)).view_as(x)


def misled(kind: str, honest: nn.Sequential) -> nn.Module:
    if kind == "winners":
        return trained(Winners)
    if kind == "half detached":
        return nn.Sequential(honest[0], honest[1], Fronted(half_detached, honest[2:]))
    change = {"smaller half": smaller_half, "drowned": drowned}[kind]
    return Fronted(lambda x: _Back.apply(x, change), honest)  # type: ignore[no-untyped-call]


SHORT = Effort(steps=20, restarts=1, queries=200, draws=8)


@pytest.mark.parametrize("kind", ["smaller half", "drowned", "half detached", "winners"])
def test_a_gradient_of_another_network_is_found(kind: str, honest: nn.Sequential) -> None:
    """Each is the honest network, or one like it, to whoever looks at logits."""
    digits = dq.load("digits", split="test").first(60)
    found = examined(misled(kind, honest), digits, 20 / 255, effort=SHORT)
    assert found["overall"] == "FAIL", found
    assert found["random search" if kind == "half detached" else "jumps"] == "FAIL"


def test_the_honest_network_passes(honest: nn.Sequential) -> None:
    digits = dq.load("digits", split="test").first(80)
    assert set(examined(honest, digits, 16 / 255, effort=SHORT).values()) == {"PASS"}


class Dead(nn.Module):
    """Its neuron is dead, or sure, within any small ball: robust there, without a gradient."""

    def forward(self, x: Tensor) -> Tensor:
        bright = nn.functional.relu(100 * (x.mean((1, 2, 3)) - 0.6)).clamp(max=10)
        return torch.stack([5 - bright, bright - 5], 1)


class Sure(nn.Module):
    """`Corners` behind a softmax of large logits: it falls as easily, and nothing moves before."""

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = Corners(1e5)(x)
        return 50 * logits.softmax(1)


@pytest.mark.parametrize("model", [Dead(), Sure()])
def test_where_nothing_moves_something_may_be_hidden(model: nn.Module) -> None:
    data, eps = (flat_images(), 16 / 255) if isinstance(model, Dead) else (tiny_images(96), 1 / 255)
    found = masking_verdict(model.eval(), data, eps, effort=QUICK)
    assert {s.name for s in found.signs if s.verdict != "PASS"} == {"flat"}
    assert (found.overall, found.strongest) == ("WARN", Score(96, 96))


# ------------------------------------------------------------------- the rule


def test_the_interval_decides() -> None:
    def least(name: str, total: int, **options: bool) -> int:
        return next(
            k for k in range(total + 1) if judged(name, Score(k, total), **options) == "FAIL"
        )

    first = least("one step", 100)
    assert Score(first, 100).interval[0] > SHARE >= Score(first - 1, 100).interval[0]
    assert judged("one step", Score(6, 100)) == "WARN"
    assert judged("one step", Score(5, 100)) == "PASS"
    assert least("one step", 1000) / 1000 < first / 100
    assert least("noise", 100, quantized=True) / 100 > 0.25
    assert least("zero gradient", 100, quantized=True) > least("zero gradient", 100)


def test_the_least_number_of_images_is_the_least_that_can_pass() -> None:
    assert Score(0, EXAMPLES).interval[1] <= SHARE < Score(0, EXAMPLES - 1).interval[1]
    assert judged("loss", Score(0, EXAMPLES)) == "PASS"
    assert judged("loss", Score(0, EXAMPLES - 1)) == "not decided"


@pytest.mark.parametrize("name", ["loss", "more steps", "surrogate"])
def test_a_better_loss_or_backward_pass_is_no_mask(name: str) -> None:
    assert judged(name, Score(50, 100), broken=True) == "WARN"
    assert judged("random search", Score(50, 100)) == "FAIL"


def test_a_gradient_that_explains_nothing_fails_where_others_break_more() -> None:
    """Of quantised networks it is a symptom of rounding, honest or not."""
    every = Score(100, 100)
    assert judged("jumps", every) == judged("jumps", every, quantized=True, broken=True) == "WARN"
    assert judged("jumps", every, broken=True) == "FAIL"


def test_overstated_takes_ten_points_beyond_chance() -> None:
    sign = Sign("loss", Score(20, 100), "WARN", "", "")
    verdict = Verdict(0.1, Score(40, 100), Score(22, 100), True, (sign,))
    assert verdict.overstated.interval[0] > 0.10
    assert (verdict.overall, str(verdict)) == ("OVERSTATED", "OVERSTATED by 18 points")
    assert str(replace(verdict, strongest=Score(25, 100))) == "WARN"
    masked = replace(sign, verdict="FAIL")
    assert replace(verdict, signs=(masked,)).overall == "FAIL"


def test_every_sign_is_explained() -> None:
    text = (Path(__file__).parents[1] / "docs" / "flags.md").read_text()
    for name, rule in RULES.items():
        assert f"| **{name}** |" in text and rule.means in text and rule.do, name
    assert (RULES["zero gradient"].warn, RULES["zero gradient"].rounded) == (records.MASKED, SHARE)


def test_bad_eps_is_refused() -> None:
    for eps, message in ((0.0, "eps above 0"), (8.0, "write 8/255")):
        with pytest.raises(UserError, match=message):
            masking_verdict(Corners(), tiny_images(8), eps)
