"""Verbs that score a network: attack, rescore and transfer. The flags that several verbs share."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from defquant.cli import rows
from defquant.cli.rows import print_json, print_measurements
from defquant.config import check_bits
from defquant.errors import UserError, needs, shown
from defquant.progress import keep_log
from defquant.records import EIGHT_BIT, FOREIGN

if TYPE_CHECKING:
    import torch
    from torch import nn

    from defquant.data import Dataset
    from defquant.images import Manifest
    from defquant.measure import Subject

__all__ = [
    "OWN", "Batch", "Device", "Images", "Json", "Own", "Root", "Seed", "Weights", "attack",
    "check_model", "least", "rescore", "transfer",
]  # fmt: skip

Json = Annotated[bool, Parameter(help="JSON lines alone on stdout, instead of rows")]
Images = Annotated[int | None, Parameter(help="first so many test images; none for all")]
Seed = Annotated[int, Parameter(help="of the attacks' draws")]
Batch = Annotated[int, Parameter(help="rows at a time")]
Root = Annotated[str | None, Parameter(help="where the data lies, if it moved")]
Device = Annotated[str, Parameter(help="auto, cpu, cuda, cuda:N")]
ModelFile = Annotated[
    str | None,
    Parameter(
        help="my.py:make_model, a function that returns a torch.nn.Module of images in [0, 1] to "
        "logits; THIS RUNS YOUR CODE in my.py. Or NAME.onnx, NAME.pt2, torchscript:FILE"
    ),
]
Weights = Annotated[str | None, Parameter(help="for --model-file: a .safetensors file")]


@dataclass(frozen=True)
class _Own:
    """A model of the user's own, instead of a run's folder."""

    model_file: ModelFile = None
    weights: Weights = None
    data: Annotated[str | None, Parameter(help="for --model-file: its data.")] = None

    def opened(
        self, root: str | None, images: int | None, batch_size: int | None, place: "torch.device"
    ) -> "tuple[nn.Module, Subject, Dataset]":
        """The model, what it is, and the first of its test images; None: all of them at a time."""
        from defquant.data import load
        from defquant.judging.suspects import foreign_on

        tested = load(self.data or "", root, "test").first(images)
        found = foreign_on(self.model_file or "", self.weights, tested, batch_size, place)
        return *found, tested.to(place)


Own = Annotated[_Own, Parameter(name="*")]
OWN = _Own()
_Tested = tuple[Path, Any, Any, Any]
"""A network that is measured: folder of its results, itself, what it is, the images."""


@dataclass(frozen=True)
class _Asked:
    """What `attack` asks of each network, and how: `saved` is where 8-bit images go."""

    attacks: list[Any]
    unaware: bool
    substitute: str | None
    saved: Path | None
    place: Any
    how: dict[str, Any]
    json: bool


def attack(
    runs: tuple[str, ...] = (),
    *,
    own: Own = OWN,
    out: str | None = None,
    save_images: str | None = None,
    attack: tuple[str, ...] = ("random", "fgsm", "rfgsm", "pgd", "pgd-50x10", "adaptive"),
    eps: tuple[float, ...] = (2 / 255, 8 / 255, 16 / 255),
    substitute: str | None = None,
    unaware: bool = False,
    detector: bool = False,
    images: Images = None,
    split: Literal["test", "validation"] = "test",
    examples: int = 8,
    seed: Seed = 0,
    batch_size: Batch = 256,
    data_root: Root = None,
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Measure clean and robust accuracy of trained runs, or of a model of your own.

    Args:
        runs: folders of runs, if no --model-file.
        out: for --model-file: folder of the results.
        save_images: empty folder for the adversarial images as PNG with a manifest; scored as
            such, too.
        attack: random[-SAMPLES] fgsm rfgsm bim[-STEPS] pgd[-STEPS[xRESTARTS]] apgd[-...]
            apgd-dlr[-...] apgd-margin[-...] apgd-t[-...], through a surrogate as apgd@soft[-...]
            apgd@twin apgd@clipfree apgd@eot apgd@bits, then queries as apgd-50+200, fab[-...]
            fab-t[-...] square[-QUERIES] standard adaptive[-STEPS]
            adaptive-t[-STEPS]; bim and pgd alone: the paper's schedule, weak at small eps.
        eps: L-infinity radii in [0, 1], as 8/255.
        substitute: run whose adversarials are transferred.
        unaware: also each attack as if it ignored the feature squeezing in front of the network.
        detector: also how many of each attack's images a detector by feature squeezing tells from
            clean ones: in detector.json.
        split: validation: the held-out training images, to choose settings by.
        examples: pictures kept for the report.
    """
    mine = {"substitute": substitute, "unaware": unaware, "detector": detector}
    check_model("attack", runs, own, out, mine | {"split": split != "test"}, save_images)
    least(1, batch_size=batch_size)
    least(0, examples=examples)
    from defquant.attacks.names import parse_attack
    from defquant.distributed import pick_device
    from defquant.files import write_json
    from defquant.foreign import blamed
    from defquant.images import MANIFEST
    from defquant.measure import examples as pictures
    from defquant.runs import test_images

    attacks = [parse_attack(name, radius) for name in attack for radius in eps]
    place, saved = pick_device(device), Path(save_images) if save_images else None
    how = {"seed": seed, "batch_size": batch_size}
    asked = _Asked(attacks, unaware, substitute, saved, place, how, json)
    if own.model_file is None:
        loaded = _loaded(runs, place, substitute, squeezed=unaware)
        targets: Any = ((*one, test_images(one[2], data_root, images, split)) for one in loaded)
    else:
        targets = [(Path(out or ""), *own.opened(data_root, images, batch_size, place))]
    with blamed(own.model_file or ""):
        for one in targets:
            run, network, facts, tested = one
            keep_log(run)
            width = _print_scores(one, asked)
            if detector:
                _print_detected(one, asked, data_root, width)
            if examples:
                best = _shown(attacks, eps)
                found = pictures(run, network, facts, tested, best, examples, seed, batch_size)
                write_json(run / "examples.json", found)
            print(run / "results.jsonl")
            if detector:
                print(run / "detector.json")
            if saved:
                print(saved / MANIFEST)


def _print_scores(one: _Tested, asked: _Asked) -> int:
    """Of one network, unaware attacks and black boxes too; returns the width of their names."""
    from defquant.attacks import FirstOrder
    from defquant.defenses import Unaware
    from defquant.foreign import warn_of_chance
    from defquant.images import measure_and_save
    from defquant.measure import replay
    from defquant.progress import AttackProgress

    attacks, source, how = asked.attacks, asked.substitute, asked.how
    asking = [a for a in attacks if isinstance(a, FirstOrder) and a.walk.steps]  # Random asks none
    others: list[Any] = [Unaware(a) for a in asking if asked.unaware]
    others += [
        replay(a, Path(source), one[-1], device=asked.place, source=source, **how)
        for a in asking
        if source
    ]
    names = [a.name + EIGHT_BIT * bool(asked.saved) for a in attacks] + [a.name for a in others]
    width, watch = max(12, *map(len, names)), AttackProgress(one[0].name, len(one[-1]), len(names))
    for m in measure_and_save(asked.saved, *one, attacks, black_box=others, watch=watch, **how):
        print_measurements([m], as_json=asked.json, width=width)
        if m.attack == "clean" and m.method.startswith(FOREIGN):
            warn_of_chance(m.score, one[-1].num_classes)
    return width


def _print_detected(one: _Tested, asked: _Asked, root: str | None, width: int) -> None:
    from defquant.attacks import FirstOrder
    from defquant.defenses import CALIBRATION, detect
    from defquant.runs import test_images

    known = test_images(one[2], root, None, "train")
    clean = known.first(min(len(known), CALIBRATION))
    attacks = [a for a in asked.attacks if isinstance(a, FirstOrder)]
    for r in detect(*one, clean, attacks, **asked.how):
        print_json(r) if asked.json else print(rows.detection_row(r, width), flush=True)


def check_model(
    verb: str, runs: Sequence[str], own: Own, out: str | None, mine: Mapping[str, object],
    save_images: str | None = None,
) -> None:  # fmt: skip
    """Raise `UserError` for flags of one's own runs beside a foreign model, and the reverse."""
    foreign = {"weights": own.weights, "data": own.data, "out": out}
    given = next((name for name, value in foreign.items() if value is not None), "")
    alone = next((name for name, value in mine.items() if value), "")
    needed = {"data": "digits, cifar10, svhn, folder or npz", "out": "FOLDER"}
    missing = next((name for name in needed if foreign[name] is None), "")
    first = next(iter(runs), "")
    if own.model_file is None:
        rules = {
            f"{verb} needs folders of runs, or --model_file my.py:make_model": not runs,
            f"--{given} belongs to --model_file; a run knows its own: leave it out": given,
            f"--save_images keeps the images of one run; found {len(runs)}: attack them one at a "
            "time": save_images and len(runs) > 1,
        }
    else:
        rules = {
            f"{verb} takes folders of runs or --model_file, not both; found {first!r}": runs,
            f"--model_file needs --{missing}: {needed.get(missing)}": missing,
            f"--{alone} is for runs of `defquant train`: leave it out": alone,
            f"{out} holds a run of `defquant train`: choose another --out":
            (Path(str(out)) / "checkpoint.safetensors").exists(),
        }  # fmt: skip
    if wrong := next((rule for rule, broken in rules.items() if broken), None):
        raise UserError(wrong)


def _loaded(
    runs: Sequence[str], place: "torch.device", source: str | None, *, squeezed: bool
) -> list[tuple[Path, Any, Any]]:
    """All are sound, and fit the substitute, before the first is attacked."""
    from defquant.measure import load_on

    loaded = [(Path(run), *load_on(Path(run), place)) for run in runs]
    other = load_on(Path(source), place)[1] if source else None
    for run, _, facts in loaded:
        ends = [(f.in_channels, f.num_classes) for f in (facts, other) if f is not None]
        if ends[0] != ends[-1]:
            raise UserError(
                f"the substitute {source} takes {ends[1][0]} channels and knows {ends[1][1]} "
                f"classes, {run} {ends[0][0]} and {ends[0][1]}: train it on the same data set"
            )
        if squeezed and facts.model.squeeze is None:
            raise UserError(
                f"--unaware attacks the network behind a feature squeezing; {run} has none: leave "
                "it out, or train with --squeeze 5"
            )
    return loaded


def _shown(attacks: Sequence[Any], eps: Sequence[float]) -> Any:
    """The attack of the report's example pictures: the one of most steps, at the middle eps."""
    from defquant.attacks import FirstOrder

    middle = sorted(eps)[len(eps) // 2]
    return max(
        (a for a in attacks if a.eps == middle),
        key=lambda a: a.walk.steps * a.walk.restarts if isinstance(a, FirstOrder) else 0,
    )


def rescore(
    folder: str,
    model: str | None = None,
    *,
    model_file: ModelFile = None,
    weights: Weights = None,
    batch_size: Batch = 256,
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Score any model on adversarial images that attack has saved.

    A row for each attack and eps: the model's score, and the one that the images had.

    Args:
        folder: folder that attack --save-images wrote.
        model: folder of a run, an .onnx file, or as --model-file.
    """
    if (model is None) == (model_file is None):
        raise UserError(
            "rescore takes one model: a run's folder, an .onnx file, or --model_file my.py:make"
        )
    if weights is not None and model_file is None:
        raise UserError("--weights belongs to --model_file; a run knows its own: leave it out")
    least(1, batch_size=batch_size)
    from defquant.distributed import pick_device
    from defquant.foreign import blamed, load_foreign
    from defquant.images import clean_images, read_manifest, rescored
    from defquant.judging.suspects import foreign_on

    manifest, place = read_manifest(Path(folder)), pick_device(device)
    spec = model_file or model or ""
    network = _own_or_onnx(Path(model), manifest, place) if model else None
    if network is None and ".py:" in spec:
        network, _ = load_foreign(spec, weights, place)
    elif network is None:
        network, _ = foreign_on(spec, weights, clean_images(manifest), batch_size, place)
    with blamed(spec):
        rows.print_rescored(rescored(manifest, network, batch_size=batch_size), as_json=json)


def _own_or_onnx(path: Path, manifest: "Manifest", place: "torch.device") -> "nn.Module | None":
    """A run, or a file that `export` wrote; None for any other file."""
    if path.suffix == ".onnx":
        needs("deploy", "onnx", "onnxruntime")
        from defquant.deploy.runtime import OnnxModel, facts_of, open_model

        try:
            file = open_model(path)
            facts_of(file, path)
        except UserError:
            return None
        return OnnxModel(file)
    if not path.is_dir():
        return None
    from defquant.checkpoint import load_on

    model, facts = load_on(path, place)
    if list(facts.classes) != list(manifest.head["classes"]):
        raise UserError(
            f"{path} knows other classes than the saved images, {facts.classes[0]!r}, ... and "
            f"{manifest.head['classes'][0]!r}, ...: use a model of the same data"
        )
    return model


def transfer(
    runs: tuple[str, ...],
    *,
    data: str | None = None,
    weights: Weights = None,
    bits: tuple[int | None, ...] = (),
    attack: str = "pgd-20",
    eps: float = 8 / 255,
    images: Images = None,
    out: str = "transfer",
    seed: Seed = 0,
    batch_size: Batch = 256,
    data_root: Root = None,
    device: Device = "auto",
    json: Json = False,
) -> None:
    """What fools one network or bit width, shown to all others: a matrix.

    Args:
        runs: folders of runs of one data set; with --data also NAME.onnx, NAME.pt2,
            my.py:make_model, torchscript:FILE. THE LAST THREE CAN RUN THEIR MAKER'S CODE.
        data: of models that are no runs: digits, cifar10, svhn, folder or npz.
        weights: for my.py:make_model: a .safetensors file.
        bits: each run at each of these, as 1 2 4 none, weights as trained; else at its own.
        attack: as of `defquant attack`.
        eps: radius, as 8/255.
        out: folder of the file and figure.
    """
    least(1, batch_size=batch_size)
    widths = [check_bits(width) for width in bits]
    if data is None and (other := next((run for run in runs if not Path(run).is_dir()), None)):
        raise UserError(f"{shown(other)} is no run's folder: another model needs --data, as digits")
    if data is not None and widths:
        raise UserError("--bits is for runs of `defquant train` alone: leave out it or --data")
    from defquant.attacks.names import parse_first_order
    from defquant.data import load
    from defquant.diagnose.runs import transfer_foreign, transfer_runs
    from defquant.distributed import pick_device
    from defquant.files import write_json
    from defquant.foreign import blamed
    from defquant.judging.suspects import foreign_on
    from defquant.report import plot_matrix, text_matrix

    step, place = parse_first_order(attack, eps), pick_device(device)
    how: dict[str, Any] = {"seed": seed, "batch_size": batch_size}
    if data is None:
        record = transfer_runs(
            [Path(run) for run in runs], step, bits=widths, images=images, data_root=data_root,
            device=place, **how,
        )  # fmt: skip
    else:
        tested = load(data, data_root, "test").first(images)
        own = {run: weights if ".py:" in run else None for run in runs}
        models = [foreign_on(run, w, tested, batch_size, place) for run, w in own.items()]
        named = {Path(run): model for run, (model, _) in zip(own, models, strict=True)}
        with blamed(*own):
            record = transfer_foreign(named, tested.to(place), step, **how)
    for line in record["cells"] if json else text_matrix(record):
        (print_json if json else print)(line)
    print(plot_matrix(record, Path(out) / "transfer.png"))
    print(write_json(Path(out) / "transfer.json", record))


def least(bound: int, **flags: int | None) -> None:
    """Raise `UserError` for the first flag below `bound`."""
    for name, value in flags.items():
        if value is not None and value < bound:
            raise UserError(f"--{name} must be {bound} or more; found {value}")
