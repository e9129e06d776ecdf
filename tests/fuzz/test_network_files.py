"""Checkpoints and ONNX files from elsewhere: mutated ones, and what once did harm."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper
from torch import nn

from defquant.deploy.graph import graph
from defquant.deploy.lower import lower
from defquant.deploy.runtime import OnnxModel, facts_of, open_model
from defquant.models import wide_resnet
from harness import Read, fuzz, outcome


def network() -> nn.Module:
    torch.manual_seed(0)
    options: dict[str, Any] = {"weight_bits": 4, "deployable": True, "num_classes": 4}
    model = wide_resnet(10, 1, bits=4, in_channels=1, **options)
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
        file = open_model(path)
        facts_of(file, path)
        return OnnxModel(file, threads=1)(torch.zeros(2, 1, 8, 8))

    return read


@pytest.mark.slow
def test_fuzz_onnx(tmp_path: Path, exported: bytes) -> None:
    fuzz(read_onnx(tmp_path), [exported])


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
    tmp_path: Path,
    exported: bytes,
    said: str,
    nodes: list[onnx.NodeProto],
    constants: list[onnx.TensorProto],
) -> None:
    model = onnx.load_model_from_string(exported)
    model.graph.node.extend(nodes)
    model.graph.initializer.extend(constants)
    assert said in (outcome(read_onnx(tmp_path), model.SerializeToString()) or "")
