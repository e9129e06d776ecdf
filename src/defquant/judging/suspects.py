"""Whatever is to be judged, as one thing: what it says of 8-bit images, and how to attack it."""

import copy
import math
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from defquant.attacks.access import differentiable, gradient, to_eval, untouched
from defquant.attacks.lint import lint_model
from defquant.captured import capture
from defquant.data import Dataset, load, to_unit
from defquant.diagnose.masking import Connected
from defquant.errors import DefquantWarning, UserError, shown
from defquant.judging.staircases import Rewriting
from defquant.quantize import Staircase

__all__ = ["Suspect", "images_of", "suspect"]

LARGEST = 1 << 30
"""Bytes of a file."""
FEW, MANY = 256, 1024
"""What takes no more than `FEW` values in `MANY` numbers or more is a staircase."""
ALIKE = 0.02  # of the images: what rounding may let a twin answer otherwise
SCRIPT = "torchscript:"
_SHOWN = 256  # labelled images by which the contract of a file's input is found


@dataclass(frozen=True)
class Suspect:
    """A network to be judged.

    Attributes:
        name: as it was named.
        kind: `run`, `ONNX`, `torch.export`, `TorchScript` or `module`.
        model: images in [0, 1], seen as 8-bit pixels, to logits; its `opened`, where it has one,
            is the twin through which surrogates attack.
        answers: pixels, uint8 (n, c, h, w), to classes int64 (n,), in the thing's own runtime.
        contract: how its input was found to be, in lines for people.
        staircases: layers whose rounding the twin opens; `closed`: those it could not.
        own: whether `model` has the thing's own gradient, not the twin's.
        sha256: of its file.
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


class Pixels(nn.Module):
    """`inner` of images rounded to 8 bits; the gradient passes the rounding as it is."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        fixed = x.detach()
        logits: Tensor = self.inner((fixed * 255).round() / 255 + (x - fixed))
        return logits


class Seen(Pixels):
    """A network of one's own, with its own backward pass; `opened` is its twin."""

    def __init__(self, inner: nn.Module, twin: nn.Module) -> None:
        super().__init__(inner)
        self.opened = Pixels(twin)


def images_of(spec: str, name: str | None, root: str | None) -> Dataset:
    """The test images of the data set `name`, or those that a run knows for its own."""
    if name is not None:
        return load(name, root, "test")
    if not Path(spec).is_dir():
        raise UserError("judge needs --data: digits, cifar10, svhn, folder or npz")
    from defquant.checkpoint import load_on
    from defquant.runs import test_images

    return test_images(load_on(Path(spec), torch.device("cpu"))[1], root, None, "test")


def suspect(
    spec: "str | Path | nn.Module | Suspect", data: Dataset, weights: str | None = None
) -> Suspect:
    """The network that `spec` names, ready to be judged on `data`.

    Args:
        spec: the folder of a run; `NAME.onnx`; `NAME.pt2` of `torch.export.save`; `my.py:make`, a
            function that returns a module; `torchscript:FILE`; or a module itself. Modules take
            images in [0, 1]; how a file takes them is found on `data`.
        data: labelled images.
        weights: of `my.py:make`, a .safetensors file.

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
    if ".py:" in text:
        from defquant.foreign import blamed, load_foreign

        found = load_foreign(text, weights, torch.device("cpu"))
        with blamed(found.path):
            made = _of_module(found.model, text, "module", data)
        evidence = found.subject.evidence or {}
        return replace(
            made, sha256=str(evidence.get("weights_sha256", evidence.get("file_sha256", "")))
        )
    if text.startswith(SCRIPT):
        return _of_file(Path(text.removeprefix(SCRIPT)), "TorchScript", torch.jit.load, data)
    if path.suffix == ".onnx":
        return _of_onnx(path, data)
    if path.suffix == ".pt2":
        return _of_file(path, "torch.export", _exported, data)
    if path.is_dir():
        from defquant.checkpoint import load_on

        model, facts = load_on(path, torch.device("cpu"))
        if len(facts.classes) != data.num_classes or facts.in_channels != data.in_channels:
            raise UserError(
                f"{path} takes {facts.in_channels} channels and knows {len(facts.classes)} "
                f"classes, {data.name} has {data.in_channels} and {data.num_classes}: use its data"
            )
        return _of_module(model, text, "run", data)
    raise UserError(
        f"a model is the folder of a run, NAME.onnx, NAME.pt2, my.py:make_model or "
        f"{SCRIPT}FILE; found {shown(text)}"
    )


def _of_onnx(path: Path, data: Dataset) -> Suspect:
    from defquant.judging.contract import File, find_contract

    _check_size(path)
    file = File(path, data.shape)
    some = data.first(min(_SHOWN, len(data)))
    found = find_contract(file, some.images, some.labels, classes=data.num_classes)
    contract, model = found.contract, file.model(found.contract)
    return Suspect(
        str(path), "ONNX", Pixels(model), lambda pixels: file.predict(pixels, contract),
        (str(found),), file.twin.staircases, file.twin.blind, own=False, sha256=_hash(path),
    )  # fmt: skip


def _of_file(path: Path, kind: str, load: Callable[[str], Any], data: Dataset) -> Suspect:
    _check_size(path)
    print(f"defquant: reading a {kind} file can run code: trust {path}?", file=sys.stderr)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's own, of its own formats
            model = load(str(path))
    except Exception as error:  # zip, JSON, pickle and torch each have their own
        reason = shown(str(error).strip().split("\n")[0] or type(error).__name__, 200)
        raise UserError(f"{path} is no whole {kind} file ({reason})") from None
    return replace(_of_module(model, str(path), kind, data), sha256=_hash(path))


def _exported(path: str) -> nn.Module:
    return torch.export.load(path).module()


def _check_size(path: Path) -> None:
    if not path.is_file():
        raise UserError(f"no file {path}")
    if path.stat().st_size > LARGEST:
        raise UserError(f"a model's file has {LARGEST >> 20:,} MiB at most; {path} is larger")


def _hash(path: Path) -> str:
    return sha256(path.read_bytes()).hexdigest()


def _of_module(model: nn.Module, name: str, kind: str, data: Dataset) -> Suspect:
    x, y = data.take(torch.arange(min(64, len(data))))
    to_eval(model)
    try:
        lint_model(model, x, y)
    except UserError:
        raise
    except Exception as error:  # whatever the model's own code raises
        reason = shown(str(error).strip().split("\n")[0], 200)
        raise UserError(f"{name} does not take images {list(x.shape)}: {reason}") from None
    own, contract = _has_gradient(model, x), ["images in [0, 1], NCHW"]
    try:
        opened = open_staircases(model, x)
    except UserError as error:
        opened = Opened(model, (), _few_layers(model, x))
        contract += [f"not opened: {error}"] * bool(opened.closed)
    twin = opened.twin if opened.twin is model or _has_gradient(opened.twin, x) else None
    if own:
        seen = Pixels(model) if twin in (None, model) else Seen(model, twin)
    else:
        seen = Pixels(Connected(model) if twin in (None, model) else twin)

    def answers(pixels: Tensor) -> Tensor:
        with untouched(model), torch.no_grad():
            logits: Tensor = model(to_unit(pixels)).float()
        return logits.argmax(1).masked_fill(logits.isnan().any(1), -1)

    return Suspect(
        name, kind, to_eval(seen), answers, tuple(contract), opened.staircases, opened.closed, own
    )


def _has_gradient(model: nn.Module, x: Tensor) -> bool:
    """Whether autograd reaches the images at all."""
    try:
        with untouched(model), differentiable(), warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            warnings.simplefilter("ignore", DefquantWarning)
            at = x[:2].clone().requires_grad_()
            gradient(model(at).float(), at)
    except (UserError, RuntimeError, NotImplementedError, UserWarning):
        return False
    return True


@dataclass(frozen=True)
class Opened:
    """A network whose staircases are `Staircase` modules.

    Attributes:
        twin: gives the network's logits; its gradient goes through every staircase in it.
        staircases: the layers of those.
        closed: layers of operations that make many values few and were not opened: an attack that
            follows the gradient may be blind there, and what it leaves is an upper bound.
    """

    twin: nn.Module
    staircases: tuple[str, ...]
    closed: tuple[str, ...]


def open_staircases(model: nn.Module, images: Tensor) -> Opened:
    """The twin of `model`; `images` are (n, c, h, w), float in [0, 1].

    Raises `UserError` in one line where the model cannot be captured as a program, and where the
    twin would answer otherwise than the model does.
    """
    x = images[:64].float()
    captured = capture(_without_observers(model), x)
    with untouched(model), torch.no_grad():
        wanted = model(x).argmax(1)
        rewriting = Rewriting(captured, x)
        twin = rewriting.module()
        differ = int((wanted != twin(x).argmax(1)).sum())
    if differ > ALIKE * len(x):
        raise UserError(
            f"cannot open the staircases of {captured.model}: its twin answers {differ} of "
            f"{len(x)} images otherwise"
        )
    layers = [layer for node, layer in rewriting.found.items() if node.graph is rewriting.graph]
    return Opened(twin, tuple(dict.fromkeys(layers)), tuple(_closed(twin, x)))


def _without_observers(model: nn.Module) -> nn.Module:
    """`model`, or a copy in which fake quantisers of torch.ao are what they compute, unobserved."""
    from torch.ao.quantization import FakeQuantizeBase

    found = [name for name, part in model.named_modules() if isinstance(part, FakeQuantizeBase)]
    model = copy.deepcopy(model) if found else model
    for name in found:
        parent, _, own = name.rpartition(".")
        part: Any = model.get_submodule(name)
        fixed = _Fixed(part) if bool(part.fake_quant_enabled[0]) else nn.Identity()
        setattr(model.get_submodule(parent), own, fixed)
    return model


class _Fixed(nn.Module):
    """A fake quantiser of torch.ao at the scale that it has."""

    def __init__(self, part: Any) -> None:
        super().__init__()
        observer = getattr(part, "activation_post_process", part)
        self.range = int(observer.quant_min), int(observer.quant_max)
        self.register_buffer("scale", part.scale.detach().float())
        self.register_buffer("zero", part.zero_point.detach().to(torch.int32))
        self.axis = int(part.ch_axis) if len(part.scale) > 1 else None

    def forward(self, x: Tensor) -> Tensor:
        scale, zero = self.get_buffer("scale"), self.get_buffer("zero")
        if self.axis is None:
            return torch.fake_quantize_per_tensor_affine(x, scale, zero, *self.range)
        return torch.fake_quantize_per_channel_affine(x, scale, zero, self.axis, *self.range)


class _Numbered(fx.Interpreter):
    """Gives staircases without ends the bits that number the values they take."""

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        module = self.fetch_attr(str(n.target)) if n.op == "call_module" else None
        if isinstance(module, Staircase) and math.isinf(module.high - module.low):
            width = float(value.max() - value.min())
            module.bits = module.own = min(8, max(1, math.ceil(math.log2(width + 1))))
        return value


class _Seen(fx.Interpreter):
    """Which nodes take few values."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.few: dict[fx.Node, bool] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, Tensor) and n.op != "get_attr":
            self.few[n] = value.numel() >= MANY and len(value.flatten()[:65536].unique()) <= FEW
        return value


def _closed(twin: fx.GraphModule, x: Tensor) -> Iterator[str]:
    """Layers of what makes few values of many, and is no staircase of ours."""
    seen = _Seen(twin)
    seen.run(x)
    for node, few in seen.few.items():
        inputs = [a for a in node.all_input_nodes if a in seen.few]
        opened = node.op == "call_module" or node.op == "placeholder"
        if few and not opened and inputs and not all(seen.few[a] for a in inputs):
            kind = node.meta.get("val")
            switches = isinstance(kind, Tensor) and kind.dtype == torch.bool
            if not switches or any(seen.few.get(user) for user in node.users):
                yield str(node.meta.get("layer") or node.name)


def _few_layers(model: nn.Module, x: Tensor) -> tuple[str, ...]:
    """Modules that make many values few, in a network that is no program."""
    found: dict[str, None] = {}
    with _watched(model, found), untouched(model), torch.no_grad():
        model(x)
    return tuple(found)


@contextmanager
def _watched(model: nn.Module, found: dict[str, None]) -> Iterator[None]:
    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            many = [t for t in (*inputs, output) if isinstance(t, Tensor) and t.numel() >= MANY]
            few = [len(t.flatten()[:65536].unique()) <= FEW for t in many]
            if len(few) > 1 and few[-1] and not all(few[:-1]):
                found[name or type(model).__name__] = None

        return hook

    handles = []
    for name, module in model.named_modules():
        try:
            handles.append(module.register_forward_hook(watch(name)))
        except RuntimeError:  # TorchScript lets nobody look inside
            found["the whole network"] = None
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
