"""Export a run, check the file, attack it, and say what it costs: one JSON card beside it."""

import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import nn

from defquant.attacks import Single, Square
from defquant.checkpoint import Facts, versions
from defquant.data import Dataset, to_unit
from defquant.deploy.cost import latencies, rows, static_cost
from defquant.deploy.export import digest, export_onnx
from defquant.deploy.graph import Input, graph
from defquant.deploy.lower import lower
from defquant.deploy.parity import Parity, parity
from defquant.deploy.program import Program
from defquant.deploy.robustness import replayed
from defquant.deploy.runtime import OnnxModel, facts_of, open_model
from defquant.errors import UserError, shown
from defquant.evaluate import correct, robust_accuracy
from defquant.results import Score

__all__ = ["CALIBRATION", "about", "attacked", "cost", "exported", "parity_facts", "read"]

CALIBRATION = 512
"""Training images on which the ranges of branch outputs are measured where they are not trained."""


def exported(
    model: nn.Module,
    facts: Facts,
    train: Dataset,
    path: Path,
    *,
    weight_bits: int = 8,
    input_type: Input = "float",
    allow_float: bool = False,
) -> tuple[Program, onnx.ModelProto]:
    """The network of a run as the file `path`, calibrated on training images where it must be."""
    known = {"classes": facts.classes, "bits": facts.model.bits, "model": facts.model.model}
    return export_onnx(
        model, path, to_unit(train.images[:CALIBRATION]),
        weight_bits=facts.model.weight_bits or weight_bits, input_type=input_type,
        allow_float=allow_float,
        facts=known,
    )  # fmt: skip


def read(path: Path, model: nn.Module, facts: Facts) -> tuple[Program, onnx.ModelProto]:
    """The file at `path` and the program of `model`, which it must hold.

    Raises `UserError` for a file that is cut, another program's, or of another network.
    """
    file = open_model(path)
    known = facts_of(file, path)
    if known.get("bits") != facts.model.bits:
        raise UserError(
            f"{path} has {known.get('bits')}-bit activations, the run {facts.model.bits}-bit ones"
        )
    dims = file.graph.input[0].type.tensor_type.shape.dim[1:]
    if dims[0].dim_value != facts.in_channels:
        raise UserError(
            f"{path} takes images of {dims[0].dim_value} channels, the run of {facts.in_channels}"
        )
    given = file.graph.output[0].type.tensor_type.shape.dim[1].dim_value
    if given != facts.num_classes:
        raise UserError(f"{path} gives {given} logits, the run {facts.num_classes}")
    shape = dims[0].dim_value, dims[1].dim_value, dims[2].dim_value
    try:
        program = lower(model, shape, peaks=known["peaks"], weight_bits=known["weight_bits"])
        if digest(program) == known["digest"]:
            return program, file
    except (UserError, KeyError, TypeError):
        pass  # ranges that the network does not ask for, or lacks: it is another one's file
    raise UserError(f"{path} was exported from another network than this run")


def about(
    run: Path, facts: Facts, path: Path, program: Program, file: onnx.ModelProto, data: Dataset
) -> dict[str, Any]:
    """Which network, from which run, in which file."""
    known = facts_of(file, path)
    floats = file.graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.FLOAT
    return {
        "format": 1,
        "kind": "defquant deployed model",
        "run": run.name,
        "method": facts.method,
        "model": facts.model.model,
        "bits": facts.model.bits,
        "weight_bits": known["weight_bits"],
        "beta": facts.train.beta,
        "seed": facts.train.seed,
        "data": data.name,
        "fingerprint": data.fingerprint,
        "file": path.name,
        "input": "float" if floats else "uint8",
        "calibrated": CALIBRATION if known["peaks"] else None,
        "versions": {**versions(torch.device("cpu")), **_engines()},
        "command": shlex.join(["defquant", *sys.argv[1:]]),
    }


def compared(model: nn.Module, program: Program, file: onnx.ModelProto, images: Dataset) -> Parity:
    """`parity` of the file and the network; `UserError` for a file of tensors of other shapes."""
    try:
        return parity(model, program, file, images)
    except (RuntimeError, IndexError) as error:
        reason = shown(str(error), 200)
        raise UserError(
            f"the file's tensors are not those of the network ({reason}): export it again"
        ) from None


def cost_rows(card: dict[str, Any]) -> list[str]:
    """The cost card as lines for people."""
    return rows(card)


def parity_facts(found: Parity) -> dict[str, Any]:
    """A `Parity` as the card holds it."""
    return {
        "images": found.agreement.total,
        "agreement": found.agreement.accuracy,
        "flipped_codes": found.flipped,
        "logit_error": found.logit_error,
        "reference_mismatches": found.mismatches,
        "unoptimised_agreement": found.unoptimised.accuracy,
        "openvino_agreement": None if found.openvino is None else found.openvino.accuracy,
    }


def attacked(
    model: nn.Module,
    file: onnx.ModelProto,
    images: Dataset,
    attacks: Sequence[Single],
    queries: int,
    few: int,
    *,
    seed: int = 0,
) -> Iterator[dict[str, Any]]:
    """Scores of the trained network and of the file, side by side, as the card holds them.

    Clean; each of `attacks`, made on `model`, rounded to 8 bits and shown to both; and `Square`,
    which needs answers alone, on the first `few` images of each directly, at each eps.
    """
    deployed = OnnxModel(file)
    both = [correct(network, images) for network in (model, deployed)]
    yield _scores("clean", 0.0, "clean", *(Score(int(s.sum()), len(s)) for s in both))
    for attack in attacks:
        trained, shipped = replayed(model, deployed, images, attack, seed=seed)
        yield _scores(attack.name, attack.eps, repr(attack), trained, shipped)
    for eps in sorted({attack.eps for attack in attacks}) if queries else ():
        square, some = Square(eps, queries=queries), images.first(min(few, len(images)))
        scores = [
            robust_accuracy(network, some, square, seed=seed) for network in (model, deployed)
        ]
        yield _scores(square.name, eps, repr(square), *scores)


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


def _scores(name: str, eps: float, settings: str, trained: Score, shipped: Score) -> dict[str, Any]:
    pairs = {"trained": trained, "deployed": shipped}
    counts = {key: list(asdict(score).values()) for key, score in pairs.items()}
    return {"attack": name, "eps": eps, "settings": settings, **counts}


def _engines() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("onnx", "onnxruntime")}
