"""Square: its schedule and squares, the exact answer of a linear network."""

from typing import Any

import torch
from torch import Tensor, nn

import defquant as dq
from defquant.attacks import Square
from defquant.attacks.engine import Look, Radius, State
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


def test_squares_tried_together_are_those_tried_one_by_one(monkeypatch: Any) -> None:
    """The same best loss after the same queries, in fewer looks."""
    model, x, y = scene(3, classes=2)
    ends, looks = [], []

    class Ended(Square):
        def advance(self, rows: State, look: Look, eps: Radius, seed: int) -> State:
            moved = super().advance(rows, look, eps, seed)
            if bool((moved["step"] == self.queries).all()) and len(moved["step"]) == 3:
                ends.append(moved["best_loss"][moved["row"].argsort()])
            return moved

    for together in (0, 64):
        monkeypatch.setattr("defquant.attacks.engine.at_once", lambda _, most=together: most)
        looks.append(0)
        with model.register_forward_hook(lambda *_: looks.append(looks.pop() + 1)):
            robust(model, (x, y), Ended(1e-4, 400), standing=torch.ones(3).bool())
    torch.testing.assert_close(ends[0], ends[-1], rtol=0, atol=1e-6)
    assert looks[1] < looks[0] / 2


def test_no_query_after_the_fall_and_none_with_a_graph() -> None:
    model, x, y = scene(20, classes=2)
    asked = 0

    def count(module: nn.Module, args: tuple[Tensor], answer: Tensor) -> None:
        nonlocal asked
        assert not torch.is_grad_enabled()
        asked += len(answer)

    handle = model.register_forward_hook(count)
    dq.robust_accuracy(model, (x, y), Square(0.3, queries=3000), batch_size=16)
    handle.remove()
    assert asked < 3000
