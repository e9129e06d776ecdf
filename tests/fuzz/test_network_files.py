"""Checkpoints and ONNX files from elsewhere: mutated ones, and what once did harm."""

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper
from onnxruntime.quantization import CalibrationDataReader, quantize_static
from torch import nn

from conftest import refused, tiny_images
from defquant.checkpoint import NAME, Checkpoint, Facts, load_on, save
from defquant.config import DataConfig, ModelConfig, TrainConfig
from defquant.data import load
from defquant.deploy.graph import graph
from defquant.deploy.lower import lower
from defquant.deploy.runtime import OnnxModel, facts_of, open_model
from defquant.deploy.ship import compared
from defquant.judging.contract import File
from defquant.models import wide_resnet
from harness import SECONDS, Read, fuzz, outcome
from onnx_nodes import network as anyones


def network(width: int = 1) -> nn.Module:
    torch.manual_seed(0)
    options: dict[str, Any] = {"weight_bits": 4, "deployable": True, "num_classes": 4}
    model = wide_resnet(10, width, bits=4, in_channels=1, **options)
    model(torch.rand(16, 1, 8, 8))  # gives the batch norms their statistics
    return model.eval()


@pytest.fixture(scope="module")
def exported() -> bytes:
    program = lower(network(), (1, 8, 8))
    raw: bytes = graph(program, facts={"format": 1}).SerializeToString()
    return raw


def read_onnx(folder: Path) -> Read:
    """As `rescore` does."""
    path = folder / "m.onnx"

    def read(raw: bytes) -> object:
        path.write_bytes(raw)
        facts_of(file := open_model(path), path)
        return OnnxModel(file, threads=1)(torch.zeros(2, 1, 8, 8))

    return read


@pytest.mark.slow
def test_fuzz_onnx(tmp_path: Path, exported: bytes) -> None:
    fuzz(read_onnx(tmp_path), [exported])


def read_anyones(folder: Path) -> Read:
    """As `judge` does; what is read whole also runs."""
    path = folder / "m.onnx"

    def read(raw: bytes) -> object:
        path.write_bytes(raw)
        file = File(path, (3, 8, 8))
        x = torch.rand(2, *file.twin.sizes)
        return file.answers(x), file.twin(x.requires_grad_()).sum().backward()

    return read


@pytest.mark.slow
def test_fuzz_anyones_onnx(tmp_path: Path) -> None:
    source, target = anyones(tmp_path / "float.onnx"), tmp_path / "m.onnx"
    data = iter([{"x": np.random.default_rng(0).random((4, 3, 8, 8), np.float32)}])
    quantize_static(source, target, type("", (CalibrationDataReader,), {
        "get_next": lambda _: next(data, None)})())  # fmt: skip
    seeds = [source.read_bytes(), target.read_bytes()]
    fuzz(read_anyones(tmp_path), seeds, tokens=[b"Tile", b"Expand", b"Pad", b"pads", b"\x7f" * 8])


FACTS = Facts(
    ModelConfig("wrn-10-1", 4, weight_bits=4, deployable=True), DataConfig(), TrainConfig(epochs=1),
    4, 1, ("a", "b", "c", "d"), "made", "0" * 16, ({"loss": 1.0},),
)  # fmt: skip


def checkpoint(folder: Path, facts: Facts = FACTS) -> bytes:
    model = network()
    save(folder, Checkpoint(facts, model.state_dict(), {}))
    return (folder / NAME).read_bytes()


def read_checkpoint(folder: Path) -> Read:
    return lambda raw: ((folder / NAME).write_bytes(raw), load_on(folder, torch.device("cpu")))


@pytest.mark.slow
def test_fuzz_checkpoint(tmp_path: Path) -> None:
    """The header alone, behind its length, so that most changes fall into it."""
    whole = checkpoint(tmp_path)
    size = 8 + int.from_bytes(whole[:8], "little")
    read, tokens = read_checkpoint(tmp_path), [b"1e999", b"-1", b"[" * 9999, b"null", b"{}", b'\\"']
    fuzz(read, [whole], seconds=SECONDS / 2)

    def with_header(raw: bytes) -> object:
        return read(len(raw).to_bytes(8, "little") + raw + whole[size:])

    fuzz(with_header, [whole[8:size]], tokens=tokens, seconds=SECONDS / 2)


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("wrn-60004-1", "far fewer"), ("wrn-10-60004", "far fewer"),
        ("vgg-16x4000", "far fewer"), (f"vgg-16x{'9' * 400}", "not ours"),
        ("wrn-16-1", "another architecture"),
    ],
)  # fmt: skip
def test_a_header_builds_no_network_that_the_file_does_not_hold(
    tmp_path: Path, model: str, said: str
) -> None:
    facts = replace(FACTS, model=replace(FACTS.model, model=model))
    raw = checkpoint(tmp_path, facts)
    assert said in (outcome(read_checkpoint(tmp_path), raw) or "")


def bombs() -> Iterator[tuple[str, list[onnx.NodeProto], list[onnx.TensorProto]]]:
    """What small files can ask for between `image` and `logits`."""
    make = helper.make_node
    size = numpy_helper.from_array(np.array([1 << 40]), "size")
    yield "ConstantOfShape", [make("ConstantOfShape", ["size"], ["a"])], [size]
    trip = numpy_helper.from_array(np.array(1 << 62), "trip")
    true = helper.make_tensor_value_info("c", onnx.TensorProto.BOOL, [])
    inner = [helper.make_tensor_value_info("i", onnx.TensorProto.INT64, []), true]
    body = helper.make_graph([make("Identity", ["c"], ["d"])], "b", inner, [
        helper.make_tensor_value_info("d", onnx.TensorProto.BOOL, [])])  # fmt: skip
    yield "Loop", [make("Loop", ["trip", ""], [], body=body)], [trip]
    row = numpy_helper.from_array(np.zeros((1, 30_000), np.float32), "row")
    column = numpy_helper.from_array(np.zeros((30_000, 1), np.float32), "column")
    yield "has the size", [make("Add", ["row", "column"], ["a"])], [row, column]


@pytest.mark.parametrize(("said", "nodes", "constants"), [*bombs()], ids=["size", "loop", "outer"])
def test_an_onnx_file_asks_for_no_more_than_export_writes(
    tmp_path: Path, exported: bytes, said: str, nodes: list[Any], constants: list[Any]
) -> None:
    model = onnx.load_model_from_string(exported)
    model.graph.node.extend(nodes)
    model.graph.initializer.extend(constants)
    assert said in (outcome(read_onnx(tmp_path), model.SerializeToString()) or "")


def test_a_file_of_other_shapes_is_no_traceback() -> None:
    """Its metadata may say that it is the network's."""
    program = lower(network(), (1, 8, 8))
    file = graph(lower(network(width=2), (1, 8, 8)), facts={"format": 1})
    refused(lambda: compared(network(), program, file, tiny_images(8)), "not those of the network")


@pytest.mark.parametrize("name", ["pipe", "/dev/zero"])
def test_a_pipe_in_place_of_a_file(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / "pipe")
    place, folder = tmp_path / name, tmp_path / "x"
    folder.mkdir()
    for link in ("test_batch", "a.png", "train_32x32.mat", NAME):
        (folder / link).symlink_to(place)
    reads: list[Read] = [
        lambda _: load("npz", place), lambda _: load("cifar10", place),
        lambda _: load("svhn", folder), lambda _: load("cifar10", folder, "test"),
        lambda _: load("folder", tmp_path), lambda _: load_on(folder, torch.device("cpu")),
        lambda _: open_model(place),
    ]  # fmt: skip
    for read in reads:
        assert outcome(read, b"")
