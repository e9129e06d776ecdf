"""Anyone's quantised network is seen as what it computes, and judged as long as it must be."""

import json
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import defquant as dq
import judged_quantisers
from conftest import REAL_DATA, refused
from defquant.attacks.surrogates import SoftRound, twin_of
from defquant.cli import main
from defquant.judging.opening import has_gradient, open_staircases
from defquant.judging.suspects import Suspect, suspect, with_twin
from defquant.judging.verdict import _paired, _verdict
from defquant.records import mean_between
from judged_quantisers import QUANTISERS

N, HIGH = 3, 6.0
STEP = HIGH / N
EDGES = [(k + 0.5) * STEP for k in range(N)]


class Net(nn.Module):
    def __init__(self, quantise: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.quantise = quantise
        self.conv1, self.norm1 = nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2, self.norm2 = nn.Conv2d(8, 12, 3, 2, 1), nn.BatchNorm2d(12)
        self.fc = nn.Linear(12 * 16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.quantise(self.norm1(self.conv1(x)))
        x = self.quantise(self.norm2(self.conv2(x)))
        return self.fc(x.flatten(1))  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def data() -> dq.Dataset:
    return dq.load("digits", split="test").first(128)


@pytest.fixture(scope="module")
def trained() -> dict[str, Tensor]:
    train = dq.load("digits", split="train")
    x, y = train.take(torch.arange(len(train)))
    torch.manual_seed(0)
    net = Net(dq.QuantReLU(2, HIGH))
    optimiser = torch.optim.Adam(net.parameters(), 3e-3)
    for _ in range(120):
        some = torch.randint(len(x), (64,))
        loss = nn.functional.cross_entropy(net(x[some]), y[some])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return net.state_dict()


def with_(trained: dict[str, Tensor], quantise: Callable[[Tensor], Tensor]) -> Net:
    net = Net(quantise)
    net.load_state_dict(trained, strict=False)
    return net.eval()


class Own(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.round(x.clamp(0, HIGH) / STEP) * STEP

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> Tensor:
        return grad[0]


def detached(x: Tensor) -> Tensor:
    r = x.clamp(0, HIGH)
    return r + (torch.round(r / STEP) * STEP - r).detach()


def detached_codes(x: Tensor) -> Tensor:
    u = torch.relu(x) / STEP
    return torch.clamp((u.round() - u).detach() + u, 0, N) * STEP


def decomposed(x: Tensor) -> Tensor:
    import torch.ao.quantization.fx._decomposed  # registers the operations of PT2E

    how = (STEP, 3, 3, 3 + N, torch.uint8)
    code = torch.ops.quantized_decomposed.quantize_per_tensor(x, *how)
    return torch.ops.quantized_decomposed.dequantize_per_tensor(code, *how)  # type: ignore[no-any-return]


def remainder(x: Tensor) -> Tensor:
    c = x.clamp(0, HIGH) + STEP / 2
    return c - torch.remainder(c, STEP)


def observed(*shape: int) -> nn.Module:
    from torch.ao.quantization import FakeQuantize, MinMaxObserver

    made: Any = FakeQuantize(MinMaxObserver, quant_min=0, quant_max=N, dtype=torch.quint8)
    made.scale, made.zero_point = torch.full(shape, STEP), torch.zeros(shape, dtype=torch.int32)
    made.disable_observer()
    return made  # type: ignore[no-any-return]


WAYS: dict[str, Callable[[Tensor], Tensor]] = {
    "a function of ours": lambda x: dq.fake_quantize(x, 2, HIGH),
    "an autograd function": Own.apply,
    "detach": detached,
    "detached codes": detached_codes,
    "no gradient": lambda x: (x * (1 / STEP)).round().clamp(0, N) * STEP,
    "floor": lambda x: torch.floor(nn.functional.relu6(x) / STEP + 0.5) * STEP,
    "torch's fake quantiser": lambda x: torch.fake_quantize_per_tensor_affine(x, STEP, -8, -8, -5),
    "a module of torch.ao": observed(1),
    "one of NNCF's": observed(),
    "operations of PT2E": decomposed,
    "bucketize": lambda x: torch.bucketize(x.contiguous(), torch.tensor(EDGES)) * STEP,
    "a table": lambda x: torch.arange(0, HIGH + 1, STEP)[
        torch.bucketize(x.contiguous(), torch.tensor(EDGES))
    ],
    "casts": lambda x: (x / STEP + 0.5).clamp(0, N).to(torch.int32).float() * STEP,
    "a remainder": remainder,
}  # fmt: skip
SOFT = dq.APGD(0.1, 8, loss="margin", surrogate=SoftRound())


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_one_function_has_one_number(
    way: Callable[[Tensor], Tensor], trained: dict[str, Tensor], data: dq.Dataset
) -> None:
    ours, theirs = with_(trained, dq.QuantReLU(2, HIGH)), with_(trained, way)
    seen = suspect(theirs, data)
    assert seen.staircases and not seen.closed
    for attack in (SOFT, dq.Adaptive(0.1, 4)):
        wanted, found = (dq.robust_accuracy(m, data, attack).correct for m in (ours, seen.model))
        assert abs(wanted - found) <= 2 and wanted < 100
    beside = with_twin(theirs, data)  # as `attack --model-file` takes it
    assert dq.robust_accuracy(beside, data, SOFT) == dq.robust_accuracy(seen.model, data, SOFT)
    assert set(beside.state_dict()) == set(with_(trained, way).state_dict())


def thermometer(x: Tensor) -> Tensor:
    return (x > EDGES[0]) * STEP + (x > EDGES[1]) * STEP + torch.where(x > EDGES[2], STEP, 0.0)


def test_steps_and_signs_are_staircases(trained: dict[str, Tensor], data: dq.Dataset) -> None:
    x, _ = data.take(torch.arange(8))
    for way in (thermometer, torch.sign, lambda x: x.ge(0).float(), lambda x: 1.0 * (x < 0)):
        net = with_(trained, way)
        opened = open_staircases(net, x)
        assert torch.equal(opened.twin(x), net(x)) and opened.staircases and not opened.closed
        at = x.clone().requires_grad_()
        with SoftRound()(opened.twin) as (forward,):
            (grad,) = torch.autograd.grad(forward(at).sum(), at)
        assert (grad != 0).any()


def test_codes_of_values_that_are_seldom_negative_keep_their_zero() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.GELU(), nn.Conv2d(4, 4, 3), nn.Flatten())
    x = torch.rand(64, 1, 8, 8)
    model = dq.prepare(net.eval(), x, bits=2)
    assert torch.equal(open_staircases(model, x).twin(x), model(x))


@pytest.fixture(scope="module")
def small() -> nn.Module:
    torch.manual_seed(0)
    return judged_quantisers.trained(judged_quantisers.Small(), dq.load("digits", split="train"), 2)


@pytest.mark.filterwarnings("ignore")  # the tools' own
@pytest.mark.parametrize(
    "tool", [t for t, (package, _) in QUANTISERS.items() if package != "torch"]
)
def test_the_twin_of_what_a_tool_made(
    tool: str, small: nn.Module, data: dq.Dataset, tmp_path: Path
) -> None:
    """It answers as the file itself does, and every rounding between two layers is open."""
    package, make = QUANTISERS[tool]
    pytest.importorskip(package)
    seen = suspect(make(small, dq.load("digits", split="train"), tmp_path), data)
    x, y = data.take(torch.arange(len(data)))
    said, twin = seen.answers(data.images), twin_of(seen.model)
    assert (twin(x).argmax(1) != said).sum() <= 3  # a file's own quantised logits have ties
    assert (said == y).float().mean() > 0.8
    assert len(seen.staircases) >= 2 and not seen.closed and has_gradient(twin, x)


def nearest(x: Tensor) -> Tensor:
    levels = torch.arange(0, HIGH + 1, STEP)
    return levels[(x[..., None] - levels).abs().argmin(-1)]


def test_what_cannot_be_opened_is_named(trained: dict[str, Tensor], data: dq.Dataset) -> None:
    found = dq.judge(with_(trained, nearest), data, eps=[8 / 255], images=8, masking=False)
    assert found.record["model"]["closed"] == ["argmin", "argmin_1"]
    assert (found.record["masking"], found.record["no_masking"]) == (None, "not asked for")
    short = dq.judge(with_(trained, torch.relu), data, eps=[1 / 255], images=8, budget=1e-6)
    assert short.record["no_masking"] == "no time was left"
    plain = suspect(with_(trained, torch.relu), data)  # a mask that switches is no staircase
    masked = suspect(with_(trained, lambda x: x * (x > 0)), data)
    assert not plain.staircases + plain.closed + masked.staircases + masked.closed


@pytest.mark.parametrize("p", [(0.02, 0.02), (0.3, 0.3), (0.0, 0.05), (0.5, 0.1), (1.0, 0.0)])
def test_the_sequence_of_intervals_keeps_its_error_rate(p: tuple[float, float]) -> None:
    """All looks of 100 sequences at 80 %: binomial(100, 0.2) is 34 or more once in 1,500."""
    draws = np.random.default_rng(0).choice([1, -1, 0], (100, 1024), p=[*p, 1 - sum(p)])
    wins, losses = (draws > 0).cumsum(1), (draws < 0).cumsum(1)
    missed = np.zeros(100, bool)
    for n in (16, 64, 256, 1024):
        for i in range(100):
            low, high = mean_between(wins[i, n - 1], losses[i, n - 1], n, 0.8)
            missed[i] |= not low <= p[0] - p[1] <= high
    assert missed.sum() <= 33
    low, high = mean_between(wins[0, -1], losses[0, -1], 1024)
    assert high - low < 0.2


def test_every_kind_of_network_is_judged(
    trained: dict[str, Tensor], data: dq.Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "my.py").write_text(
        "import test_judge as t\ndef make(): return t.Net(t.detached)\n"
    )
    net, (x, _) = with_(trained, detached), data.take(torch.arange(2))
    save_file(net.state_dict(), tmp_path / "w.safetensors")
    shapes = ({0: torch.export.Dim("n")},)
    torch.export.save(torch.export.export(net, (x,), dynamic_shapes=shapes), tmp_path / "n.pt2")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.trace(net, x), tmp_path / "n.ts")
    own = ["--weights", f"{tmp_path}/w.safetensors"]
    specs = (
        [f"{tmp_path}/my.py:make", *own],
        [f"{tmp_path}/n.pt2"],
        [f"torchscript:{tmp_path}/n.ts"],
    )
    rows, how = [], ["--data", "digits", "--eps", "16/255", "--images", "32", "--budget", "1h"]
    for spec in specs:
        out = tmp_path / "out"
        code = main(["judge", *spec, *how, "--out", str(out), "--json"])
        record = json.loads((out / "judgement.json").read_text())
        assert record == json.loads(capsys.readouterr().out.splitlines()[0])
        assert code == (record["verdict"] == "MASKED")
        assert record["verdict"] in (out / "judgement.html").read_text()
        rows.append([record["rows"][0][name]["count"] for name in ("usual", "strongest")])
    assert rows[0] == rows[1] and abs(rows[2][0] - rows[0][0]) <= 1 and rows[0][1] < rows[0][0] - 3


def test_other_verbs_take_what_judge_takes(
    small: nn.Module, data: dq.Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file of someone's: attacked, its images shown to it again, diagnosed, and a transfer."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        file = str(judged_quantisers.dynamic(small, data, tmp_path))
    (tmp_path / "my.py").write_text(
        "import judged_quantisers as j, torch\ndef make(): torch.manual_seed(0); return j.Small()"
    )
    save_file(small.state_dict(), tmp_path / "w.safetensors")
    own, images, out = [f"{tmp_path}/my.py:make"], str(tmp_path / "images"), str(tmp_path / "out")
    own += ["--weights", f"{tmp_path}/w.safetensors"]
    how = ["--data", "digits", "--images", "48", "--eps", "64/255", "--out", out]
    attack = ["--attack", "pgd-3", "--examples", "0", "--save-images", images]
    assert main(["attack", "--model-file", file, *how, *attack]) == 0
    for model in ([file], ["--model-file", *own]):
        assert main(["rescore", images, *model]) == 0
    effort = ["--steps", "2", "--restarts", "1", "--queries", "5", "--no-audit"]
    assert main(["diagnose", "--model-file", file, *how, *effort]) in (0, 1)
    capsys.readouterr()
    assert main(["transfer", file, *own, *how, "--attack", "pgd-3", "--json"]) == 0
    cells = [json.loads(line) for line in capsys.readouterr().out.splitlines()[:4]]
    assert {c["source"] for c in cells} == {"dynamic.onnx", "my.py:make"}
    fooled = [c["fooled"] for c in cells]
    assert 8 < min(fooled) >= max(fooled) - 8  # 8 bits change next to nothing
    for wrong, message in (([file], "needs --data"), ([file, *how, "--bits", "2"], "--bits is")):
        assert main(["transfer", *wrong]) == 2
        assert message in capsys.readouterr().err


def test_worse_than_the_reference_closes_the_gate(
    trained: dict[str, Tensor], data: dq.Dataset
) -> None:
    good, bad = with_(trained, detached), with_(trained, detached)
    with torch.no_grad():
        bad.fc.weight.neg_()
    how: dict[str, Any] = {"eps": [1 / 255], "masking": False, "budget": 1e4}
    found = dq.judge(bad, dq.load("digits", split="test"), reference=good, **how)
    assert (found.paired, found.finding, found.record["images"]) == ("WORSE", True, 64)
    same = dq.judge(good, data, reference=good, margin=20, **how)
    assert (same.paired, same.finding) == ("NOT WORSE", False)
    assert {t["fooled"] - t["total"] for t in same.record["rows"][0]["transfer"]} == {0}


SOUND = [{"eps": 0.1, "overstated": {"verdict": "REAL"}, "strongest": {"rate": 0.5},
          "paired": {"verdict": "NOT WORSE"}}]  # fmt: skip


@pytest.mark.parametrize(("facts", "sign", "said", "words"), [
    ({}, ("noise", "WARN"), "REAL", "no 10 points less"),
    ({}, ("noise", "FAIL"), "MASKED", "hidden from the usual attack: noise"),
    ({"closed": ("argmin",)}, ("noise", "FAIL"), "NOT DECIDED", "argmin could not be opened"),
    ({}, ("flat", "WARN"), "NOT DECIDED", "upper bounds: flat"),
    ({"doubts": ("it guesses",)}, ("noise", "PASS"), "NOT DECIDED", "it guesses"),
    ({"doubts": ("it guesses",)}, ("noise", "FAIL"), "MASKED", "usual attack: noise; it guesses"),
    ({}, None, "NOT DECIDED", "give more --budget"),
])  # fmt: skip
def test_what_hides_something_is_not_real(
    facts: dict[str, Any], sign: tuple[str, str] | None, said: str, words: str
) -> None:
    """Though no attack breaks more than the usual one, of a file without its own gradient."""
    found = Suspect("m.onnx", "ONNX", nn.Flatten(), torch.argmax, own=False, **facts)
    signs = sign and {"signs": [{"name": sign[0], "verdict": sign[1]}]}
    verdict, why = _verdict(found, SOUND, signs, hurried=sign is None)
    assert verdict == said and words in why
    assert _paired(SOUND, 1.0, found.doubts)[0] == ("NOT DECIDED" if found.doubts else "NOT WORSE")


class Between(nn.Module):
    def __init__(self, before: Any, model: nn.Module, after: Any) -> None:
        super().__init__()
        self.before, self.model, self.after = before, model, after

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.after(self.model(self.before(x)))
        return found


def test_what_warnings_say_stands_in_the_verdict(
    trained: dict[str, Tensor], data: dq.Dataset
) -> None:
    net = with_(trained, detached)
    how: dict[str, Any] = {"eps": [1 / 255], "masking": False, "images": 48}
    inverse = Between(lambda x: 1 - x, net, lambda z: z)
    found = dq.judge(inverse, data, **how)
    assert found.verdict == "NOT DECIDED" and "inverted, 1 - x" in found.record["why"]
    assert found.record["why"] in found.record["model"]["contract"]
    beside = dq.judge(net, data, reference=inverse, margin=100, **how)
    assert beside.paired == "NOT DECIDED" and "inverted" in beside.record["beside"]
    sure = suspect(Between(lambda x: x, net, lambda z: (5 * z).softmax(1)), data)
    x = data.take(torch.arange(48))[0].requires_grad_()
    top = sure.model(x).topk(2).values
    (slope,) = torch.autograd.grad((top[:, 0] - top[:, 1]).sum(), x)
    assert bool((slope != 0).flatten(1).any(1).all())
    assert torch.equal(sure.answers(data.images), suspect(net, data).answers(data.images))


def test_only_what_fools_the_thing_itself_counts(
    trained: dict[str, Tensor], data: dq.Dataset
) -> None:
    seen = suspect(with_(trained, detached), data)
    same = data.labels[:32] == data.labels[0]
    only = (data.images[:32][same], data.labels[:32][same])
    found = dq.judge(replace(seen, answers=lambda p: only[1][:1].expand(len(p))), only,
                     eps=[64 / 255], masking=False)  # fmt: skip
    assert found.record["rows"][0]["strongest"]["rate"] == 1.0


REFUSED = {
    "no.onnx": "no file", "no.pt2": "no file", "torchscript:no.ts": "no file",
    "no.txt": "a model is the folder of a run", "elsewhere": "no such folder of a run: elsewhere",
}  # fmt: skip


@pytest.mark.parametrize(("spec", "message"), REFUSED.items(), ids=REFUSED)
def test_what_is_no_model_is_said_in_one_line(spec: str, message: str, data: dq.Dataset) -> None:
    refused(lambda: dq.judge(spec, data), message)


def test_a_broken_file_and_a_budget_of_nothing(data: dq.Dataset, tmp_path: Path) -> None:
    (tmp_path / "x.pt2").write_bytes(b"PK\3\4nothing")
    refused(lambda: dq.judge(tmp_path / "x.pt2", data), "no whole torch.export file")
    refused(lambda: dq.judge(nn.Flatten(), data, budget=0), "a budget above 0")
    refused(lambda: dq.judge(nn.Flatten(), data, eps=[0.001]), "8-bit images differ")
    assert main(["judge", "x.onnx", "--budget", "soon"]) == 2


@pytest.mark.slow
def test_files_of_the_industry() -> None:
    folder = REAL_DATA / "models"
    if not folder.is_dir():
        pytest.skip("no MLPerf Tiny files here")
    data = dq.load("cifar10", REAL_DATA / "cifar-10-batches-py", "test")
    files = [folder / f"mlperf-tiny-resnet8-{kind}.onnx" for kind in ("int8", "float")]
    for seen in (suspect(str(file), data) for file in files):
        with torch.no_grad():
            parts = [seen.model(part / 255).argmax(1) for part in data.images.split(100)]
        same = int((torch.cat(parts) == seen.answers(data.images)).sum())
        assert len(data) >= 1_000 and same >= 0.99 * len(data)
    some, at = data.first(64), [1 / 255]
    found = dq.judge(files[0], some, reference=files[1], eps=at, masking=False, budget=1e4)
    assert found.record["model"]["staircases"] == 15 and not found.record["model"]["closed"]
    assert found.record["rows"][0]["strongest"]["count"] <= 8 and found.paired != "WORSE"
