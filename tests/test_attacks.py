"""Attacks against a linear model, whose exact answer is known, and against their own rules."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import defquant as dq
from defquant.attacks import (
    BIM,
    FGSM,
    PGD,
    RFGSM,
    Attack,
    FirstOrder,
    Random,
    RandomEps,
    Transfer,
    untouched,
)
from defquant.attacks.contract import Target, uniform
from defquant.attacks.engine import look, perturb, rank, rows_of, unbroken
from defquant.attacks.first_order import paper_steps
from defquant.attacks.names import parse_attack
from defquant.diagnose import Effort
from defquant.evaluate import robust, vanishing

MAKE: list[Callable[[float], FirstOrder]] = [
    lambda eps: Random(eps, samples=3),
    FGSM,
    RFGSM,
    BIM,
    PGD,
    lambda eps: PGD(eps, steps=5, restarts=2),
]


class Linear(nn.Module):
    """Two classes, logits ±(w·x + b)/2, so that the margin moves by exactly eps·||w||_1."""

    def __init__(self, size: int, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.w = nn.Parameter(torch.randn(size, generator=generator))

    def margin(self, x: Tensor) -> Tensor:
        return (x.flatten(1) - 0.5) @ self.w

    def forward(self, x: Tensor) -> Tensor:
        margin = self.margin(x)
        return torch.stack([-margin, margin], 1) / 2


def scene(n: int = 40, seed: int = 0) -> tuple[Linear, Tensor, Tensor]:
    model = Linear(3 * 4 * 4)
    generator = torch.Generator().manual_seed(seed)
    x = 0.3 + 0.4 * torch.rand(n, 3, 4, 4, generator=generator)  # eps 0.1 never leaves [0, 1]
    return model, x, (model.margin(x) > 0).long().detach()


@pytest.mark.parametrize("attack", [FGSM(0.05), BIM(0.05), PGD(0.05, steps=3)])
def test_on_a_linear_model_the_optimum_is_reached(attack: FirstOrder) -> None:
    model, x, y = scene()
    adversarial = attack(model, x, y)
    sign = 2 * y - 1
    fall = ((model.margin(x) - model.margin(adversarial)) * sign).detach()
    norm = model.w.detach().abs().sum()
    torch.testing.assert_close(
        fall, torch.full_like(fall, 0.05 * float(norm)), rtol=1e-4, atol=1e-5
    )
    robust = dq.robust_accuracy(model.eval(), (x, y), attack)
    assert robust.correct == int(((model.margin(x) * sign) > 0.05 * norm).sum())


def test_rfgsm_takes_the_gradient_after_its_random_step() -> None:
    model, x, y = scene()
    moved = RFGSM(0.08)(model, x, y) - x
    step = 0.04 * torch.sign(-(2 * y[:, None] - 1) * model.w).view(-1, 3, 4, 4)
    start = moved - step
    torch.testing.assert_close(start.abs(), torch.full_like(start, 0.04), rtol=1e-4, atol=1e-6)
    assert 0.4 < (start > 0).float().mean() < 0.6


@settings(max_examples=30, deadline=None)
@given(
    make=st.sampled_from(MAKE),
    eps=st.sampled_from([0.0, 1 / 255, 8 / 255, 0.3, 1.0]),
    seed=st.integers(0, 1000),
)
def test_ball_and_range_hold(make: Callable[[float], FirstOrder], eps: float, seed: int) -> None:
    model = Linear(3 * 4 * 4, seed)
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(8, 3, 4, 4, generator=generator)
    y = torch.randint(0, 2, (8,), generator=generator)
    attack = make(eps)
    for adversarial in (attack(model, x, y), attack.last(model, x, y)):
        assert (adversarial - x).abs().max() <= eps + 1e-6
        assert adversarial.min() >= 0
        assert adversarial.max() <= 1
        if eps == 0:
            assert torch.equal(adversarial, x)


def trained(seed: int = 0, bits: int | None = 4) -> nn.Module:
    torch.manual_seed(seed)
    model = dq.wide_resnet(10, 1, bits=bits, in_channels=1, num_classes=4)
    for _ in range(20):  # batch norm's statistics
        model(torch.rand(32, 1, 8, 8))
    return model.eval()


@pytest.mark.parametrize("make", MAKE)
def test_the_active_set_agrees_with_the_plain_loop(make: Callable[[float], FirstOrder]) -> None:
    """An example falls in the refilled batch exactly if some iterate of its own fools."""
    model, x, y = scene(60)
    attack = make(0.03)
    everyone = torch.ones_like(y, dtype=torch.bool)
    fell, ids, plan = ~everyone, torch.arange(len(x)), attack.plan
    for restart in range(plan.restarts):
        rows = rows_of(ids + restart * len(x), x, y, ids, y[:, None])
        rows = attack.begin(rows, attack.eps, 7)
        for step in range(plan.steps + 1):
            fell |= model(rows["at"]).argmax(1) != y
            if step < plan.steps:
                rows = attack.advance(rows, look((model,), rows, plan), attack.eps, 7)
    for size in (1, 7, 256):
        found = robust(model, (x, y), attack, seed=7, batch_size=size, standing=everyone)
        assert torch.equal(found, ~fell), size


@pytest.mark.parametrize("make", MAKE)
def test_same_answer_whatever_the_batch_size_and_order(
    make: Callable[[float], FirstOrder],
) -> None:
    model, x, y = scene(50)
    attack = make(0.03)
    whole = robust(model.eval(), (x, y), attack, seed=3)
    assert torch.equal(whole, robust(model, (x, y), attack, seed=3, batch_size=3))
    order = torch.randperm(50, generator=torch.Generator().manual_seed(0))
    mixed = unbroken(Target(model, x, y, 3, 8), attack, order)
    assert torch.equal(mixed, whole[order])


def test_draws_depend_on_seed_id_and_restart_alone() -> None:
    shape = torch.Size([3, 5, 5])
    ids, zero = torch.arange(200), torch.zeros(200, dtype=torch.int64)
    draws = uniform(1, ids, zero, shape)
    assert torch.equal(uniform(1, ids[[7, 3]], zero[:2], shape), draws[[7, 3]])
    assert not torch.equal(uniform(2, ids, zero, shape), draws)
    assert not torch.equal(uniform(1, ids, zero + 1, shape), draws)
    flat = draws.flatten()
    assert flat.min() >= 0
    assert flat.max() < 1
    assert abs(float(flat.mean()) - 0.5) < 0.01
    assert abs(float(flat.var()) - 1 / 12) < 0.002
    corr = torch.corrcoef(draws.flatten(1))
    assert (corr - torch.eye(200)).abs().max() < 0.6
    buckets = torch.histc(flat, 20, 0, 1)
    chi2 = ((buckets - len(flat) / 20) ** 2 / (len(flat) / 20)).sum()
    assert chi2 < 45  # 19 degrees of freedom: p about 0.0007


def test_uniform_matches_splitmix64_in_python() -> None:
    def mix(z: int) -> int:
        m = 2**64 - 1
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & m
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & m
        return z ^ (z >> 31)

    key = mix((mix(mix(12345) ^ 6) + 2) & (2**64 - 1))
    expected = [
        (mix((key + i * 0x9E3779B97F4A7C15) & (2**64 - 1)) >> 40) * 2**-24 for i in range(1, 5)
    ]
    got = uniform(12345, torch.tensor([6]), torch.tensor([2]), torch.Size([4]))
    assert got[0].tolist() == expected


def test_model_is_left_as_it_was_even_after_an_error() -> None:
    model = trained().train()
    model.get_submodule("blocks.0.bn1").eval()  # a frozen batch norm must stay frozen
    first, second = list(model.parameters())[:2]
    first.requires_grad_(False)
    second.grad = torch.full_like(second, 3.0)
    kept = second.grad
    modes = [m.training for m in model.modules()]
    counter = torch.zeros(1)
    model.register_buffer("counter", counter)
    buffers = [b.clone() for b in model.buffers()]
    random_state = torch.get_rng_state()
    x, y = torch.rand(4, 1, 8, 8), torch.zeros(4, dtype=torch.int64)
    torch.set_rng_state(random_state)
    PGD(8 / 255)(model, x, y)
    with pytest.raises(RuntimeError, match="boom"), untouched(model):
        model.get_buffer("counter").add_(1)  # a model may count its own calls
        first.grad, second.grad = torch.zeros_like(first), torch.zeros_like(second)
        model(x)
        torch.rand(3)
        raise RuntimeError("boom")
    assert [m.training for m in model.modules()] == modes
    assert not first.requires_grad
    assert first.grad is None
    assert counter.item() == 0
    assert second.grad is kept
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
    with pytest.raises(dq.UserError, match="run it once"):
        dq.accuracy(lazy, (x, y))


ANY: list[Attack] = [
    *(make(0.05) for make in MAKE), RandomEps(RFGSM(0.0)), dq.APGD(0.05, 3), dq.FAB(0.05, 3),
    dq.Square(0.05, 9), dq.Worst((FGSM(0.05), dq.FAB(0.05, 3))), Transfer(FGSM(0.05), Linear(48)),
    dq.DIVA(0.05, Linear(48), steps=2),
]  # fmt: skip


@pytest.mark.parametrize("attack", ANY, ids=str)
def test_no_graph_goes_in_or_comes_out_and_inference_mode_changes_nothing(attack: Attack) -> None:
    model, x, y = scene(6)

    def made(x: Tensor) -> Tensor:
        return attack(model, x, y.clone(), generator=torch.Generator().manual_seed(0))

    plain = made(x)
    assert not made(x.clone().requires_grad_()).requires_grad
    with torch.inference_mode():
        torch.testing.assert_close(made(x.clone()), plain, rtol=0, atol=0)
        again = dq.robust_accuracy(model.eval(), (x.clone(), y.clone()), attack)
    assert again == dq.robust_accuracy(model, (x, y), attack)


def test_attacks_run_in_eval_mode_without_parameter_gradients() -> None:
    seen: list[tuple[bool, bool]] = []

    class Spy(Linear):
        def forward(self, x: Tensor) -> Tensor:
            seen.append((self.training, self.w.requires_grad))
            return super().forward(x)

    spy = Spy(3 * 4 * 4)
    _, x, y = scene(4)
    FGSM(0.1)(spy, x, y)
    assert set(seen) == {(False, False)}


def test_best_iterate_prefers_one_that_fools() -> None:
    """A model that is fooled only near x - 0.02: PGD passes through it and must not lose it."""

    class Valley(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            d = (x - 0.5).mean((1, 2, 3))
            hit = ((d + 0.02).abs() < 0.006).float() * 4
            return torch.stack([2 + d * 10, hit], 1)

    x, y = torch.full((1, 1, 2, 2), 0.5), torch.zeros(1, dtype=torch.int64)
    attack = BIM(0.06, steps=12, alpha=0.005)
    model = Valley()
    assert model(attack.last(model, x, y)).argmax(1).item() == 0
    assert model(attack(model, x, y)).argmax(1).item() == 1
    assert dq.robust_accuracy(model.eval(), (x, y), attack).correct == 0


def test_an_iterate_that_fools_beats_one_of_higher_loss() -> None:
    logits = torch.tensor([[1.0, 1.1, -9.0], [1.0, 0.99, 0.99], [1.0, 0.5, 0.5], [1.0, 9.0, 9.0]])
    y = torch.zeros(4, dtype=torch.int64)
    loss = nn.functional.cross_entropy(logits, y, reduction="none")
    assert loss[1] > loss[0]
    order = rank(loss, logits.argmax(1) != y)
    assert torch.argsort(order).tolist() == [2, 1, 0, 3]
    assert rank(torch.tensor([torch.inf, 1e9]), torch.tensor([False, True])).diff() > 0


def test_nan_in_one_example_leaves_its_neighbours_alone() -> None:
    class Poisoned(Linear):
        def forward(self, x: Tensor) -> Tensor:
            logits = super().forward(x)
            return torch.where(x[:, :1, 0, 0] > 0.9, torch.nan, logits)

    sound, x, y = scene(20)
    poisoned = Poisoned(3 * 4 * 4)
    clean = PGD(0.02)(sound, x, y)
    x[0, 0, 0, 0] = 0.99
    dirty = PGD(0.02)(poisoned, x, y)
    torch.testing.assert_close(dirty[1:], clean[1:])
    everyone = torch.ones_like(y, dtype=torch.bool)
    mine, other = (
        robust(model.eval(), (x, y), PGD(0.02), batch_size=6, standing=everyone)
        for model in (poisoned, sound)
    )
    assert not mine[0]
    assert torch.equal(mine[1:], other[1:])


def test_a_gradient_that_is_one_number_expanded_is_followed() -> None:
    """The backward pass of a sum hands out a view of stride 0, which nothing may write into."""

    class Bright(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            total = x.sum((1, 2, 3))
            return torch.stack([6 - total, total - 6], 1)

    x = torch.full((4, 1, 4, 4), 0.4)  # the sum is 6.4, so that 0.4 / 16 per pixel is enough
    y = torch.ones(4, dtype=torch.long)
    assert (PGD(0.04)(Bright().eval(), x, y).sum((1, 2, 3)) < 6).all()
    assert vanishing(Bright(), (x, y), torch.ones(4, dtype=torch.bool)) == 0
    verdict = dq.masking_verdict(Bright().eval(), (x, y), 0.04, effort=Effort(2, 1, 2, 2))
    assert verdict.usual.correct == 0


def test_paper_schedule() -> None:
    assert [paper_steps(e / 255) for e in (1, 2, 4, 8, 16)] == [1, 2, 5, 10, 20]
    assert PGD(8 / 255).walk.steps == 10
    assert abs(PGD(8 / 255).walk.rate * 8 - 1) < 1e-9
    assert repr(PGD(8 / 255)) == "PGD(eps=8/255, steps=10, alpha=1/255)"
    assert repr(PGD(8 / 255, steps=50, restarts=10)) == (
        "PGD(eps=8/255, steps=50, alpha=0.4/255, restarts=10)"
    )


def test_names_are_read_back() -> None:
    for text, name in [
        ("random", "Random"), ("fgsm", "FGSM"), ("rfgsm", "R+FGSM"), ("bim-7", "BIM-7"),
        ("pgd", "PGD"), ("PGD-50x10", "PGD-50x10"), ("random-5", "Random-5"),
    ]:  # fmt: skip
        assert parse_attack(text, 0.1).name == name
    for text in ("pgd-", "fgsm-3", "cw", "", "pgdx3", "bim-3x2", "pgd-0"):
        with pytest.raises(dq.UserError):
            parse_attack(text, 0.1)


def test_random_eps_is_drawn_per_example_or_per_batch() -> None:
    model, x, y = scene(400)
    generator = torch.Generator().manual_seed(0)
    moved = (RandomEps(RFGSM(0.0))(model, x, y, generator=generator) - x).abs().amax((1, 2, 3))
    eps = moved * 255
    assert eps.max() <= 16 + 1e-3
    assert abs(float(eps.mean()) - 6.3) < 0.8  # E clip(|N(0,8)|, 0, 16) = 6.2...
    assert eps.unique().numel() > 300
    one = (RandomEps(PGD(0.0))(model, x, y, generator=generator) - x).abs().amax((1, 2, 3)) * 255
    assert one.max() - one.min() < 1.01  # one radius for the batch, reached within a step


def test_transfer_never_asks_the_target() -> None:
    class Silent(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise AssertionError("asked")

    model, x, y = scene()
    attack = Transfer(FGSM(0.05), model)
    assert attack.name == "FGSM(B)"
    assert attack.eps == 0.05
    torch.testing.assert_close(attack(Silent(), x, y), FGSM(0.05).last(model, x, y))
    assert dq.robust_accuracy(model.eval(), (x, y), attack) == dq.robust_accuracy(
        model, (x, y), FGSM(0.05)
    )


@pytest.mark.parametrize("eps", [8, 255.0, -0.1, float("nan")])
def test_eps_in_pixels_is_refused(eps: float) -> None:
    with pytest.raises(dq.UserError, match="eps") as error:
        FGSM(eps)
    assert "\n" not in str(error.value)
    if eps == 8:
        assert "write 8/255" in str(error.value)


def test_images_outside_the_range_are_refused() -> None:
    model, x, y = scene()
    with pytest.raises(dq.UserError, match=r"images must lie in \[0, 1\]"):
        FGSM(0.1)(model, x * 255, y)
    with pytest.raises(dq.UserError, match=r"images must lie in \[0, 1\]"):
        FGSM(0.1)(model, torch.full_like(x, float("nan")), y)
    with pytest.raises(dq.UserError, match=r"of shape \(40,\)"):
        FGSM(0.1)(model, x, y[:3])


def test_gradients_are_straight_through() -> None:
    """A 2-bit network's gradient at its images is alive: nearly every pixel moves."""
    model = trained(bits=2)
    x, y = torch.rand(6, 1, 8, 8), torch.arange(6) % 4
    moved = perturb(model, x, y, FGSM(0.1), seed=0, keep="last") - x
    assert (moved.abs() > 0.01).float().mean() > 0.9
