"""Whatever is to be judged, as one thing: what it says of 8-bit images, and how to attack it."""

import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from defquant.attacks import APGD, PGD, Adaptive, Attack, Square
from defquant.attacks.access import to_eval, untouched
from defquant.attacks.contract import Target, seed_of, standing, told
from defquant.attacks.lint import lint_answer, lint_model, probabilities
from defquant.attacks.surrogates import twin_of
from defquant.data import Dataset, load, to_unit
from defquant.diagnose.masking import Connected
from defquant.errors import UserError, needs, shown
from defquant.evaluate import device_of
from defquant.foreign import blamed, load_foreign, probe
from defquant.judging.opening import Opened, few_layers, has_gradient, open_staircases
from defquant.measure import Subject
from defquant.records import FOREIGN

__all__ = [
    "QUERIES", "STEPS", "Pixels", "Side", "Suspect", "Witnessed", "foreign_on", "images_for",
    "suspect", "with_twin",
]  # fmt: skip

STEPS, QUERIES = 40, 500
"""Of the attacks on a suspect."""
LARGEST = 1 << 30
"""Bytes of a file."""
SCRIPT = "torchscript:"
_SHOWN = 256  # labelled images by which the contract of a file's input is found


@dataclass(frozen=True)
class Suspect:
    """A network to be judged.

    Attributes:
        name: as it was named.
        kind: `run`, `ONNX`, `torch.export`, `TorchScript` or `module`.
        model: images in [0, 1] to logits, in torch; its `defquant_twin`, where it has one, is that
            through which surrogates attack.
        answers: pixels, uint8 (n, c, h, w), to classes int64 (n,), in the thing's own runtime.
        contract: how its input was found to be, in lines for people.
        staircases: layers whose rounding the twin opens; `closed`: those it could not.
        own: whether `model` has the thing's own gradient, not the twin's.
        sha256: of its file.
        doubts: warnings, each of which makes its numbers others than they should be.
    """

    name: str
    kind: str
    model: nn.Module
    answers: Callable[[Tensor], Tensor]
    contract: tuple[str, ...] = ()
    staircases: tuple[str, ...] = ()
    closed: tuple[str, ...] = ()
    own: bool = True
    sha256: str = ""
    doubts: tuple[str, ...] = ()


class Seen(nn.Module):
    """`model`, with its own backward pass, and the twin through which surrogates attack it."""

    def __init__(self, model: nn.Module, twin: nn.Module) -> None:
        super().__init__()
        self.model, self.defquant_twin = model, twin

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.model(x)
        return logits


class Logs(nn.Module):
    """Logits of a `model` that returns probabilities, whose small differences would underflow."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.model(x)
        return found.clamp_min(torch.finfo(found.dtype).tiny).log()


class Pixels(nn.Module):
    """`model` of images rounded to 8 bits; the gradient passes the rounding as it is."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        if twin_of(model) is not model:
            self.defquant_twin = Pixels(twin_of(model))

    def forward(self, x: Tensor) -> Tensor:
        fixed = x.detach()
        logits: Tensor = self.model((fixed * 255).round() / 255 + (x - fixed))
        return logits


class Witnessed(Pixels):
    """A twin of a file, whose first class is always the one that the file itself answers."""

    def __init__(self, found: Suspect) -> None:
        super().__init__(found.model)
        self.answers = found.answers

    def forward(self, x: Tensor) -> Tensor:
        logits = super().forward(x)
        with torch.no_grad():
            said = self.answers((x * 255).round().to(torch.uint8))
            order = torch.arange(logits.shape[1]).expand(logits.shape).clone()
            top, rows = logits.argmax(1), torch.arange(len(said))
            order[rows, top], order[rows, said] = said, top
        return logits.gather(1, order)


def with_twin(model: nn.Module, data: Dataset) -> nn.Module:
    """`model` itself, with its twin beside it where it has staircases that can be opened.

    For a model that nobody else holds: the twin is an attribute of it, and no module or buffer.
    """
    x, _ = data.take(torch.arange(min(64, len(data))))
    device = device_of(model, x.device)
    try:
        with redirect_stdout(sys.stderr):
            opened = open_staircases(model, x.to(device))
        if opened.staircases and has_gradient(opened.twin, x):
            vars(model)["defquant_twin"] = opened.twin.to(device)
    except UserError:
        pass  # surrogates then change what they know of the model itself
    return model


def foreign_on(
    spec: str, weights: str | None, images: Dataset, batch_size: int | None, place: torch.device
) -> tuple[nn.Module, Subject]:
    """Whatever `judge` takes, seen to answer on the images, with its staircases opened."""
    if ".py:" in spec:
        model, subject = load_foreign(spec, weights, place)
        probe(spec, model, images, batch_size or len(images))
        return with_twin(model, images), subject
    found, name = suspect(spec, images, weights), Path(spec).name
    subject = Subject(f"{FOREIGN} ({name})", name, evidence={"file_sha256": found.sha256})
    return to_eval(Witnessed(found)) if found.kind == "ONNX" else found.model, subject


def images_for(spec: str, name: str | None, root: str | None) -> Dataset:
    """The test images of the data set `name`, or those that a run knows for its own."""
    if name is not None:
        return load(name, root, "test")
    if not Path(spec).is_dir():
        _check_there(spec)
        raise UserError(
            "a model needs --data: digits, cifar10, svhn, folder or npz; a run has its own"
        )
    from defquant.checkpoint import load_on
    from defquant.runs import test_images

    return test_images(load_on(Path(spec), torch.device("cpu"))[1], root, None, "test")


def suspect(
    spec: "str | Path | nn.Module | Suspect",
    data: Dataset,
    weights: str | None = None,
    fed: str | None = None,
) -> Suspect:
    """The network that `spec` names, ready to be judged on `data`.

    Args:
        spec: the folder of a run; `NAME.onnx`; `NAME.pt2` of `torch.export.save`; `my.py:make`, a
            function that returns a module; `torchscript:FILE`; or a module itself. Modules take
            images in [0, 1]; how a file takes them is found on `data`.
        data: labelled images.
        weights: of `my.py:make`, a .safetensors file.
        fed: how an ONNX file takes its images, as far as it is known: see `given_contract`.

    Raises:
        UserError: in one line, what it is not, cannot be read or does not fit the data.
    """
    if isinstance(spec, Suspect):
        return spec
    if isinstance(spec, nn.Module):
        return _of_module(spec, type(spec).__name__, "module", data)
    text, path = str(spec), Path(spec)
    if weights is not None and ".py:" not in text:
        raise UserError(f"weights belong to my.py:make_model; {text} has its own")
    if fed is not None and path.suffix != ".onnx":
        raise UserError(f"how it is fed is asked of an ONNX file; {text} takes images in [0, 1]")
    if ".py:" in text:
        return _of_python(text, weights, data)
    if text.startswith(SCRIPT):
        return _of_file(Path(text.removeprefix(SCRIPT)), "TorchScript", torch.jit.load, data)
    if path.suffix == ".onnx":
        return _of_onnx(path, data, fed)
    if path.suffix == ".pt2":
        return _of_file(path, "torch.export", lambda at: torch.export.load(at).module(), data)
    if path.is_dir():
        return _of_run(text, data)
    _check_there(text)
    raise UserError(
        f"a model is the folder of a run, NAME.onnx, NAME.pt2, my.py:make_model or "
        f"{SCRIPT}FILE; found {shown(text)}"
    )


def _check_there(spec: str) -> None:
    """Raise `UserError` where it is the path of nothing."""
    if not (":" in spec or Path(spec).suffix or Path(spec).exists()):
        raise UserError(f"no such folder of a run: {shown(spec)}")


def _of_python(spec: str, weights: str | None, data: Dataset) -> Suspect:
    model, subject = load_foreign(spec, weights, torch.device("cpu"))
    with blamed(spec):
        made = _of_module(model, spec, "module", data)
    evidence = subject.evidence or {}
    return replace(made, sha256=evidence.get("weights_sha256", evidence.get("file_sha256", "")))


def _of_run(spec: str, data: Dataset) -> Suspect:
    from defquant.checkpoint import load_on

    path = Path(spec)
    model, facts = load_on(path, torch.device("cpu"))
    if len(facts.classes) != data.num_classes or facts.in_channels != data.in_channels:
        raise UserError(
            f"{path} takes {facts.in_channels} channels and knows {len(facts.classes)} classes, "
            f"{data.name} has {data.in_channels} and {data.num_classes}: use its data"
        )
    return _of_module(model, spec, "run", data)


def _of_onnx(path: Path, data: Dataset, fed: str | None) -> Suspect:
    needs("deploy", "onnx", "onnxruntime")
    from defquant.judging.contract import File, find_contract, given_contract

    given = {} if fed is None else given_contract(fed)
    digest = _sha256(path)
    file = File(path, data.shape)
    some = data.first(min(_SHOWN, len(data)))
    found = find_contract(file, some.images, some.labels, classes=data.num_classes, **given)
    contract, front = found.contract, file.model(found.contract)
    model = front if has_gradient(front, to_unit(some.images[:2])) else Connected(front)
    return Suspect(
        str(path), "ONNX", model, lambda pixels: file.predict(pixels, contract),
        (str(found),), file.twin.staircases, file.twin.blind, own=False, sha256=digest,
    )  # fmt: skip


def _of_file(path: Path, kind: str, load: Callable[[str], Any], data: Dataset) -> Suspect:
    digest = _sha256(path)
    print(f"defquant: reading a {kind} file can run code: trust {path}?", file=sys.stderr)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's own, of its own formats
            model = load(str(path))
    except Exception as error:  # zip, JSON, pickle and torch each have their own
        reason = shown(str(error).strip().split("\n")[0] or type(error).__name__, 200)
        raise UserError(f"{path} is no whole {kind} file ({reason})") from None
    return replace(_of_module(model, str(path), kind, data), sha256=digest)


def _sha256(path: Path) -> str:
    """Of a file, which is there and not too large."""
    if not path.is_file():
        raise UserError(f"no file {path}")
    if path.stat().st_size > LARGEST:
        raise UserError(f"a model's file has {LARGEST >> 20:,} MiB at most; {path} is larger")
    return sha256(path.read_bytes()).hexdigest()


def _of_module(model: nn.Module, name: str, kind: str, data: Dataset) -> Suspect:
    x, y = data.take(torch.arange(min(64, len(data))))
    itself = to_eval(model)
    try:
        with untouched(itself), torch.no_grad():
            first = itself(x)
        lint_answer(first, len(x), int(y.max()))
        model = to_eval(Logs(itself)) if probabilities(first) else itself
        lint_model(model, x, y)
    except UserError:
        raise
    except Exception as error:  # whatever the model's own code raises
        reason = shown(str(error).strip().split("\n")[0], 200)
        raise UserError(f"{name} does not take images {list(x.shape)}: {reason}") from None
    own, contract = has_gradient(model, x), ["images in [0, 1], NCHW"]
    try:
        opened = open_staircases(model, x)
    except UserError as error:
        opened = Opened(model, (), few_layers(model, x))
        contract += [f"not opened: {error}"] * bool(opened.closed)
    twin = opened.twin if has_gradient(opened.twin, x) else model
    seen = Seen(model, twin) if own and twin is not model else twin
    seen = seen if own or twin is not model else Connected(model)

    def answers(pixels: Tensor) -> Tensor:
        with untouched(itself), torch.no_grad():
            return told(itself(to_unit(pixels)).float())

    return Suspect(
        name, kind, to_eval(seen), answers, tuple(contract), opened.staircases, opened.closed, own
    )


@dataclass
class Side:
    """A suspect under attack, and what was seen of it so far, by the place of an image.

    `usual` and `strongest` hold, for each eps, which images stand; `fooling` the pixels that
    fooled the thing itself.
    """

    suspect: Suspect
    images: Tensor
    labels: Tensor
    seed: int
    usual: dict[float, Tensor] = field(default_factory=dict)
    strongest: dict[float, Tensor] = field(default_factory=dict)
    fooling: dict[float, dict[int, Tensor]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.clean = torch.zeros(len(self.labels), dtype=torch.bool)
        self.model = Pixels(self.suspect.model)

    def look(self, ids: Tensor, eps: Sequence[float]) -> None:
        """See which of the images `ids` are right, and stand at each eps, rising."""
        self.clean[ids] = self.suspect.answers(self.images[ids]) == self.labels[ids]
        usual = strongest = self.clean[ids]
        for radius in eps:
            fooling = self.fooling.setdefault(radius, {})
            before = [e for e in eps if e < radius]
            if before:  # the fallen stay fallen
                fooling |= self.fooling[before[-1]]
            usual = self._left(ids, usual, [PGD(radius, steps=STEPS)], fooling)
            strongest = self._left(ids, strongest & usual, self._attacks(radius), fooling)
            for held, found in ((self.usual, usual), (self.strongest, strongest)):
                held.setdefault(radius, torch.zeros_like(self.clean))[ids] = found

    def _attacks(self, eps: float) -> list[Attack]:
        """Another loss, then everything through surrogates; a search where gradients are blind."""
        found: list[Attack] = [APGD(eps, STEPS, loss="margin"), *Adaptive(eps, STEPS).attacks]
        return [*found, Square(eps, QUERIES)] if self.suspect.closed else found

    def _left(
        self, ids: Tensor, alive: Tensor, attacks: Sequence[Attack], fooling: dict[int, Tensor]
    ) -> Tensor:
        """Which of `ids` that are `alive` none of `attacks` fools, as 8-bit pixels."""

        def witness(some: Tensor, made: Tensor) -> Tensor:
            pixels = (made * 255).round().to(torch.uint8)
            fooled = self.suspect.answers(pixels) != self.labels[some]
            fooling.update(zip(some[fooled].tolist(), pixels[fooled], strict=True))
            return fooled

        alive = alive.clone()
        for place, attack in enumerate(attacks):
            if not bool(alive.any()):
                break
            target = Target(
                self.model, self.images, self.labels, seed_of(self.seed, place), 128,
                witness=witness,
            )  # fmt: skip
            alive[alive.clone()] = standing(attack, target, ids[alive])
        return alive
