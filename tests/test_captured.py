"""What is captured is what the network computes, or is refused in one line that names the layer."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune, spectral_norm

import defquant as dq
from conftest import left_alone, refused
from defquant.captured import MOVES, border, capture, kind_of, operation
from defquant.config import ModelConfig
from defquant.models import build

X = torch.rand(5, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Layers, and a function of them and the images."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.act, self.drop, self.fc = dq.QuantReLU(3), nn.Dropout(0.5), nn.Linear(6, 4)
        self.function, self.calls = function, 0

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def usual(net: Any, x: Tensor) -> Tensor:
    y = net.act(net.norm(net.conv(x)))
    return net.fc(net.drop(y).mean((2, 3)))  # type: ignore[no-any-return]


class Own(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight - self.weight.mean((1, 2, 3), keepdim=True), None)  # type: ignore[no-any-return]


class Optional(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, prior: Tensor | None = None) -> Any:
        y = self.model(x if prior is None else prior)
        return (y, y) if self.training else y


def net(change: Callable[[Any], object] = lambda net: None, function: Any = usual) -> nn.Module:
    torch.manual_seed(0)
    model = Net(function)
    model.get_buffer("norm.running_mean").uniform_(-1, 1)
    change(model)
    return model.train()


def replaced(model: Any) -> None:
    model.conv = Own(3, 6, 3, padding=1)


def in_place(net: Any, x: Tensor) -> Tensor:
    y = net.conv(x)
    y += net.act(y)
    return net.fc(nn.functional.relu_(y).mean((2, 3)))  # type: ignore[no-any-return]


def several_outputs(net: Any, x: Tensor) -> Tensor:
    """Views of what is not contiguous, and one of several outputs."""
    first, second = net.conv(x).transpose(1, 3).contiguous().view(x.size(0), -1, 6).chunk(2, 1)
    return net.fc(first + second.max(1, keepdim=True)[0]).mean(1)  # type: ignore[no-any-return]


def torchs_quantiser(net: Any, x: Tensor) -> Tensor:
    y = torch.fake_quantize_per_tensor_affine(
        net.conv(x), quant_max=255, quant_min=0, zero_point=100, scale=0.02
    )
    return net.fc(y.mean((2, 3)))  # type: ignore[no-any-return]


SEEN = {
    "torch's quantiser": net(function=torchs_quantiser),
    "usual": net(),
    "a subclass": net(replaced),
    "a hook": net(lambda m: m.conv.register_forward_hook(lambda c, x, y: 2 * y)),
    "a pre-hook": net(lambda m: m.conv.register_forward_pre_hook(lambda c, x: (x[0] / 2,))),
    "pruned": net(lambda m: prune.random_unstructured(m.conv, "weight", 0.5)),
    "weight norm": net(lambda m: parametrizations.weight_norm(m.conv)),
    "spectral norm": net(lambda m: spectral_norm(m.conv)),
    "parametrised": net(lambda m: parametrizations.spectral_norm(m.conv)),
    "in place": net(function=in_place),
    "several outputs": net(function=several_outputs),
    "optional input": Optional(net()),
    "double": net().double(),
    "squeezed": build(ModelConfig("wrn-10-1", bits=2, squeeze=5), num_classes=4, in_channels=3),
    "deployable": build(
        ModelConfig("wrn-10-1", bits=4, weight_bits=4, convex=True, deployable=True),
        num_classes=4, in_channels=3,
    ),
}  # fmt: skip


@pytest.mark.parametrize("model", SEEN.values(), ids=SEEN)
def test_the_program_answers_as_the_network(model: nn.Module) -> None:
    with left_alone(model):
        captured = capture(model, X[:1])
    with torch.no_grad():
        wanted = model.eval()(X.to(next(model.parameters()).dtype)).float()
    assert (captured.values(X) - wanted).abs().max() < 1e-5


def test_layers_weights_and_quantisers_are_known() -> None:
    model = build(
        ModelConfig("wrn-10-1", bits=4, weight_bits=4), num_classes=4, in_channels=3
    ).eval()
    captured = capture(model, X)
    seen = {node.name: operation(node) for node in captured.calls}
    assert seen["blocks_0_act1"] == "defquant.clip_round.default"
    (conv,) = (node for node in captured.calls if node.name == "blocks_0_conv1")
    weight: Any = conv.args[1]
    assert (weight.meta["name"], weight.meta["bits"]) == ("blocks.0.conv1.weight", 4)
    assert torch.equal(weight.meta["float"], model.get_parameter("blocks.0.conv1.weight"))
    assert captured.end.meta["layer"] == "classifier.fc" and captured.constant(weight) is not None


def looks(net: Any, x: Tensor) -> Tensor:
    y = net.act(net.conv(x))
    return net.fc(y.mean((2, 3)) if y.mean() > 0 else y.amax((2, 3)))  # type: ignore[no-any-return]


def behind_a_view(net: Any, x: Tensor) -> Tensor:
    y = net.conv(x)
    flat = y.flatten(2)
    y += 1
    return net.fc(flat.mean(2))  # type: ignore[no-any-return]


REFUSED: dict[str, tuple[Any, str]] = {
    "decides by value": (looks, "cannot follow Net: it decides by the values"),
    "one batch": (lambda n, x: n.fc(n.conv(x).reshape(2, 6, -1).mean(2)), "one number of images"),
    "random": (lambda n, x: usual(n, x) + torch.randn(4), "answers the same images otherwise"),
    "behind a view": (behind_a_view, "changes in place what 'flatten|changes in place what 'mean"),
    "two outputs": (lambda n, x: (usual(n, x), x), "one tensor of logits .* found tuple"),
    "no rows": (lambda n, x: usual(n, x).mean(0), r"found \[4\]"),
    "its own error": (lambda n, x: n.fc(n.conv(x)), "cannot follow Net, layer 'fc': mat1 and mat2"),
    "NaN": (lambda n, x: usual(n, x) * float("nan"), "NaN or infinity"),
}


@pytest.mark.parametrize(("function", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_followed_is_refused_in_one_line(function: Any, message: str) -> None:
    with pytest.raises(dq.UserError, match=message) as error:
        capture(net(function=function), X)
    assert "\n" not in str(error.value)


def test_a_weight_that_is_not_finite_is_named() -> None:
    model = net()
    model.get_parameter("conv.weight").data[0, 0, 0, 0] = float("nan")
    refused(lambda: capture(model, X), "'conv.weight' is not finite")


ONES = torch.ones(2, dtype=torch.int64)
MOVED: dict[str, Callable[[Tensor], Tensor]] = {
    "slice": lambda x: x[:, 1:, ::2], "select": lambda x: x[:, 0], "flip": lambda x: x.flip(1),
    "roll": lambda x: x.roll(1, 2), "permute": lambda x: x.permute(0, 2, 3, 1),
    "transpose": lambda x: x.transpose(1, 2), "movedim": lambda x: x.movedim(1, 3),
    "reshape": lambda x: x.reshape(-1, 6, 32), "unsqueeze": lambda x: x.unsqueeze(1).squeeze(1),
    "expand": lambda x: x[:, :1].expand(-1, 3, -1, -1), "repeat": lambda x: x.repeat(1, 2, 1, 1),
    "chunk": lambda x: x.chunk(2, 2)[1], "split": lambda x: x.split([1, 2], 1)[1],
    "unbind": lambda x: x.unbind(1)[2], "narrow": lambda x: x.narrow(1, 1, 2),
    "pixel_unshuffle": lambda x: nn.functional.pixel_unshuffle(x, 2),
    "channel_shuffle": lambda x: nn.functional.channel_shuffle(x, 3),
    "upsample": nn.Upsample(scale_factor=2), "tile": lambda x: x.tile(1, 2, 1, 1),
    "unfold": lambda x: x.unfold(2, 3, 1), "index_select": lambda x: x.index_select(1, ONES),
}  # fmt: skip


@pytest.mark.parametrize("move", MOVED.values(), ids=MOVED)
def test_what_moves_values_computes_none(move: Callable[[Tensor], Tensor]) -> None:
    """And is known as such to all who ask: audit, export, prepare and judge."""
    captured = capture(Net(lambda net, x: move(x).flatten(1)[:, :4]), X)
    assert {kind_of(node) for node in captured.calls} <= MOVES
    assert torch.isin(captured.values(X), X).all()


@pytest.mark.parametrize(
    ("pad", "wanted"),
    [
        (lambda x: nn.functional.pad(x, (1, 2, 3, 4)), (3, 1, 4, 2)),
        (lambda x: torch.constant_pad_nd(x, (1, 2, 3, 4)), (3, 1, 4, 2)),
        (lambda x: nn.functional.pad(x, (1, 2, 3, 4), value=1.0), None),
        (lambda x: nn.functional.pad(x, (-1, 2, 3, 4)), None),
        (lambda x: nn.functional.pad(x, (1, 2)), None),
        (lambda x: nn.functional.pad(x, (1, 2, 3, 4), mode="reflect"), None),
        (lambda x: torch.ops.aten.reflection_pad2d(x, (1, 2, 3, 4)), None),
    ],
)
def test_a_border_of_zeros_is_told_from_others(
    pad: Callable[[Tensor], Tensor], wanted: Any
) -> None:
    seen = capture(net(function=lambda net, x: net.fc(pad(net.conv(x)).mean((2, 3)))), X)
    assert [border(node) for node in seen.nodes if "pad" in kind_of(node)] == [wanted]
