"""Shared by all tests: few threads, small networks."""

import gzip
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from defquant.data import Dataset
from defquant.errors import UserError

REAL_DATA = Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture(autouse=True)
def _few_threads() -> None:
    torch.set_num_threads(1)


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
    patch.setattr("defquant.report.plot.script", lambda: gzip.compress(b"vega", mtime=0))
