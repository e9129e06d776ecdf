import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import defquant as dq
from conftest import refused
from defquant.attacks import FGSM, PGD, Attack, Random, Transfer
from defquant.attacks.contract import Ask
from defquant.data import Dataset
from defquant.evaluate import correct, robust, sweep, vanishing


class Threshold(nn.Module):
    """Right on images brighter than 0.5 on average, for class 1."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        z = (x.mean((1, 2, 3)) - 0.5) * self.w * 20
        return torch.stack([-z, z], 1)


def ladder() -> tuple[Tensor, Tensor]:
    """Images whose distance from the threshold is 0, 1/255, ... 99/255, all of class 1."""
    images = (torch.arange(100) / 255 + 0.5).clamp(0, 1)
    return images.view(-1, 1, 1, 1).expand(-1, 1, 4, 4), torch.ones(100, dtype=torch.int64)


class Foreign:
    """An attack of someone else's."""

    def __init__(
        self, move: Callable[[Tensor, Tensor], object], eps: float = 1 / 255, name: str = "Foreign"
    ) -> None:
        self.move, self.eps, self.name = move, eps, name

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, **_: object) -> Tensor:
        return self.move(x, y)  # type: ignore[return-value]


def idle(x: Tensor, y: Tensor) -> Tensor:
    return x


EVERYONE = torch.ones(100, dtype=torch.bool)


def test_robust_accuracy_counts_exactly_those_within_reach() -> None:
    model, data = Threshold().eval(), ladder()
    for pixels in (5, 20, 60):
        eps = (pixels + 0.5) / 255
        for attack in (FGSM(eps), Foreign(lambda x, y, eps=eps: x - eps, eps)):  # type: ignore[misc]
            assert dq.robust_accuracy(model, data, attack) == dq.Score(100 - pixels - 1, 100)
    assert dq.accuracy(model, data).correct == 99  # the first is on the threshold: argmax says 0


def test_uint8_and_float_images_score_the_same() -> None:
    images = torch.randint(0, 256, (50, 1, 4, 4), generator=torch.Generator().manual_seed(0))
    labels = torch.ones(50, dtype=torch.int64)
    data = Dataset(images.to(torch.uint8), labels, ("0", "1"), "noise")
    model, floats, attack = Threshold().eval(), (images.float() / 255, labels), PGD(4 / 255)
    assert dq.robust_accuracy(model, data, attack) == dq.robust_accuracy(model, floats, attack)
    assert torch.equal(correct(model, data), correct(model, floats))


def test_sweeps_fall_monotonically_and_carry_the_fallen() -> None:
    model, data = Threshold().eval(), ladder()

    weak = Foreign(idle, 0.2, "FGSM")
    attacks: list[Attack] = [FGSM(30 / 255), FGSM(10 / 255), Random(5 / 255), weak]
    found = list(sweep(model, data, attacks))
    assert found[0].attack is None
    fgsm = [s for s in found if getattr(s.attack, "name", "") == "FGSM"]
    assert [s.score.correct for s in fgsm] == sorted((s.score.correct for s in fgsm), reverse=True)
    assert [round(s.attack.eps * 255) for s in fgsm] == [10, 30, 51]  # type: ignore[union-attr]
    assert fgsm[0].score.correct == 89
    assert fgsm[-1].attack is weak
    assert fgsm[-1].score == fgsm[-2].score
    assert all((a.survivors | ~b.survivors).all() for a, b in pairwise(fgsm))


def test_progress_rises_to_the_end_and_changes_nothing() -> None:
    """Batches, restarts, looks without a gradient, parts and a user's own function alike."""
    model, data = Threshold().eval(), ladder()

    eps = 40 / 255
    attacks: list[Attack] = [
        PGD(eps, steps=5, restarts=2), dq.Square(eps, queries=30), dq.Adaptive(eps, 4),
        Foreign(idle),
    ]  # fmt: skip
    told: list[list[tuple[float, int]]] = []

    @contextmanager
    def watch(attack: Attack) -> Iterator[Callable[[Ask], None]]:
        told.append([])
        yield lambda ask: told[-1].append(ask())

    found = list(sweep(model, data, attacks, batch_size=16, watch=watch))
    assert [s.score for s in found] == [s.score for s in sweep(model, data, attacks, batch_size=16)]
    for one, scored in zip(told, found[1:], strict=True):
        shares, standing = zip(*one, strict=True)
        assert 0 <= shares[0] < 0.3 and 0.8 < shares[-1] <= 1
        assert all(b > a - 0.1 for a, b in pairwise(shares))  # a guess: what falls is left out
        assert sorted(standing, reverse=True) == list(standing)
        assert standing[0] > 80 and standing[-1] == scored.score.correct


@pytest.mark.parametrize("inside", [lambda a: a, lambda a: dq.Worst((a, FGSM(1 / 255))),
    lambda a: Transfer(a, Threshold().eval())])  # fmt: skip
@pytest.mark.parametrize(("move", "said"), [
    (lambda x, y: x.sub_(0.25), "further than its eps"),
    (lambda x, y: x[:1], "must return float images"),
    (lambda x, y: x.mul(255).byte(), "must return float images"),
    (lambda x, y: (x, y), "must return float images"),
    (lambda x, y: torch.full_like(x, torch.nan), "outside"),
    (lambda x, y: x.sub(y.zero_()[:, None, None, None]), ""),
    (lambda x, y: (x.double() - 1 / 255).clone().requires_grad_(), ""),
])  # fmt: skip
def test_what_a_foreign_attack_returns_is_checked_and_what_it_got_is_a_copy(
    inside: Callable[[Attack], Attack], move: Callable[[Tensor, Tensor], object], said: str
) -> None:
    model, (x, y) = Threshold().eval(), ladder()
    x, attack, before = x.clone(), inside(Foreign(move)), x.clone()
    calls: list[Callable[[], object]] = [lambda: dq.robust_accuracy(model, (x, y), attack)]
    calls += [] if attack.__class__ is Foreign else [lambda: attack(model, x, y)]
    for call in calls:
        if said:
            with pytest.raises(dq.UserError, match=said):
                call()
        else:
            call()
    assert torch.equal(x, before) and torch.equal(y, torch.ones_like(y))


def test_a_foreign_attacks_global_draws_follow_the_seed_and_the_batch() -> None:
    drawn: list[tuple[float, float, float]] = []

    def draw(x: Tensor, y: Tensor) -> Tensor:
        drawn.append((torch.rand(()).item(), random.random(), np.random.rand()))
        return x

    def draws(seed: int, attack: Attack) -> list[tuple[float, float, float]]:
        drawn.clear()
        dq.robust_accuracy(Threshold().eval(), ladder(), attack, batch_size=50, seed=seed)
        return list(drawn)

    def state() -> tuple[object, ...]:
        return (*torch.get_rng_state().tolist(), random.getstate(), repr(np.random.get_state()))

    before = state()
    for attack in (Foreign(draw), dq.Worst((Foreign(draw), FGSM(1 / 255)))):
        first, other = draws(0, attack), draws(1, attack)
        assert draws(0, attack) == first
        for kind in zip(*first, *other, strict=True):
            assert len(set(kind)) == len(kind)
    assert state() == before


class Whole(Threshold):
    """Logits that let no gradient through, each in its own way."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way

    def forward(self, x: Tensor) -> Tensor:
        if self.way == "detached":
            return super().forward(x.detach())
        if self.way == "numpy":
            return super().forward(torch.from_numpy(x.numpy()))
        other = torch.ones((), requires_grad=True)  # a graph, which the images are not in
        return super().forward(x.detach()) * other


@pytest.mark.parametrize("way", ["detached", "numpy", "another graph"])
def test_without_a_gradient_square_and_random_run_and_the_others_say_so(way: str) -> None:
    model, data = Whole(way).eval(), ladder()
    honest = Threshold().eval()
    for blind in (dq.Square(5.5 / 255, 20), Random(5.5 / 255)):
        assert dq.robust_accuracy(model, data, blind) == dq.robust_accuracy(honest, data, blind)
    assert vanishing(model, data, EVERYONE) is None
    for sighted in (FGSM(0.1), dq.DIVA(0.1, model, steps=1), dq.Adaptive(0.1, 4)):
        with pytest.raises(dq.UserError, match="or use square"):
            dq.robust_accuracy(model, data, sighted)
    with torch.inference_mode():
        inside = Threshold().eval()
    assert dq.accuracy(inside, data) == dq.accuracy(honest, data)
    refused(lambda: dq.robust_accuracy(inside, data, FGSM(0.1)), "made under torch")


def test_vanishing_gradients_are_counted() -> None:
    class Flat(Threshold):
        """Gradients die above 0.701, which is no pixel: at an end versions of torch differ."""

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.clamp(0, 0.701))

    model, data = Flat().eval(), ladder()
    standing = correct(model, data)
    above = int((data[0][:, 0, 0, 0] > 0.701).sum())
    assert vanishing(model, data, standing, batch_size=7) == above / int(standing.sum())
    assert vanishing(Threshold().eval(), data, standing) == 0
    assert vanishing(model, data, standing & False) is None
    attacks = (dq.FGSM(0.2), dq.Square(0.1, queries=1), dq.FGSM(0.1), dq.Random(0.1), dq.FGSM(0.3))
    marks = [
        (getattr(s.attack, "name", None), s.masked, s.carried) for s in sweep(model, data, attacks)
    ]
    radii = (("FGSM", True, (0.1, 0.2)[:n]) for n in range(3))
    assert marks == [(None, False, ()), *radii, ("Square-1", False, ()), ("Random", False, ())]


def test_an_answer_of_nan_is_wrong_even_where_argmax_hits() -> None:
    class Nan(Threshold):
        def forward(self, x: Tensor) -> Tensor:
            z = super().forward(x)
            bright = (x.mean((1, 2, 3)) > 0.7)[:, None]
            return torch.where(bright & (torch.arange(2) == 1), torch.nan, z)  # class 1, the truth

    model, data = Nan().eval(), ladder()
    sound = int((data[0].mean((1, 2, 3)) <= 0.7).sum()) - 1  # the first is on the threshold
    assert dq.accuracy(model, data).correct == sound

    assert int(robust(model, data, Foreign(idle), standing=EVERYONE).sum()) == sound
