"""A trained network into an ONNX file that runs in integers, or an error that says why not."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx
from torch import Tensor, nn

from defquant.deploy.calibrate import calibrate
from defquant.deploy.graph import Input, graph
from defquant.deploy.lower import lower
from defquant.deploy.program import Conv, Linear, Program
from defquant.deploy.runtime import integer_convolutions
from defquant.errors import UserError
from defquant.files import write_bytes

__all__ = ["FORMAT", "digest", "export_onnx"]

FORMAT = 1


def export_onnx(
    model: nn.Module,
    path: Path | str,
    images: Tensor,
    *,
    weight_bits: int = 8,
    input_type: Input = "float",
    facts: Mapping[str, Any] | None = None,
    allow_float: bool = False,
) -> tuple[Program, onnx.ModelProto]:
    """Write `model` to `path` as an ONNX file of opset 21 with a dynamic batch.

    Every convolution runs in integers in onnxruntime; the optimised graph is read back to see that.

    Args:
        model: as `lower` takes it; left as it was found.
        path: of the file, which is written whole or not at all.
        images: float in [0, 1], (n, c, h, w): their shape is that of the input, and they calibrate
            what the model does not quantise itself (`calibrate`).
        weight_bits: of layers without bits of their own: 8, 4 or 2.
        input_type: `float`, images in [0, 1], or `uint8`, pixels.
        facts: kept in the file as JSON, `classes` among them for people.
        allow_float: accept a file of which some convolutions run in float.

    Raises:
        UserError: a layer without an integer form, named; convolutions that run in float.
    """
    peaks = calibrate(model, images)
    shape = int(images.shape[1]), int(images.shape[2]), int(images.shape[3])
    program = lower(model, shape, peaks=peaks, weight_bits=weight_bits)
    known = {
        **(facts or {}), "format": FORMAT, "digest": digest(program), "peaks": peaks,
        "weight_bits": weight_bits,
    }  # fmt: skip
    file = graph(program, input_type=input_type, facts=known)
    integer, convolutions = integer_convolutions(file)
    if integer < len(program.convolutions) and not allow_float:
        raise UserError(
            f"only {integer} of {convolutions} convolutions run in integers in this onnxruntime: "
            "accept that with --allow-float"
        )
    write_bytes(Path(path), file.SerializeToString())
    return program, file


def digest(program: Program) -> str:
    """16 hex digits of SHA-256 over everything that the program computes with."""
    found = hashlib.sha256(repr((program.shape, sorted(program.grids.items()))).encode())
    for op in program.ops:
        plain = {k: v for k, v in vars(op).items() if not hasattr(v, "tobytes") and k != "weight"}
        found.update(repr((type(op).__name__, sorted(plain.items()))).encode())
        arrays = [v for v in vars(op).values() if hasattr(v, "tobytes")]
        if isinstance(op, Conv | Linear):
            found.update(repr((op.weight.bits, op.weight.multiple)).encode())
            arrays += [op.weight.integers, op.weight.scale]
        for array in arrays:
            found.update(array.tobytes())
    return found.hexdigest()[:16]
