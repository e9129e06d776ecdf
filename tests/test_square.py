"""Square: its schedule and squares, the exact answer of a linear network, logits alone."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import defquant as dq
from defquant.attacks import Square
from defquant.attacks.square import _with_square, side_of
from defquant.evaluate import robust
from linear_scenes import middle_eps, scene


def rows(n: int, step: int, size: int = 32) -> dict[str, Tensor]:
    x = torch.full((n, 3, size, size), 0.5)
    ids = torch.arange(n)
    return {"x": x, "id": ids, "start": torch.zeros_like(ids), "step": torch.full_like(ids, step)}


def test_the_side_follows_the_papers_schedule() -> None:
    for queries in (10_000, 5_000, 500):
        for step in range(0, queries, 7):
            passed = int(step / queries * 10_000)
            halvings = sum(passed > count for count in (10, 50, 200, 500, 1e3, 2e3, 4e3, 6e3, 8e3))
            side = max(1, round((0.8 / 2**halvings * 32 * 32) ** 0.5))
            assert side_of(rows(1, step), queries, 0.8).item() == side, (queries, step)


def test_a_square_lies_anywhere_and_changes_something() -> None:
    eps, side = 0.1, torch.full((2000,), 3)
    scene = rows(2000, 5, size=8)
    best = scene["x"] + eps  # every + again would change nothing
    moved = _with_square(best, scene, side, eps, seed=0)
    changed = (moved != best).any(1)
    assert (changed.flatten(1).sum(1) == 9).all()
    assert ((moved - scene["x"]).abs() - eps).abs().max() < 1e-6
    assert changed.any(0).all(), "the corners, too"
    tops = changed.any(2).float().argmax(1)
    assert (torch.bincount(tops, minlength=6) > 240).all()  # 2000 / 6 = 333 each
    assert torch.bincount(tops).numel() == 6


def test_on_a_linear_network_it_comes_near_the_optimum_and_never_below() -> None:
    model, x, y = scene(30, classes=2)
    eps, stand = middle_eps(model, x, y)
    found = [dq.robust_accuracy(model, (x, y), Square(eps, queries=q)).correct for q in (5, 2000)]
    assert stand <= found[1] < found[0]
    assert found[1] <= stand + 1


@settings(max_examples=15, deadline=None)
@given(
    eps=st.sampled_from([0.0, 1 / 255, 0.1, 1.0]),
    seed=st.integers(0, 100),
    batch_size=st.sampled_from([1, 3, 7]),
)
def test_ball_range_batch_size_and_order(eps: float, seed: int, batch_size: int) -> None:
    model, _, y = scene(12)
    x = torch.rand(12, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    attack = Square(eps, queries=8)
    made = attack(model, x, y, generator=torch.Generator().manual_seed(seed))
    assert (made - x).abs().max() <= eps + 1e-6
    assert made.min() >= 0
    assert made.max() <= 1
    standing = torch.ones(12, dtype=torch.bool)
    whole = robust(model, (x, y), attack, seed=seed, standing=standing)
    parts = robust(model, (x, y), attack, seed=seed, standing=standing, batch_size=batch_size)
    assert torch.equal(whole, parts)
    order = torch.randperm(12)
    mixed = attack(
        model, x[order], y[order], generator=torch.Generator().manual_seed(seed), ids=order
    )
    torch.testing.assert_close(mixed, made[order])


class Foreign(nn.Module):
    """As a wrapper of another runtime: no parameters, float32 numpy inside, never a gradient."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.__dict__["inner"] = inner  # hidden from torch

    def forward(self, x: Tensor) -> Tensor:
        assert not torch.is_grad_enabled()
        with torch.no_grad():
            answer: Tensor = self.__dict__["inner"](torch.from_numpy(x.numpy()))
        return answer


def test_logits_are_all_it_asks_for() -> None:
    model, x, y = scene(20)
    eps, _ = middle_eps(model, x, y)
    foreign = Foreign(model).eval()
    assert not list(foreign.parameters())
    attack = Square(eps, queries=30)
    assert dq.robust_accuracy(foreign, (x, y), attack) == dq.robust_accuracy(model, (x, y), attack)
    torch.testing.assert_close(attack(foreign, x, y), attack(model, x, y))


def test_no_query_after_the_fall() -> None:
    model, x, y = scene(20, classes=2)
    asked = 0

    def count(module: nn.Module, args: tuple[Tensor], answer: Tensor) -> None:
        nonlocal asked
        asked += len(answer)

    handle = model.register_forward_hook(count)
    dq.robust_accuracy(model, (x, y), Square(0.3, queries=3000), batch_size=16)
    handle.remove()
    assert asked < 3000


def test_a_users_mistakes() -> None:
    for queries, p in ((0, 0.8), (10, 0.0), (10, 1.5)):
        with pytest.raises(dq.UserError):
            Square(0.1, queries=queries, p=p)
    assert repr(Square(8 / 255)) == "Square(eps=8/255, queries=5000, p=0.8)"
