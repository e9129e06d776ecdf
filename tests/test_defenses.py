"""The filters against scipy, the attacks through and around them, the detector's arithmetic."""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.ndimage import median_filter
from torch import Tensor, nn

import defquant as dq
from conftest import alike, refused, tiny_images, uniform
from defquant.attacks import FGSM, PGD, Random
from defquant.config import ModelConfig, TrainConfig
from defquant.data import Dataset, to_unit
from defquant.defenses import Detector, FeatureSqueezing, Unaware, detection, squeezing_distance
from defquant.evaluate import correct
from defquant.models import build
from defquant.models.squeezing import median_2x2, reduce_depth, squeeze
from linear_scenes import network

Array = NDArray[np.float64]


@pytest.mark.parametrize("bits", range(1, 9))
def test_depth_is_a_grid_of_that_many_bits(bits: int) -> None:
    """And lets every gradient through."""
    n = 2**bits - 1
    x = torch.linspace(0, 1, 4001).view(1, 1, 1, -1).requires_grad_()
    squeezed, weight = reduce_depth(x, bits), uniform(1, 1, 1, 4001)
    assert torch.equal(squeezed.unique(), torch.arange(n + 1) / n)
    assert torch.equal(reduce_depth(squeezed, bits), squeezed)
    assert torch.equal(torch.autograd.grad((squeezed * weight).sum(), x)[0], weight)


def test_depth_ties_to_even_and_eight_bits_or_none_change_no_eight_bit_image() -> None:
    halves = (torch.arange(3) + 0.5).view(1, 1, 1, 3) / 3
    assert (reduce_depth(halves, 2).flatten() * 3).tolist() == [0.0, 2.0, 2.0]
    x = to_unit(torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16))
    assert torch.equal(reduce_depth(x, 8), x) and reduce_depth(x, None) is x


@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(*(st.integers(1, high) for high in (3, 3, 9, 9))),
    levels=st.sampled_from([1, 3, 10**6]),
    seed=st.integers(0, 1000),
)
def test_median_is_scipys(shape: tuple[int, ...], levels: int, seed: int) -> None:
    x = uniform(*shape, seed=seed).mul(levels).round().div(levels)
    expected = torch.from_numpy(median_filter(x.numpy(), size=(1, 1, 2, 2), mode="reflect"))
    assert torch.equal(median_2x2(x), expected)
    assert torch.equal(median_2x2(x.double()), expected.double())


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


@pytest.mark.parametrize("bits", range(1, 9))
def test_both_orders_give_one_squeezed_image_in_its_memory_format(bits: int) -> None:
    x = uniform(2, 3, 6, 7).contiguous(memory_format=torch.channels_last)
    assert torch.equal(squeeze(x, bits), reduce_depth(median_2x2(x), bits))
    assert torch.equal(squeeze(x, bits), squeeze(x.contiguous(), bits))
    assert torch.equal(squeeze(x, bits, median=False), reduce_depth(x, bits))
    assert squeeze(x, bits).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("bits", [0, 9, True, 2.5])
def test_other_bits_and_tensors_are_refused(bits: int) -> None:
    refused(lambda: reduce_depth(uniform(1, 1, 2, 2), bits), "bits must be")
    refused(lambda: FeatureSqueezing(nn.Flatten(), bits), "bits must be")
    for x in (torch.rand(3, 4, 4), torch.zeros(1, 3, 4, 4, dtype=torch.uint8)):
        for squeezer in (reduce_depth, median_2x2, squeeze):
            refused(partial(squeezer, x), "images are float (n, c, h, w); found")


def built(squeeze: int | None) -> nn.Module:
    config = ModelConfig("wrn-10-1", bits=4, convex=True, squeeze=squeeze)
    return build(config, num_classes=4, in_channels=1, seed=3)


def behind(bare: nn.Module) -> dict[str, Tensor]:
    return {f"model.{name}": value for name, value in bare.state_dict().items()}


def test_squeeze_builds_the_same_network_behind_the_filter() -> None:
    model, bare, x = built(4), built(None), uniform(6, 1, 8, 8)
    assert alike(model.state_dict(), behind(bare))
    for seed in range(10):  # batch norm's statistics, without which 4 bits are all zero
        bare(uniform(32, 1, 8, 8, seed=seed))
    model.load_state_dict(behind(bare))
    model, bare = model.eval(), bare.eval()
    assert torch.equal(model(x), FeatureSqueezing(bare, 4)(x))
    assert torch.equal(model(x), bare(median_2x2(reduce_depth(x, 4))))
    assert not torch.equal(model(x), bare(x)) and not FeatureSqueezing(bare).training
    at, before = x.clone().requires_grad_(), model(x)
    answers = model(at), bare(squeeze(at, 4))
    grads = [torch.autograd.grad(answer[:, 0].sum(), at)[0] for answer in answers]
    assert torch.equal(*grads) and grads[0].any()
    assert dq.set_bits(model, 2) is model and model.bits == 4
    assert not torch.equal(model(x), before)
    assert torch.equal(model(x), FeatureSqueezing(dq.set_bits(bare, 2), 4)(x))


@pytest.mark.parametrize("penalty", ["fused", "loss", "parseval"])
def test_training_through_the_filter_is_training_on_filtered_images(penalty: str) -> None:
    """Exactly so for 8 bits, whose medians are bytes: penalty, momentum and convex sums, too."""
    raw = tiny_images(48)
    filtered = median_2x2(to_unit(raw.images)).mul(255).round().to(torch.uint8)
    assert not torch.equal(filtered, raw.images)
    config = TrainConfig(epochs=2, batch_size=16, beta=0.05, penalty=penalty, device="cpu")  # type: ignore[arg-type]
    squeezed, bare = built(8), built(None)
    mine = dq.train(squeezed, raw, config)
    theirs = dq.train(bare, replace(raw, images=filtered), config)
    for name in ("loss", "penalty"):
        assert [h[name] for h in mine] == [h[name] for h in theirs]
    assert alike(squeezed.state_dict(), behind(bare))


def test_unaware_attacks_the_inner_network() -> None:
    attack, x = Unaware(FGSM(8 / 255)), uniform(6, 1, 8, 8)
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
    refused(lambda: attack(inner, x, y), "found WideResNet")


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

    class Broken(Brightest):
        def forward(self, x: Tensor) -> Tensor:
            return torch.where(x.amax((1, 2, 3)) > 0.9, torch.nan, 0.0)[:, None].repeat(1, 2)

    suspicious = squeezing_distance(Broken(), torch.cat([dotted(1), dark(1)]))
    assert suspicious.tolist() == [math.inf, 0.0]


@settings(max_examples=40, deadline=None)
@given(rate=st.floats(0, 0.99), n=st.integers(1, 60), seed=st.integers(0, 100))
def test_the_threshold_flags_as_many_as_allowed(rate: float, n: int, seed: int) -> None:
    clean = dotted(n) * uniform(n, 1, 1, 1, seed=seed)
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
    refused(lambda: detector.fit(Brightest(), dark()), "no threshold to fit")


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: Detector().flags(Brightest(), dark()), "call fit"),
        (lambda: Detector().fit(Brightest(), dark(), 1.0), "false positive rate"),
        (lambda: squeezing_distance(Brightest(), dark() + 2), "must lie in [0, 1]"),
        (lambda: squeezing_distance(Brightest(), dark(), ()), "needs squeezers and images"),
        (lambda: squeezing_distance(Brightest(), dark(0)), "needs squeezers and images"),
    ],
)
def test_detector_refuses_what_it_cannot_do(call: Callable[[], object], said: str) -> None:
    refused(call, said)


# --- a run's images and its detector -----------------------------------------------------------


def noise(n: int, seed: int) -> Dataset:
    """Flat grey images with a little noise: squeezing moves their answers, more or less."""
    generator = torch.Generator().manual_seed(seed)
    pixels = 128 + 40 * torch.randn(n, 1, 6, 6, generator=generator)
    labels = torch.randint(0, 3, (n,), generator=generator)
    return Dataset(pixels.clamp(0, 255).to(torch.uint8), labels, ("a", "b", "c"), "noise")


W = torch.randn(3, 36, generator=torch.Generator().manual_seed(5))


def linear() -> nn.Module:
    layer = nn.Linear(36, 3, bias=False)
    layer.load_state_dict({"weight": W})
    return nn.Sequential(nn.Flatten(), layer).eval()


def by_hand(data: Dataset, calibration: Dataset, eps: float) -> list[int]:
    """FGSM on `linear()` and Xu et al.'s detector in numpy, image by image, in float64."""
    w = W.double().numpy()

    def p(x: Array) -> Array:
        z = np.exp(w @ x.ravel() - (w @ x.ravel()).max())
        shares: Array = z / z.sum()
        return shares

    def distance(x: Array) -> float:
        smooth = median_filter(x, size=2, mode="reflect")
        return max(float(np.abs(p(x) - p(s)).sum()) for s in (np.round(31 * x) / 31, smooth))

    def attacked(x: Array, y: int) -> Array:
        grad = (w.T @ (p(x) - np.eye(3)[y])).reshape(x.shape)
        moved = np.clip(x + eps * np.sign(grad), 0, 1)
        fooling = [at for at in (x, moved) if p(at).argmax() != y]
        return min(fooling, key=lambda at: p(at)[y]) if fooling else moved

    clean, others = (
        [x[0] / 255 for x in each.images.double().numpy()] for each in (data, calibration)
    )
    threshold = sorted(map(distance, others), reverse=True)[len(others) * 5 // 100]
    made = [attacked(x, y) for x, y in zip(clean, data.labels.tolist(), strict=True)]
    labels = data.labels.tolist()
    right = [p(x).argmax() == y for x, y in zip(clean, labels, strict=True)]
    pairs = zip(made, labels, right, strict=True)
    fooling = [x for x, y, known in pairs if known and p(x).argmax() != y]
    caught = sum(distance(x) > threshold for x in fooling)
    return [caught, len(fooling), sum(distance(x) > threshold for x in clean), len(clean)]


@pytest.mark.parametrize("eps", [4 / 255, 24 / 255])
def test_detection_counts_what_a_count_by_hand_counts(eps: float) -> None:
    model, data, calibration = linear(), noise(90, 0), noise(200, 1)
    labels = model(to_unit(data.images)).argmax(1)
    labels[::9] = (labels[::9] + 1) % 3  # some are wrong before they are attacked
    data = replace(data, labels=labels)
    expected = by_hand(data, calibration, eps)
    assert 0 < expected[0] < expected[1]
    assert 0 < expected[2] < expected[3]
    found = detection(model, data, calibration, FGSM(eps))
    assert found.detected is not None
    both = (found.detected, found.false_positives)
    assert [n for score in both for n in (score.correct, score.total)] == expected


def test_detection_attacks_and_watches_the_network_inside() -> None:
    data, calibration, attack = tiny_images(24), tiny_images(40, seed=1), PGD(0.1, steps=3)
    model = network()
    inside = detection(model, data, calibration, attack)
    model.train()
    assert detection(FeatureSqueezing(model, 1), data, calibration, attack) == inside
    assert model.training


def test_detection_draws_from_its_seed() -> None:
    model, data, calibration, attack = linear(), noise(90, 0), noise(200, 1), Random(24 / 255)
    detector = Detector().fit(model, calibration.images)
    found = [detection(model, data, calibration, attack, seed=seed) for seed in range(3)]
    assert len({each.detected for each in found}) > 1
    for seed, each in enumerate(found):
        x, right = to_unit(data.images), correct(model, data)
        made = attack.made(model, x, data.labels, torch.arange(90), seed=seed)
        assert each == detector.rates(model, data.images, made[right], data.labels[right])


@pytest.mark.parametrize(("shift", "eps"), [(1, 24 / 255), (0, 0.0)])
def test_without_an_image_that_is_right_and_fools_there_is_nothing_to_detect(
    shift: int, eps: float
) -> None:
    model, data = linear(), noise(20, 0)
    data = replace(data, labels=(model(to_unit(data.images)).argmax(1) + shift) % 3)
    found = detection(model, data, noise(40, 1), FGSM(eps))
    assert found.detected is None
    assert found.false_positives.total == 20
