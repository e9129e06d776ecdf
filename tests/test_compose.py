"""The worst case over attacks: per example, later ones only on what stands, named and parsed."""

import pytest
import torch
from torch import Tensor, nn

import defquant as dq
from defquant.attacks import APGD, FAB, FGSM, PGD, Attack, Composition, Square, Transfer
from defquant.evaluate import robust, sweep
from linear_scenes import middle_eps, scene


class Breaks:
    """Fools every example whose id is in `ids`, by drawing it black; notes who is given."""

    by_id = True
    eps = 1.0

    def __init__(self, ids: range) -> None:
        self.ids, self.seen = ids, list[int]()

    def __call__(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        *,
        generator: torch.Generator | None = None,
        ids: Tensor | None = None,
    ) -> Tensor:
        assert ids is not None
        self.seen += ids.tolist()
        hit = torch.tensor([i in self.ids for i in ids.tolist()])
        return torch.where(hit[:, None, None, None], torch.zeros_like(x), x)


class Bright(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        light = x.mean((1, 2, 3))
        return torch.stack([light, 0.1 - light], 1)


def test_later_attacks_see_only_what_stands() -> None:
    x, y = torch.full((10, 1, 2, 2), 0.5), torch.zeros(10, dtype=torch.int64)
    first, second, third = Breaks(range(4)), Breaks(range(2, 7)), Breaks(range(0))
    worst = dq.Worst((first, second, third))
    assert robust(Bright().eval(), (x, y), worst, batch_size=3).nonzero().flatten().tolist() == [
        7, 8, 9,
    ]  # fmt: skip
    assert first.seen == list(range(10))
    assert second.seen == [4, 5, 6, 7, 8, 9]
    assert third.seen == [7, 8, 9]
    first.seen, second.seen = [], []
    made = worst(Bright(), x, y)
    assert (made.amax((1, 2, 3)) == 0).tolist() == [True] * 7 + [False] * 3
    assert second.seen == [4, 5, 6, 7, 8, 9]


@pytest.mark.parametrize(
    "make",
    [dq.Standard, lambda eps: dq.Adaptive(eps, 8), lambda e: dq.Worst((PGD(e), Square(e, 9)))],
)
def test_the_worst_case_is_that_of_its_parts(make: type[Composition]) -> None:
    model, x, y = scene(15)
    eps, stand = middle_eps(model, x, y)
    worst = make(eps)
    parts: list[Attack] = [
        FAB(eps, 10, targets=4) if isinstance(part, FAB) else
        Square(eps, 50) if isinstance(part, Square) else part for part in worst.attacks
    ]  # fmt: skip
    short = dq.Worst(tuple(parts))
    whole = robust(model, (x, y), short)
    assert torch.equal(whole, robust(model, (x, y), short, batch_size=5))
    first = robust(model, (x, y), parts[0])
    assert not (whole & ~first).any()
    assert stand <= int(whole.sum()) <= int(first.sum())
    made = short(model, x, y)
    assert (made - x).abs().max() <= eps + 1e-6
    fell = (model(made).argmax(1) != y).sum()
    assert abs(int(fell) - (15 - int(whole.sum()))) <= 3  # other draws, from a generator


def test_standard_is_autoattacks_and_exact_on_a_linear_network() -> None:
    eps = 8 / 255
    assert dq.Standard(eps).attacks == (
        APGD(eps, 100), APGD(eps, 100, loss="dlr-targeted", targets=9),
        FAB(eps, 100, targets=9), Square(eps, 5000),
    )  # fmt: skip
    model, x, y = scene(6)
    eps, stand = middle_eps(model, x, y)
    assert dq.robust_accuracy(model, (x, y), dq.Standard(eps)).correct == stand


def test_adaptive_costs_at_most_three_times_pgd() -> None:
    """Counted in rows of gradients and of logits, on a network of which nothing falls."""

    class Iron(nn.Module):
        rows = logits = 0

        def forward(self, x: Tensor) -> Tensor:
            if torch.is_grad_enabled():
                Iron.rows += len(x)
            else:
                Iron.logits += len(x)
            light = x.mean((1, 2, 3))
            return torch.stack([light + 9, -light], 1)

    x, y = torch.rand(32, 1, 4, 4), torch.zeros(32, dtype=torch.int64)
    counts = []
    for attack in (PGD(0.1, steps=40), dq.Adaptive(0.1, 40)):
        Iron.rows = Iron.logits = 0
        assert dq.robust_accuracy(Iron().eval(), (x, y), attack).correct == 32
        counts.append((Iron.rows, Iron.logits))
    (plain, few), (gradients, logits) = counts
    assert plain == 32 * 40
    assert few < 32 * 5
    assert gradients == 1.875 * plain
    # the search, the float twin's own answers, the last look of each part, and the input checks
    assert 4 * plain < logits < 4.6 * plain


def test_eps_rises_within_a_family() -> None:
    model, x, y = scene(20)
    scored = list(sweep(model, (x, y), [dq.Adaptive(e, 4) for e in (0.02, 0.005, 0.3)]))
    counts = [one.score.correct for one in scored]
    assert counts == sorted(counts, reverse=True)
    assert [s.attack.eps for s in scored if isinstance(s.attack, Composition)] == [0.005, 0.02, 0.3]


def test_transfer_never_asks_the_target() -> None:
    class Silent(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise AssertionError("asked")

    model, x, y = scene(classes=2)
    attack = Transfer(FGSM(0.05), model)
    assert attack.name == "FGSM(B)"
    assert attack.eps == 0.05
    torch.testing.assert_close(attack(Silent(), x, y), FGSM(0.05).last(model, x, y))
    assert dq.robust_accuracy(model, (x, y), attack) == dq.robust_accuracy(
        model, (x, y), FGSM(0.05)
    )


def test_parts_of_one_eps() -> None:
    for parts in ((), (PGD(0.1), Square(0.2))):
        with pytest.raises(dq.UserError, match="one eps"):
            dq.Worst(parts)


@pytest.mark.parametrize(("reach", "left"), [(0.6, 0), (0.4, 3)])
def test_targets_find_the_class_that_the_likeliest_rival_hides(reach: float, left: int) -> None:
    """Along s in [-1, 1] the likeliest rival rises and never wins; one behind it wins at s = -1
    where 0.5 + `reach` exceeds the label's 1. Every untargeted loss climbs the first."""
    side = (torch.arange(64).view(1, 1, 8, 8) + torch.arange(8).view(8, 1)) % 2 * 2.0 - 1

    class Decoy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            s = ((x - 0.5) * side).mean((1, 2, 3)) / 0.1
            logits = [torch.ones_like(s), 0.9 + 0.05 * s.tanh(), 0.5 - reach * s]
            return 20 * torch.stack(logits, 1)

    x, y = torch.full((3, 1, 8, 8), 0.5), torch.zeros(3, dtype=torch.int64)
    for attack, stand in ((dq.Adaptive(0.1, 10), 3), (dq.Adaptive(0.1, 10, targets=2), left)):
        assert dq.robust_accuracy(Decoy().eval(), (x, y), attack).correct == stand


def test_the_end_searches_long_where_no_gradient_leads() -> None:
    """No gradient: random squares have to set seven eighths of the 64 pixels right."""
    side = torch.randint(2, (1, 1, 8, 8), generator=torch.Generator().manual_seed(0)) * 2.0 - 1

    class Blind(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            s = ((x - 0.5) * side).mean((1, 2, 3)) / 0.1
            return torch.stack([torch.full_like(s, 0.75), s.detach() + 0 * s], 1)

    x, y = torch.full((8, 1, 8, 8), 0.5), torch.zeros(8, dtype=torch.int64)
    for attack, stand in ((dq.Adaptive(0.1, 10), 8), (dq.Adaptive(0.1, 10, targets=1), 0)):
        assert dq.robust_accuracy(Blind().eval(), (x, y), attack).correct == stand
