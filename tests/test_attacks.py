"""Every attack of `names.py` keeps the contract, and first-order ones reach a linear optimum."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import defquant as dq
from conftest import refused
from defquant.attacks import (
    APGD,
    BIM,
    FAB,
    FGSM,
    PGD,
    RFGSM,
    Attack,
    FirstOrder,
    Random,
    RandomEps,
    Single,
    Square,
    Transfer,
    engine,
)
from defquant.attacks.contract import Target, eight_bit, standing, uniform
from defquant.attacks.engine import look, rank, rivals_of, rows_of
from defquant.attacks.first_order import paper_steps
from defquant.attacks.graphs import tensor_float
from defquant.attacks.look import opened, smooth
from defquant.attacks.names import ATTACKS, parse_attack, parse_first_order
from defquant.attacks.surrogates import EOT, ClipFree, FloatTwin, Precisions, SoftRound
from defquant.diagnose import Effort
from defquant.evaluate import robust, vanishing
from linear_scenes import LinearNet, middle_eps, scene

NUMBERS = {("steps", "restarts"): "-4x2", ("steps",): "-4", ("samples",): "-3", ("queries",): "-8"}
EVERY = [name + NUMBERS.get(numbers, "") for name, (_, numbers) in ATTACKS.items()]
EVERY = [*EVERY, "bim", "pgd", "apgd-margin@soft-4x2+8", "apgd-t-3+5"]
EVERY.remove("standard")  # thousands of queries; its parts are here


OTHER = LinearNet()
with torch.no_grad():
    OTHER.weight.copy_(OTHER.weight + OTHER.weight.roll(1, 1) / 2)
MADE: dict[str, Callable[[float], Any]] = {
    **{name: partial(parse_attack, name) for name in EVERY},
    "transfer": lambda eps: Transfer(PGD(eps, steps=2), OTHER),
    "diva": lambda eps: dq.DIVA(eps, OTHER, steps=3),
    "worst": lambda eps: dq.Worst((FGSM(eps), FAB(eps, 3))),
}


@pytest.mark.parametrize("eps", [0.0, 1 / 255, 0.1, 1.0])
@pytest.mark.parametrize("name", MADE)
def test_ball_and_range_hold(name: str, eps: float) -> None:
    model, x, y = LinearNet(), torch.rand(8, 3, 4, 4), torch.arange(8) % 5
    attack, ids = MADE[name](eps), torch.arange(8)
    made = [attack(model, x, y, generator=torch.Generator().manual_seed(5))]
    made += [attack.last(model, x, y)] if isinstance(attack, FirstOrder) else []
    if name in EVERY:
        saved = eight_bit(attack, model, (x * 255).round() / 255, y, ids, seed=5)
        assert ((saved * 255).round() / 255 - saved).abs().max() < 1e-6
    for adversarial in made:
        assert (adversarial - x).abs().max() <= eps + 1e-6
        assert adversarial.min() >= 0
        assert adversarial.max() <= 1
        assert eps > 0 or torch.equal(adversarial, x)


@pytest.mark.parametrize("name", MADE)
def test_same_answer_whatever_the_batch_size_the_order_and_who_stands(name: str) -> None:
    model, x, y = scene(30)
    attack, everyone = MADE[name](middle_eps(model, x, y)[0]), torch.ones(30).bool()
    whole, some = robust(model, (x, y), attack, seed=3, standing=everyone), torch.arange(30) % 3 > 0
    for size in (1, 7):
        assert torch.equal(robust(model, (x, y), attack, seed=3, batch_size=size), whole)
    assert torch.equal(robust(model, (x, y), attack, seed=3, standing=some), whole & some)
    order = torch.randperm(30, generator=torch.Generator().manual_seed(0))
    assert torch.equal(standing(attack, Target(model, x, y, 3, 8), order), whole[order])
    made, mixed = (
        attack(model, x[i], y[i], generator=torch.Generator().manual_seed(3), ids=i)
        for i in (torch.arange(30), order)
    )
    torch.testing.assert_close(mixed, made[order], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", EVERY)
def test_what_was_found_is_returned_and_an_effort_more_loses_nothing(name: str) -> None:
    """The best iterates of the score's draws fool exactly where the example fell."""
    model, x, y = scene(30)
    attack = parse_attack(name, middle_eps(model, x, y)[0])
    fell = ~robust(model, (x, y), attack, seed=3)
    if isinstance(attack, Single):
        made = attack.made(model, x, y, torch.arange(30), seed=3)
        assert torch.equal(model(made).argmax(1) != y, fell)
        assert attack.plan.bounded or torch.equal(made[~fell], x[~fell])
    if name.endswith("x2"):
        once = parse_attack(name.removesuffix("x2"), attack.eps)
        assert not (robust(model, (x, y), once, seed=3) < ~fell).any()


@pytest.mark.parametrize("name", EVERY)
def test_nan_in_one_example_leaves_its_neighbours_alone(name: str) -> None:
    class Poisoned(LinearNet):
        def forward(self, x: Tensor) -> Tensor:
            return torch.where(x[:, :1, 0, 0] > 0.95, torch.nan, super().forward(x))

    sound, x, y = scene(20)
    poisoned, everyone = Poisoned().eval(), torch.ones(20).bool()
    attack = parse_attack(name, 0.02)
    clean = attack(sound, x, y)
    other = robust(sound, (x, y), attack, batch_size=6, standing=everyone)
    x[0, 0, 0, 0] = 0.99
    dirty = attack(poisoned, x, y)
    torch.testing.assert_close(dirty[1:], clean[1:])
    assert dirty.isfinite().all()
    mine = robust(poisoned, (x, y), attack, batch_size=6, standing=everyone)
    assert not mine[0]
    assert torch.equal(mine[1:], other[1:])


ANY: list[Attack] = [
    *(parse_attack(name, 0.05) for name in EVERY if "@" not in name), RandomEps(RFGSM(0.0)),
    dq.Worst((FGSM(0.05), FAB(0.05, 3))), Transfer(FGSM(0.05), LinearNet(classes=2)),
    dq.DIVA(0.05, LinearNet(classes=2), steps=2),
]  # fmt: skip


@pytest.mark.parametrize("attack", ANY, ids=str)
def test_no_graph_goes_in_or_comes_out_and_inference_mode_changes_nothing(attack: Attack) -> None:
    model, x, y = scene(6, classes=2)

    def made(x: Tensor) -> Tensor:
        return attack(model, x, y.clone(), generator=torch.Generator().manual_seed(0))

    plain = made(x)
    assert not made(x.clone().requires_grad_()).requires_grad
    with torch.inference_mode():
        torch.testing.assert_close(made(x.clone()), plain, rtol=0, atol=0)
        again = dq.robust_accuracy(model.eval(), (x.clone(), y.clone()), attack)
    assert again == dq.robust_accuracy(model, (x, y), attack)


@pytest.mark.parametrize("attack", [FGSM(0.05), BIM(0.05), PGD(0.05, steps=3)])
def test_on_a_linear_model_the_optimum_is_reached(attack: FirstOrder) -> None:
    model, x, y = scene(classes=2)
    before, after = (model.radii(at, y).amin(1) for at in (x, attack(model, x, y)))
    torch.testing.assert_close(before - after, torch.full_like(x[:, 0, 0, 0], 0.05))
    assert dq.robust_accuracy(model, (x, y), attack).correct == int((before > 0.05).sum())


def test_rfgsm_takes_the_gradient_after_its_random_step() -> None:
    model, x, y = scene(classes=2)
    step = 0.04 * (model.weight[1 - y] - model.weight[y]).sign().view(-1, 3, 4, 4)
    start = RFGSM(0.08)(model, x, y) - x - step
    torch.testing.assert_close(start.abs(), torch.full_like(start, 0.04), rtol=1e-4, atol=1e-6)
    assert 0.4 < (start > 0).float().mean() < 0.6


@pytest.mark.parametrize("name", [n for n in EVERY if n[:2] != "ad" and "@" not in n])
def test_the_active_set_agrees_with_the_plain_loop(name: str) -> None:
    """An example falls in the refilled batch exactly if some iterate of its own fools."""
    model, x, y = scene(40)
    attack = parse_attack(name, middle_eps(model, x, y)[0])
    assert isinstance(attack, Single)
    fell, ids, plan = torch.zeros(40).bool(), torch.arange(40), attack.plan
    rivals = rivals_of((model,), x, y, plan.targets, 40)
    for start in range(plan.restarts * rivals.shape[1]):
        rows = attack.begin(rows_of(ids + 40 * start, x, y, ids, rivals), attack.eps, 7)
        for done in range(plan.looks + 1):
            seen = look((model,), rows, plan)
            fell |= seen.fooled & ((rows["at"] - x).abs().amax((1, 2, 3)) <= attack.eps + 1e-7)
            rows = attack.advance(rows, seen, attack.eps, 7) if done < plan.looks else rows
    for size in (1, 7, 256):
        found = robust(model, (x, y), attack, seed=7, batch_size=size)
        assert torch.equal(found, ~fell), size


def test_where_all_fall_logits_go_first() -> None:
    """After the first batch, which falls at its second look, no gradient is asked there."""
    model, x, y = scene(40)
    asked = {True: 0, False: 0}

    def note(_: nn.Module, args: tuple[Tensor]) -> None:
        asked[args[0].requires_grad] += len(args[0])

    with model.register_forward_pre_hook(note):
        standing = torch.ones(40).bool()
        assert not robust(model, (x, y), dq.BIM(0.9, 5), standing=standing, batch_size=8).any()
    assert asked[True] <= 40 + 2 * 8


def test_a_cpu_is_given_some_images_at_a_time() -> None:
    model, x = LinearNet((3, 32, 32)), torch.rand(150, 3, 32, 32)
    rows = {"at": x, "y": torch.arange(150) % 5, "target": torch.arange(150) % 4}
    sizes: list[int] = []
    small = model.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    seen = look((model,), rows, dq.APGD(0.1).plan, room=160)
    small.remove()
    assert sizes == [64, 64, 32]
    assert torch.equal(seen.fooled, model(x).argmax(1) != rows["y"])
    whole = look((model,), {n: part[140:] for n, part in rows.items()}, dq.APGD(0.1).plan)
    torch.testing.assert_close(seen.grad[140:], whole.grad)


def test_draws_are_splitmix64_of_seed_id_restart_and_place_alone() -> None:
    def mix(z: int) -> int:
        m = 2**64 - 1
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & m
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & m
        return z ^ (z >> 31)

    def slow(seed: int, id_: int, restart: int) -> list[float]:
        key = mix((mix(mix(seed) ^ id_) + restart) & (2**64 - 1))
        places = (key + i * 0x9E3779B97F4A7C15 for i in range(1, 5))
        return [(mix(place & (2**64 - 1)) >> 40) * 2**-24 for place in places]

    ids, restarts = torch.arange(200), torch.arange(200) % 3
    found = uniform(12345, ids, restarts, torch.Size([2, 2]))
    assert found.flatten(1).tolist() == [slow(12345, id_, id_ % 3) for id_ in range(200)]
    assert found.min() >= 0 and found.max() < 1 and abs(float(found.mean()) - 0.5) < 0.03


def test_an_iterate_that_fools_beats_one_of_higher_loss() -> None:
    logits = torch.tensor([[1.0, 1.1, -9.0], [1.0, 0.99, 0.99], [1.0, 0.5, 0.5], [1.0, 9.0, 9.0]])
    y = torch.zeros(4, dtype=torch.int64)
    loss = nn.functional.cross_entropy(logits, y, reduction="none")
    assert loss[1] > loss[0]
    order = rank(loss, logits.argmax(1) != y)
    assert torch.argsort(order).tolist() == [2, 1, 0, 3]
    assert rank(torch.tensor([torch.inf, 1e9]), torch.tensor([False, True])).diff() > 0


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


def test_random_eps_is_drawn_per_example_or_per_batch() -> None:
    model, x, y = scene(400, classes=2)
    generator = torch.Generator().manual_seed(0)
    moved = (RandomEps(RFGSM(0.0))(model, x, y, generator=generator) - x).abs().amax((1, 2, 3))
    eps = moved * 255
    assert eps.max() <= 16 + 1e-3
    assert abs(float(eps.mean()) - 6.3) < 0.8  # E clip(|N(0,8)|, 0, 16) = 6.2...
    assert eps.unique().numel() > 300
    one = (RandomEps(PGD(0.0))(model, x, y, generator=generator) - x).abs().amax((1, 2, 3)) * 255
    assert one.max() - one.min() < 1.01  # one radius for the batch, reached within a step


def test_paper_schedule() -> None:
    assert [paper_steps(e / 255) for e in (1, 2, 4, 8, 16)] == [1, 2, 5, 10, 20]
    assert PGD(8 / 255).walk.steps == 10
    assert abs(PGD(8 / 255).walk.rate * 8 - 1) < 1e-9


def test_names_are_read_and_reprs_are_those_of_the_results() -> None:
    for text, attack, name, shown in (
        ("random", Random(0.1), "Random", "Random(eps=25.5/255)"),
        ("random-5", Random(0.1, 5), "Random-5", "Random(eps=25.5/255, samples=5)"),
        ("fgsm", FGSM(0.1), "FGSM", "FGSM(eps=25.5/255)"),
        ("rfgsm", RFGSM(0.1), "R+FGSM", "RFGSM(eps=25.5/255)"),
        ("bim-7", BIM(0.1, 7), "BIM-7", "BIM(eps=25.5/255, steps=7, alpha=9.107/255)"),
        ("pgd", PGD(0.1), "PGD", "PGD(eps=25.5/255, steps=29, alpha=1/255)"),
        ("PGD-50x10", PGD(0.1, 50, restarts=10), "PGD-50x10",
         "PGD(eps=25.5/255, steps=50, alpha=1.275/255, restarts=10)"),
        ("apgd", APGD(0.1), "APGD-CE", "APGD(eps=25.5/255, steps=100, loss=ce)"),
        ("APGD-20x3", APGD(0.1, 20, 3), "APGD-CE-20x3",
         "APGD(eps=25.5/255, steps=20, restarts=3, loss=ce)"),
        ("apgd-t-30", APGD(0.1, 30, loss="dlr-targeted"), "APGD-T-30",
         "APGD(eps=25.5/255, steps=30, loss=dlr-targeted, targets=9)"),
        ("apgd-margin@soft-50+200", APGD(0.1, 50, 1, "margin", 9, SoftRound(), 200),
         "APGD-MARGIN-50+200 (SoftRound())",
         "APGD(eps=25.5/255, steps=50, loss=margin, surrogate=SoftRound(), queries=200)"),
        ("apgd@twin-9x2", APGD(0.1, 9, 2, surrogate=FloatTwin()), None, None),
        ("apgd-dlr@clipfree", APGD(0.1, loss="dlr", surrogate=ClipFree()), None, None),
        ("apgd@eot", APGD(0.1, surrogate=EOT()), None, None),
        ("apgd@bits-5", APGD(0.1, 5, surrogate=Precisions()), None, None),
        ("fab", FAB(0.1), "FAB", "FAB(eps=25.5/255, steps=100)"),
        ("fab-t-5x2", FAB(0.1, 5, 2, 9), "FAB-T",
         "FAB(eps=25.5/255, steps=5, restarts=2, targets=9)"),
        ("square", Square(0.1), "Square", "Square(eps=25.5/255, queries=5000, p=0.8)"),
        ("square-99", Square(0.1, 99), "Square-99", "Square(eps=25.5/255, queries=99, p=0.8)"),
        ("standard", dq.Standard(0.1), "Standard", "Standard(eps=25.5/255)"),
        ("adaptive-20", dq.Adaptive(0.1, 20), "Adaptive-20", "Adaptive(eps=25.5/255, steps=20)"),
        ("adaptive-t-9", dq.Adaptive(0.1, 9, 5), "Adaptive-T-9",
         "Adaptive(eps=25.5/255, steps=9, targets=5)"),
    ):  # fmt: skip
        found = parse_attack(text, 0.1)
        assert found == attack
        assert name is None or (found.name, repr(found)) == (name, shown)
    refused(lambda: parse_first_order("standard", 0.1), "last iterate")


@pytest.mark.parametrize("text", [
    "", "cw", "pgd-", "fgsm-3", "pgdx3", "bim-3x2", "pgd-0", "apgd-x", "apgd-dlr-", "square-1x2",
    "standard-3", "adaptive-2x2", "apgd-ce", "pgd@soft", "apgd@", "apgd@hard", "apgd-9@soft",
    "pgd-20+5", "apgd+", "apgd@soft-5+x", "square+9",
])  # fmt: skip
def test_other_names_are_refused(text: str) -> None:
    with pytest.raises(dq.UserError, match=r"unknown attack|must be 1 or more"):
        parse_attack(text, 0.1)


@pytest.mark.parametrize("eps", [8, 255.0, -0.1, float("nan")])
def test_eps_in_pixels_is_refused(eps: float) -> None:
    for make in (FGSM, dq.Standard, APGD):
        with pytest.raises(dq.UserError, match="eps") as error:
            make(eps)
        assert "\n" not in str(error.value)
        assert eps != 8 or "write 8/255" in str(error.value)


MISTAKES: list[tuple[Callable[..., object], dict[str, Any]]] = [
    (APGD, {"steps": 0}), (APGD, {"restarts": 0}), (APGD, {"targets": 0}), (APGD, {"loss": "l2"}),
    (APGD, {"queries": -1}), (FAB, {"steps": 0}), (FAB, {"restarts": 0}), (FAB, {"targets": -1}),
    (Square, {"queries": 0}), (Square, {"p": 0.0}), (Square, {"p": 1.5}), (Random, {"samples": 0}),
    (BIM, {"alpha": 8}), (PGD, {"restarts": 0}), (dq.Adaptive, {"steps": 0}),
    (dq.Adaptive, {"targets": -1}),
]  # fmt: skip


@pytest.mark.parametrize(("make", "wrong"), MISTAKES)
def test_settings_that_cannot_be(make: Callable[..., object], wrong: dict[str, Any]) -> None:
    (name,) = wrong
    with pytest.raises(dq.UserError, match=name) as error:
        make(0.1, **wrong)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("attack", [PGD(0.05, steps=6), APGD(0.05, 5, queries=9), FAB(0.05, 6)])
@pytest.mark.parametrize(("wrong", "rough"), [(True, True), (False, True), (True, False)])
def test_a_gpus_search_is_believed_where_the_network_itself_is_fooled(
    attack: Attack, wrong: bool, rough: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Recorded at fixed sizes; a fast pass that is always fooled fells none that else stands.

    Nor is there one where the arithmetic must stay float32.
    """
    model, x, y = scene(40)

    def fast(_: nn.Module, x: tuple[Tensor], answer: Tensor) -> Tensor:
        return -answer if wrong and torch.backends.cuda.matmul.allow_tf32 else answer

    eps = middle_eps(model, x, y)[0]
    attack = replace(attack, eps=eps)  # type: ignore[type-var]
    plain = robust(model, (x, y), attack, batch_size=24)
    monkeypatch.setattr(engine, "searchable", lambda *_: True)
    monkeypatch.setattr(engine, "smooth", lambda *_: rough)
    model.register_forward_hook(fast)
    found = robust(model, (x, y), attack, batch_size=24)
    assert 0 < plain.sum() < 40
    assert not torch.backends.cuda.matmul.allow_tf32
    assert torch.equal(found, plain) if not (wrong and rough) else bool((plain <= found).all())


@pytest.mark.parametrize(
    ("model", "surrogate", "expected"),
    [
        (dq.wide_resnet(10, 1), None, True), (dq.wide_resnet(10, 1), SoftRound(), True),
        (dq.wide_resnet(10, 1, bits=4), None, False),
        (dq.wide_resnet(10, 1, bits=4), FloatTwin(), False),
        (dq.wide_resnet(10, 1), Precisions(), False),
        (nn.Sequential(nn.Flatten(), nn.Linear(192, 5)), None, True),
        (dq.wide_resnet(10, 1, weight_bits=4), None, False),
        (nn.Sequential(LinearNet()), None, False),
    ],
)  # fmt: skip
def test_no_other_arithmetic_where_a_staircase_may_be(
    model: nn.Module, surrogate: Any, expected: bool
) -> None:
    assert smooth(model, PGD(0.1).plan._replace(surrogate=surrogate)) is expected


@pytest.mark.parametrize("score", [
    dq.accuracy, lambda model, data: dq.robust_accuracy(model, data, PGD(0.05, steps=2)),
    lambda model, data: PGD(0.05, steps=2)(model, *data),
])  # fmt: skip
def test_scores_are_those_of_float32(score: Any) -> None:
    """TensorFloat-32, which torch allows a GPU's convolutions, is off in every look."""
    model, x, y = scene(8)
    allowed: list[bool] = []
    flags = torch.backends.cudnn, torch.backends.cuda.matmul
    model.register_forward_hook(lambda *_: allowed.extend(flag.allow_tf32 for flag in flags))
    with tensor_float(True):
        score(model, (x, y))
        assert all(flag.allow_tf32 for flag in flags)
    assert allowed and not any(allowed)


def test_a_rough_look_answers_in_float32_and_points_in_tensor_float() -> None:
    """By what torch allows while the model runs forward, and backward."""
    seen: list[tuple[str, bool]] = []

    class Watched(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            seen.append(("forward", torch.backends.cudnn.allow_tf32))
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *grad: Tensor) -> Tensor:
            seen.append(("backward", torch.backends.cudnn.allow_tf32))
            return grad[0]

    class Model(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return Watched.apply(x).flatten(1)[:, :4]  # type: ignore[no-untyped-call,no-any-return]

    plan, y = PGD(0.1).plan, torch.zeros(2, dtype=torch.int64)
    rows = {"at": torch.rand(2, 3, 2, 2), "y": y, "target": y}
    for rough in (False, True):
        with opened(Model(), plan, rows["at"]) as forwards:
            look(forwards, rows, plan, rough=rough)
    assert seen == [("forward", False), ("backward", False), ("forward", False), ("backward", True)]


def test_tensor_float_leaves_what_the_user_set() -> None:
    """By whichever of torch's names, and none of them is refused inside that was not before."""
    backends: Any = torch.backends
    get, put = torch.get_float32_matmul_precision, torch.set_float32_matmul_precision
    owners = (backends.cudnn.conv, backends.cudnn.rnn, backends.cuda.matmul)
    before = get(), [owner.fp32_precision for owner in owners]
    try:
        for level in ("medium", "high", "highest"):
            put(level)
            with tensor_float(True), tensor_float(False):
                assert get() == "highest" and not backends.cuda.matmul.allow_tf32
            assert get() == level
        backends.cuda.matmul.allow_tf32 = True
        with tensor_float(False):
            assert not backends.cuda.matmul.allow_tf32
        assert backends.cuda.matmul.allow_tf32
        put(before[0])
        for owner, value in zip(owners, ("tf32", "ieee", "tf32"), strict=True):
            owner.fp32_precision = value
        with tensor_float(False):
            assert [owner.fp32_precision for owner in owners] == ["ieee"] * 3
        assert [owner.fp32_precision for owner in owners] == ["tf32", "ieee", "tf32"]
    finally:
        for owner, value in zip(owners, before[1], strict=True):
            owner.fp32_precision = value
        put(before[0])
