"""`--model-file`: a model of the user's own, and every way in which it can be wrong."""

import hashlib
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import defquant as dq
from conftest import alike, refused
from defquant.cli import main
from defquant.foreign import load_foreign
from defquant.records import FOREIGN, read_folder

CODE = """
import torch
from helper import WIDTH
from torch import nn
from torch.nn import functional as F

print("hello from my code")

class Net(nn.Module):
    def __init__(self, channels=1, classes=10):
        super().__init__()
        self.conv = nn.Conv2d(channels, WIDTH, 3, padding=1)
        self.fc = nn.Linear(WIDTH * 64, classes)

    def forward(self, x):
        print("and when it is asked")
        return self.fc(F.relu(self.conv(x)).flatten(1))

class Late(Net):
    def forward(self, x):
        if len(x) > 8:
            raise KeyError("boom")
        return super().forward(x)

class Pair(Net):
    def forward(self, x):
        return super().forward(x), x

class Shut(Net):
    def forward(self, x):
        with torch.no_grad():
            return super().forward(x)

class One(Net):  # an engine that was built for one image
    def forward(self, x):
        assert len(x) == 1
        return super().forward(x)

def raises():
    return [1, 2][3]

def leaves():
    raise SystemExit("bye")

def tied():
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 10))
    net[2].weight = net[1].weight
    return net

def exported():
    batch = {0: torch.export.Dim("batch", min=1, max=4096)}
    image = torch.rand(4, 1, 8, 8)
    return torch.export.export(Net(), (image,), dynamic_shapes=(batch,)).module()

def quantised():
    import defquant as dq
    return dq.wide_resnet(10, 1, bits=3, in_channels=1)

make_model = lambda: Net()
no_module = lambda: 3
rgb = lambda: Net(channels=3)
many = lambda: Net(classes=100)
wrapped = lambda: nn.DataParallel(Net())
normed = lambda: nn.Sequential(Net(), nn.BatchNorm1d(10))
old_names = lambda: nn.utils.parametrizations.weight_norm(nn.Linear(64, 10))
lazy = lambda: nn.Sequential(nn.Flatten(), nn.LazyLinear(10))
asks = lambda width: Net(width)
frozen = lambda: torch.jit.freeze(torch.jit.script(Net().eval()))
not_callable = 3
"""


def loaded(spec: str, weights: Path | None = None) -> nn.Module:
    return load_foreign(spec, str(weights) if weights else None, torch.device("cpu"))[0]


def line(text: str) -> int:
    """The number of the line of `my.py` that holds `text`."""
    return 1 + next(i for i, row in enumerate(CODE.splitlines()) if text in row)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `my.py`, what it imports, and weights of a trained `Net`."""
    folder = tmp_path_factory.mktemp("mine")
    (folder / "my.py").write_text(CODE)
    (folder / "helper.py").write_text("WIDTH = 8\n")
    torch.manual_seed(0)
    net = loaded(f"{folder}/my.py:make_model")
    data = dq.load("digits").first(512)
    dq.train(net, data, dq.TrainConfig(epochs=6, batch_size=32, lr=0.02, device="cpu"))
    save_file(net.state_dict(), folder / "w.safetensors")
    return folder


def words(place: Path, function: str, out: Path, *more: str) -> list[str]:
    return [
        "attack", "--model-file", f"{place}/my.py:{function}", "--data", "digits",
        "--attack", "fgsm", "pgd-3", "--eps", "8/255", "--images", "60", "--out", str(out), *more,
    ]  # fmt: skip


def refuses(capsys: pytest.CaptureFixture[str], *command: str) -> str:
    capsys.readouterr()
    assert main(command) == 2
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line.startswith("defquant: ")]
    assert "Traceback" not in captured.err
    assert sum("runs your code" not in line and "warning" not in line for line in lines) == 1
    return lines[-1]


def test_scores_are_those_of_python(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, weights = tmp_path / "out", str(place / "w.safetensors")
    capsys.readouterr()
    command = words(place, "make_model", out, "--weights", weights, "--json")
    assert main([*command, "--save-images", str(tmp_path / "images")]) == 0
    captured = capsys.readouterr()
    assert f"runs your code from {place}/my.py" in captured.err
    assert "hello from my code" in captured.err
    *_, results, manifest = captured.err.splitlines()
    assert (results, manifest) == (
        str(out / "results.jsonl"), str(tmp_path / "images" / "manifest.jsonl"),
    )  # fmt: skip
    records = {r["attack"]: r for r in map(json.loads, captured.out.splitlines())}
    found = loaded(f"{place}/my.py:make_model", Path(weights))
    data = dq.load("digits", split="test").first(60)
    for name, attack in (("FGSM", dq.FGSM(8 / 255)), ("PGD-3", dq.PGD(8 / 255, steps=3))):
        assert records[name]["correct"] == dq.robust_accuracy(found, data, attack).correct
    assert records["clean"]["correct"] > 45
    assert {m.method for m in read_folder(out)} == {f"{FOREIGN} (w.safetensors)"}
    assert records["clean"]["model"] == "my.py:make_model"
    assert len(records["clean"]["evidence"]["weights_sha256"]) == 64
    assert (out / "examples.json").is_file()
    own = ["--model-file", f"{place}/my.py:make_model", "--weights", weights]
    capsys.readouterr()
    assert main(["rescore", str(tmp_path / "images"), *own, "--json"]) == 0
    scores = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert all(r["correct"] == r["saved_correct"] for r in scores)


def test_an_engine_for_one_image(place: Path, tmp_path: Path) -> None:
    own = ["--weights", str(place / "w.safetensors"), "--batch-size", "1"]
    more = ["--save-images", str(tmp_path / "images"), "--examples", "3", "--images", "6"]
    assert main([*words(place, "One", tmp_path / "out"), *own, *more]) == 0
    assert main(
        ["rescore", str(tmp_path / "images"), "--model-file", f"{place}/my.py:One", *own]
    ) == 0  # fmt: skip


@pytest.mark.filterwarnings("ignore::defquant.DefquantWarning")  # negated: it may guess
def test_two_weight_files_of_one_name_in_one_folder_are_two_networks(
    place: Path, tmp_path: Path
) -> None:
    out, table = tmp_path / "out", tmp_path / "t.md"
    other = tmp_path / "w.safetensors"
    save_file({k: -v for k, v in load_file(place / "w.safetensors").items()}, other)
    for weights in (place / "w.safetensors", other, other):
        assert main(words(place, "make_model", out, "--weights", str(weights))) == 0
    page = ["report", str(out), "--out", str(tmp_path / "p.html"), "--markdown", str(table)]
    assert main(page) == 0
    rows = sorted(line for line in table.read_text().splitlines() if " | clean |" in line)
    text = (tmp_path / "p.html").read_text()
    assert "your full precision model" not in text
    for shown in (table.read_text(), text):
        assert "your model (w.safetensors)" in shown and "As given" in shown
    digests = sorted(map(_hash, (place / other.name, other)))
    assert all(d[:6] in row and "±" not in row for d, row in zip(digests, rows, strict=True))


def _hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.filterwarnings("ignore::defquant.DefquantWarning")  # untrained: it guesses
@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("absent", "has no function 'absent'; it has: Net, Late, Pair"),
        ("not_callable", "has no function 'not_callable'"),
        ("raises", f"my.py, line {line('[1, 2][3]')}: IndexError: list index out of range"),
        ("leaves", f"my.py, line {line('SystemExit')}: SystemExit: bye"),
        ("no_module", "must return a torch.nn.Module; found int"),
        ("asks", "my.py: TypeError: <lambda>() missing 1 required positional argument: 'width'"),
        ("rgb", f"my.py, line {line('self.fc(F.relu')}: RuntimeError on images of 1 x 8 x 8"),
        ("many", "knows 100 classes, digits 10: use what"),
        ("Late", f"my.py, line {line('KeyError')}: KeyError: 'boom'"),
        ("Pair", "it returned a tuple of 2 (Tensor, Tensor): wrap it"),
        ("Shut", "follows the gradient, and the model's outputs have none"),
    ],
)
def test_what_the_code_does_wrong(
    function: str, message: str, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in refuses(capsys, *words(place, function, tmp_path / "out"))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # torch.jit's
@pytest.mark.filterwarnings("ignore::defquant.DefquantWarning")  # untrained: it guesses
@pytest.mark.parametrize("function", ["exported", "frozen"])
def test_programs_that_know_no_modes_are_attacked(
    function: str, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`torch.export` refuses `eval()`, and frozen TorchScript has no `training`."""
    command = words(place, function, tmp_path / "out", "--examples", "0", "--json")
    assert main(command) == 0
    assert [json.loads(line)["total"] for line in capsys.readouterr().out.splitlines()] == [60] * 3
    model = loaded(f"{place}/my.py:{function}")
    del vars(model)["training"]
    data = dq.load("digits", split="test").first(60)
    assert dq.robust_accuracy(model, data, dq.FGSM(8 / 255)).total == 60


def test_a_quantised_one_says_its_bits(place: Path) -> None:
    _, subject = load_foreign(f"{place}/my.py:quantised", None, torch.device("cpu"))
    assert (subject.bits, subject.method) == (3, FOREIGN)


def test_files_that_do_not_run(tmp_path: Path) -> None:
    spec = f"{tmp_path}/my.py:f"
    for text, message in (
        ("x = 1\ndef f(:\n", "my.py, line 2: SyntaxError"),
        ("import nosuchmodule\n", "my.py, line 1: ModuleNotFoundError: No module named"),
        ("x = 1\n\nraise ValueError('a\\nb')\n", "my.py, line 3: ValueError: a b"),
    ):
        (tmp_path / "my.py").write_text(text)
        refused(lambda: loaded(spec), message)
    for wrong in ("my.py", "my.txt:f", "my.py:f()", ":"):
        refused(partial(loaded, wrong), "a Python file and a function")
    refused(lambda: loaded(f"{tmp_path}/other.py:f"), "no file")


def test_weights_that_do_not_fit(place: Path, tmp_path: Path) -> None:
    spec, path = f"{place}/my.py:make_model", tmp_path / "x.safetensors"
    state = loaded(spec).state_dict()
    without = {name: v for name, v in state.items() if name != "fc.bias"}
    for tensors, message in (
        (without, 'does not fit the Net of'), (without, 'Missing key(s) in state_dict: "fc.bias"'),
        (state | {"head": torch.zeros(1)}, 'Unexpected key(s) in state_dict: "head"'),
        (state | {"fc.bias": torch.zeros(3)}, "size mismatch for fc.bias"),
    ):  # fmt: skip
        save_file(tensors, path)
        refused(lambda: loaded(spec, path), message)
    path.write_bytes(path.read_bytes()[:100])
    refused(lambda: loaded(spec, path), "not a whole safetensors file")
    for name in ("w.pt", "renamed.safetensors"):
        torch.save(state, tmp_path / name)
        refused(partial(loaded, spec, tmp_path / name), "is a pickle, which can run code")
    refused(lambda: loaded(spec, tmp_path / "none.safetensors"), "no weights at")


Weights = dict[str, torch.Tensor]


def without_counts(state: Weights) -> Weights:
    """As torch 0.3 wrote batch norms."""
    return {name: v for name, v in state.items() if not name.endswith("num_batches_tracked")}


OLD = {"weight_g": (10, 1), "weight_v": (10, 64), "bias": (10,)}  # of weight_norm


def named(pattern: str, state: Weights) -> Weights:
    return {pattern.format(name): v for name, v in state.items()}


@pytest.mark.parametrize(
    ("function", "written"),
    [
        ("make_model", lambda model: named("module._orig_mod.{}", model.state_dict())),
        ("wrapped", lambda model: model.module.state_dict()),
        ("normed", lambda model: without_counts(model.state_dict())),
        ("normed", lambda model: named("model.module._orig_mod.{}", model.state_dict())),
        ("old_names", lambda model: {n: torch.ones(OLD[n]) for n in OLD}),
        ("lazy", lambda model: nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).state_dict()),
    ],
)
def test_torch_decides_whether_weights_fit(
    function: str, written: Callable[[Any], Weights], place: Path, tmp_path: Path
) -> None:
    spec, path = f"{place}/my.py:{function}", tmp_path / "x.safetensors"
    given = {name: torch.full_like(v, 3) for name, v in written(loaded(spec)).items()}
    save_file(given, path)
    found = loaded(spec, path).state_dict()
    assert all((v == 3).all() for n, v in found.items() if "num_batches" not in n)


def test_tied_weights_and_the_line_that_converts(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, path = f"{place}/my.py:tied", tmp_path / "x.safetensors"
    tied = loaded(spec)
    safetensors.torch.save_model(tied, str(path))
    assert alike(loaded(spec, path).state_dict(), tied.state_dict())

    spec = f"{place}/my.py:rgb"
    state = dict(loaded(spec).state_dict())
    state["conv.weight"] = state["conv.weight"].to(memory_format=torch.channels_last)
    torch.save(state, tmp_path / "x.pt")
    said = refused(lambda: loaded(spec, tmp_path / "x.pt"))
    monkeypatch.chdir(tmp_path)
    exec(said.partition("where you trust it, ")[2])
    assert alike(loaded(spec, path).state_dict(), state)


def test_flags_that_do_not_go_together(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    command = words(place, "make_model", out)
    for more, message in (
        (["--substitute", "x"], "--substitute is for runs"),
        (["--unaware"], "--unaware is for runs"),
        (["--detector"], "--detector is for runs"),
        (["--split", "validation"], "--split is for runs"),
        (["--batch-size", "0"], "--batch_size must be 1"),
        (["--data", "mnist"], "unknown data set 'mnist'"),
    ):
        assert message in refuses(capsys, *command, *more)
    model = ["--model-file", f"{place}/my.py:make_model"]
    assert "needs --data" in refuses(capsys, "attack", *model, "--out", str(out))
    assert "needs --out" in refuses(capsys, "attack", *model, "--data", "digits")
    assert "not both; found 'x'" in refuses(capsys, "attack", "x", *command[1:])
    assert "attack needs folders of runs" in refuses(capsys, "attack", "--eps", "0.1")
    assert "--data belongs to --model_file" in refuses(capsys, "attack", "x", "--data", "digits")
    out.mkdir()
    (out / "checkpoint.safetensors").touch()
    assert "holds a run of" in refuses(capsys, *command)


@pytest.mark.filterwarnings("always::defquant.DefquantWarning")
def test_a_model_that_guesses_is_said_so(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = np.zeros((100, 8, 8), np.uint8)
    images[:, 2:4] = np.arange(100)[:, None, None]
    np.savez(tmp_path / "d.npz", images=images, labels=np.arange(100) % 10)
    command = words(place, "make_model", tmp_path / "out")
    command[command.index("digits")] = "npz"
    command[command.index("60")] = "20"
    assert main([*command, "--data-root", str(tmp_path / "d.npz"), "--examples", "0"]) == 0
    assert "warning: the model guesses: look at its weights" in capsys.readouterr().err
