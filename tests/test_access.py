"""A model is left as it was found, whatever happened; attacks run in eval mode, without a graph."""

import os
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import defquant as dq
from conftest import left_alone, refused, tiny_images, uniform
from defquant.attacks import FGSM, PGD, untouched
from defquant.attacks.access import channels_last
from defquant.captured import capture
from defquant.deploy.lower import calibrate
from defquant.diagnose import Effort, first_block_distances, gradient_cosines, layer_distances
from defquant.training import monitor
from linear_scenes import LinearNet, network, scene

Data = tuple[Tensor, Tensor]


def diva(model: nn.Module, data: Data) -> None:
    twin = network(None).train()
    with left_alone(twin):
        dq.DIVA(0.1, twin, steps=2)(model, *data)


ATTACKS = (FGSM(0.5), PGD(0.5, steps=2), dq.Square(0.1, 3), dq.Adaptive(0.1, 2), dq.FAB(0.1, 2))
LOOKS: dict[str, Callable[[nn.Module, Data], object]] = {
    "attacks": lambda m, d: [attack(m, *d) for attack in ATTACKS],
    "scores": lambda m, d: (dq.accuracy(m, d), list(dq.sweep(m, d, ATTACKS))),
    "audit": dq.audit, "diva": diva,
    "layers": lambda m, d: layer_distances(m, d[0], d[0].flip(0)),
    "first block": lambda m, d: first_block_distances(m, d[0], [(0.5, d[0].flip(0))]),
    "monitor": lambda m, d: monitor(m, tiny_images(8), 0.1),
    "masking": lambda m, d: dq.masking_verdict(m, d, 0.1, effort=Effort(2, 1, 2, 2)),
    "transfer": lambda m, d: dq.transfer_matrix({"a": m}, d, PGD(0.1, steps=1)),
    "cosines": lambda m, d: gradient_cosines(m, d, [1, 2]),
    "calibration": lambda m, d: calibrate(m, d[0], batch_size=3),
    "capture": lambda m, d: capture(m, d[0]),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:the model is in training mode")
@pytest.mark.parametrize("look", LOOKS.values(), ids=LOOKS)
def test_whoever_looks_at_a_model_leaves_it_as_it_was(look: Callable[..., object]) -> None:
    """A part in another mode, a frozen weight and a gradient of the user's among it."""
    model = network(2)
    model.get_submodule("blocks.0").train()
    first, second = list(model.parameters())[:2]
    first.requires_grad_(False)
    second.grad = torch.ones_like(second)
    with left_alone(model):
        look(model, (uniform(8, 1, 8, 8), torch.arange(8) % 4))


def test_model_is_left_as_it_was_even_after_an_error() -> None:
    model = network().train()
    model.get_submodule("blocks.0.bn1").eval()  # a frozen batch norm must stay frozen
    first, second = list(model.parameters())[:2]
    first.requires_grad_(False)
    second.grad = torch.full_like(second, 3.0)
    kept = second.grad
    model.register_buffer("counter", torch.zeros(1))
    x = uniform(4, 1, 8, 8)
    with left_alone(model), pytest.raises(RuntimeError, match="boom"), untouched(model):
        model.get_buffer("counter").add_(1)  # a model may count its own calls
        first.grad, second.grad = torch.zeros_like(first), torch.zeros_like(second)
        model(x)
        torch.rand(3)
        raise RuntimeError("boom")
    assert torch.equal(kept, torch.full_like(second, 3.0))


def test_only_buffers_that_changed_are_written_back() -> None:
    """Each with its own values, of every type and shape; the others may belong to a graph."""
    model = nn.Module()
    for name, value in {
        "map": torch.rand(2, 3, 2, 2).contiguous(memory_format=torch.channels_last),
        "scalar": torch.tensor(7), "steps": torch.arange(4), "nan": torch.tensor([1.0, torch.nan]),
        "empty": torch.empty(0), "wide": torch.rand(3, 2, dtype=torch.float64).t(),
        "swapped": torch.rand(3, 2),
    }.items():  # fmt: skip
        model.register_buffer(name, value)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    versions = {name: buffer._version for name, buffer in model.named_buffers()}
    with untouched(model):
        model.get_buffer("map")[1, 2] = 5.0
        model.get_buffer("steps").add_(1)
        model.get_buffer("swapped").data = torch.zeros(3, 2)
    for name, buffer in model.named_buffers():
        torch.testing.assert_close(buffer, before[name], rtol=0, atol=0, equal_nan=True)
    assert model.get_buffer("map").is_contiguous(memory_format=torch.channels_last)
    for name in ("scalar", "empty", "wide"):
        assert model.get_buffer(name)._version == versions[name]


class Observed(LinearNet):
    """Buffers that grow, that appear and that are bound anew, and a flag that tells of them."""

    cache: Tensor | None
    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("low", torch.empty(0))
        self.register_buffer("cache", None)
        self.register_buffer("calls", torch.zeros(()))
        self.ready = False

    def forward(self, x: Tensor) -> Tensor:
        self.get_buffer("low").resize_(3).copy_(x.amin((0, 2, 3)).detach())
        if not self.ready:
            self.register_buffer("scale", torch.ones(()))
            self.cache, self.ready = torch.ones(()), True
        self.calls = self.calls + 1
        return super().forward(x) * self.get_buffer("scale") * self.get_buffer("cache")


def test_buffers_come_back_by_name_and_the_first_error_is_the_one_seen() -> None:
    model, (_, x, y) = Observed(), scene(4)
    calls = model.get_buffer("calls")
    for _ in range(2):  # it runs again: flag and buffers agree
        PGD(0.1)(model, x, y)
        with pytest.raises(ValueError, match="mine"), untouched(model):
            model(x)
            raise ValueError("mine")
        assert model.calls is calls
        assert [(n, b.numel()) for n, b in model.named_buffers()] == [("low", 0), ("calls", 1)]
        assert model.cache is None and not model.ready
    lazy = nn.Sequential(nn.Flatten(), nn.LazyLinear(2)).eval()
    refused(lambda: dq.accuracy(lazy, (x, y)), "run it once")


def test_attacks_run_in_eval_mode_without_parameter_gradients() -> None:
    seen: set[tuple[bool, bool]] = set()
    spy, x, y = scene(4)
    spy.train()
    spy.register_forward_hook(lambda *_: seen.add((spy.training, spy.weight.requires_grad)))
    FGSM(0.1)(spy, x, y)
    assert seen == {(False, False)}


class Ordered(nn.Module):
    """A convolution between two of other kinds of reading: by memory or not, as `reads` says."""

    def __init__(self, reads: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.fc, self.reads = nn.Conv2d(3, 8, 3, 4), nn.Linear(128, 4), reads
        self.seen: list[bool] = []

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        self.seen.append(x.is_contiguous(memory_format=torch.channels_last))
        return self.fc(self.reads(x))  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("reads", "last"),
    [
        (lambda x: x.flatten(1), True),
        (lambda x: x.view(len(x), -1), False),
        (lambda x: x.as_strided((len(x), 128), (128, 1)), False),  # as a kernel of a user's own may
    ],
)
def test_convolutions_run_channels_last_where_the_answers_stay(
    reads: Callable[[Tensor], Tensor], last: bool
) -> None:
    model, data = Ordered(reads).eval(), (uniform(6, 3, 16, 16), torch.arange(6) % 4)
    weight = model.conv.weight
    there = weight.data_ptr()
    with torch.no_grad():
        usual = model(data[0])
    with pytest.raises(KeyboardInterrupt), channels_last(model, data[0]):
        assert torch.allclose(model(data[0]), usual, atol=1e-5)
        assert model.seen[-1] == last
        raise KeyboardInterrupt
    assert weight is model.conv.weight and weight.data_ptr() == there
    model.seen.clear()
    dq.robust_accuracy(model, (data[0], usual.argmax(1)), PGD(0.01, steps=3))
    assert model.seen[-1] == last


def test_small_images_and_compiled_models_run_as_they_are() -> None:
    model = Ordered(lambda x: x.flatten(1))
    compiled = Ordered(lambda x: x.flatten(1))
    compiled._compiled_call_impl = compiled.forward  # as `Module.compile` leaves it
    for one, side in ((model, 8), (compiled, 16)):
        with channels_last(one, uniform(2, 3, side, side)):
            assert one.conv.weight.is_contiguous()


SHAPES = """
import torch
from torch.nn.functional import conv2d

last, some = torch.channels_last, (1, 3, 4, 5, 6, 7, 8, 10, 12, 16, 20, 24)
shapes = [(k, s, i, o, 1) for k in (1, 3, 5) for s in (1, 2) for i in some for o in some]
shapes += [(3, s, c, c, c) for s in (1, 2) for c in some]
torch.set_num_threads(1)
for k, s, i, o, groups in shapes:
    for side, n in ((8, 3), (7, 2), (32, 2)):
        found = []
        for layout in (torch.contiguous_format, last):
            torch.manual_seed(0)
            x = torch.randn(n, i, side, side).contiguous(memory_format=layout).requires_grad_()
            w = torch.randn(o, i // groups, k, k).contiguous(memory_format=layout)
            y = conv2d(x, w, None, s, k // 2, 1, groups)
            found.append((y.detach(), *torch.autograd.grad(y.square().sum(), x)))
        for usual, other in zip(*found):
            assert torch.allclose(usual, other, rtol=1e-3, atol=1e-2), (k, s, i, o, groups, side)
"""


@pytest.mark.slow
@pytest.mark.parametrize("instructions", ["AVX512_CORE", "AVX2", "SSE41"])
def test_an_attack_asks_onednn_for_nothing_that_it_writes_out_of_bounds(instructions: str) -> None:
    """Channels last, as the gradient of weights is at some widths: see `step`. glibc looks."""
    checks = {"LD_PRELOAD": "libc_malloc_debug.so.0", "MALLOC_CHECK_": "3"}
    env = os.environ | checks | {"ONEDNN_MAX_CPU_ISA": instructions}
    subprocess.run([sys.executable, "-c", SHAPES], env=env, check=True)
