"""The usual mistakes of a call are named, sound calls are not, and any module can be attacked."""

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import defquant as dq
from conftest import refused, tiny_images
from defquant import evaluate
from defquant.defenses import Detector
from defquant.diagnose import Effort
from linear_scenes import middle_eps, scene

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
    ("accept", "wrap", "message"),
    [
        (lambda x: x.amin((1, 2, 3)) < -1.5, lambda x: x * STD + MEAN,
         "normalised with ImageNet's mean and deviation: put that into"),
        (lambda x: (x.amin((1, 2, 3)) + 1).abs() < 0.1, lambda x: (x + 1) / 2, "scaled to [-1, 1]"),
        (lambda x: x.amax((1, 2, 3)) > 9, lambda x: x / 255, "as pixels of 0..255"),
        (lambda x: x[:, 2].mean((1, 2)) > x[:, 0].mean((1, 2)), lambda x: x.flip(1),
         "colours in reverse, BGR for RGB"),
        (lambda x: x.mean((1, 2, 3)).abs() < 0.5, lambda x: X[: len(x)], ""),
    ],
)  # fmt: skip
def test_normalised_and_reversed(
    accept: Callable[[Tensor], Tensor], wrap: Callable[[Tensor], Tensor], message: str
) -> None:
    assert message in said(Sure(accept, wrap))


def test_labels() -> None:
    shifted = said(Then(lambda z: z.roll(1, 1)))
    assert "one below the model's class" in shifted and "correct the labels" in shifted
    assert "one above the model's class" in said(Then(lambda z: z.roll(-1, 1)))
    assert "another order" in said(Then(lambda z: z[:, [2, 3, 0, 1]]))


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


def test_models_that_mislead_are_named() -> None:
    assert "training mode" in said(Nearest().train())
    assert "probabilities" in said(Then(lambda z: z.softmax(1)))
    assert "the batch it comes in" in said(Then(lambda z: 100 * (z - z.mean(0))))
    refused(lambda: dq.accuracy(Nearest(), (X[:0], Y[:0])), "no images")
    assert "not all finite" in said(Then(lambda z: z * float("nan")))
    assert "exactly the same output" in said(Then(lambda z: 0 * z))


def test_images_in_another_layout() -> None:
    with pytest.raises(dq.UserError, match=r"looks like \(n, h, w, c\): use x.permute"):
        dq.robust_accuracy(Nearest(), (X.permute(0, 2, 3, 1), Y), dq.FGSM(0.1))
    with pytest.raises(dq.UserError, match=r"images must lie in \[0, 1\]"):
        dq.robust_accuracy(Nearest(), ((X - MEAN) / STD, Y), dq.FGSM(0.1))


WRONG = (Y + 1) % 4
ENTRIES: dict[str, Callable[[nn.Module, Any], object]] = {
    "accuracy": lambda m, d: dq.accuracy(m, d),
    "robust_accuracy": lambda m, d: dq.robust_accuracy(m, d, dq.FGSM(0.01)),
    "sweep": lambda m, d: list(dq.sweep(m, d, [dq.FGSM(0.01)])),
    "robust": lambda m, d: evaluate.robust(
        m, d, dq.FGSM(0.01), standing=torch.ones(96, dtype=torch.bool)
    ),
    "answers": lambda m, d: evaluate.answers(m, d),
    "attack": lambda m, d: dq.APGD(0.01, 2)(m, *d),
    "worst": lambda m, d: dq.Worst((dq.FGSM(0.01),))(m, *d),
    "verdict": lambda m, d: dq.masking_verdict(m, d, 0.01),
    "matrix": lambda m, d: dq.transfer_matrix({"m": m}, d, dq.FGSM(0.01)),
}


@pytest.mark.parametrize("entry", ENTRIES.values(), ids=ENTRIES)
@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (WRONG[:, None], r"torch.int64 of shape \(96, 1\), first \[1\]: use labels\[:, 0\]"),
        (torch.tensor(1), r"of shape \(\), first \[1\]"),
        (nn.functional.one_hot(Y), r"use labels.argmax\(1\), if they are one-hot"),
        (Y + 0.5, r"found torch.float32 of shape \(96,\), first \[0.5\]: use labels.long\(\)"),
        (Y.numpy() == 1, r"found torch.bool of shape"),
        (Y - 1, r"from 0 up; found -1 among torch.int64 of shape \(96,\)"),
        (
            Y.numpy().astype(np.uint8) + 3,
            r"labels must lie in 0\.\.3, the model's classes; found 6",
        ),
        ([[1], [1, 2]], "found a list that is no plain array"),
        ("many", "found a str that is no plain array"),
    ],
)
def test_labels_that_cannot_be(
    entry: Callable[[nn.Module, Any], object], labels: Any, message: str
) -> None:
    with pytest.raises(dq.UserError, match=message):
        entry(Nearest(), (X, labels))


def test_labels_of_any_width() -> None:
    few = Y % 2  # a data set may know fewer classes than the model
    right = dq.accuracy(Nearest(), (X, few))
    for labels in (few.int(), few.to(torch.uint8), few.numpy()[::-1][::-1], few.tolist(),
                   few.numpy().astype(">u2")):  # fmt: skip
        assert dq.accuracy(Nearest(), (X.numpy(), labels)) == right
    with pytest.raises(dq.UserError, match="two or more classes; it returned 1"):
        dq.accuracy(Then(lambda z: z[:, :1]), (X, Y * 0))
    small = nn.Sequential(nn.Flatten(), nn.Linear(192, 3))
    with pytest.raises(dq.UserError, match=r"labels must lie in 0\.\.2, .* found 3"):
        dq.train(small, DATA, dq.TrainConfig(epochs=1, batch_size=16, device="cpu"))


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (X > 0.5, r"torch.bool: use images.float\(\)"),
        (DATA.images.to(torch.uint16), r"torch.uint16: use images.float\(\) / 65535"),
        (DATA.images.int(), r"torch.int32: use images.to\(torch.uint8\)"),
        (DATA.images.short() - 300, "torch.int16: scale them"),
        (255 * X, "divide by 255"),
        (X.double().numpy() - 1e-5, r"found \[-1e-05, .*: put the normalisation into"),
        (X / 0, "some are no numbers"),
        (X[0], r"images \(n, c, h, w\); found torch.float32 \(3, 8, 8\)"),
        ([1, 2], "found list"),
    ],
)
def test_images_that_cannot_be(images: Any, message: str) -> None:
    for entry in ("accuracy", "attack"):
        with pytest.raises(dq.UserError, match=message):
            ENTRIES[entry](Nearest(), (images, Y))


def test_a_last_digit_beyond_the_range_is_cut_off() -> None:
    x = (X / X.max()).clone()
    x[0, 0], x[1, 0] = 1.0000004, -1e-7
    for images in (x, x.double(), x.double().numpy()):
        found = dq.PGD(0.1)(Nearest(), images, Y)  # type: ignore[arg-type]
        assert found.min() >= 0
        assert found.max() <= 1
        assert dq.accuracy(Nearest(), (images, Y)) == dq.accuracy(Nearest(), (x.clamp(0, 1), Y))


@pytest.mark.parametrize("kind", [torch.float64, torch.float16])
def test_models_of_another_type_are_given_images_so(kind: torch.dtype) -> None:
    model, x, y = scene()
    eps = middle_eps(model, x, y)[0]
    attacks = [dq.FGSM(eps), dq.APGD(eps, 4, queries=4), dq.Square(eps, queries=20)]
    before, after = (
        [s.score.correct for s in dq.sweep(m, (x, y), attacks)]
        for m in (scene()[0], model.to(kind))
    )
    assert all(abs(a - b) <= 3 for a, b in zip(before, after, strict=True))
    assert dq.PGD(eps)(model, x, y).dtype == torch.float32
    assert evaluate.vanishing(model, (x, y), torch.ones(40, dtype=torch.bool)) == 0
    assert not model._forward_pre_hooks


@pytest.mark.parametrize(
    ("attack", "message"),
    [
        (dq.PGD, r"found the class PGD: use an object of it, PGD\(8/255\)"),
        ("pgd", "found 'pgd': use an object, as dq.PGD"),
        (None, "found None"),
    ],
)
def test_what_is_no_attack(attack: Any, message: str) -> None:
    calls: tuple[Callable[[], object], ...] = (
        lambda: dq.robust_accuracy(Nearest(), (X, Y), attack),
        lambda: list(dq.sweep(Nearest(), (X, Y), [attack])),
        lambda: dq.Worst((attack,)),
    )
    for call in calls:
        with pytest.raises(dq.UserError, match=message):
            call()


def test_what_is_no_data() -> None:
    for data in (X, [(X, Y)], None):
        with pytest.raises(dq.UserError, match="data is a Dataset or a pair"):
            dq.accuracy(Nearest(), data)  # type: ignore[arg-type]


def test_random_models() -> None:
    """Noise is named as noise, once, and not as an example's dependence on its batch."""
    found = said(Then(lambda z: z + 0.1 * torch.randn_like(z)))
    assert "two identical calls of the model differ" in found
    assert "apgd@eot" in found
    assert "depends on the batch" not in found


@pytest.mark.parametrize("batch_size", [1, 3, 20])
def test_no_model_sees_more_rows_than_batch_size(batch_size: int) -> None:
    seen: list[int] = []

    class Engine(Nearest):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(len(x))
            return super().forward(1 - x)  # most are wrong: what explains it is looked for, too

    model, data = Engine(), (X[:40], Y[:40])
    attacks: list[Any] = [
        dq.Square(0.2, queries=8), dq.APGD(0.2, 3, restarts=2, queries=6), dq.PGD(0.2),
        dq.APGD(0.2, 2, loss="dlr-targeted"), dq.FAB(0.2, 2),
        dq.Transfer(dq.PGD(0.1), model), dq.Adaptive(0.2, 4),
    ]  # fmt: skip
    with pytest.warns(dq.DefquantWarning, match="inverted"):
        list(dq.sweep(model, data, attacks, batch_size=batch_size))
    evaluate.vanishing(model, data, torch.ones(40, dtype=torch.bool), batch_size=batch_size)
    effort = Effort(steps=2, queries=2, draws=2, batch_size=batch_size)
    dq.masking_verdict(model, data, 0.1, effort=effort)
    dq.transfer_matrix({"a": model}, data, dq.FGSM(0.1), batch_size=batch_size)
    Detector().fit(model, X[:40], batch_size=batch_size).rates(
        model, X[:40], X[:40], Y[:40], batch_size=batch_size
    )
    assert max(seen) == batch_size
    refused(lambda: dq.accuracy(model, data, batch_size=0), "batch_size must be 1 or more; found 0")


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
