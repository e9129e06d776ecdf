"""Between precisions: DIVA, crossings, cosines and transfer, where the answers are known."""

import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, nn

import defquant as dq
from conftest import refused, tiny_images, uniform
from defquant.attacks import DIVA, PGD, Attack, Transfer
from defquant.diagnose import (
    Crossing,
    at_bits,
    crossing,
    evasive,
    gradient_cosine,
    gradient_cosines,
    smallest_broken,
    transfer_matrix,
)
from defquant.errors import UserError
from defquant.quantize import Quantizer
from defquant.records import Score


def linear(w: Tensor, offset: float = 0.0) -> nn.Module:
    """Logits 0 and w x - offset of images (n, 1, 1, len(w)): class 1 is w x > offset."""
    layer = nn.Linear(len(w), 2)
    layer.weight.data = torch.stack([torch.zeros_like(w), w])
    layer.bias.data = torch.tensor([0.0, -offset])
    return nn.Sequential(nn.Flatten(), layer).eval()


def pixels(*values: float) -> Tensor:
    return torch.tensor(values).view(1, 1, 1, -1)


def small(bits: int | None = 2) -> nn.Module:
    torch.manual_seed(0)
    model = dq.wide_resnet(10, 1, bits=bits, in_channels=1, num_classes=4)
    for i in range(5):
        model(uniform(16, 1, 8, 8, seed=i))
    return model.eval()


def labels_of(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        answers: Tensor = model(x).argmax(1)
    return answers


# ----------------------------------------------------------------------- DIVA


def test_diva_moves_apart_what_two_networks_see_apart() -> None:
    """The network looks at pixel 0, its twin at pixel 1: one falls and the other rises."""
    edge, twin = linear(torch.tensor([8.0, 0.0]), 4), linear(torch.tensor([0.0, 8.0]), 4)
    x, y = pixels(0.55, 0.55), torch.ones(1, dtype=torch.long)
    moved = DIVA(0.1, twin, steps=10)(edge, x, y)
    torch.testing.assert_close(moved, pixels(0.45, 0.65), atol=1e-6, rtol=0)
    assert evasive(edge, (x, y), DIVA(0.1, twin)) == Score(1, 1)
    assert evasive(edge, (x, y), DIVA(0.04, twin)) == Score(0, 1)
    assert evasive(edge, (x, 1 - y), DIVA(0.1, twin)) is None  # wrong for both


def test_pgd_takes_both_down_where_diva_takes_one() -> None:
    """w and w + d agree on a strong common pixel: PGD uses it, DIVA keeps the twin right."""
    edge, twin = linear(torch.tensor([4.0, 4.0]), 4), linear(torch.tensor([4.0, 0.0]), 2)
    x, y = pixels(0.52, 0.52), torch.ones(1, dtype=torch.long)
    pgd = PGD(0.1, steps=10)(edge, x, y)
    assert (labels_of(edge, pgd).item(), labels_of(twin, pgd).item()) == (0, 0)
    moved = DIVA(0.1, twin, steps=20)(edge, x, y)
    assert (labels_of(edge, moved).item(), labels_of(twin, moved).item()) == (0, 1)


def test_diva_cannot_part_equal_networks() -> None:
    model = small()
    x = uniform(12, 1, 8, 8)
    data = (x, labels_of(model, x))
    assert evasive(model, data, DIVA(0.2, small(), steps=5)) == Score(0, 12)


def test_c_weighs_the_quantised_network() -> None:
    """Both look at one pixel: with c = 1/4 the twin's gain wins, with c = 4 the network's loss."""
    edge, twin = linear(torch.tensor([4.0]), 2), linear(torch.tensor([4.0]), 2)
    x, y = pixels(0.5), torch.ones(1, dtype=torch.long)
    found = [float(DIVA(0.1, twin, c=c)(edge, x, y)) for c in (0.25, 4)]
    assert found == pytest.approx([0.6, 0.4])


def test_an_iterate_that_parts_them_comes_before_one_of_higher_loss() -> None:
    """At c = 4 the loss is highest at 0.42, where both are fooled; from 0.45 to 0.5 only one is."""
    edge, twin = linear(torch.tensor([4.0]), 2), linear(torch.tensor([4.0]), 1.8)
    x, y = pixels(0.52), torch.ones(1, dtype=torch.long)
    assert 0.45 < float(DIVA(0.1, twin, c=4, steps=40)(edge, x, y)) < 0.5
    assert evasive(edge, (x, y), DIVA(0.1, twin, c=4, steps=40)) == Score(1, 1)


def test_diva_refuses_nonsense() -> None:
    model, twin, x = small(), small(None), uniform(4, 1, 8, 8)
    assert repr(DIVA(8 / 255, twin)) == "DIVA(eps=8/255, c=1, steps=20, alpha=1/255)"
    bad: list[dict[str, float]] = [{"eps": 8}, {"steps": 0}, {"c": 0}, {"alpha": 2}]
    for settings_ in bad:
        with pytest.raises(UserError):
            DIVA(**{"eps": 0.1, "twin": twin, **settings_})  # type: ignore[arg-type]
    with pytest.raises(UserError, match="same classes"):
        DIVA(0.1, linear(torch.ones(64)))(model, x, labels_of(model, x))


# ------------------------------------------------------------------- crossing


def test_the_smallest_broken_eps_of_a_linear_network_is_its_distance() -> None:
    """Under L-infinity the margin falls by eps ||w||_1: broken from margin / ||w||_1 on."""
    w = torch.tensor([1.0, -2.0, 3.0])
    model = linear(w, 1.0)
    x = 0.3 + 0.4 * uniform(40, 1, 1, 3)
    side = x.flatten(1) @ w - 1
    y = (side > 0).long()
    y[0] = 1 - y[0]
    radii = [0.02, 0.05, 0.1, 0.2]
    broken = smallest_broken(model, (x, y), lambda eps: PGD(eps, steps=5), radii)
    distance = (side.abs() / 6).tolist()
    expected = [next((r for r in radii if r > d), math.inf) for d in distance]
    assert broken.tolist() == [0.0, *expected[1:]]


def test_curves_cross_where_straight_lines_do() -> None:
    """At 0.1 3 and 2 of 4 stand, at 0.2 0 and 2: one ahead, two behind, a third of the way."""
    inf = math.inf
    first = torch.tensor([0.2, 0.2, 0.2, 0.1])
    second = torch.tensor([inf, inf, 0.1, 0.1])
    found = crossing(first, second, [0.1, 0.2], samples=200)
    assert found.eps == pytest.approx(0.1 + 0.1 / 3)
    assert found.above == "first"
    swapped = crossing(second, first, [0.1, 0.2], samples=200)
    assert (swapped.eps, swapped.above) == (found.eps, "second")
    assert (swapped.low, swapped.high, swapped.share) == (found.low, found.high, found.share)


def test_curves_that_touch_for_a_while_cross_in_its_middle() -> None:
    """Difference +1, 0, 0, -1 at 0.1 ... 0.4."""
    first, second = torch.tensor([0.2, 0.4]), torch.tensor([0.1, math.inf])
    assert crossing(first, second, [0.1, 0.2, 0.3, 0.4]).eps == pytest.approx(0.25)


def curves(n: int, crosses: float, seed: int) -> tuple[Tensor, Tensor, list[float]]:
    """Broken eps of two networks whose curves cross at `crosses`.

    P(broken > e) is 1 - e / (2 crosses) of the first; of the second, at `crosses` the same 1/2,
    before it lower and behind it higher: half of its images fall at once, uniformly on half the
    way, the others late.
    """
    radii = [i / 40 for i in range(1, 41)]
    draws = uniform(2, n, seed=seed).double()
    first = 2 * crosses * draws[0]
    second = torch.where(draws[1] < 0.5, crosses * draws[1], crosses * 4 * draws[1])
    grid = torch.tensor([*radii, math.inf], dtype=torch.float64)
    up = [grid[torch.bucketize(d, grid)] for d in (first, second)]
    return up[0], up[1], radii


def test_the_bootstrap_finds_a_known_crossing() -> None:
    """Of 40 draws, 95 % of the intervals should hold the truth; fewer than 33 has p < 1e-3."""
    hits = 0
    for seed in range(40):
        first, second, radii = curves(400, 0.2, seed)
        found = crossing(first, second, radii, samples=300, seed=seed)
        assert found.eps is not None and found.above == "first"
        assert found.low is not None and found.low <= found.eps
        hits += found.low <= 0.2 and (found.high is None or found.high >= 0.2)
    assert hits >= 33


def test_more_images_narrow_the_interval() -> None:
    widths = []
    for n in (100, 1600):
        found = crossing(*curves(n, 0.2, 1), samples=500)
        assert found.low is not None and found.high is not None
        widths.append(found.high - found.low)
    assert widths[1] < widths[0] / 2


def test_the_interval_is_paired() -> None:
    """Two networks that differ on few images alone: drawn apart, their noise would drown it."""
    radii = [0.1, 0.2, 0.3]
    shared = 0.1 * torch.randint(1, 5, (1000,), generator=torch.Generator().manual_seed(0))
    first, second = shared.clone(), shared.clone()
    first[:80], second[:80] = 0.3, 0.1  # ahead at 0.1 and 0.2
    first[80:100], second[80:100] = 0.1, math.inf  # behind at all
    found = crossing(first, second, radii)
    assert found.eps is not None and 0.2 < found.eps < 0.3
    assert found.share == 1
    assert found.low is not None and found.low > 0.2


def test_no_crossing_is_an_answer() -> None:
    high, low = torch.tensor([0.2, 0.2, math.inf]), torch.tensor([0.1, 0.2, 0.2])
    found = crossing(high, low, [0.1, 0.2], samples=50)
    assert found == Crossing(None, None, None, "first", 0.0, 3)
    assert crossing(high, high, [0.1, 0.2], samples=50) == Crossing(None, None, None, None, 0.0, 3)


def test_an_interval_may_be_open() -> None:
    """One image of a thousand makes the crossing: many samples leave it out, and never cross."""
    first, second = torch.full((1000,), 0.2), torch.full((1000,), 0.2)
    first[:500], second[0] = 0.3, math.inf
    found = crossing(first, second, [0.1, 0.2, 0.3])
    assert found.eps is not None
    assert found.high is None
    assert 0.5 < found.share < 0.75  # 1 - 1/e = 0.63


def test_the_order_of_images_and_the_seed() -> None:
    first, second, radii = curves(200, 0.2, 3)
    found = crossing(first, second, radii, samples=100)
    assert found == crossing(first, second, radii, samples=100)
    assert found.low != crossing(first, second, radii, samples=100, seed=1).low
    assert crossing(first.flip(0), second.flip(0), radii, samples=100).eps == found.eps


@pytest.mark.parametrize("radii", [[], [0.0, 0.1], [0.2, 0.1], [0.1, 0.1]])
def test_radii_rise_from_above_zero(radii: list[float]) -> None:
    refused(lambda: crossing(torch.ones(2), torch.ones(2), radii), "radii must rise")


def test_curves_of_other_images_are_refused() -> None:
    for first, second in ((torch.ones(2), torch.ones(3)), (torch.ones(0), torch.ones(0))):
        with pytest.raises(UserError, match="same images"):
            crossing(first, second, [0.1])


# --------------------------------------------------------------------- cosine


def test_cosines_of_linear_networks() -> None:
    """A linear network's input gradient is along w, up to its sign, everywhere."""
    w, v = torch.tensor([3.0, 4.0]), torch.tensor([4.0, 3.0])
    x, y = uniform(10, 1, 1, 2), torch.arange(10) % 2
    for other, expected in ((w, 1), (2 * w, 1), (v, 24 / 25), (-w, -1)):
        found = gradient_cosine(linear(w), linear(other), (x, y))
        assert (found.left_out, found.examples) == (0, 10)
        assert [found.mean, found.low, found.high] == pytest.approx([expected] * 3, abs=1e-5)


def test_few_cosines_have_students_interval_and_one_bounds_nothing() -> None:
    model, (x, y) = small(), (uniform(4, 1, 8, 8), torch.arange(4))
    pair = at_bits(model, 1), at_bits(model, None)
    each = [gradient_cosine(*pair, (x[i : i + 1], y[i : i + 1])) for i in range(4)]
    assert {(one.low, one.high) for one in each} == {(-1.0, 1.0)}
    means = [one.mean or 0.0 for one in each]
    low, high = stats.t.interval(0.95, 3, np.mean(means), stats.sem(means))
    found = gradient_cosine(*pair, (x, y))
    assert (found.low, found.high) == pytest.approx((max(-1, low), min(1, high)), abs=1e-4)


def test_zero_gradients_have_no_cosine() -> None:
    x, y = uniform(4, 1, 1, 2), torch.zeros(4, dtype=torch.long)
    found = gradient_cosine(linear(torch.ones(2)), linear(torch.zeros(2)), (x, y))
    assert (found.mean, found.low, found.high, found.left_out) == (None, None, None, 4)


def test_cosines_per_bit_width() -> None:
    model = small()
    data = (uniform(20, 1, 8, 8), torch.arange(20) % 4)
    found = gradient_cosines(model, data, [1, 2, 8], batch_size=7)
    assert {m.bits for m in model.modules() if isinstance(m, Quantizer)} == {2}
    means = {bits: cosine.mean for bits, cosine in found.items()}
    assert all(c.low is not None and c.mean is not None and c.low < c.mean for c in found.values())
    assert means[8] == pytest.approx(1, abs=0.1)
    assert means[1] is not None and means[8] is not None and means[1] < means[8]
    whole = gradient_cosine(model, model, data)
    assert whole.mean == pytest.approx(1)
    apart = gradient_cosine(at_bits(model, 1), at_bits(model, None), data)
    assert apart.mean == pytest.approx(means[1])


def test_at_bits_copies() -> None:
    model = small(2)
    copies = {bits: at_bits(model, bits) for bits in (1, None)}
    for bits, copy in copies.items():
        assert {m.bits for m in copy.modules() if isinstance(m, Quantizer)} == {bits}
        assert next(copy.parameters()) is not next(model.parameters())
    refused(lambda: at_bits(model, 9), "bits must be")


# ------------------------------------------------------------------- transfer matrix


def trained(bits: int | None, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = dq.wide_resnet(10, 1, bits=bits, in_channels=1, num_classes=4)
    config = dq.TrainConfig(epochs=2, batch_size=16, device="cpu", augment=False)
    dq.train(model, tiny_images(128), config, show=False)
    return model.eval()


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return trained(4)


def test_equal_networks_fall_alike_and_as_in_the_white_box(model: nn.Module) -> None:
    data, attack = tiny_images(40, seed=1), PGD(40 / 255, steps=5)
    found = transfer_matrix({"a": model, "b": at_bits(model, 4)}, data, attack)
    x, y = data.take(torch.arange(40))
    with torch.no_grad():
        right = model(x).argmax(1) == y
        last = attack.last(model, x, y, generator=torch.Generator().manual_seed(0))
        fooled = int(((model(last).argmax(1) != y) & right).sum())
    assert 0 < fooled < int(right.sum())
    assert found.cells == ((Score(fooled, int(right.sum())),) * 2,) * 2
    assert (found.names, found.attack) == (("a", "b"), repr(attack))


def test_each_cell_is_a_transfer(model: nn.Module) -> None:
    """Images that the source has wrong do not count, unlike in `dq.robust_accuracy`."""
    networks = {"2": at_bits(model, 2), "4": model, "float": at_bits(model, None)}
    data, attack = tiny_images(40, seed=1), PGD(40 / 255, steps=5)
    found = transfer_matrix(networks, data, attack, seed=3)
    x, y = data.take(torch.arange(40))
    for i, source in enumerate(networks.values()):
        for j, target in enumerate(networks.values()):
            with torch.no_grad():
                both = (source(x).argmax(1) == y) & (target(x).argmax(1) == y)
                generator = torch.Generator().manual_seed(3)
                moved = Transfer(attack, source)(target, x, y, generator=generator)
                fooled = (target(moved).argmax(1) != y) & both
            assert found.cells[i][j] == Score(int(fooled.sum()), int(both.sum()))


def test_linear_networks_transfer_where_the_signs_of_their_weights_agree() -> None:
    """PGD goes to -eps sign(w): it moves v x by -eps sum(v sign(w)), for every image."""
    models = {
        "w": linear(torch.tensor([3.0, 1.0]), 2), "near": linear(torch.tensor([3.0, -1.0]), 1),
        "against": linear(torch.tensor([-3.0, -1.0]), -2),
    }  # fmt: skip
    x = torch.tensor([[0.55, 0.55], [0.6, 0.6], [0.8, 0.6]]).view(3, 1, 1, 2)
    data = (x, torch.ones(3, dtype=torch.long))
    found = transfer_matrix(models, data, PGD(0.08, steps=10))
    # margins 0.2 0.4 1.0 of w and 0.1 0.2 0.8 of near fall by 0.32, by 0.16 on the other's images
    assert found.cells[0][:2] == (Score(1, 3), Score(1, 3))
    assert found.cells[1][:2] == (Score(0, 3), Score(2, 3))
    assert found.cells[2] == (None, None, None)  # wrong on all of them
    assert [row[2] for row in found.cells] == [None] * 3


def test_the_batch_does_not_matter(model: nn.Module) -> None:
    networks = {"2": at_bits(model, 2), "4": model}
    data, attack = tiny_images(20, seed=1), PGD(0.1, steps=3)
    found = transfer_matrix(networks, data, attack)
    assert found == transfer_matrix(networks, data, attack, batch_size=3)


def darken(
    model: nn.Module, x: Tensor, y: Tensor, *, generator: torch.Generator | None = None
) -> Tensor:
    return (x - 0.2).clamp(0, 1)


def test_any_attack_will_do(model: nn.Module) -> None:
    data = tiny_images(20, seed=1)
    attacks: list[Attack] = [darken, DIVA(0.1, at_bits(model, None), steps=2)]
    for attack in attacks:
        assert transfer_matrix({"a": model}, data, attack, batch_size=7).cells[0][0] is not None


def test_networks_that_cannot_be_compared_are_refused(model: nn.Module) -> None:
    data, attack = tiny_images(8), PGD(0.1, steps=1)
    refused(lambda: transfer_matrix({}, data, attack), "one network or more")
    torch.manual_seed(0)
    more = dq.wide_resnet(10, 1, in_channels=1, num_classes=7).eval()
    refused(lambda: transfer_matrix({"a": model, "b": more}, data, attack), "a knows 4, b 7")
    colour = dq.wide_resnet(10, 1, in_channels=3, num_classes=4).eval()
    refused(lambda: transfer_matrix({"a": model, "b": colour}, data, attack), "b does not")
