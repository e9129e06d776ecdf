"""Run an exported file with onnxruntime, as a module like any other, and read what it became."""

import json
import math
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
from numpy.typing import NDArray
from onnx import helper
from torch import Tensor, nn

from defquant.deploy.graph import METADATA, OPERATORS
from defquant.errors import UserError, shown
from defquant.files import read_bytes

__all__ = ["OnnxModel", "facts_of", "integer_convolutions", "open_model", "session"]

_QUIET = 3
_LARGEST = 1 << 24
"""Elements of a tensor, for one image."""
_INTEGER = ("QLinearConv",)
_FLOAT = ("Conv", "FusedConv", "NhwcFusedConv", "ConvInteger")


def open_model(path: Path) -> onnx.ModelProto:
    """The file at `path`, which `defquant export` may have written: it may come from anywhere.

    Raises `UserError` where it is missing, cut, no ONNX model, or has what `graph` never writes:
    loops and other operators, values in other files, tensors of no or of enormous size.
    """
    try:
        model = onnx.load_model_from_string(read_bytes(path))
        strange = sorted({node.op_type for node in model.graph.node} - OPERATORS)
        if model.functions or strange:
            found = (strange or ["functions"])[0]
            raise UserError(f"{path} was not made by `defquant export`: it has {shown(found)!r}")
        onnx.checker.check_model(model)
        _check_sizes(model)
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"no file {path}") from None
    except Exception as error:  # protobuf, checker and file system each have their own
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"{path} is not a whole ONNX model ({shown(reason, 200)})") from None
    return model


def _check_sizes(model: onnx.ModelProto) -> None:
    """Raise `ValueError` unless images make tensors of bearable sizes, in proportion to them."""
    body = model.graph
    ends = [list(t.type.tensor_type.shape.dim) for t in (*body.input, *body.output)]
    if [len(dims) for dims in ends] != [4, 2] or any(dims[0].dim_value for dims in ends):
        raise ValueError("it must take a batch of images and give a batch of logits")
    far = any(tensor.data_location == onnx.TensorProto.EXTERNAL for tensor in body.initializer)
    if far or body.sparse_initializer:
        raise ValueError("it keeps values in another file, or sparse ones")
    one, two = (_sizes(model, batch) for batch in (1, 2))
    for name in (name for node in body.node for name in node.output):
        size, of_two = (math.prod(known.get(name, [0])) for known in (one, two))
        if not 0 < size <= _LARGEST or not 0 < of_two <= 2 * size:
            raise ValueError(f"tensor {name!r} has the size {one.get(name)}")
    if math.prod(dim.dim_value for dim in ends[0][1:]) > _LARGEST:
        raise ValueError("it takes enormous images")


def _sizes(model: onnx.ModelProto, batch: int) -> dict[str, list[int]]:
    """Of every tensor that a node gives for so many images; 0 for a dimension not known."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    del copy.graph.value_info[:]
    for end in (*copy.graph.input, *copy.graph.output):
        end.type.tensor_type.shape.dim[0].dim_value = batch
    for node in copy.graph.node:
        if node.op_type == "GroupNormalization":  # of which onnx infers no size
            node.CopyFrom(helper.make_node("Identity", node.input[:1], node.output))
    body = onnx.shape_inference.infer_shapes(copy, strict_mode=True, data_prop=True).graph
    ends = (t for t in (*body.value_info, *body.output) if t.type.tensor_type.HasField("shape"))
    return {t.name: [dim.dim_value for dim in t.type.tensor_type.shape.dim] for t in ends}


def facts_of(model: onnx.ModelProto, path: Path) -> dict[str, Any]:
    """What `defquant export` wrote into the file. Raises `UserError` where there is nothing."""
    text = {p.key: p.value for p in model.metadata_props}.get(METADATA)
    try:
        facts = json.loads(text) if text else None
    except (ValueError, RecursionError):
        facts = None
    if not isinstance(facts, dict) or "format" not in facts:
        raise UserError(f"{path} was not made by `defquant export`: its metadata lack `{METADATA}`")
    return facts


def session(
    model: onnx.ModelProto | Path,
    *,
    threads: int = 0,
    optimise: bool = True,
    saved: Path | None = None,
) -> ort.InferenceSession:
    """An onnxruntime session on the CPU.

    Args:
        model: the file or the model.
        threads: of one operation; 0 for as many as cores.
        optimise: False turns every graph optimisation off, so that all runs in float.
        saved: where to write the optimised graph.

    Raises:
        UserError: onnxruntime refuses the model.
    """
    options = ort.SessionOptions()
    options.log_severity_level = _QUIET
    options.intra_op_num_threads = threads
    level = ort.GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_ENABLE_ALL if optimise else level.ORT_DISABLE_ALL
    if saved is not None:
        options.optimized_model_filepath = str(saved)
    source = str(model) if isinstance(model, Path) else model.SerializeToString()
    try:
        return ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"onnxruntime cannot run {_name(model)}: {reason}") from None


def integer_convolutions(model: onnx.ModelProto | Path) -> tuple[int, int]:
    """How many convolutions onnxruntime runs in integers, of how many: its optimised graph."""
    with tempfile.TemporaryDirectory() as folder:
        saved = Path(folder) / "optimised.onnx"
        session(model, saved=saved)
        kinds = Counter(node.op_type for node in onnx.load(saved).graph.node)
    integer = sum(kinds[kind] for kind in _INTEGER)
    return integer, integer + sum(kinds[kind] for kind in _FLOAT)


def tensors(
    model: onnx.ModelProto, names: Sequence[str], images: NDArray[Any], *, optimise: bool = True
) -> Mapping[str, NDArray[Any]]:
    """The tensors `names` of the graph, which are made outputs of a copy, for `images`."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    known = {output.name for output in copy.graph.output}
    for name in names:
        if name not in known:
            copy.graph.output.append(helper.make_empty_tensor_value_info(name))
    run = session(copy, optimise=optimise)
    feed = {run.get_inputs()[0].name: images}
    return dict(zip(names, run.run(list(names), feed), strict=True))


class OnnxModel(nn.Module):
    """An ONNX file as a module: images in [0, 1] to logits, on the CPU, without gradients.

    It holds no parameters, so that attacks that need no gradient, and all scores, take it as it is.
    Raises `UserError` for another shape than the file's.
    """

    def __init__(self, model: onnx.ModelProto | Path, *, threads: int = 0, optimise: bool = True):
        super().__init__()
        self.session = session(model, threads=threads, optimise=optimise)
        self.input = self.session.get_inputs()[0]
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        wanted = self.input.shape[1:]
        if list(x.shape[1:]) != list(wanted):
            raise UserError(f"the model takes images {wanted}; found {list(x.shape[1:])}")
        try:
            return torch.from_numpy(self.session.run(None, {self.input.name: self.fed(x)})[0])
        except Exception as error:  # onnxruntime has a class for each kind of failure
            raise UserError(f"onnxruntime cannot run the model: {shown(str(error), 200)}") from None

    def fed(self, x: Tensor) -> NDArray[Any]:
        """`x` as the file wants it: float32, or pixels as uint8."""
        if self.input.type == "tensor(uint8)":
            return x.detach().mul(255).round().to(torch.uint8).cpu().numpy()
        return np.ascontiguousarray(x.detach().float().cpu().numpy())


def _name(model: onnx.ModelProto | Path) -> str:
    return str(model) if isinstance(model, Path) else "the model"
