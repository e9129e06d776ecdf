"""`defquant export` and `verify`, as someone would use them, and what they are made of."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import defquant as dq
from defquant.attacks import PGD
from defquant.attacks.contract import to_pixels
from defquant.cli import main
from defquant.config import ModelConfig
from defquant.data import Dataset
from defquant.deploy.graph import METADATA, graph
from defquant.deploy.lower import lower
from defquant.deploy.parity import AGREEMENT, FLIPPED, parity
from defquant.deploy.runtime import OnnxModel
from defquant.deploy.ship import replayed
from defquant.evaluate import robust_accuracy
from defquant.models import build


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two short trainings on digits: `dq`, to be deployed, and `plain`, which is not."""
    folder = tmp_path_factory.mktemp("runs")
    common = ["train", "--preset", "digits-short", "--epochs", "3", "--bits", "4", "--clip", "1"]
    extra = ["--beta", "0.05", "--weight-bits", "4", "--deployable"]
    assert main([*common, *extra, "--out", str(folder / "dq")]) == 0
    assert main([*common, "--out", str(folder / "plain")]) == 0
    return folder


QUICK = ["--attacked", "60", "--few", "20", "--queries", "20", "--repeats", "2", "--threads", "1"]
QUICKEST = [
    "--attack",
    "fgsm",
    "--attacked",
    "10",
    "--queries",
    "0",
    "--repeats",
    "0",
    "--images",
    "50",
]


@pytest.fixture(scope="module")
def shipped(runs: Path) -> Path:
    """`dq`, exported."""
    file = runs / "shipped" / "dq.onnx"
    assert main(["export", str(runs / "dq"), str(file), *QUICKEST]) == 0
    return file


def test_export_and_verify(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "dq.onnx"
    words = ["export", str(runs / "dq"), str(file), "--eps", "16/255", *QUICK]
    words += ["--attack", "fgsm", "pgd-20", "adaptive-5", "--reference", str(runs / "plain")]
    assert main(words) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[-2:] == [str(file), str(tmp_path / "dq.json")]
    assert any("10 of 10 convolutions in integers" in line for line in out)
    card = json.loads((tmp_path / "dq.json").read_text())
    assert card["convolutions"] == [10, 10] and card["calibrated"] is None  # a batch norm of codes
    assert card["parity"]["agreement"] >= AGREEMENT
    assert card["parity"]["reference_mismatches"] == 0
    attacks = ["clean", "FGSM", "PGD-20", "Adaptive-5", "Square-20"]
    assert [s["attack"] for s in card["scores"]] == attacks and card["reference"] == "plain"
    for scores in card["scores"]:
        assert scores["trained"][1] == scores["deployed"][1] == scores["reference"][1]
        assert abs(scores["trained"][0] - scores["deployed"][0]) <= 2
    assert card["cost"]["file_bytes"] == file.stat().st_size
    assert set(card["cost"]["latency"]["batches"]) == {"1", "32"}
    assert main(["verify", str(runs / "dq"), str(file), "--json"]) == 0
    verified = json.loads(capsys.readouterr().out)
    assert verified["parity"] == card["parity"]


def test_a_network_that_was_not_trained_for_it_is_calibrated(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "plain.onnx"
    words = ["export", str(runs / "plain"), str(file), "--weight-bits", "8", "--input", "uint8"]
    assert main([*words, "--attack", "fgsm", "--eps", "8/255", "--queries", "0", "--repeats", "0",
                 "--json"]) == 0  # fmt: skip
    card = json.loads(capsys.readouterr().out)
    assert card["calibrated"] == 512 and card["input"] == "uint8" and card["weight_bits"] == 8
    assert card["convolutions"] == [9, 9] and "latency" not in card["cost"]
    assert card["parity"]["agreement"] > 0.9
    assert main(["verify", str(runs / "plain"), str(file)]) == 0


def claiming(path: Path, **facts: object) -> None:
    """`facts` among what the file says of itself; none of it without any."""
    model = onnx.load(path)
    known = json.loads(model.metadata_props[0].value)
    del model.metadata_props[:]
    if facts:
        onnx.helper.set_model_props(model, {METADATA: json.dumps(known | facts)})
    onnx.save(model, path)


SPOILED: dict[str, Callable[[Path], object]] = {
    "2-bit activations, dq 4-bit ones": lambda path: claiming(path, bits=2),
    "full-precision activations, dq 4-bit ones": lambda path: claiming(path, bits=None),
    "is not a whole ONNX model": lambda path: path.write_bytes(path.read_bytes()[:3000]),
    "was not made by `defquant export`": claiming,
    "was exported from another network": lambda path: claiming(path, digest="0" * 16),
    "was written by another version of defquant": lambda path: claiming(path, format=2),
    "no file": lambda path: path.unlink(),
}


@pytest.mark.parametrize("message", SPOILED)
def test_what_is_wrong_with_a_file_is_said_in_one_line(
    runs: Path, shipped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], message: str
) -> None:
    file = Path(shutil.copy(shipped, tmp_path))
    SPOILED[message](file)
    assert main(["verify", str(runs / "dq"), str(file)]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["export", "RUN"], "model"),
        (["export", "RUN", "OUT", "--weight-bits", "3"], "weight_bits"),
        (["export", "RUN", "OUT", "--reference", "float"], "no such folder of a run: float"),
        (["export", "RUN", "OUT", "--attacked", "0"], "--attacked must be 1 or more"),
        (["export", "RUN", "OUT", "--repeats", "-1"], "--repeats must be 0 or more"),
        (["export", "NONE", "OUT"], "no checkpoint"),
        (["verify", "RUN", "SHIPPED", "--images", "100000"], "has 450 images"),
        (["verify", "PLAIN", "SHIPPED"], "exported from another network"),
    ],
)
def test_mistakes(
    runs: Path, shipped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    words: list[str], message: str,
) -> None:  # fmt: skip
    places = {"RUN": runs / "dq", "PLAIN": runs / "plain", "SHIPPED": shipped, "NONE": tmp_path}
    places["OUT"] = tmp_path / "x.onnx"
    assert main([str(places.get(word, word)) for word in words]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_without_the_extra_one_line_says_so(
    runs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["verify", str(runs / "dq"), "x.onnx"]) == 2
    assert "pip install 'defquant[deploy]'" in capsys.readouterr().err


def test_a_float_convolution_is_an_error_unless_allowed(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As an onnxruntime that fuses one convolution fewer would have it."""
    counted = "integer_convolutions"
    monkeypatch.setattr(f"defquant.deploy.ship.{counted}", lambda model: (8, 9))
    monkeypatch.setattr(f"defquant.deploy.parity.{counted}", lambda model: (8, 9))
    file = tmp_path / "x.onnx"
    assert main(["export", str(runs / "dq"), str(file), *QUICKEST]) == 2
    assert "only 8 of 9" in capsys.readouterr().err and not file.exists()
    assert main(["export", str(runs / "dq"), str(file), *QUICKEST, "--allow-float"]) == 0
    assert main(["verify", str(runs / "dq"), str(file), "--images", "50"]) == 1
    assert "2 of 10 convolutions of codes run in float" in capsys.readouterr().err


class Bright(nn.Module):
    """Class 1 where the mean of the image exceeds `threshold`, by 100 times the excess."""

    def __init__(self, threshold: float) -> None:
        super().__init__()
        self.threshold = nn.Parameter(torch.tensor(threshold))

    def forward(self, x: Tensor) -> Tensor:
        excess = 100 * (x.mean((1, 2, 3)) - self.threshold)
        return torch.stack([-excess, excess], 1)


def test_replayed_images_are_scored_on_both() -> None:
    """Every image is 100, threshold 105.5: within 8 of it lies a fooling one, at 101.5 too."""
    images = Dataset(torch.full((6, 1, 2, 2), 100, dtype=torch.uint8),
                     torch.zeros(6, dtype=torch.int64), ("dark", "bright"), "flat")  # fmt: skip
    trained, lower_one, higher = (Bright(v / 255).eval() for v in (105.5, 101.5, 109.5))
    for attack, expected in ((PGD(8 / 255, steps=10), (0, 6)), (PGD(4 / 255, steps=10), (6, 6))):
        for other, index in ((trained, 0), (higher, 1)):
            scores = replayed(trained, other, images, attack, batch_size=4)
            assert scores[0].correct == expected[0]
            assert scores[1].correct == (expected[0] if index == 0 else 6)
    assert replayed(trained, lower_one, images, PGD(4 / 255, steps=10))[1].correct == 0


@given(
    st.integers(0, 255), st.floats(0, 1, width=32), st.integers(0, 40),
)  # fmt: skip
def test_pixels_stay_in_the_ball_and_near(pixel: int, value: float, radius: int) -> None:
    x = torch.tensor([pixel / 255])
    eps = radius / 255
    inside = torch.tensor([value]).clamp(x - eps, x + eps).clamp(0, 1)
    found = to_pixels(inside, x, eps)
    level = found * 255
    assert (level - level.round()).abs() < 1e-4
    assert (level.round() - pixel).abs() <= radius
    assert (found - inside).abs() * 255 <= 0.5 + 1e-3
    far = to_pixels(torch.tensor([value]), x, eps)
    assert ((far * 255).round() - pixel).abs() <= radius and 0 <= far <= 1


def test_random_search_runs_on_the_file_itself() -> None:
    """It finds on the ONNX model what it finds on the network that computes the same."""
    data = dq.load("digits", split="train")
    model = dq.vgg16(bits=4, width=0.125, weight_bits=8, deployable=True, in_channels=1)
    dq.train(model, data, dq.TrainConfig(epochs=2, batch_size=64, clip=1.0))
    test = dq.load("digits", split="test").first(40)
    deployed = OnnxModel(graph(lower(model, data.shape)))
    attack = dq.Square(24 / 255, queries=60)
    scores = [robust_accuracy(network, test, attack) for network in (model, deployed)]
    clean = dq.accuracy(deployed, test)
    assert scores[1].correct < clean.correct
    assert abs(scores[0].correct - scores[1].correct) <= 1


@pytest.mark.slow
@pytest.mark.parametrize("bits", [1, 2, 4, 7, 8])
@pytest.mark.parametrize("name", ["wrn-10-1", "resnet-18x0.125", "vgg-16x0.125"])
def test_bounds_of_a_trained_network(name: str, bits: int) -> None:
    """The bounds of `parity`, on networks that learnt something and on some that hardly did."""
    config = ModelConfig(
        name, bits=bits, convex=True, weight_bits=8 if bits % 2 else 4, deployable=True
    )
    model = build(config, num_classes=10, in_channels=1)
    data, test = dq.load("digits", split="train"), dq.load("digits", split="test")
    dq.train(model, data, dq.TrainConfig(epochs=2, batch_size=64, clip=1.0, beta=0.05))
    program = lower(model, data.shape)
    found = parity(model, program, graph(program), test, deep=64)
    assert found.faults == {}
    assert found.agreement.accuracy >= AGREEMENT and found.flipped <= FLIPPED
    assert found.unoptimised.correct >= 63  # of 64: float sums may part at a tie
