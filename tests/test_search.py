"""A search from where a gradient led: no weaker than its ascent, blind to nothing logits show."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import defquant as dq
from defquant.attacks import APGD, Square
from defquant.attacks.surrogates import SoftRound
from defquant.errors import UserError
from defquant.evaluate import robust


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


def scene(n: int = 24) -> tuple[Tensor, Tensor]:
    """Images a little brighter than the threshold; label 1."""
    x = 0.55 + 0.02 * torch.rand(n, 1, 6, 6, generator=torch.Generator().manual_seed(2))
    return x, torch.ones(n, dtype=torch.int64)


def test_queries_break_what_the_gradient_cannot() -> None:
    x, y = scene()
    for model in (Stairs(), Stairs(straight=False)):
        stand = {q: robust(model, (x, y), APGD(0.12, 20, queries=q)) for q in (0, 200)}
        assert stand[0].sum() >= len(x) - 4  # a random start may fool
        assert stand[200].sum() == 0
        assert robust(model, (x, y), Square(0.12, 200)).sum() == 0


@settings(max_examples=15, deadline=None)
@given(st.floats(0.01, 0.2), st.integers(0, 99), st.integers(1, 30), st.integers(1, 40))
def test_never_weaker_than_its_ascent_whatever_the_batch(
    eps: float, seed: int, batch_size: int, queries: int
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 8, 3), dq.QuantReLU(2, 0.5), nn.Flatten(), nn.Linear(128, 3))
    model.eval()
    x = torch.rand(20, 1, 6, 6, generator=torch.Generator().manual_seed(1))
    y = model(x).argmax(1)
    plain = APGD(eps, 5, loss="margin", surrogate=SoftRound())
    searched = APGD(eps, 5, loss="margin", surrogate=SoftRound(), queries=queries)
    left = robust(model, (x, y), searched, seed=seed)
    assert not (left & ~robust(model, (x, y), plain, seed=seed)).any()
    assert torch.equal(left, robust(model, (x, y), searched, seed=seed, batch_size=batch_size))


def test_a_called_search_returns_what_fools_in_the_ball() -> None:
    x, y = scene()
    model, attack = Stairs(), APGD(0.12, 10, queries=100)
    made = attack(model, x, y)
    assert (made - x).abs().max() <= 0.12 + 1e-6
    assert made.min() >= 0
    assert made.max() <= 1
    assert torch.equal(model(made).argmax(1) == y, robust(model, (x, y), attack))


def test_cost_is_steps_of_gradients_and_queries_of_logits() -> None:
    x, y = scene(32)
    model, attack = Stairs(), APGD(1e-4, 10, queries=30)  # nothing falls
    for batch_size in (8, 16, 32, 100):  # sizes that are not padded
        model.forwards = model.climbs = 0
        assert robust(model, (x, y), attack, standing=y > 0, batch_size=batch_size).all()
        assert model.climbs == 32 * 10
        assert model.forwards == 32 * (10 + 30 + 1)


def test_starts_and_targets_each_have_their_search() -> None:
    x, y = scene(6)
    model = Stairs()
    robust(model, (x, y), APGD(1e-4, 4, restarts=3, queries=7), standing=y > 0)
    assert model.climbs >= 6 * 3 * 4
    assert model.forwards - model.climbs >= 6 * 3 * 8


def test_mistakes_and_names() -> None:
    with pytest.raises(UserError, match="queries must be 0"):
        APGD(0.1, queries=-1)
    attack = APGD(0.1, 50, loss="margin", surrogate=SoftRound(), queries=200)
    assert attack.name == "APGD-MARGIN-50+200 (SoftRound())"
    assert repr(attack).endswith("surrogate=SoftRound(), queries=200)")
