"""The filters against scipy, the attacks through and around them, the detector's arithmetic."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import median_filter
from torch import Tensor, nn

import defquant as dq
from conftest import tiny_images
from defquant.attacks import FGSM, PGD, Random
from defquant.data import to_unit
from defquant.defenses import (
    Detector,
    FeatureSqueezing,
    Unaware,
    median_2x2,
    reduce_depth,
    squeeze,
    squeezing_distance,
)
from defquant.errors import UserError


def images(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("bits", range(1, 9))
def test_depth_is_a_grid_of_that_many_bits(bits: int) -> None:
    n = 2**bits - 1
    squeezed = reduce_depth(torch.linspace(0, 1, 4001).view(1, 1, 1, -1), bits)
    assert torch.equal(squeezed.unique(), torch.arange(n + 1) / n)
    assert torch.equal(reduce_depth(squeezed, bits), squeezed)


def test_depth_ties_to_even_and_none_is_no_rounding() -> None:
    halves = (torch.arange(3) + 0.5).view(1, 1, 1, 3) / 3
    assert torch.equal(reduce_depth(halves, 2).flatten() * 3, torch.tensor([0.0, 2.0, 2.0]))
    assert reduce_depth(halves, None) is halves


def test_eight_bits_change_no_eight_bit_image() -> None:
    x = to_unit(torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16))
    assert torch.equal(reduce_depth(x, 8), x)


def test_depth_lets_every_gradient_through() -> None:
    x = torch.tensor([0.0, 0.3, 1.0]).view(1, 1, 1, 3).requires_grad_()
    weight = images(1, 1, 1, 3)
    assert torch.equal(torch.autograd.grad((reduce_depth(x) * weight).sum(), x)[0], weight)


@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(*(st.integers(1, high) for high in (3, 3, 9, 9))),
    levels=st.sampled_from([1, 3, 10**6]),
    seed=st.integers(0, 1000),
)
def test_median_is_scipys(shape: tuple[int, ...], levels: int, seed: int) -> None:
    x = images(*shape, seed=seed).mul(levels).round().div(levels)
    expected = torch.from_numpy(median_filter(x.numpy(), size=(1, 1, 2, 2), mode="reflect"))
    assert torch.equal(median_2x2(x), expected)
    assert torch.equal(median_2x2(x.double()), expected.double())


def test_median_is_the_upper_one() -> None:
    assert median_2x2(torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]]) / 4)[0, 0, 1, 1] == 3 / 4


@settings(max_examples=20, deadline=None)
@given(h=st.integers(1, 5), w=st.integers(1, 5), seed=st.integers(0, 100))
def test_median_gradient_is_exact_where_pixels_differ(h: int, w: int, seed: int) -> None:
    order = torch.randperm(2 * h * w, generator=torch.Generator().manual_seed(seed))
    x = (order.double() / order.numel()).view(1, 2, h, w).requires_grad_()
    assert torch.autograd.gradcheck(median_2x2, (x,))


def test_pixels_that_tie_share_the_medians_gradient() -> None:
    x = torch.tensor([[[[0.1, 0.6], [0.6, 0.9]]]], requires_grad=True)
    (grad,) = torch.autograd.grad(median_2x2(x)[0, 0, 1, 1], x)
    assert torch.equal(grad, torch.tensor([[[[0.0, 0.5], [0.5, 0.0]]]]))
    flat = torch.full((1, 1, 4, 4), 0.5, requires_grad=True)
    (grad,) = torch.autograd.grad(median_2x2(flat).sum(), flat)
    assert grad.sum() == 16


@given(bits=st.integers(1, 8), seed=st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_both_orders_give_one_squeezed_image(bits: int, seed: int) -> None:
    x = images(2, 3, 6, 7, seed=seed)
    assert torch.equal(squeeze(x, bits), reduce_depth(median_2x2(x), bits))
    assert torch.equal(squeeze(x, bits, median=False), reduce_depth(x, bits))


def test_memory_format_is_kept() -> None:
    x = images(2, 3, 8, 8).contiguous(memory_format=torch.channels_last).requires_grad_()
    assert squeeze(x).is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(squeeze(x), squeeze(x.detach().contiguous()), rtol=0, atol=0)


@pytest.mark.parametrize("bits", [0, 9, True, 2.5])
def test_other_bits_are_refused(bits: int) -> None:
    with pytest.raises(UserError, match="bits must be"):
        reduce_depth(images(1, 1, 2, 2), bits)
    with pytest.raises(UserError, match="bits must be"):
        FeatureSqueezing(nn.Flatten(), bits)


@pytest.mark.parametrize("x", [torch.rand(3, 4, 4), torch.zeros(1, 3, 4, 4, dtype=torch.uint8)])
def test_other_tensors_are_refused(x: Tensor) -> None:
    for squeezer in (reduce_depth, median_2x2, squeeze):
        with pytest.raises(UserError, match=r"images are float \(n, c, h, w\); found"):
            squeezer(x)


def network(bits: int | None = None) -> nn.Module:
    torch.manual_seed(0)
    model = dq.wide_resnet(10, 1, bits=bits, in_channels=1, num_classes=4)
    for _ in range(10):  # batch norm's statistics
        model(torch.rand(32, 1, 8, 8))
    return model.eval()


def test_the_module_is_the_network_behind_the_filter() -> None:
    model = network(4)
    squeezed, x = FeatureSqueezing(model), images(8, 1, 8, 8)
    assert not squeezed.training
    assert torch.equal(squeezed(x), model(median_2x2(reduce_depth(x, 5))))
    dq.set_bits(squeezed, 2)
    assert squeezed.bits == 5
    squeezed.train()(x).sum().backward()
    assert all(p.grad is not None for p in squeezed.parameters())


def test_attacks_go_through_the_squeezing() -> None:
    data, model = tiny_images(32), FeatureSqueezing(network())
    x, y = data.take(torch.arange(32))
    y = model(x).argmax(1)
    before = nn.functional.cross_entropy(model(x), y)
    adversarial = PGD(16 / 255, steps=5)(model, x, y)
    assert nn.functional.cross_entropy(model(adversarial), y) > before
    aware = dq.robust_accuracy(model, (x, y), PGD(16 / 255, steps=5))
    unaware = dq.robust_accuracy(model, (x, y), Unaware(PGD(16 / 255, steps=5)))
    assert aware.correct <= unaware.correct


def test_unaware_attacks_the_inner_network() -> None:
    attack, x = Unaware(FGSM(8 / 255)), images(6, 1, 8, 8)
    inner, y = network(), torch.arange(6) % 4
    expected = FGSM(8 / 255).last(inner, x, y)
    assert torch.equal(attack(FeatureSqueezing(inner), x, y), expected)
    assert (attack.eps, attack.name) == (8 / 255, "FGSM (unaware)")
    assert repr(attack) == "Unaware(attack=FGSM(eps=8/255))"
    generators = (torch.Generator().manual_seed(3) for _ in range(2))
    first, again = (
        Unaware(Random(0.1))(FeatureSqueezing(inner), x, y, generator=g) for g in generators
    )
    assert torch.equal(first, again)
    with pytest.raises(UserError, match="found WideResNet"):
        attack(inner, x, y)


class Brightest(nn.Module):
    """Logits (0, 4 m - 2), m the brightest pixel: a lone one, which the median removes, decides."""

    def forward(self, x: Tensor) -> Tensor:
        m = x.amax((1, 2, 3))
        return torch.stack([torch.zeros_like(m), 4 * m - 2], 1)


def dark(n: int = 40) -> Tensor:
    return torch.zeros(n, 1, 6, 6)


def dotted(n: int = 40, value: float = 1.0) -> Tensor:
    x = dark(n)
    x[:, 0, 3, 3] = value
    return x


def test_distance_in_closed_form() -> None:
    model = Brightest().train()
    assert torch.equal(squeezing_distance(model, dark()), torch.zeros(40))
    expected = 2 * (1 / (1 + math.exp(-2)) - 1 / (1 + math.exp(2)))
    distance = squeezing_distance(model, torch.cat([dotted(300), dark(1)]), (median_2x2,))
    torch.testing.assert_close(distance, torch.tensor([expected] * 300 + [0.0]))
    assert model.training
    as_bytes = (dotted() * 255).to(torch.uint8)
    assert torch.equal(squeezing_distance(model, as_bytes), squeezing_distance(model, dotted()))


def test_a_network_that_answers_nan_is_suspicious() -> None:
    class Broken(Brightest):
        def forward(self, x: Tensor) -> Tensor:
            return torch.where(x.amax((1, 2, 3)) > 0.9, torch.nan, 0.0)[:, None].repeat(1, 2)

    distance = squeezing_distance(Broken(), torch.cat([dotted(1), dark(1)]))
    assert distance.tolist() == [math.inf, 0.0]


@settings(max_examples=40, deadline=None)
@given(rate=st.floats(0, 0.99), n=st.integers(1, 60), seed=st.integers(0, 100))
def test_the_threshold_flags_as_many_as_allowed(rate: float, n: int, seed: int) -> None:
    clean = dotted(n) * images(n, 1, 1, 1, seed=seed)
    detector = Detector(squeezers=(median_2x2,)).fit(Brightest(), clean, rate)
    distance = squeezing_distance(Brightest(), clean, (median_2x2,))
    if len(distance.unique()) == n:
        assert int(detector.flags(Brightest(), clean).sum()) == math.floor(rate * n)
    assert detector.flags(Brightest(), clean).float().mean() <= rate + 1e-6


def test_rates_are_scores_of_both_kinds() -> None:
    detector = Detector().fit(Brightest(), dark())
    clean, adversarial = torch.cat([dark(17), dotted(3)]), torch.cat([dotted(30), dark(10)])
    rates = detector.rates(Brightest(), clean, adversarial)
    assert (rates.detected, rates.false_positives) == (dq.Score(30, 40), dq.Score(3, 20))
    none = torch.zeros(40, dtype=torch.int64)
    assert detector.rates(Brightest(), clean, adversarial, none).detected == dq.Score(30, 30)
    right = torch.tensor([1] * 30 + [0] * 10)
    assert detector.rates(Brightest(), clean, adversarial, right).detected is None


def test_the_papers_rule_needs_no_threshold() -> None:
    detector = Detector("prediction", (squeeze,))
    both = torch.cat([dotted(2), dotted(2, 0.4), dark(2)])  # 0.4 is still class 0
    assert detector.flags(Brightest(), both).tolist() == [True] * 2 + [False] * 4
    with pytest.raises(UserError, match="no threshold to fit"):
        detector.fit(Brightest(), dark())


def test_detector_refuses_what_it_cannot_do() -> None:
    with pytest.raises(UserError, match="call fit"):
        Detector().flags(Brightest(), dark())
    with pytest.raises(UserError, match="false positive rate"):
        Detector().fit(Brightest(), dark(), 1.0)
    with pytest.raises(UserError, match=r"must lie in \[0, 1\]"):
        squeezing_distance(Brightest(), dark() + 2)
    for x, squeezers in ((dark(), ()), (dark(0), (squeeze,))):
        with pytest.raises(UserError, match="needs squeezers and images"):
            squeezing_distance(Brightest(), x, squeezers)
