"""A model is left as it was found, whatever happened; attacks run in eval mode, without a graph."""

import pytest
import torch
from torch import Tensor, nn

import defquant as dq
from defquant.attacks import FGSM, PGD, untouched
from linear_scenes import Linear, linear_scene, network


def test_model_is_left_as_it_was_even_after_an_error() -> None:
    model = network().train()
    model.get_submodule("blocks.0.bn1").eval()  # a frozen batch norm must stay frozen
    first, second = list(model.parameters())[:2]
    first.requires_grad_(False)
    second.grad = torch.full_like(second, 3.0)
    kept = second.grad
    model.register_buffer("counter", torch.zeros(1))
    modes = [m.training for m in model.modules()]
    buffers = [b.clone() for b in model.buffers()]
    x, y = torch.rand(4, 1, 8, 8), torch.zeros(4, dtype=torch.int64)
    random_state = torch.get_rng_state()
    PGD(8 / 255)(model, x, y)
    with pytest.raises(RuntimeError, match="boom"), untouched(model):
        model.get_buffer("counter").add_(1)  # a model may count its own calls
        first.grad, second.grad = torch.zeros_like(first), torch.zeros_like(second)
        model(x)
        torch.rand(3)
        raise RuntimeError("boom")
    assert [m.training for m in model.modules()] == modes
    assert not first.requires_grad and second.grad is kept
    assert torch.equal(kept, torch.full_like(second, 3.0))
    assert all(p.grad is None for p in model.parameters() if p is not second)
    assert all(torch.equal(a, b) for a, b in zip(buffers, model.buffers(), strict=True))
    assert torch.equal(random_state, torch.get_rng_state())


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


class Observed(Linear):
    """Buffers that grow, that appear and that are bound anew, and a flag that tells of them."""

    cache: Tensor | None
    calls: Tensor

    def __init__(self) -> None:
        super().__init__(3 * 4 * 4)
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
    model, (_, x, y) = Observed(), linear_scene(4)
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
    with pytest.raises(dq.UserError, match="run it once"):
        dq.accuracy(lazy, (x, y))


def test_attacks_run_in_eval_mode_without_parameter_gradients() -> None:
    seen: set[tuple[bool, bool]] = set()
    spy, (_, x, y) = Linear(3 * 4 * 4), linear_scene(4)
    spy.register_forward_hook(lambda *_: seen.add((spy.training, spy.w.requires_grad)))
    FGSM(0.1)(spy, x, y)
    assert seen == {(False, False)}
