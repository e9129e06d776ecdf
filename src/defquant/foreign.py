"""A model from the user's own Python file. **This runs that file**, as `python my.py` would."""

import hashlib
import importlib.util
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from defquant.attacks.access import to_eval
from defquant.checkpoint import read_tensors
from defquant.data import Dataset
from defquant.errors import DefquantWarning, UserError
from defquant.evaluate import lint_classes
from defquant.measure import Subject
from defquant.quantize import adjustable
from defquant.records import FOREIGN, Score

__all__ = ["blamed", "load_foreign", "probe", "warn_of_chance"]

_WRAPPERS = ("module.", "model.")
_PICKLES = (".pt", ".pth", ".ckpt", ".bin", ".pkl")


def load_foreign(spec: str, weights: str | None, device: torch.device) -> tuple[nn.Module, Subject]:
    """Run the file of `spec`, `my.py:make_model`, call that function, load the weights.

    Returns the model, and what its measurements say of it. Raises `UserError`, with the user's own
    error and its line, where any of it fails.
    """
    file, colon, function = spec.rpartition(":")
    path = Path(file)
    if not colon or not function.isidentifier() or path.suffix != ".py":
        raise UserError(f"--model_file is a Python file and a function, my.py:make; found {spec!r}")
    if not path.is_file():
        raise UserError(f"no file {path}: give --model_file as my.py:make_model")
    print(f"defquant: runs your code from {path}", file=sys.stderr)
    with blamed(spec, always=True), redirect_stdout(sys.stderr):  # stdout is for results
        model = _function(path, function)()
    if not isinstance(model, nn.Module):
        raise UserError(
            f"{function} of {path} must return a torch.nn.Module; found {type(model).__name__}"
        )
    method, files = FOREIGN, {"file": path}
    if weights is not None:
        files["weights"] = Path(weights)
        _load_weights(model, files["weights"], path)
        method = f"{FOREIGN} ({files['weights'].name})"
    evidence = {what: used.name for what, used in files.items()}
    for what, used in files.items():
        evidence[f"{what}_sha256"] = hashlib.sha256(used.read_bytes()).hexdigest()
    widths = {quantizer.bits for quantizer in adjustable(model)}
    bits = widths.pop() if len(widths) == 1 else None
    subject = Subject(method, f"{path.name}:{function}", bits, evidence=evidence)
    return to_eval(model.to(device)), subject


def probe(spec: str, model: nn.Module, data: Dataset, batch_size: int) -> None:
    """Show the model of `spec` two images, or one where `batch_size` is.

    Raises `UserError` unless it has a logit for each class.
    """
    shape = " x ".join(map(str, data.shape))
    some = data.take(torch.arange(min(2, batch_size, len(data))))
    with blamed(spec, where=f" on images of {shape}", always=True):
        lint_classes(model, some, data.num_classes, data.name)


def warn_of_chance(clean: Score, classes: int) -> None:
    """Warn where the model is right no more often than one that guesses."""
    if clean.interval[0] <= 1 / classes:
        warnings.warn(
            "the model guesses: look at its weights, the normalisation, the order of colours and "
            "classes, before any of these numbers is used",
            DefquantWarning, stacklevel=2,
        )  # fmt: skip


@contextmanager
def blamed(*specs: str, where: str = "", always: bool = False) -> Iterator[None]:
    """What the user's code raises, as a `UserError` with the error's kind and line in its file.

    An error that went through no line of the files of `specs` passes, if not `always`.
    """
    try:
        yield
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        paths = [Path(spec.rpartition(":")[0]) for spec in reversed(specs)]
        mine = [(path, line) for path in paths if (line := _line(error, path)) is not None]
        if not mine and not always:
            raise
        path, line = mine[0] if mine else (paths[0], None)
        at = "" if line is None else f", line {line}"
        said = " ".join(str(error).split())[:300]
        raise UserError(f"{path}{at}: {type(error).__name__}{where}: {said}") from None


def _line(error: BaseException, path: Path) -> int | None:
    """Where in `path` it was raised or passed through last."""
    if isinstance(error, SyntaxError) and error.filename == str(path.resolve()):
        return error.lineno
    steps = traceback.extract_tb(error.__traceback__)
    mine = [step.lineno for step in steps if step.filename == str(path.resolve())]
    return mine[-1] if mine else None


def _function(path: Path, name: str) -> Callable[[], object]:
    """From the file as a module; it can import what lies beside it, as under `python my.py`."""
    spec = importlib.util.spec_from_file_location(f"_defquant_{path.stem}", path.resolve())
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module.__name__] = module  # dataclasses and pickles look a class's module up
    sys.path.insert(0, str(path.resolve().parent))
    spec.loader.exec_module(module)
    own = {
        key: value
        for key, value in vars(module).items()
        if callable(value) and getattr(value, "__module__", "") == module.__name__
    }
    found = getattr(module, name, None)
    if not callable(found):
        raise UserError(f"{path} has no function {name!r}; it has: {', '.join(own) or 'none'}")
    return found  # type: ignore[no-any-return]


def _load_weights(model: nn.Module, weights: Path, path: Path) -> None:
    """What `load_state_dict` takes, strictly, fits: old names and lazy layers are its affair."""
    if not weights.is_file():
        raise UserError(f"no weights at {weights}: give a .safetensors file")
    with weights.open("rb") as raw:
        start = raw.read(2)
    if weights.suffix in _PICKLES or start in (b"PK", b"\x80\x02"):
        raise UserError(
            f"{weights} is a pickle, which can run code, and is not read: convert it where you "
            "trust it, safetensors.torch.save_file({k: v.contiguous().clone() for k, v in "
            f"torch.load({weights.name!r}, weights_only=True).items()}}, "
            f"{weights.stem + '.safetensors'!r})"
        )
    tensors = _named_as(model.state_dict(), read_tensors(weights)[1])
    try:
        model.load_state_dict(tensors)
    except Exception as error:  # of torch, or of the user's own `load_state_dict`
        said = " ".join(str(error).split())
        said = re.sub(r"^Error\(s\) in loading state_dict for \w+: ", "", said)[:300]
        raise UserError(
            f"{weights} does not fit the {type(model).__name__} of {path}: {said}"
        ) from None


def _named_as(own: Mapping[str, object], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`tensors` under the names that the model has for them, wrapped or not on either side.

    What `save_model` kept once is there for every tensor that shares its memory.
    """
    names = {plain: name for name, plain in _plain(own).items()}
    found = {names.get(plain, name): tensors[name] for name, plain in _plain(tensors).items()}
    places = {_place(own.get(name)): name for name in found}
    shared = {n: places.get(_place(value)) for n, value in own.items() if n not in found}
    return found | {n: found[of] for n, of in shared.items() if of and _place(own[n])}


def _plain(names: Iterable[str]) -> dict[str, str]:
    """Each name without what DataParallel, Lightning or torch.compile put into all of them."""
    plain = {n: ".".join(part for part in n.split(".") if part != "_orig_mod") for n in names}
    for prefix in _WRAPPERS * 2:
        if all(name.startswith(prefix) for name in plain.values()):
            plain = {n: name.removeprefix(prefix) for n, name in plain.items()}
    return plain


def _place(value: object) -> tuple[object, ...]:
    """Where a tensor lies in memory; nothing for one that is lazy, or no tensor at all."""
    if not isinstance(value, Tensor) or is_lazy(value) or not value.numel():
        return ()
    return value.data_ptr(), value.shape, value.stride()
