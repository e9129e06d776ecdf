"""Export a run, check the file, attack it, and say what it costs: one JSON card beside it."""

import hashlib
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, is_dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor, nn

from defquant.attacks import Composition, Single, Square
from defquant.attacks.contract import Target, right
from defquant.attacks.contract import attacked as made
from defquant.captured import Captured, capture
from defquant.checkpoint import Facts, versions
from defquant.data import Dataset, Images, images_of, to_unit
from defquant.deploy.cost import latencies, static_cost
from defquant.deploy.graph import Input, graph
from defquant.deploy.lower import calibrate, lower
from defquant.deploy.parity import Parity, parity
from defquant.deploy.program import Program
from defquant.deploy.runtime import OnnxModel, facts_of, integer_convolutions, open_model
from defquant.errors import UserError, shown
from defquant.evaluate import correct, device_of, robust_accuracy
from defquant.files import write_bytes
from defquant.measure import Subject
from defquant.records import Score

__all__ = [
    "CALIBRATION", "FORMAT", "SIDES", "Origin", "attacked", "card_of", "compared", "cost", "digest",
    "export_onnx", "exported", "read", "replayed",
]  # fmt: skip

FORMAT = 3
CALIBRATION = 512
"""Training images on which the ranges of branch outputs are measured where they are not trained."""
SIDES = "trained", "deployed", "reference"
NEAR = 0.8
"""Largest mean error of a file's first logits, over their spread: another file's have 1.1."""


@dataclass(frozen=True)
class Origin:
    """What is exported, as the card and the file name it.

    Attributes:
        name: of the run's folder, or `my.py:make`.
        known: `method`, `model`, `bits`, and `beta` and `seed` of a run.
        classes: their names.
        channels: of an image.
        weight_bits: that it was trained with.
        trained: to be deployed, so that the file's codes must be the network's.
    """

    name: str
    known: Mapping[str, Any]
    classes: tuple[str, ...]
    channels: int
    weight_bits: int | None = None
    trained: bool = False

    @staticmethod
    def of_run(run: Path, facts: Facts) -> "Origin":
        known = {
            "method": facts.method, "model": facts.model.model, "bits": facts.model.bits,
            "beta": facts.train.beta, "seed": facts.train.seed,
        }  # fmt: skip
        bits = facts.model.weight_bits
        whole = facts.model.deployable and bits is not None
        return Origin(run.name, known, facts.classes, facts.in_channels, bits, whole)

    @staticmethod
    def of_model(subject: Subject, data: Dataset) -> "Origin":
        """A model of the user's own, of these data."""
        keys = ("method", "model", "bits", "beta", "seed", "evidence")
        known = {key: getattr(subject, key) for key in keys}
        return Origin(str(subject.model), known, tuple(data.classes), data.images.shape[1])


def export_onnx(
    model: nn.Module,
    path: Path | str,
    images: Tensor | Images,
    *,
    weight_bits: int = 8,
    input_type: Input = "float",
    facts: Mapping[str, Any] | None = None,
    allow_float: bool = False,
    strict: bool = False,
) -> tuple[Program, onnx.ModelProto]:
    """Write `model` to `path` as an ONNX file of opset 21 with a dynamic batch.

    Every convolution of quantised values runs in integers in onnxruntime; the optimised graph is
    read back to see that. The file has answered the first images like the network before it is
    written.

    Args:
        model: any that `capture` can follow; left as it was found.
        path: of the file, which is written whole or not at all.
        images: (n, c, h, w), uint8 or float in [0, 1], or data, of which the first 512 are taken:
            their shape is that of the input, and they calibrate what the model does not quantise
            itself (`calibrate`).
        weight_bits: of layers without bits of their own: 8, 4 or 2.
        input_type: `float`, images in [0, 1], or `uint8`, pixels.
        facts: kept in the file as JSON, `classes` among them for people.
        allow_float: accept a file of which this onnxruntime runs some convolutions in float.
        strict: accept no convolution that reads what is not quantised, and thus stays in float.

    Raises:
        UserError: what has no form in a file, named; convolutions that run in float; answers that
            are not the network's.
    """
    images = to_unit(images_of(images, CALIBRATION))
    shape = int(images.shape[1]), int(images.shape[2]), int(images.shape[3])
    seen = capture(model, images[:1])
    peaks = calibrate(seen, images)
    program = lower(seen, shape, peaks=peaks, weight_bits=weight_bits)
    if strict and program.float_convolutions:
        named = ", ".join(map(repr, program.float_convolutions[:3]))
        raise UserError(
            f"{len(program.float_convolutions)} convolutions stay in float, as what they read is "
            f"not quantised ({named}): quantise it, or leave out --strict"
        )
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
    _check_answers(seen, file, images[:64])
    write_bytes(Path(path), file.SerializeToString())
    return program, file


def _check_answers(seen: Captured, file: onnx.ModelProto, images: Tensor) -> None:
    wanted, found = seen.values(images), OnnxModel(file)(images)
    away = float((found - wanted).abs().mean() / wanted.std().clamp_min(1e-6))
    if not away < NEAR:
        raise UserError(
            f"the file would not answer as {seen.model} does: its logits are {away:.2g} of their "
            "spread away; more bits, or more of the network quantised in training, bring it nearer"
        )


def digest(program: Program) -> str:
    """16 hex digits of SHA-256 over everything that the program computes with."""
    found = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, np.ndarray):
            found.update(repr((value.shape, str(value.dtype))).encode() + value.tobytes())
        elif is_dataclass(value):
            found.update(type(value).__name__.encode())
            add(tuple(vars(value).values()))
        elif isinstance(value, tuple):
            found.update(b"(")
            for part in value:
                add(part)
        else:
            found.update(repr(value).encode())

    add((program.shape, tuple(sorted(program.grids.items())), program.ops))
    return found.hexdigest()[:16]


def exported(
    model: nn.Module,
    origin: Origin,
    train: Dataset,
    path: Path,
    *,
    weight_bits: int = 8,
    **options: Any,
) -> tuple[Program, onnx.ModelProto]:
    """`export_onnx`, calibrated on training images where it must be."""
    known = {
        "classes": origin.classes,
        "bits": origin.known["bits"],
        "model": origin.known["model"],
    }
    return export_onnx(
        model, path, to_unit(train.images[:CALIBRATION]), facts=known,
        weight_bits=origin.weight_bits or weight_bits, **options,
    )  # fmt: skip


def read(path: Path, model: nn.Module, origin: Origin) -> tuple[Program, onnx.ModelProto]:
    """The file at `path` and the program of `model`, which it must hold.

    Raises `UserError` for a file that is cut, another program's, or of another network.
    """
    file = open_model(path)
    known = facts_of(file, path)
    if known["format"] != FORMAT:
        raise UserError(f"{path} was written by another version of defquant: export it again")
    if known.get("bits") != origin.known["bits"]:
        both = known.get("bits"), origin.known["bits"]
        its, own = (f"{bits}-bit" if bits else "full-precision" for bits in both)
        raise UserError(f"{path} has {its} activations, {origin.name} {own} ones")
    dims = file.graph.input[0].type.tensor_type.shape.dim[1:]
    if dims[0].dim_value != origin.channels:
        raise UserError(
            f"{path} takes images of {dims[0].dim_value} channels, {origin.name} of "
            f"{origin.channels}"
        )
    given = file.graph.output[0].type.tensor_type.shape.dim[1].dim_value
    if given != len(origin.classes):
        raise UserError(f"{path} gives {given} logits, {origin.name} {len(origin.classes)}")
    shape = dims[0].dim_value, dims[1].dim_value, dims[2].dim_value
    try:
        program = lower(model, shape, peaks=known["peaks"], weight_bits=known["weight_bits"])
        if digest(program) == known["digest"]:
            return program, file
    except (UserError, KeyError, TypeError):
        pass  # ranges that the network does not ask for, or lacks: it is another one's file
    raise UserError(f"{path} was exported from another network than {origin.name}")


def compared(model: nn.Module, program: Program, file: onnx.ModelProto, images: Dataset) -> Parity:
    """`parity` of the file and the network; `UserError` for a file of tensors of other shapes."""
    try:
        return parity(model, program, file, images)
    except (RuntimeError, IndexError) as error:
        raise UserError(
            f"the file's tensors are not those of the network ({shown(str(error), 200)}): export "
            "it again"
        ) from None


def card_of(
    origin: Origin,
    path: Path,
    file: onnx.ModelProto,
    program: Program,
    data: Dataset,
    found: Parity,
) -> dict[str, Any]:
    """Which network, from where, in which file, and how near to it."""
    known = facts_of(file, path)
    floats = file.graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.FLOAT
    engines = {name: version(name) for name in ("onnx", "onnxruntime")}
    return {
        "format": 1, "kind": "defquant deployed model", "run": origin.name, **origin.known,
        "weight_bits": known["weight_bits"], "data": data.name,
        "fingerprint": data.fingerprint, "file": path.name,
        "input": "float" if floats else "uint8",
        "calibrated": CALIBRATION if known["peaks"] else None,
        "versions": versions(torch.device("cpu")) | engines,
        "command": shlex.join(["defquant", *sys.argv[1:]]),
        "convolutions": list(found.convolutions), "floats": program.floats,
        "parity": {
            "images": found.agreement.total, "agreement": found.agreement.accuracy,
            "flipped_codes": found.flipped, "logit_error": found.logit_error,
            "reference_mismatches": found.mismatches,
            "unoptimised_agreement": found.unoptimised.accuracy,
            "openvino_agreement": found.openvino and found.openvino.accuracy,
        },
    }  # fmt: skip


def attacked(
    model: nn.Module,
    file: onnx.ModelProto,
    images: Dataset,
    attacks: Sequence[Single | Composition],
    queries: int,
    few: int,
    reference: nn.Module | None = None,
    *,
    seed: int = 0,
) -> Iterator[dict[str, Any]]:
    """Scores of the trained network and of the file, side by side, as the card holds them.

    Clean; each of `attacks`, made on `model`, rounded to 8 bits and shown to both; and `Square`,
    which needs answers alone, on the first `few` images of each directly, at each eps. Beside them
    those of a `reference`, under the same attacks made on itself.
    """
    deployed = OnnxModel(file)
    networks = [model, deployed, *([] if reference is None else [reference])]
    both = [correct(network, images) for network in networks]
    yield _scores("clean", 0.0, "clean", *(Score.of(s) for s in both))
    for attack in attacks:
        scores = replayed(model, deployed, images, attack, seed=seed)
        if reference is not None:
            scores += replayed(reference, reference, images, attack, seed=seed)[:1]
        yield _scores(attack.name, attack.eps, repr(attack), *scores)
    for eps in sorted({attack.eps for attack in attacks}) if queries else ():
        square, some = Square(eps, queries=queries), images.first(min(few, len(images)))
        found = [robust_accuracy(network, some, square, seed=seed) for network in networks]
        yield _scores(square.name, eps, repr(square), *found)


def replayed(
    trained: nn.Module,
    deployed: nn.Module,
    images: Dataset,
    attack: Single | Composition,
    *,
    seed: int = 0,
    batch_size: int = 256,
) -> tuple[Score, ...]:
    """Robust accuracy of both networks against images that `attack` makes on `trained`.

    The best iterate of every example, rounded to 8 bits inside its ball (`to_pixels`), is shown to
    both; an example counts where the network is right on it and on its clean image. Both scores are
    of the same images, so they differ only where the two networks do.
    """
    networks = trained, deployed
    standing = [correct(network, images, batch_size=batch_size) for network in networks]
    there = images.to(device_of(trained, images.images.device))
    target = Target(trained, there.images, there.labels, seed, batch_size)
    for ids, adversarial in made(partial(attack.eight_bit, trained, seed=seed), target):
        for network, stands in zip(networks, standing, strict=True):
            found = right(network, adversarial, there.labels[ids])
            stands[ids.to(stands.device)] &= found.to(stands.device)
    return tuple(map(Score.of, standing))


def cost(
    model: nn.Module, program: Program, file: onnx.ModelProto, *, repeats: int, threads: int
) -> dict[str, Any]:
    """The cost card: sizes, operations, memory, and the latency where `repeats` > 0."""
    single = graph(program, integers=False)
    card = static_cost(program, file_bytes=file.ByteSize(), float_file_bytes=single.ByteSize())
    if repeats:
        card["latency"] = latencies(
            model, file, single, program.shape, repeats=repeats, threads=threads
        )
    return card


def _scores(name: str, eps: float, settings: str, *scores: Score) -> dict[str, Any]:
    counts = {side: list(astuple(score)) for side, score in zip(SIDES, scores, strict=False)}
    return {"attack": name, "eps": eps, "settings": settings, **counts}
