"""APGD: the exact answer of linear networks, a slow reference of its schedule, its losses."""

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import defquant as dq
from defquant.attacks import APGD, Square, losses
from defquant.attacks.apgd import checkpoints
from defquant.attacks.contract import uniform
from defquant.attacks.losses import LossName
from defquant.attacks.surrogates import SoftRound
from defquant.evaluate import robust
from linear_scenes import middle_eps, scene

NAMES: list[LossName] = ["ce", "scaled-ce", "margin", "dlr", "dlr-targeted"]


class Hills(nn.Module):
    """Two classes, z_1 - z_0 bumpy in every pixel: steps overshoot and must be halved."""

    def forward(self, x: Tensor) -> Tensor:
        bumps = torch.sin(9 * x + torch.arange(x[0].numel()).view(x[0].shape)).sum((1, 2, 3))
        return torch.stack([torch.full_like(bumps, 10), bumps], 1)


def slow_apgd(
    model: nn.Module, x: Tensor, y: Tensor, eps: float, steps: int, noise: Tensor
) -> Tensor:
    """Algorithm 1 of the paper on one image (c, h, w), with the margin; the best loss."""

    def see(at: Tensor) -> tuple[float, Tensor]:
        at = at[None].clone().requires_grad_()
        loss = losses.margin(model(at), y[None], y[None]).sum()
        return float(loss.detach()), torch.autograd.grad(loss, at)[0][0]

    def project(z: Tensor) -> Tensor:
        return torch.minimum(torch.maximum(z, x - eps), x + eps).clamp(0, 1)

    marks, p = [0.0, 0.22], 0.22
    while (p := marks[-1] + max(marks[-1] - marks[-2] - 0.03, 0.06)) <= 1:
        marks.append(p)
    w = [math.ceil(round(mark * steps, 6)) for mark in marks]
    eta, at = 2 * eps, project(x + eps * noise / noise.abs().max())
    before = at
    path = [see(at)]
    best, best_at = path[0], at
    eta_before, best_before = eta, best[0]
    halved = True
    grad = path[0][1]
    for k in range(1, steps + 1):
        alpha = 1.0 if k == 1 else 0.75
        z = project(at + eta * grad.sign())
        new = project(at + alpha * (z - at) + (1 - alpha) * (at - before))
        before, at = at, new
        path.append(see(at))
        grad = path[-1][1]
        if path[-1][0] > best[0]:
            best, best_at = path[-1], at
        if k in w[1:]:
            last = w[w.index(k) - 1]
            gains = sum(path[i + 1][0] > path[i][0] for i in range(last, k))
            stuck = eta == eta_before and best[0] <= best_before and not halved
            eta_before, best_before = eta, best[0]
            halved = gains <= 0.75 * (k - last) or stuck
            if halved:
                eta, at, grad = eta / 2, best_at, best[1]
    return torch.tensor(best[0])


def test_the_paths_are_those_of_the_paper() -> None:
    model, eps, steps = Hills().eval(), 0.3, 30
    x = 0.3 + 0.4 * torch.rand(6, 1, 3, 3, generator=torch.Generator().manual_seed(0))
    y, ids = torch.zeros(6, dtype=torch.int64), torch.arange(6)
    made = APGD(eps, steps, loss="margin")(model, x, y)
    noise = uniform(0, ids, torch.zeros_like(ids), x.shape[1:]) * 2 - 1
    ours = losses.margin(model(made), y, y)
    slow = [slow_apgd(model, x[i], y[i], eps, steps, noise[i]) for i in range(6)]
    torch.testing.assert_close(ours, torch.stack(slow), rtol=0, atol=1e-4)


def test_checkpoints() -> None:
    assert checkpoints(100) == (22, 41, 57, 70, 80, 87, 93, 99)
    assert checkpoints(1) == (1,)
    assert checkpoints(5) == (2, 3, 4, 5)
    for steps in range(1, 300):
        found = checkpoints(steps)
        assert list(found) == sorted(set(found))
        assert found[0] >= 1
        assert found[-1] <= steps


@pytest.mark.parametrize("loss", NAMES)
def test_on_a_linear_network_it_finds_all_there_is(loss: LossName) -> None:
    model, x, y = scene()
    eps, stand = middle_eps(model, x, y)
    targets = APGD(eps, 20, restarts=2, loss=loss, targets=4)
    if loss == "dlr-targeted":  # every class in turn: exact
        assert dq.robust_accuracy(model, (x, y), targets).correct == stand
    else:  # the likeliest class need not be the nearest, but no more can fall than can
        assert stand <= dq.robust_accuracy(model, (x, y), targets).correct < len(y)
    model, x, y = scene(30, classes=2)
    eps, stand = middle_eps(model, x, y)
    assert dq.robust_accuracy(model, (x, y), APGD(eps, 10, loss=loss)).correct == stand


def test_dlr_by_hand_and_its_fallback() -> None:
    logits = torch.tensor([[5.0, 3.0, 1.0, 0.0], [4.0, 3.0, 2.0, 0.0]], requires_grad=True)
    y = torch.tensor([0, 2])
    loss = losses.dlr(logits, y, y)
    torch.testing.assert_close(loss.detach(), torch.tensor([-0.5, 1.0]))
    grad = torch.autograd.grad(loss.sum(), logits)[0]
    assert grad[1].tolist() == [1.0, 0.0, -1.0, 0.0]  # constant at 1: the margin's gradient
    targeted = losses.dlr_targeted(logits, torch.tensor([0, 0]), torch.tensor([1, 3]))
    torch.testing.assert_close(targeted.detach(), torch.tensor([-2 / 4.5, -4 / 3]))
    few = torch.tensor([[2.0, 1.0]])
    for each in (losses.dlr, losses.dlr_targeted):
        zero, one = torch.tensor([0]), torch.tensor([1])
        assert each(few, zero, one).item() == -1


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_losses_that_do_not_vanish(scale: float) -> None:
    """Cross-entropy has no gradient on a network x 1e4; the others are as before."""
    model, x, y = scene(10)
    x = x.requires_grad_()
    for name in NAMES:
        value = losses.LOSSES[name](model(x) * scale, y, (y + 1) % 5)
        grad = torch.autograd.grad(value.sum(), x)[0]
        alive = bool((grad.abs().amax((1, 2, 3)) > 0).all())
        assert alive == (name != "ce" or scale < 1e4), name


class Stairs(nn.Module):
    """Two classes by a sum of rounded pixels: the true gradient is zero nearly everywhere.

    With `straight` a straight-through gradient that points the wrong way, else one of zero.
    """

    def __init__(self, straight: bool = True) -> None:
        super().__init__()
        self.straight = straight
        self.forwards = self.climbs = 0
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        self.forwards += len(x)
        self.climbs += len(x) * torch.is_grad_enabled()
        steps = (5 * x).round() / 5
        turned = -1.0 if self.straight else 0.0
        total = (steps.detach() + turned * (x - x.detach())).mean((1, 2, 3)) - 0.5
        return torch.stack([-total, total], 1)


def stairs_scene(n: int = 24) -> tuple[Tensor, Tensor]:
    """Images a little brighter than the threshold; label 1."""
    x = 0.55 + 0.02 * torch.rand(n, 1, 6, 6, generator=torch.Generator().manual_seed(2))
    return x, torch.ones(n, dtype=torch.int64)


def test_queries_break_what_the_gradient_cannot() -> None:
    x, y = stairs_scene()
    for model in (Stairs(), Stairs(straight=False)):
        stand = {q: robust(model, (x, y), APGD(0.12, 20, queries=q)) for q in (0, 200)}
        assert stand[0].sum() >= len(x) - 4  # a random start may fool
        assert stand[200].sum() == 0
        assert robust(model, (x, y), Square(0.12, 200)).sum() == 0


@settings(max_examples=15, deadline=None)
@example(0.130859375, 67, 2, 22)  # with float32 weights, a tie of two images that 2 bits see as one
@given(st.floats(0.01, 0.2), st.integers(0, 99), st.integers(1, 30), st.integers(1, 40))
def test_never_weaker_than_its_ascent_whatever_the_batch(
    eps: float, seed: int, batch_size: int, queries: int
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 8, 3), dq.QuantReLU(2, 0.5), nn.Flatten(), nn.Linear(128, 3))
    model.eval().double()  # in float32 last digits, which a batch's size changes, tip a rounding,
    for weights in model.parameters():  # and sums of float32 weights lie midway between logits
        nn.init.uniform_(weights, -0.2, 0.2)
    x = torch.rand(20, 1, 6, 6, generator=torch.Generator().manual_seed(1))
    y = model(x.double()).argmax(1)
    plain = APGD(eps, 5, loss="margin", surrogate=SoftRound())
    searched = APGD(eps, 5, loss="margin", surrogate=SoftRound(), queries=queries)
    left = robust(model, (x, y), searched, seed=seed)
    assert not (left & ~robust(model, (x, y), plain, seed=seed)).any()
    assert torch.equal(left, robust(model, (x, y), searched, seed=seed, batch_size=batch_size))


def test_cost_is_steps_of_gradients_and_queries_of_logits() -> None:
    x, y = stairs_scene(32)
    model, attack = Stairs(), APGD(1e-4, 10, queries=30)  # nothing falls
    for batch_size in (8, 16, 32, 100):  # sizes that are not padded
        model.forwards = model.climbs = 0
        assert robust(model, (x, y), attack, standing=y > 0, batch_size=batch_size).all()
        assert model.climbs == 32 * 10
        assert model.forwards == 32 * (10 + 30 + 1)


def test_starts_and_targets_each_have_their_search() -> None:
    x, y = stairs_scene(6)
    model = Stairs()
    robust(model, (x, y), APGD(1e-4, 4, restarts=3, queries=7), standing=y > 0)
    assert model.climbs >= 6 * 3 * 4
    assert model.forwards - model.climbs >= 6 * 3 * 8
