"""Does the file compute what was trained? Code for code, and in its answers."""

import importlib.util
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor, fx, nn

from defquant.attacks.access import untouched
from defquant.captured import Captured
from defquant.data import Images, images_of, to_unit
from defquant.deploy.lower import captured
from defquant.deploy.program import Program, rounded, run, steps, value
from defquant.deploy.runtime import OnnxModel, integer_convolutions, tensors
from defquant.records import Score

__all__ = ["AGREEMENT", "FLIPPED", "Parity", "parity"]

AGREEMENT = 0.995
"""Lowest share of images to which file and network give the same answer."""
FLIPPED = 0.01
"""Highest share of activation codes that differ from the network's."""
TIE = 1e-3
"""Distance from a tie, in steps, within which two orders of rounding may disagree."""


@dataclass(frozen=True)
class Parity:
    """How far the file is from the network, and onnxruntime from the integer reference.

    Attributes:
        convolutions: in integers, and all, of the graph that onnxruntime made of the file.
        meant: how many convolutions of codes the program has, which should run in integers.
        agreement: images with the same top class in the file and in the network.
        flipped: share of the network's activation codes that the integer reference has otherwise.
        logit_error: largest difference of a logit, over the standard deviation of the logits.
        mismatches: codes of onnxruntime that the reference, given the same inputs, does not round
            to, ties aside; 0 or something is wrong.
        unoptimised: `agreement` of onnxruntime without graph optimisations.
        openvino: `agreement` of OpenVINO, a second engine; None where it is not installed or
            refuses the file.
        openvino_sums: the same where it must also give out every sum; None where `openvino` holds.
            OpenVINO leaves out the rounding of a convolution's codes in front of a sum that it
            merges with the quantiser behind it, and merges no sum that it must give out.
    """

    convolutions: tuple[int, int]
    meant: int
    agreement: Score
    flipped: float
    logit_error: float
    mismatches: int
    unoptimised: Score
    openvino: Score | None
    openvino_sums: Score | None = None

    @property
    def faults(self) -> dict[str, str]:
        """The bounds that are broken, each by its name with a line that says so."""
        integer, _ = self.convolutions
        floats = f"{self.meant - integer} of {self.meant} convolutions of codes run in float"
        agreement = f"top-1 agreement {self.agreement} is below {AGREEMENT:.1%}"
        flipped = f"{self.flipped:.2%} of the activation codes differ, more than {FLIPPED:.1%}"
        reference = f"{self.mismatches} codes are not those of the integer reference"
        checks = {
            "float": (integer < self.meant, floats),
            "agreement": (self.agreement.accuracy < AGREEMENT, agreement),
            "flipped": (self.flipped > FLIPPED, flipped),
            "reference": (self.mismatches > 0, reference),
        }
        return {name: line for name, (broken, line) in checks.items() if broken}


def parity(
    model: nn.Module,
    program: Program,
    file: onnx.ModelProto,
    images: Tensor | Images,
    *,
    deep: int = 128,
    batch_size: int = 256,
) -> Parity:
    """Compare the trained `model`, its `program` and the exported `file` on `images`.

    Answers are compared on all images; codes, and the slower engines, on the first `deep` of them.
    """
    pixels = images_of(images)
    some = to_unit(pixels[:deep]).cpu()
    trained = _logits(model, pixels, batch_size)
    shipped = _logits(OnnxModel(file), pixels, batch_size)
    plain = _logits(OnnxModel(file, optimise=False), pixels[:deep], batch_size)
    second, sums = _second(file, some, trained[:deep])
    return Parity(
        integer_convolutions(file),
        len(program.convolutions),
        _agreement(shipped, trained),
        _flipped(captured(model, some), program, some, batch_size),
        float((shipped - trained).abs().max() / trained.std().clamp_min(1e-12)),
        _mismatches(program, file, some),
        _agreement(plain, trained[:deep]),
        second,
        sums,
    )


def _logits(model: nn.Module, images: Tensor, batch_size: int) -> Tensor:
    parameter = next(model.parameters(), None)
    device = torch.device("cpu") if parameter is None else parameter.device
    with untouched(model), torch.no_grad():
        parts = [model(to_unit(part.to(device))).cpu() for part in images.split(batch_size)]
    return torch.cat(parts).float()


def _agreement(one: Tensor, other: Tensor) -> Score:
    return Score.of(one.argmax(1) == other.argmax(1))


def _flipped(seen: Captured, program: Program, x: Tensor, batch_size: int) -> float:
    """Share of activation codes in which `program` differs from the captured network."""
    kept: dict[str, list[Tensor]] = {name: [] for name in program.activations}

    def keep(node: fx.Node, value: Any) -> None:
        if node.name in kept:
            kept[node.name].append(value)

    for part in x.split(batch_size):
        seen.values(part, keep)
    codes = run(program, x)
    differing = seen_codes = 0
    for name, parts in kept.items():
        grid = program.grids[name]
        wanted = rounded(grid, torch.cat(parts) / grid.scale)
        differing += int((codes[name] != wanted).sum())
        seen_codes += wanted.numel()
    return differing / seen_codes if seen_codes else 0.0


def _mismatches(program: Program, file: onnx.ModelProto, x: Tensor) -> int:
    """Codes of onnxruntime away from those of the reference by more than a tie can explain.

    The reference is given onnxruntime's own codes at each operation, so that one difference counts
    once and not in all that follows.
    """
    names = [op.name for op in program.ops if op.name in program.grids]
    found = tensors(file, names, OnnxModel(file).fed(x))
    known, wrong = {"image": x}, 0
    for op in program.ops:
        if op.name not in program.grids:
            known[op.name] = value(program, op, known)
            continue
        codes = torch.from_numpy(found[op.name])
        grid, exact = program.grids[op.name], steps(program, op, known)
        low, high = (rounded(grid, exact + shift) for shift in (-TIE, TIE))
        wrong += int(((codes < low) | (codes > high)).sum())
        known[op.name] = codes
    return wrong


def _second(file: onnx.ModelProto, x: Tensor, wanted: Tensor) -> tuple[Score | None, Score | None]:
    """`openvino` and `openvino_sums`."""
    answers = _openvino(file, x)
    found = None if answers is None else _agreement(answers, wanted)
    if found is None or found.accuracy >= AGREEMENT:
        return found, None
    answers = _openvino(file, x, sums=True)
    return found, None if answers is None else _agreement(answers, wanted)


def _openvino(file: onnx.ModelProto, x: Tensor, *, sums: bool = False) -> Tensor | None:
    """Logits of OpenVINO's CPU engine; None where it is not installed or refuses the file.

    `sums`: with every sum as one more output.
    """
    if importlib.util.find_spec("openvino") is None:
        return None
    import io

    import openvino

    core = openvino.Core()
    try:
        model = core.read_model(io.BytesIO(file.SerializeToString()))
        model.reshape(list(x.shape))  # of an open batch it can give all channels the first's bias
        if sums:
            model.add_outputs([n.output[0] for n in file.graph.node if n.op_type == "Add"])
        # its default on processors with bfloat16 is bfloat16: then it answers otherwise than itself
        compiled = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        return torch.from_numpy(np.array(compiled(OnnxModel(file).fed(x))["logits"]))
    except RuntimeError:  # also at the first images, where ONEDNN_MAX_CPU_ISA forbids its kernels
        return None
