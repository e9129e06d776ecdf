"""Verbs that ship: export, verify."""

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import Namespace

from defquant.commands.rows import print_json
from defquant.errors import UserError
from defquant.results import Score

if TYPE_CHECKING:
    from defquant.checkpoint import Facts
    from defquant.deploy.parity import Parity

__all__ = ["export", "verify"]


def export(settings: Namespace) -> int:
    """`defquant export`: a run as an integer ONNX file, with its card beside it."""
    _check(settings)
    from defquant.attacks import Single
    from defquant.attacks.names import parse_attack
    from defquant.deploy import cost as costs
    from defquant.deploy import ship
    from defquant.files import write_json
    from defquant.runs import load_images, test_images

    named = [parse_attack(name, eps) for name in settings.attack for eps in settings.eps]
    attacks = [attack for attack in named if isinstance(attack, Single)]
    if len(attacks) < len(named):
        raise UserError("--attack takes attacks that make one image each: not standard or adaptive")
    run, path = Path(settings.run), Path(settings.model)
    model, facts = _loaded(run, settings.data_root)
    images = test_images(facts, settings.data_root, settings.images)
    program, file = ship.exported(
        model, facts, load_images(facts.data, "train"), path, weight_bits=settings.weight_bits,
        input_type=settings.input, allow_float=settings.allow_float,
    )  # fmt: skip
    found = ship.compared(model, program, file, images)
    card = ship.card_of(run, facts, path, file, images, found)
    card["scores"] = []
    _print_parity(card, found, settings.json)
    for scores in ship.attacked(
        model, file, images.first(min(settings.attacked, len(images))), attacks,
        settings.queries, settings.few,
        seed=settings.seed,
    ):  # fmt: skip
        card["scores"].append(scores)
        if not settings.json:
            print(_scores_row(run.name, scores), flush=True)
    card["cost"] = ship.cost(
        model, program, file, repeats=settings.repeats, threads=settings.threads
    )
    if settings.json:
        print_json(card)
    else:
        print("\n".join(costs.rows(card["cost"])))
    print(path)
    print(write_json(path.with_suffix(".json"), card))
    return _said(_expected(found, facts, settings.allow_float))


def verify(settings: Namespace) -> int:
    """`defquant verify`: is the file the network of the run? 1 where a bound is broken."""
    _check(settings)
    from defquant.deploy import ship
    from defquant.runs import test_images

    run, path = Path(settings.run), Path(settings.model)
    model, facts = _loaded(run, settings.data_root)
    program, file = ship.read(path, model, facts)
    images = test_images(facts, settings.data_root, settings.images)
    found = ship.compared(model, program, file, images)
    card = ship.card_of(run, facts, path, file, images, found)
    if settings.json:
        print_json(card)
    _print_parity(card, found, settings.json)
    print(path)
    return _said(_expected(found, facts, settings.allow_float))


def _check(settings: Namespace) -> None:
    for name in ("onnx", "onnxruntime"):
        if importlib.util.find_spec(name) is None:
            raise UserError(f"this needs {name}: pip install 'defquant[deploy]'")
    for name in ("images", "attacked", "few", "threads"):
        value = getattr(settings, name, None)
        if value is not None and value < 1:
            raise UserError(f"--{name} must be 1 or more; found {value}")
    for name in ("queries", "repeats"):
        if getattr(settings, name, 0) < 0:
            raise UserError(f"--{name} must not be negative; found {getattr(settings, name)}")


def _loaded(run: Path, data_root: str | None) -> "tuple[Any, Facts]":
    """The network on the CPU, and its facts with `data_root` in them."""
    from dataclasses import replace

    import torch

    from defquant.checkpoint import load_on

    model, facts = load_on(run, torch.device("cpu"))
    if data_root is not None:
        facts = replace(facts, data=replace(facts.data, data_root=data_root))
    return model, facts


def _expected(found: "Parity", facts: "Facts", allow_float: bool) -> list[str]:
    """The faults that count. A network that was not trained to be deployed is only calibrated."""
    trained = facts.model.deployable and facts.model.weight_bits is not None
    return [
        fault
        for kind, fault in found.faults.items()
        if kind == "reference" or (kind == "float" and not allow_float)
        or (kind in ("agreement", "flipped") and trained)
    ]  # fmt: skip


def _said(faults: Sequence[str]) -> int:
    import sys

    for fault in faults:
        print(f"defquant: {fault}", file=sys.stderr)
    return 1 if faults else 0


def _print_parity(card: Mapping[str, Any], found: "Parity", as_json: bool) -> None:
    if as_json:
        return
    integer, convolutions = found.convolutions
    print(f"{card['run']:24} {integer} of {convolutions} convolutions in integers", end="")
    measured = card["calibrated"]
    print(f", ranges measured on {measured} training images" if measured else "")
    print(f"{card['run']:24} same answer as the trained network: {found.agreement}")
    print(f"{card['run']:24} activation codes that differ: {found.flipped:.2%}", end="; ")
    print(f"largest difference of a logit: {found.logit_error:.2g} of their spread")
    print(f"{card['run']:24} codes unlike the integer reference: {found.mismatches}", end="; ")
    print(f"without optimisations the same answer: {found.unoptimised}")
    if found.openvino is not None:
        print(f"{card['run']:24} OpenVINO, the same answer: {found.openvino}", flush=True)


def _scores_row(run: str, scores: Mapping[str, Any]) -> str:
    eps = f"{scores['eps'] * 255:.4g}/255" if scores["eps"] else ""
    trained, deployed = (Score(*scores[kind]) for kind in ("trained", "deployed"))
    return f"{run:24} {scores['attack']:12} {eps:>8}  trained {trained}  deployed {deployed}"
