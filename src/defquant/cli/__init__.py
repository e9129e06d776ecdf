"""The command line: a verb, its flags, its function. `--help` and mistakes import no torch.

Cyclopts reads the words by the verb's signature; `convert`, which reads files too, says what a
value may be.
"""

import argparse
import logging
import re
import shlex
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import asdict, is_dataclass
from inspect import BoundArguments
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import yaml
from cyclopts import App, CycloptsError, Parameter, Token
from cyclopts.completion import ShellDetectionError
from cyclopts.config import Dict

from defquant.cli.rows import json_alone
from defquant.cli.verbs import VERBS
from defquant.config import PRESETS, check_eps
from defquant.errors import UserError, near, shown, visible
from defquant.files import read_text
from defquant.progress import note, spoken
from defquant.typed import check_sound, convert, parse_yaml

__all__ = ["VERBS", "eps", "main", "parse", "settings_of", "verb_app"]

_MOVES = re.compile(r"[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")
_QUIET, _VERBOSE = ("-q", "--quiet"), ("-v", "--verbose")
_EVERYWHERE = """With every verb: --config FILE reads any of these flags from YAML, flags on the
command line override it; --print_config prints them all as YAML and does nothing; -q or --quiet
leaves progress out; -v or --verbose adds the settings, the time, and an error's traceback.

Exit status: 0 done, 1 a finding, 2 bad input, 130 interrupted."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb. Returns 0 when done, 1 for a finding, 2 for bad input, 130 for Ctrl-C."""
    words = list(sys.argv[1:] if argv is None else argv)
    warnings.showwarning = _print_warning
    few, much = (any(word in switch for word in words) for switch in (_QUIET, _VERBOSE))
    with spoken(shlex.join(["defquant", *words]), quiet=few):
        try:
            if few and much:
                raise UserError("--quiet and --verbose say the opposite: give one")
            return _run(words, much)
        except UserError as error:
            return _failed(str(error))
        except KeyboardInterrupt:
            _failed("interrupted; what is written stands, the last checkpoint too")
            return 130
        except BrokenPipeError:
            return 1
        except (OSError, UnicodeError, OverflowError, RecursionError, MemoryError) as error:
            return _failed(f"{type(error).__name__}: {shown(str(error), 300)}", much)


def _run(words: Sequence[str], verbose: bool) -> int:
    asked, begun = parse(words), time.monotonic()
    if asked is None:
        return 0
    verb, given = asked
    if verbose:
        logging.basicConfig(format="defquant: %(message)s")
        logging.getLogger("defquant").setLevel(logging.INFO)
        settings = yaml.safe_dump(settings_of(given), sort_keys=False, default_flow_style=None)
        print(settings, end="", file=sys.stderr)
    with json_alone() if given.arguments.get("json") else nullcontext():
        status = int(verb(*given.args, **given.kwargs) or 0)
    if verbose:
        print(f"defquant: {time.monotonic() - begun:.1f} s", file=sys.stderr)
    return status


def _failed(why: str, verbose: bool = False) -> int:
    if verbose:
        traceback.print_exc()
    _tell(why)
    return 2


def parse(words: Sequence[str]) -> tuple[Callable[..., int | None], BoundArguments] | None:
    """A verb and what it is given; None where help, version or `--print_config` has answered.

    Raises `UserError`: an unknown verb or flag, a value that the flag does not take.
    """
    words = [word for word in words if word not in (*_QUIET, *_VERBOSE)]
    verb, *flags = words or ["--help"]
    if verb not in (*VERBS, "-h", "--help", "help", "--version", "--install-completion"):
        known = ", ".join(VERBS)
        raise UserError(f"unknown verb {shown(verb)!r}{near(verb, VERBS)}: use one of {known}")
    app, show = verb_app(), False
    if verb in VERBS:
        app.config, show, flags = _files(verb, flags)
    try:
        command, given, *_ = app.parse_args(
            ["--help" if verb == "help" else verb, *_switched(flags)],
            exit_on_error=False, print_error=False,
        )  # fmt: skip
    except CycloptsError as error:
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from None
        raise UserError(f"{shown(str(error), 300)} (see `defquant {verb} --help`)") from None
    if command not in VERBS.values():
        command(*given.args, **given.kwargs)
        return None
    settings = settings_of(given)
    for name, value in settings.items():
        _check(f"--{name}", value)
    if show:
        print(yaml.safe_dump(settings, sort_keys=False), end="")
        return None
    return command, given


def verb_app() -> App:
    """The verbs; whatever a flag's type is, `_read` reads it."""
    every = Parameter(
        converter=_read, consume_multiple=True, allow_repeating=True, negative="",
        show_default=_default,
    )  # fmt: skip
    app = App(
        name="defquant", help="Networks that are small and hard to fool.", version=_version,
        help_format="markdown", help_epilogue=_EVERYWHERE, default_parameter=every,
        result_action="return_value",
    )  # fmt: skip
    for place, (name, verb) in enumerate(VERBS.items()):
        app.command(verb, name=name, sort_key=place)

    def complete(*, shell: Literal["bash", "zsh", "fish"] | None = None) -> None:
        """Teach your shell the verbs and flags."""
        try:
            print(app.install_completion(shell=shell))
        except ShellDetectionError:
            raise UserError("which shell? Give --shell bash, zsh or fish") from None

    app.command(complete, name="--install-completion")
    return app


def settings_of(given: BoundArguments) -> dict[str, Any]:
    """All flags of a verb by name, as YAML can hold them."""
    given.apply_defaults()
    found: dict[str, Any] = {}
    for name, value in given.arguments.items():
        found |= asdict(value) if is_dataclass(value) else {name: value}  # type: ignore[arg-type]
    return {name: list(v) if isinstance(v, tuple) else v for name, v in found.items()}


def _files(verb: str, flags: list[str]) -> tuple[list[Dict], bool, list[str]]:
    """What `--config` files and the preset say, the first to be heard first; the other flags."""
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    early.add_argument("--config", action="append", default=[])
    early.add_argument("--print_config", "--print-config", action="store_true")
    if verb == "train":
        early.add_argument("--preset")
    try:
        found, rest = early.parse_known_args(flags)
    except argparse.ArgumentError as error:
        raise UserError(f"{error} (see `defquant {verb} --help`)") from None
    layers = {name: _read_config(name) for name in reversed(found.config)}
    if verb == "train":
        named = [found.preset, *(layer.get("preset") for layer in layers.values())]
        if preset := next((name for name in named if name is not None), None):
            if not isinstance(preset, str) or preset not in PRESETS:
                preset, known = str(preset), ", ".join(PRESETS)
                like = near(preset, PRESETS)
                raise UserError(f"unknown preset {shown(preset)!r}{like}: use one of {known}")
            layers = {"--preset": {"preset": preset}, **layers, preset: dict(PRESETS[preset])}
    sources = [
        Dict(layer, use_commands_as_keys=False, source=name) for name, layer in layers.items()
    ]
    return sources, found.print_config, rest


def _read_config(name: str) -> dict[str, Any]:
    """Settings in a file, or in a text that begins with `{`."""
    text = name if name.lstrip().startswith("{") else read_text(Path(name), 1 << 20)
    where = "--config" if text is name else name
    found = parse_yaml(text, where)
    if not isinstance(found, dict):
        raise UserError(f"{where} must hold flags by name, as `bits: 4`; found {shown(found)}")
    for key, value in found.items():
        for part in value if isinstance(value, list) else [value]:
            if isinstance(part, list | dict):
                raise UserError(f"{where}: {shown(key)} takes plain values; found {shown(part)}")
    return {str(key): value for key, value in found.items()}


def _switched(words: Sequence[str]) -> list[str]:
    """`--augment false` as `--augment=false`; a bare switch needs no word."""
    found: list[str] = []
    for word in words:
        before = found[-1] if found else ""
        said = ("true", "false", "yes", "no", *["none", "null"] * (before == "--convex"))
        if re.match("--[^=]+$", before) and word.lower() in said:
            found[-1] += f"={word}"
        else:
            found.append(word)
    return found


def eps(text: str) -> float:
    """`8/255` or `0.03` as a number in [0, 1]. Raises `UserError` otherwise."""
    value = _scalar(float, text.strip())
    if isinstance(value, str) or value != value:
        raise UserError(f"eps is a number in [0, 1], as 8/255 or 0.03; found '{shown(text)}'")
    return check_eps(value)


def _read(kind: Any, tokens: Sequence[Token]) -> Any:
    """The words of one flag as a value of its type. Raises `UserError` for another."""
    name = "--" + (tokens[0].keyword or "value").strip("-[]").replace("-", "_")
    words = [token.value.strip() for token in tokens]
    if get_origin(kind) is not tuple:
        return _one(kind, words[-1], name)
    inner = get_args(kind)[0]
    if inner is not str:  # 60,120 and [60, 120] are lists, too
        words = [part for word in words for part in word.strip("[]").split(",") if part]
    return tuple(_one(inner, word, name) for word in words)


def _one(kind: Any, word: str, name: str) -> Any:
    if name in ("--eps", "--attack_eps", "--attack_sigma"):
        return eps(word)
    value = _scalar(kind, word)
    # a width has words of its own, in `check_bits`
    return value if name in ("--bits", "--squeeze") else convert(kind, value, name)


def _scalar(kind: Any, word: str) -> Any:
    """`word` as a number, none or one of several where `kind` has them; else as it is."""
    kinds = get_args(kind) or (kind,)
    if get_origin(kind) is Literal:
        return next((one for one in kinds if str(one) == word), word)
    if bool in kinds and word.lower() in ("true", "false"):
        return word.lower() == "true"
    if type(None) in kinds and word in ("none", "null", "None"):
        return None
    with suppress(ValueError, ZeroDivisionError):
        if int in kinds:
            return int(word)
        if float in kinds:
            over, line, under = word.partition("/")
            return float(over) / (float(under) if line else 1)
    return word


def _check(name: str, value: Any) -> None:
    """Raise `UserError` for numbers beyond 64 bits, and texts that would move a cursor."""
    check_sound(value, name)
    for text in value if isinstance(value, list) else [value]:
        if isinstance(text, str) and _MOVES.search(text):
            raise UserError(
                f"{name}: names hold no control or direction characters; found '{shown(text)}'"
            )


def _default(value: Any) -> Any:
    """A default as one would type it: words, and 8/255."""
    if isinstance(value, tuple):
        return " ".join(str(_default(one)) for one in value)
    radius = isinstance(value, float) and 0 < value < 0.1 and (255 * value).is_integer()
    return f"{255 * value:.0f}/255" if radius else value


def _version() -> str:
    from importlib.metadata import version

    return f"defquant {version('defquant')}"


def _print_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    _tell("warning: " + visible(" ".join(str(message).split("\n"))))


def _tell(text: str) -> None:
    """On stderr, and into a log that has begun."""
    print(f"defquant: {text}", file=sys.stderr)
    note(f"defquant: {text}", begins=False)
