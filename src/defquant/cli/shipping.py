"""Verbs that ship a network: export, verify, push and pull. No torch on import."""

import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from defquant.cli import scores
from defquant.cli.rows import eps_column, print_json
from defquant.errors import UserError, needs
from defquant.records import Score

if TYPE_CHECKING:
    from torch import nn

    from defquant.data import Dataset
    from defquant.deploy.parity import Parity
    from defquant.deploy.ship import Origin

__all__ = ["export", "pull", "push", "verify"]


def export(
    run: str,
    model: str | None = None,
    *,
    own: scores.Own = scores.OWN,
    images: scores.Images = None,
    allow_float: bool = False,
    strict: bool = False,
    weight_bits: Literal[8, 4, 2] = 8,
    input: Literal["float", "uint8"] = "float",
    attack: tuple[str, ...] = ("fgsm", "pgd-20", "adaptive-20"),
    eps: tuple[float, ...] = (2 / 255, 8 / 255),
    reference: str | None = None,
    attacked: int = 1000,
    queries: int = 500,
    few: int = 200,
    seed: scores.Seed = 0,
    repeats: int = 30,
    threads: int = 2,
    data_root: scores.Root = None,
    json: scores.Json = False,
) -> int:
    """Write a network as an integer ONNX model, checked, attacked and priced.

    Args:
        run: folder of the run; with --model-file none.
        model: the ONNX file; its card lies beside it as .json.
        allow_float: accept a file of which this onnxruntime runs some convolutions in float.
        strict: accept no convolution that stays in float, as what it reads is not quantised.
        weight_bits: of the weights, where the run was trained with float ones.
        input: what the file takes: images in [0, 1], or pixels.
        attack: attacks whose images are made on the trained network and shown to both; as in
            attack.
        eps: as 8/255.
        reference: the float network to stand beside them under the same attacks, made on itself: a
            run, NAME.onnx, NAME.pt2 or my.py:make_model.
        attacked: first so many images for them.
        queries: of the random search (Square) on the file itself; 0 for none.
        few: first so many images for it.
        repeats: rounds of timing; 0 for none.
        threads: of each engine while it is timed.
    """
    needs("deploy", "onnx", "onnxruntime")
    scores.least(1, attacked=attacked, few=few, threads=threads)
    scores.least(0, queries=queries, repeats=repeats)
    import torch

    from defquant.attacks.names import parse_attack
    from defquant.deploy import cost, ship
    from defquant.files import write_json
    from defquant.judging.suspects import foreign_on

    attacks = [parse_attack(name, radius) for name in attack for radius in eps]
    path, network, origin, known, tested = _deployable(run, model, own, data_root, images)
    beside = None
    if reference is not None:
        beside, _ = foreign_on(reference, None, tested, None, torch.device("cpu"))
    program, file = ship.exported(
        network, origin, known("train"), path, weight_bits=weight_bits, input_type=input,
        allow_float=allow_float, strict=strict,
    )  # fmt: skip
    found = ship.compared(network, program, file, tested)
    card = ship.card_of(origin, path, file, program, tested, found)
    if not json:
        print("\n".join(_parity(card, found)), flush=True)
    card["scores"], card["reference"] = [], reference and Path(reference).name
    some = tested.first(min(attacked, len(tested)))
    for shown in ship.attacked(network, file, some, attacks, queries, few, beside, seed=seed):
        card["scores"].append(shown)
        if not json:
            row = f"{origin.name:24} {shown['attack']:12} {eps_column(shown['eps'])}"
            sides = (f"{kind} {Score(*shown[kind])}" for kind in ship.SIDES if kind in shown)
            print("  ".join([row, *sides]), flush=True)
    card["cost"] = ship.cost(network, program, file, repeats=repeats, threads=threads)
    print_json(card) if json else print("\n".join(cost.rows(card["cost"])))
    print(path)
    print(write_json(path.with_suffix(".json"), card))
    return _judged(found, origin, allow_float)


def verify(
    run: str,
    model: str | None = None,
    *,
    own: scores.Own = scores.OWN,
    images: scores.Images = None,
    allow_float: bool = False,
    data_root: scores.Root = None,
    json: scores.Json = False,
) -> int:
    """Check that an exported file computes what its network does; 1 where a bound is broken.

    Args:
        run: folder of the run; with --model-file none.
        model: the ONNX file.
        allow_float: accept a file of which this onnxruntime runs some convolutions in float.
    """
    needs("deploy", "onnx", "onnxruntime")
    from defquant.deploy import ship

    path, network, origin, _, tested = _deployable(run, model, own, data_root, images)
    program, file = ship.read(path, network, origin)
    found = ship.compared(network, program, file, tested)
    card = ship.card_of(origin, path, file, program, tested, found)
    print_json(card) if json else print("\n".join(_parity(card, found)))
    print(path)
    return _judged(found, origin, allow_float)


def push(source: str, repo: str, *, public: bool = False, dry_run: bool = False) -> None:
    """Put a run or an exported file on the Hugging Face Hub, with a card that has its numbers.

    The token is that of `hf auth login`, or HF_TOKEN. The files name paths and commands as typed.

    Args:
        source: folder of a run, or an .onnx file of export with its .json.
        repo: OWNER/NAME.
        public: a new repository is for all to see; else it is private.
        dry_run: print the card; put nothing there.
    """
    from defquant import hub

    if dry_run:
        print(hub.model_card(Path(source), repo), end="")
    else:
        print(hub.push(Path(source), repo, public=public))


def pull(repo: str, *, out: str | None = None, revision: str | None = None) -> None:
    """Bring a run or an exported file from the Hugging Face Hub, checked; no code of it is run.

    Args:
        repo: OWNER/NAME.
        out: new folder; NAME if not given.
        revision: commit, branch or tag; the newest if not given.
    """
    from defquant import hub

    print(hub.pull(repo, Path(out or repo.rpartition("/")[2]), revision=revision))


def _deployable(
    run: str, file: str | None, own: scores.Own, root: str | None, images: int | None
) -> "tuple[Path, nn.Module, Origin, Callable[[str], Dataset], Dataset]":
    """The ONNX file, the network on the CPU, where it is from, its data, its first test images."""
    scores.least(1, images=images)
    import torch

    from defquant.deploy.ship import Origin

    cpu = torch.device("cpu")
    if own.model_file is None:
        from defquant.checkpoint import load_on
        from defquant.runs import load_images, test_images

        if file is None:
            raise UserError("give the run's folder and the ONNX file, or --model-file and the file")
        if misplaced := own.weights or own.data:
            raise UserError(f"a run knows its own weights and data; found {misplaced!r}")
        model, facts = load_on(Path(run), cpu)
        if root is not None:
            facts = replace(facts, data=replace(facts.data, data_root=root))
        tested = test_images(facts, None, images, "test")
        origin = Origin.of_run(Path(run), facts)
        return Path(file), model, origin, partial(load_images, facts.data), tested
    from defquant.data import load

    if file is not None or own.data is None:
        raise UserError("--model-file takes the ONNX file alone, and --data: digits, cifar10, ...")
    model, subject, tested = own.opened(root, images, None, cpu)
    origin = Origin.of_model(subject, tested)
    return Path(run), model, origin, partial(load, own.data, root), tested


def _judged(found: "Parity", origin: "Origin", allow_float: bool) -> int:
    """Says the faults that count. A network not trained to be deployed is only calibrated."""
    counts = {"reference"} | ({"agreement", "flipped"} if origin.trained else set())
    counts |= set() if allow_float else {"float"}
    faults = [fault for kind, fault in found.faults.items() if kind in counts]
    for fault in faults:
        print(f"defquant: {fault}", file=sys.stderr)
    return int(bool(faults))


def _parity(card: Mapping[str, Any], found: "Parity") -> Iterator[str]:
    run, (integer, convolutions) = f"{card['run']:24}", found.convolutions
    measured = card["calibrated"]
    images = f", ranges measured on {measured} training images" if measured else ""
    floats = ", ".join(f"{kind} x {n}" for kind, n in card["floats"].items())
    yield f"{run} {integer} of {convolutions} convolutions in integers{images}"
    if floats:
        yield f"{run} in float: {floats}"
    yield f"{run} same answer as the trained network: {found.agreement}"
    yield (
        f"{run} activation codes that differ: {found.flipped:.2%}; "
        f"largest difference of a logit: {found.logit_error:.2g} of their spread"
    )
    yield (
        f"{run} codes unlike the integer reference: {found.mismatches}; "
        f"without optimisations the same answer: {found.unoptimised}"
    )
    if found.openvino is not None:
        yield f"{run} OpenVINO, the same answer: {found.openvino}"
    if found.openvino_sums is not None:
        yield f"{run} OpenVINO, made to keep each rounding in front of a sum: {found.openvino_sums}"
