"""Eq. 4 and Figure 3 on networks whose distances are known in closed form."""

import json
import math
from dataclasses import asdict

import pytest
import torch
from torch import Tensor, nn

import defquant as dq
from conftest import refused, uniform
from defquant.diagnose import first_block_distances, layer_distances, normalized_distance
from defquant.errors import UserError
from defquant.quantize import Quantizer, QuantReLU, QuantTanh


def linear(W: Tensor) -> nn.Linear:
    layer = nn.Linear(W.shape[1], W.shape[0], bias=False)
    layer.weight.data.copy_(W)
    return layer


def pixels(*rows: list[float]) -> Tensor:
    """Each row an image of one line."""
    return torch.tensor(rows).view(len(rows), 1, 1, -1)


def network_of(*layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(*layers, nn.Flatten())


def test_each_row_is_an_example() -> None:
    a = torch.tensor([[[3.0, 4.0]], [[0.0, 2.0]]])
    b = torch.tensor([[[3.0, 5.0]], [[1.0, 2.0]]])
    torch.testing.assert_close(normalized_distance(a, b), torch.tensor([1 / 5, 1 / 2]))
    torch.testing.assert_close(
        normalized_distance(a[None], b[None]), torch.tensor([math.sqrt(2 / 29)])
    )
    assert torch.equal(normalized_distance(a, a), torch.zeros(2))
    torch.testing.assert_close(normalized_distance(7 * a, 7 * b), normalized_distance(a, b))


def test_a_clean_row_of_zeros() -> None:
    a, b = torch.zeros(2, 3), torch.tensor([[0.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    assert normalized_distance(a, b).tolist() == [0.0, math.inf]


@pytest.mark.parametrize(
    ("a", "b"), [((2, 3), (2, 4)), ((2, 3), (1, 3)), ((3,), (3,)), ((0, 3), (0, 3))]
)
def test_unequal_shapes_are_refused(a: tuple[int, ...], b: tuple[int, ...]) -> None:
    refused(lambda: normalized_distance(torch.ones(a), torch.ones(b)), "must share a shape")
    with pytest.raises(UserError, match="must share a shape"):
        layer_distances(nn.Flatten(), torch.ones(a), torch.ones(b))


def test_an_orthonormal_layer_keeps_d_and_a_gain_multiplies_it() -> None:
    """Clean along e1, noise along e2: gains 1 and 5 there take D to 5 D, and then 5 D stays."""
    Q = torch.linalg.qr(uniform(4, 4) - 0.5).Q
    gain = torch.diag(torch.tensor([1.0, 5.0, 1.0, 1.0]))
    model = network_of(linear(Q), linear(gain @ Q.T), linear(Q), linear(torch.eye(4)))
    x = pixels([1.0, 0, 0, 0], [2.0, 0, 0, 0])
    found = layer_distances(model, x, x + pixels([0, 0.1, 0, 0]))
    assert [d.layer for d in found] == ["0", "1", "2", "3"]
    assert [d.index for d in found] == [0, 1, 2, 3]
    for record, factor in zip(found, (1, 1, 5, 5), strict=True):
        assert record.bits is None
        assert record.distance.mean == pytest.approx(factor * (0.1 + 0.05) / 2, rel=1e-5)
        assert record.distance.spread == pytest.approx(factor * 0.05 / math.sqrt(2), rel=1e-5)
        assert record.distance.whole == pytest.approx(factor * math.sqrt(0.02 / 5), rel=1e-5)
        assert (record.distance.left_out, record.distance.examples) == (0, 2)


def quantised(high: float = 1.0, bits: int | None = 3) -> nn.Sequential:
    return network_of(linear(torch.eye(8)), QuantReLU(bits, high), linear(torch.eye(8)))


def grid() -> Tensor:
    """Points of the 3-bit grid on [0, 1], the last left out: there the noise would be clipped."""
    return torch.arange(8).remainder(7).div(7).repeat(2, 1).view(2, 1, 1, 8)


@pytest.mark.parametrize(("share", "factor"), [(0.45, 0.0), (0.55, 1 / 0.55)])
def test_noise_below_half_a_step_vanishes_and_above_it_grows(share: float, factor: float) -> None:
    moved = grid() + share / 7
    (plain,) = {float(d) for d in normalized_distance(grid(), moved)}
    first, second = layer_distances(quantised(), grid(), moved)
    assert first.distance.mean == pytest.approx(plain)
    assert second.distance.mean == pytest.approx(factor * plain)
    (block,) = first_block_distances(quantised(bits=None), grid(), [(share / 7, moved)], bits=3)
    assert block.plain.mean == pytest.approx(plain)
    assert block.quantized.mean == pytest.approx(factor * plain)


def test_evenly_spread_activations_gain_most_from_small_noise() -> None:
    """E|Q(a + δ) - Q(a)|² = δΔ, whatever the paper's Figure 3a shows for other activations."""
    model, step = nn.Sequential(QuantReLU(None, high=1.0)), 1 / 7
    a = step / 2 + (1 - step) * torch.linspace(0, 1, 200_001)[None]  # whole cells, none of them cut
    for noise in (step / 4, step / 16):
        (block,) = first_block_distances(model, a, [(noise, a + noise)])
        assert block.plain.whole is not None
        assert block.quantized.whole is not None
        gain = block.quantized.whole / block.plain.whole
        assert gain == pytest.approx(math.sqrt(step / noise), rel=0.1)


def network(bits: int | None = 4) -> nn.Module:
    torch.manual_seed(0)
    model = dq.wide_resnet(10, 1, bits=bits, in_channels=1, num_classes=4)
    for _ in range(5):  # batch norm's statistics
        model(torch.rand(16, 1, 8, 8))
    return model


def pair(n: int = 6) -> tuple[Tensor, Tensor]:
    x = uniform(n, 1, 8, 8)
    return x, (x + 0.1 * (uniform(n, 1, 8, 8, seed=1) - 0.5)).clamp(0, 1)


def test_layers_come_in_the_order_of_the_forward_pass() -> None:
    x, moved = pair()
    found = layer_distances(network(), x, moved)
    block = ["conv1", "conv2"]
    assert [d.layer for d in found][:3] == ["stem", *(f"blocks.0.{name}" for name in block)]
    assert [d.layer for d in found][-1] == "classifier.fc"
    assert len(found) == 1 + 3 * 2 + 2 + 1  # stem, three blocks, two shortcuts, classifier
    assert found[0].distance.mean == pytest.approx(float(normalized_distance(x, moved).mean()))
    assert {d.bits for d in found} == {4}


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mixer = nn.MultiheadAttention(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens, counted in the first dimension and the images in the second, mixed twice."""
        tokens = nn.functional.conv2d(x, torch.ones(1, 1, 1, 1)).squeeze(1).transpose(0, 1)
        for _ in range(2):
            tokens = self.mixer(tokens, tokens, tokens)[0]
        return tokens[0]


def test_functional_calls_and_repeated_ones_are_there_too() -> None:
    torch.manual_seed(0)
    x, moved = pair()
    found = layer_distances(Functional(), x, moved)
    assert [d.layer for d in found] == ["conv2d", *["mixer", "mixer.out_proj"] * 2]
    for d in found[:2]:
        assert d.distance.mean == pytest.approx(float(normalized_distance(x, moved).mean()))


def test_many_examples_are_taken_in_parts() -> None:
    x, moved = pair(300)
    model = network()
    found = layer_distances(model, x, moved)[3].distance
    parts = [layer_distances(model, x[i : i + 100], moved[i : i + 100]) for i in (0, 100, 200)]
    means = [part[3].distance.mean or 0.0 for part in parts]
    assert found.examples == 300
    assert found.mean == pytest.approx(sum(means) / 3, rel=1e-4)


def test_mixed_bits_are_said_so() -> None:
    model = network()
    next(m for m in model.modules() if isinstance(m, Quantizer)).bits = 2
    found = layer_distances(model, *pair())
    assert {d.bits for d in found} == {"mixed"}
    json.dumps([asdict(record) for record in found], allow_nan=False)


def test_the_first_block_is_the_first_one_called_whatever_its_bits() -> None:
    x, moved = pair()
    attacked = [(0.05, moved), (0.0, x)]
    found = first_block_distances(network(1), x, attacked)
    assert found == first_block_distances(network(None), x, attacked)
    model = network(None).eval()
    block = model.get_submodule("blocks.0")

    def activation(x: Tensor) -> Tensor:
        stem = model.get_submodule("stem")(x)
        return nn.functional.relu6(block.get_submodule("bn1")(stem)).detach()

    plain = normalized_distance(activation(x), activation(moved))
    rounded = normalized_distance(
        dq.fake_quantize(activation(x), 3), dq.fake_quantize(activation(moved), 3)
    )
    assert found[0].plain.mean == pytest.approx(float(plain.mean()))
    assert found[0].quantized.mean == pytest.approx(float(rounded.mean()))
    assert (found[0].eps, found[0].bits) == (0.05, 3)
    assert (found[1].plain.mean, found[1].quantized.whole) == (0.0, 0.0)


def test_the_tanh_quantiser_has_a_first_block_too() -> None:
    x = uniform(2, 5)
    (block,) = first_block_distances(nn.Sequential(QuantTanh(2)), x, [(0.1, x + 0.1)], bits=8)
    plain = normalized_distance(torch.tanh(x), torch.tanh(x + 0.1))
    assert block.plain.mean == pytest.approx(float(plain.mean()))


def test_what_rounding_silences_is_left_out_of_the_mean() -> None:
    x, moved = torch.tensor([[0.2, 0.2], [0.8, 0.2]]), torch.tensor([[0.8, 0.2], [0.8, 0.8]])
    (block,) = first_block_distances(nn.Sequential(QuantReLU(None, 1.0)), x, [(0.6, moved)], bits=1)
    assert (block.quantized.left_out, block.quantized.mean, block.quantized.spread) == (1, 1.0, 0.0)
    (alone,) = first_block_distances(
        nn.Sequential(QuantReLU(None, 1.0)), x[:1], [(0.6, moved[:1])], bits=1
    )
    assert (alone.quantized.mean, alone.quantized.whole) == (None, None)


def test_what_is_missing_or_out_of_range_is_refused() -> None:
    x, moved = pair()
    bare = nn.Sequential(nn.Flatten(), nn.Linear(64, 4))
    with pytest.raises(UserError, match="Quantizer to look at; Sequential calls none"):
        first_block_distances(bare, x, [(0.05, moved)])
    with pytest.raises(UserError, match="convolution or linear layer to look at; Flatten calls no"):
        layer_distances(nn.Flatten(), x, moved)
    refused(lambda: first_block_distances(network(), x, [(8, moved)]), "write 8/255")
    refused(lambda: first_block_distances(network(), x, [(0.05, moved)], bits=0), "bits must be")
