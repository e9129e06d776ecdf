"""The nodes and constants of an ONNX file from anywhere: functions inlined, sizes bounded."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx
import torch
from onnx import AttributeProto, TensorProto, helper, numpy_helper
from torch import Tensor

from defquant.errors import UserError, shown
from defquant.files import opened, read_bytes
from defquant.judging.operators import OPERATORS
from defquant.judging.quantized import QUANTIZED
from defquant.judging.shapes import Step

__all__ = ["FLOATS", "LARGEST", "TABLE", "Nodes", "blamed", "read_nodes"]

TABLE = OPERATORS | QUANTIZED
LARGEST = 1 << 28
"""Numbers in all constants together, and in all that the nodes make of an image."""
_STEPS, _NESTED = 20_000, 16
_DOMAINS = ("", "ai.onnx", "com.microsoft")
_OLDEST = 7
_SMALL: dict[int, tuple[int, int]] = {TensorProto.UINT4: (0, 15), TensorProto.INT4: (-8, 7)}
_HALVES = (TensorProto.FLOAT16, TensorProto.BFLOAT16)
FLOATS = (TensorProto.FLOAT, TensorProto.DOUBLE, *_HALVES)
_WHOLES = {
    TensorProto.BOOL, TensorProto.UINT8, TensorProto.INT8, TensorProto.UINT16, TensorProto.INT16,
    TensorProto.INT32, TensorProto.INT64, *_SMALL,
}  # fmt: skip
Functions = Mapping[tuple[str, str], onnx.FunctionProto]


@dataclass
class Nodes:
    """A file as steps in order, constants by name, and what it takes and gives.

    Attributes:
        small: ranges of the constants whose types torch has not.
        size: numbers in all constants.
        seen: nodes so far, calls of functions among them.
    """

    path: Path
    inputs: list[onnx.ValueInfoProto]
    outputs: list[str]
    steps: list[Step] = field(default_factory=list)
    constants: dict[str, Tensor] = field(default_factory=dict)
    small: dict[str, tuple[int, int]] = field(default_factory=dict)
    size: int = 0
    seen: int = 0

    def constant(self, name: str, tensor: TensorProto) -> None:
        """Raises `ValueError` for more than `LARGEST` numbers, strings, and what is not there."""
        self.constants[name] = self.tensor(tensor)
        if tensor.data_type in _SMALL:
            self.small[name] = _SMALL[tensor.data_type]

    def tensor(self, tensor: TensorProto) -> Tensor:
        size = 1
        for dim in tensor.dims:
            size *= dim
            if dim < 0 or size > LARGEST:
                break
        self.size += max(size, 0)
        if size < 0 or self.size > LARGEST:
            raise ValueError(f"constants of more than {LARGEST:,} numbers: {list(tensor.dims)[:8]}")
        kind = tensor.data_type
        if kind not in _WHOLES and kind not in FLOATS:
            known = kind in TensorProto.DataType.values()
            name = TensorProto.DataType.Name(kind) if known else str(kind)
            raise ValueError(f"constants of type {name} are not read")
        if tensor.data_location == TensorProto.EXTERNAL:
            tensor = _brought(tensor, self.path.parent)
        array = numpy_helper.to_array(tensor)
        if kind in _SMALL:
            array = array.astype("int8")
        if kind in _HALVES:
            array = array.astype("float32")
        return torch.from_numpy(array.copy())


def _brought(tensor: TensorProto, folder: Path) -> TensorProto:
    """`tensor` with its bytes, which lie in a file of the same folder."""
    where = {entry.key: entry.value for entry in tensor.external_data}
    path = folder / where.get("location", "")
    if not path.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"values in {shown(where.get('location', ''))!r}, outside its folder")
    with opened(path) as file:
        file.seek(int(where.get("offset", 0)))
        content = file.read(int(where.get("length", 8 * LARGEST)))
    return TensorProto(data_type=tensor.data_type, dims=tensor.dims, raw_data=content)


def read_nodes(path: Path) -> Nodes:
    """Raises `UserError` for a file that is none, or holds what is not read."""
    try:
        model = onnx.load_model_from_string(read_bytes(path))
        if not model.graph.node:  # as an empty file has none
            raise ValueError("it has no nodes")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    except Exception as error:  # of protobuf, which has several
        raise UserError(f"{path} is not a whole ONNX model ({shown(str(error), 200)})") from None
    with blamed(str(path)):
        graph = model.graph
        stored = {tensor.name for tensor in graph.initializer}
        if graph.sparse_initializer:
            raise ValueError("sparse constants are not read")
        inputs = [value for value in graph.input if value.name not in stored]
        nodes = Nodes(path, inputs, [value.name for value in graph.output])
        for tensor in graph.initializer:
            nodes.constant(tensor.name, tensor)
        functions = {(f.domain, f.name): f for f in model.functions}
        _inline(nodes, graph.node, _Place(_versions(model.opset_import), functions))
    return nodes


@contextmanager
def blamed(what: str) -> Iterator[None]:
    """Whatever a strange file makes torch, numpy and protobuf raise, as one line about `what`."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        said = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{what}: {shown(said, 200)}") from None


def _versions(imports: Any, default: int = 1) -> dict[str, int]:
    versions = {entry.domain: int(entry.version) for entry in imports}
    version = versions.setdefault("", versions.get("ai.onnx", default))
    if not _OLDEST <= version <= onnx.defs.onnx_opset_version():
        newest = onnx.defs.onnx_opset_version()
        raise ValueError(f"operator sets {_OLDEST} to {newest} are read; found {version}")
    return versions


@dataclass(frozen=True)
class _Place:
    """Where nodes stand: the graph, or a function, called with names and attributes."""

    versions: Mapping[str, int]
    functions: Functions
    names: Mapping[str, str] | None = None
    attributes: Mapping[str, AttributeProto] = field(default_factory=dict)
    prefix: str = ""
    depth: int = 0

    def named(self, name: str) -> str:
        if self.names is None or not name:
            return name
        return self.names.get(name, f"{self.prefix}/{name}")

    def attribute(self, given: AttributeProto) -> AttributeProto | None:
        return self.attributes.get(given.ref_attr_name) if given.ref_attr_name else given


def _inline(nodes: Nodes, graph: Any, place: _Place) -> None:
    """Add the nodes of `graph` as steps, those of functions in the place of their calls."""
    for number, node in enumerate(graph):
        inputs = tuple(map(place.named, node.input))
        outputs = tuple(map(place.named, node.output))
        name = node.name or next(iter(outputs), f"number {number}")
        given = {a.name: found for a in node.attribute if (found := place.attribute(a)) is not None}
        with blamed(f"{nodes.path}: node {shown(name)!r} ({shown(node.op_type)})"):
            nodes.seen += 1
            if nodes.seen > _STEPS:
                raise ValueError(f"the file has more than {_STEPS:,} nodes")
            function = place.functions.get((node.domain, node.op_type))
            if function is not None:
                _inline(
                    nodes, function.node, _called(function, inputs, outputs, given, place, number)
                )
                continue
            if node.op_type == "Constant":
                _constant(nodes, outputs[0], given)
                continue
            if node.domain not in _DOMAINS or node.op_type not in TABLE:
                where = f" of {shown(node.domain)}" if node.domain not in _DOMAINS else ""
                raise ValueError(f"the operator {shown(node.op_type)}{where} is not read")
            attributes = {key: _attribute(nodes, value) for key, value in given.items()}
            version = place.versions.get("" if node.domain == "ai.onnx" else node.domain, 1)
            if node.domain == "com.microsoft":
                version = max(place.versions[""], 13)
            nodes.steps.append(Step(node.op_type, name, inputs, outputs, attributes, version))


def _called(
    function: onnx.FunctionProto, inputs: tuple[str, ...], outputs: tuple[str, ...],
    given: Mapping[str, AttributeProto], place: _Place, number: int,
) -> _Place:  # fmt: skip
    if place.depth == _NESTED:
        raise ValueError(f"functions call each other more than {_NESTED} deep")
    names = dict.fromkeys(function.input, "")
    names |= dict(zip(function.input, inputs, strict=False))
    names |= dict(zip(function.output, outputs, strict=False))
    attributes = {a.name: a for a in function.attribute_proto} | dict(given)
    prefix = f"{place.prefix}/{function.name}.{number}"
    versions = _versions(function.opset_import, place.versions[""])
    return _Place(versions, place.functions, names, attributes, prefix, place.depth + 1)


def _attribute(nodes: Nodes, attribute: AttributeProto) -> Any:
    if attribute.type in (AttributeProto.GRAPH, AttributeProto.GRAPHS):
        raise ValueError("graphs inside nodes are not read")
    if attribute.type == AttributeProto.TENSOR:
        return nodes.tensor(attribute.t)
    value = helper.get_attribute_value(attribute)
    if isinstance(value, bytes):
        return value.decode()
    return list(value) if attribute.type in (AttributeProto.INTS, AttributeProto.FLOATS) else value


def _constant(nodes: Nodes, name: str, given: Mapping[str, AttributeProto]) -> None:
    ((key, attribute),) = given.items()
    if key == "value":
        nodes.constant(name, attribute.t)
    elif key in ("value_float", "value_floats", "value_int", "value_ints"):
        kind = torch.float32 if "float" in key else torch.int64
        nodes.constants[name] = torch.tensor(_attribute(nodes, attribute), dtype=kind)
    else:
        raise ValueError(f"a constant given as {shown(key)} is not read")
