"""`examples/serve.py`: an image file classified by an exported model alone."""

import subprocess
import sys
import venv
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
import pytest
import torch
from PIL import Image

from defquant.deploy.graph import graph
from defquant.deploy.lower import lower
from defquant.models import wide_resnet

SCRIPT = Path(__file__).parents[1] / "examples" / "serve.py"
CLASSES = ("cat", "dog", "owl", "ant")
SIZE = 12


def write_model(
    path: Path, channels: int, input_type: Literal["float", "uint8"], **facts: object
) -> torch.nn.Module:
    torch.manual_seed(3)
    model = wide_resnet(
        10, 1, bits=4, weight_bits=8, deployable=True, num_classes=4, in_channels=channels
    )
    model(torch.rand(64, channels, SIZE, SIZE))  # gives the batch norms their statistics
    program = lower(model.eval(), (channels, SIZE, SIZE))
    onnx.save(graph(program, input_type=input_type, facts={"format": 1, **facts}), path)
    return model


def write_picture(path: Path, model: torch.nn.Module, channels: int) -> int:
    """Of many random pictures the one of which `model` is surest; its class."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (200, channels, SIZE, SIZE), generator=generator)
    with torch.no_grad():
        logits = model(images / 255)
    best, second = logits.topk(2).values.T
    index = int((best - second).argmax())
    pixels = images[index].permute(1, 2, 0).numpy().astype(np.uint8)
    Image.fromarray(pixels[..., 0] if channels == 1 else pixels).save(path)
    return int(logits[index].argmax())


def serve(*words: Path | str, python: Path | str = sys.executable) -> tuple[int, str, str]:
    done = subprocess.run(
        [str(python), str(SCRIPT), *map(str, words)], capture_output=True, text=True, check=False
    )
    return done.returncode, done.stdout, done.stderr


@pytest.fixture(scope="module")
def shipped(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, str]:
    """A model, a picture and the class that the trained network gives it."""
    folder = tmp_path_factory.mktemp("shipped")
    model = write_model(folder / "model.onnx", 3, "float", classes=CLASSES)
    answer = CLASSES[write_picture(folder / "image.png", model, 3)]
    return folder / "model.onnx", folder / "image.png", answer


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("input_type", ["float", "uint8"])
def test_it_says_what_the_trained_network_says(
    tmp_path: Path, channels: int, input_type: Literal["float", "uint8"]
) -> None:
    model = write_model(tmp_path / "m.onnx", channels, input_type, classes=CLASSES)
    answer = CLASSES[write_picture(tmp_path / "i.png", model, channels)]
    code, out, err = serve(tmp_path / "m.onnx", tmp_path / "i.png")
    assert (code, err) == (0, "")
    shares, names = zip(*(line.split() for line in out.splitlines()), strict=True)
    assert len(names) == 3
    assert names[0] == answer
    values = [float(share.rstrip("%")) for share in shares]
    assert values == sorted(values, reverse=True)
    assert 0 < sum(values) < 100.2


def test_any_picture_is_made_to_fit(tmp_path: Path, shipped: tuple[Path, Path, str]) -> None:
    """Another size, colours or grey, a palette, an alpha channel."""
    kinds = {"big.jpg": "RGB", "grey.png": "L", "palette.gif": "P", "alpha.png": "RGBA"}
    for name, kind in kinds.items():
        Image.new(kind, (40, 25)).save(tmp_path / name)
        code, out, err = serve(shipped[0], tmp_path / name)
        assert (code, len(out.splitlines()), err) == (0, 3, "")
    write_model(tmp_path / "grey.onnx", 1, "float")
    assert serve(tmp_path / "grey.onnx", tmp_path / "big.jpg")[0] == 0


def test_a_model_without_names_has_numbers(tmp_path: Path, shipped: tuple[Path, Path, str]) -> None:
    write_model(tmp_path / "m.onnx", 3, "float")
    _, out, _ = serve(tmp_path / "m.onnx", shipped[1])
    assert out.splitlines()[0].split()[1] == str(CLASSES.index(shipped[2]))


def test_bad_input_is_one_line(tmp_path: Path, shipped: tuple[Path, Path, str]) -> None:
    model, picture, _ = shipped
    names = ("cut.onnx", "text.png", "half.png", "missing")
    cut, text, half, missing = (tmp_path / name for name in names)
    cut.write_bytes(model.read_bytes()[: model.stat().st_size // 2])
    text.write_text("no picture")
    half.write_bytes(picture.read_bytes()[:200])
    for words in (
        (missing, picture), (model, missing), (cut, picture), (model, text), (model, half),
        (picture, model), (), (model,), (model, picture, picture),
    ):  # fmt: skip
        code, out, err = serve(*words)
        assert (code, out, len(err.splitlines())) == (2, "", 1), err
        assert err.startswith(("cannot classify", "usage:"))


@pytest.mark.slow
def test_it_needs_neither_torch_nor_defquant(
    tmp_path: Path, shipped: tuple[Path, Path, str]
) -> None:
    venv.create(tmp_path / "env", with_pip=True)
    python = tmp_path / "env" / "bin" / "python"
    wanted = [f"{name}=={version(name)}" for name in ("onnxruntime", "numpy", "pillow")]
    subprocess.run([python, "-m", "pip", "install", "--quiet", *wanted], check=True)
    for name in ("torch", "defquant", "onnx"):
        tried = subprocess.run([python, "-c", f"import {name}"], capture_output=True, check=False)
        assert b"ModuleNotFoundError" in tried.stderr
    model, picture, answer = shipped
    code, out, err = serve(model, picture, python=python)
    assert (code, err) == (0, "")
    assert out.splitlines()[0].split()[1] == answer
