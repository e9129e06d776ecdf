"""APGD: the exact answer of linear networks, a slow reference of its schedule, its losses."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import defquant as dq
from defquant.attacks import APGD, losses
from defquant.attacks.apgd import checkpoints
from defquant.attacks.contract import uniform
from defquant.attacks.losses import LossName
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


@settings(max_examples=20, deadline=None)
@given(
    loss=st.sampled_from(NAMES),
    eps=st.sampled_from([0.0, 1 / 255, 0.1, 1.0]),
    seed=st.integers(0, 100),
    batch_size=st.sampled_from([1, 3, 7]),
)
def test_ball_range_batch_size_and_order(
    loss: LossName, eps: float, seed: int, batch_size: int
) -> None:
    model, x, y = scene(12)
    x = torch.rand(12, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    attack = APGD(eps, 4, restarts=2, loss=loss, targets=2)
    made = attack(model, x, y, generator=torch.Generator().manual_seed(seed))
    assert (made - x).abs().max() <= eps + 1e-6
    assert made.min() >= 0
    assert made.max() <= 1
    if eps == 0:
        assert torch.equal(made, x)
    standing = torch.ones(12, dtype=torch.bool)
    whole = robust(model, (x, y), attack, seed=seed, standing=standing)
    parts = robust(model, (x, y), attack, seed=seed, standing=standing, batch_size=batch_size)
    assert torch.equal(whole, parts)
    order = torch.randperm(12)
    mixed = attack(
        model, x[order], y[order], generator=torch.Generator().manual_seed(seed), ids=order
    )
    torch.testing.assert_close(mixed, made[order], rtol=0, atol=1e-5)


def test_what_was_found_cannot_be_lost() -> None:
    """The images returned fool exactly where the example fell."""
    model, x, y = scene(40)
    eps, _ = middle_eps(model, x, y)
    for loss in NAMES:
        attack = APGD(eps, 10, loss=loss)
        made = attack(model, x, y, generator=torch.Generator().manual_seed(0))
        fooled = model(made).argmax(1) != y
        again = APGD(eps, 10, loss=loss, restarts=3)
        assert not (robust(model, (x, y), again) & ~robust(model, (x, y), attack)).any()
        assert 10 <= int(fooled.sum()) <= 25


def test_nan_stays_in_its_row() -> None:
    class Poisoned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = scene()[0]

        def forward(self, x: Tensor) -> Tensor:
            return torch.where(x[:, :1, 0, 0] > 0.95, torch.nan, self.inner(x))

    sound, x, y = scene()
    eps, _ = middle_eps(sound, x, y)
    for loss in NAMES:
        clean = APGD(eps, 6, loss=loss)(sound, x, y)
        sick = x.clone()
        sick[0, 0, 0, 0] = 1.0
        dirty = APGD(eps, 6, loss=loss)(Poisoned().eval(), sick, y)
        torch.testing.assert_close(dirty[1:], clean[1:])
        assert dirty.isfinite().all()


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


def test_a_users_mistakes() -> None:
    mistakes: list[dict[str, Any]] = [
        {"steps": 0}, {"restarts": 0}, {"targets": 0}, {"loss": "l2"}, {"eps": 8},
    ]  # fmt: skip
    for mistake in mistakes:
        with pytest.raises(dq.UserError) as error:
            APGD(**({"eps": 0.1} | mistake))
        assert "\n" not in str(error.value)
    assert repr(APGD(8 / 255, loss="dlr-targeted")) == (
        "APGD(eps=8/255, steps=100, loss=dlr-targeted, targets=9)"
    )
