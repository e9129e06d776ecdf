"""The usual mistakes of a call are named, sound calls are not, and any module can be attacked."""

import warnings
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn

import defquant as dq
from conftest import tiny_images

DATA = tiny_images(96, channels=3)
TINT = torch.tensor([1.0, 0.6, 0.2]).view(1, 3, 1, 1)  # so that the order of colours matters
X, Y = (DATA.images / 255).float() * TINT, DATA.labels
MEAN = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)


class Nearest(nn.Module):
    """Logits are the negative distances to each class's mean image; holds no parameters."""

    def __init__(self, change: Callable[[Tensor], Tensor] = lambda x: x) -> None:
        super().__init__()
        self.means = torch.stack([change(X)[k == Y].mean(0) for k in range(4)])
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return -(x[:, None] - self.means).square().mean((2, 3, 4))


class Then(nn.Module):
    def __init__(self, change: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.model, self.change = Nearest(), change
        self.eval()

    def forward(self, x: Tensor) -> object:
        return self.change(self.model(x))


def said(model: nn.Module, x: Tensor = X, y: Tensor = Y) -> str:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        dq.robust_accuracy(model, (x, y), dq.FGSM(0))
    return " | ".join(str(w.message) for w in caught)


def test_sound_models_raise_nothing() -> None:
    assert not said(Nearest())
    assert not said(Then(lambda z: z.log_softmax(1)))
    torch.manual_seed(0)
    x, y = dq.load("digits").take(torch.arange(500))
    for bits in (None, 8):  # untrained ones guess, but no repair helps them
        for _ in range(3):
            assert not said(dq.wide_resnet(10, 1, bits=bits, in_channels=1).eval(), x, y)


def test_a_model_of_inverted_images() -> None:
    assert "on 96 inverted, 1 - x" in said(Nearest(lambda x: 1 - x))


class Sure(nn.Module):
    """Right on images for which `accept` holds, and wrong on all others."""

    def __init__(self, accept: Callable[[Tensor], Tensor], wrap: Callable[[Tensor], Tensor]):
        super().__init__()
        self.accept, self.wrap, self.model = accept, wrap, Nearest()
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        good = self.model(self.wrap(x))
        guess = torch.zeros_like(good) - 0.1 * x.mean((1, 2, 3))[:, None] * torch.arange(4)
        return torch.where(self.accept(x)[:, None], good, guess)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            Sure(lambda x: x.amin((1, 2, 3)) < -1.5, lambda x: x * STD + MEAN),
            "normalised with ImageNet's mean and deviation: put that into",
        ),
        (
            Sure(lambda x: (x.amin((1, 2, 3)) + 1).abs() < 0.1,
                 lambda x: (x + 1) / 2),
            "scaled to [-1, 1]",
        ),
        (
            Sure(lambda x: x.amax((1, 2, 3)) > 9, lambda x: x / 255),
            "as pixels of 0..255",
        ),
        (
            Sure(lambda x: x[:, 2].mean((1, 2)) > x[:, 0].mean((1, 2)), lambda x: x.flip(1)),
            "colours in reverse, BGR for RGB",
        ),
        (
            Sure(lambda x: x.mean((1, 2, 3)).abs() < 0.5, lambda x: X[: len(x)]),
            "",
        ),
    ],
)  # fmt: skip
def test_normalised_and_reversed(model: nn.Module, message: str) -> None:
    assert message in said(model)


def test_labels() -> None:
    assert "one below the model's class" in said(Shifted(1))
    assert "one above the model's class" in said(Shifted(-1), y=Y)
    assert "another order" in said(Permuted((2, 3, 0, 1)))
    assert "correct the labels" in said(Shifted(1))


class Shifted(Nearest):
    def __init__(self, by: int) -> None:
        super().__init__()
        self.by = by

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).roll(self.by, 1)


class Permuted(Nearest):
    def __init__(self, order: Sequence[int]) -> None:
        super().__init__()
        self.order = list(order)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[:, self.order]


def test_outputs_that_cannot_be() -> None:
    for change, message in (
        (lambda z: (z, z), r"returned a tuple of 2 \(Tensor, Tensor\)"),
        (lambda z: {"logits": z}, "returned a dict with keys 'logits'"),
        (lambda z: z.argmax(1), r"returned a torch\.int64 tensor"),
        (lambda z: None, "returned a NoneType"),
        (lambda z: z[:, :, None], r"must return logits \(n, classes\)"),
    ):
        with pytest.raises(dq.UserError, match=message):
            dq.robust_accuracy(Then(change), (X, Y), dq.FGSM(0.1))
    with pytest.raises(dq.UserError, match="the model's outputs have none"):
        dq.robust_accuracy(Then(lambda z: z.detach()), (X, Y), dq.FGSM(0.1))
    black = dq.Square(0.1, queries=5)
    assert dq.robust_accuracy(Then(lambda z: z.detach()), (X, Y), black).total == 96


def test_nan_and_constant_outputs() -> None:
    assert "not all finite" in said(Then(lambda z: z * float("nan")))
    assert "exactly the same output" in said(Then(lambda z: 0 * z))


def test_images_in_another_layout() -> None:
    with pytest.raises(dq.UserError, match=r"looks like \(n, h, w, c\): use x.permute"):
        dq.robust_accuracy(Nearest(), (X.permute(0, 2, 3, 1), Y), dq.FGSM(0.1))
    with pytest.raises(dq.UserError, match=r"images must lie in \[0, 1\]"):
        dq.robust_accuracy(Nearest(), ((X - MEAN) / STD, Y), dq.FGSM(0.1))


def test_any_module() -> None:
    """Without parameters, with functional relu, compiled, in DataParallel: the same score."""
    torch.manual_seed(0)

    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(144, 4)

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.fc(nn.functional.relu(self.conv(x)).flatten(1))
            return logits

    attack = dq.PGD(16 / 255, steps=3)
    model = Functional()
    dq.train(model, DATA, dq.TrainConfig(epochs=5, batch_size=16, lr=0.05, device="cpu"))
    model.eval()
    plain = dq.robust_accuracy(model, DATA, attack)
    assert dq.robust_accuracy(nn.DataParallel(model).eval(), DATA, attack) == plain
    compiled = torch.compile(model, backend="eager")
    assert dq.robust_accuracy(compiled, DATA, attack) == plain  # type: ignore[arg-type]
    assert dq.robust_accuracy(Nearest(), (X, Y), dq.FGSM(0.01)).correct > 0
