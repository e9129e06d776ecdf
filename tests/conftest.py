"""Shared by all tests: few threads, small networks."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from defquant.data import Dataset
from defquant.errors import UserError

REAL_DATA = Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture(autouse=True)
def _begun_alike() -> None:
    """Whatever ran before: one thread, and the same random numbers."""
    torch.set_num_threads(1)
    torch.manual_seed(0)


def tiny_images(n: int = 64, *, size: int = 8, channels: int = 1, seed: int = 0) -> Dataset:
    """Bright bars on a dark ground: four classes that a small network learns in a few steps."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 4
    images = torch.randint(0, 60, (n, channels, size, size), generator=generator)
    half = size // 2
    corners = ((0, 0), (0, half), (half, 0), (half, half))
    for index, label in enumerate(labels.tolist()):
        row, column = corners[label]
        images[index, :, row : row + half, column : column + half] += 120
    return Dataset(images.to(torch.uint8), labels, ("nw", "ne", "sw", "se"), "corners")


def refused(call: Callable[[], object], *parts: str) -> str:
    """The message of the `UserError` that `call` must raise: one line that holds all `parts`."""
    with pytest.raises(UserError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message, message
    return message


def alike(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    """The same names and, bit for bit, the same tensors."""
    return a.keys() == b.keys() and all(torch.equal(value, b[name]) for name, value in a.items())


@contextmanager
def left_alone(*models: nn.Module) -> Iterator[None]:
    """The state, modes, gradients, hooks and bits of `models` stay, and so do global draws."""
    weights = [p for model in models for p in model.parameters()]
    state = [{name: t.clone() for name, t in model.state_dict().items()} for model in models]
    grads, draws = [p.grad for p in weights], torch.get_rng_state()

    def rest() -> list[object]:
        parts = (part for model in models for part in model.modules())
        hooks = ((len(p._forward_hooks), len(p._forward_pre_hooks), set(vars(p)), p) for p in parts)
        own = [(*each, part.training, getattr(part, "bits", None)) for *each, part in hooks]
        return [own, [p.requires_grad for p in weights]]

    before = rest()
    yield
    assert all(map(alike, state, (model.state_dict() for model in models)))
    assert rest() == before and all(p.grad is g for p, g in zip(weights, grads, strict=True))
    assert torch.equal(draws, torch.get_rng_state())


def uniform(*shape: int, seed: int = 0) -> Tensor:
    """Numbers in [0, 1) that depend on the seed alone."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def corners() -> Dataset:
    return tiny_images()


@pytest.fixture
def drawn() -> None:
    """Of a test that looks at the charts of a page."""


@pytest.fixture
def undrawn(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages without pictures of their charts and without Vega, which take seconds."""
    if "drawn" not in request.fixturenames:
        undraw(monkeypatch)


def undraw(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("defquant.report.plot.svg", lambda spec: "<svg></svg>")
