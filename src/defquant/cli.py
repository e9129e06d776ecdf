"""The command line: a verb, its flags, its function. `--help` and mistakes import no torch."""

import re
import sys
import warnings
from argparse import ArgumentError
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from defquant.config import check_eps
from defquant.errors import UserError, shown, visible
from defquant.files import read_text
from defquant.flags import VERBS, parser_for
from defquant.typed import check_sound, parse_yaml

__all__ = ["eps", "main"]

_SWITCHES = (
    "augment", "nesterov", "amp", "channels_last", "convex", "resume", "json", "smoke", "unaware",
    "detector", "list", "dry_run", "render_only", "deployable", "allow_float",
    "no_audit",
)  # fmt: skip

_MOVES = re.compile(r"[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb. Returns 0 when done, 1 for a finding, 2 for bad input, 130 for Ctrl-C."""
    words = list(sys.argv[1:] if argv is None else argv)
    warnings.showwarning = _print_warning
    try:
        return _dispatch(words)
    except UserError as error:
        print(f"defquant: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(
            "defquant: interrupted; what was finished stands, the last checkpoint too",
            file=sys.stderr,
        )
        return 130
    except BrokenPipeError:
        return 1
    except (OSError, UnicodeError, OverflowError, RecursionError, MemoryError) as error:
        print(f"defquant: {type(error).__name__}: {shown(str(error), 300)}", file=sys.stderr)
        return 2


def _dispatch(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        print("usage: defquant VERB [flags]   (defquant VERB --help explains the flags)\n")
        print("\n".join(f"  {verb:9} {what}" for verb, what in VERBS.items()))
        print("\nexit status: 0 done, 1 a finding, 2 bad input, 130 interrupted")
        return 0
    if words[0] == "--version":
        from importlib.metadata import version

        print(f"defquant {version('defquant')}")
        return 0
    verb, flags = words[0], words[1:]
    if verb not in VERBS:
        raise UserError(f"unknown verb {shown(verb)!r}: use one of {', '.join(VERBS)}")
    settings = _parse(verb, flags)
    if settings is None:
        return 0
    from defquant import commands
    from defquant.commands.rows import json_alone

    run: Callable[[Namespace], int] = getattr(commands, verb)
    with json_alone() if settings.get("json") else nullcontext():
        return run(settings)


def _parse(verb: str, flags: list[str]) -> Namespace | None:
    """The flags as a namespace; None where `--help` or `--print_config` has answered."""
    preset = _preset(flags)  # reads and checks what --config names
    _check({"flags": [word for word in flags if "\n" not in word]})
    parser = parser_for(verb, preset if verb == "train" else None)
    try:
        settings: Namespace = parser.parse_args(_spelled(flags))
    except ArgumentError as error:
        raise UserError(_one_line(verb, str(error))) from None
    except SystemExit as stop:
        if stop.code:
            raise UserError(f"bad flags: see `defquant {verb} --help`") from None
        return None
    _check({f"--{name}": value for name, value in settings.as_dict().items() if name != "config"})
    if verb in ("attack", "export"):
        settings.eps = [eps(text) for text in settings.eps]
    if verb in ("transfer", "diagnose"):
        settings.eps = eps(settings.eps)
    if verb == "train":
        settings.attack_sigma = eps(settings.attack_sigma)
        if settings.attack_eps is not None:
            settings.attack_eps = eps(settings.attack_eps)
    return settings


def eps(text: str | float) -> float:
    """`8/255` or `0.03` as a number in [0, 1]. Raises `UserError` otherwise."""
    match = re.fullmatch(r"\s*([\d.eE+-]+)\s*(?:/\s*([\d.]+))?\s*", str(text))
    try:
        value = float(match[1]) / float(match[2] or 1) if match else float("nan")
    except (ValueError, ZeroDivisionError):
        value = float("nan")
    if value != value:
        raise UserError(f"eps is a number in [0, 1], as 8/255 or 0.03; found '{shown(text)}'")
    return check_eps(value)


def _spelled(flags: list[str]) -> list[str]:
    """`--data-root` as `--data_root`, and a bare switch as `--switch true`."""
    spelled: list[str] = []
    for word, following in pairwise([*flags, "--"]):
        name, equals, value = word.partition("=")
        if name.startswith("--"):
            name = "--" + name[2:].replace("-", "_")
        if name == "--milestones" or (spelled and spelled[-1] == "--milestones"):
            name, value = _listed(name), _listed(value)  # 60,120 as [60,120]
        if value == "none" and name != "--attack":
            value = "null"
        if name == "none" and spelled and spelled[-1] != "--attack":
            name = "null"
        spelled.append(name + equals + value)
        bare = following.lower() not in ("true", "false", "yes", "no", "null", "none")
        if not equals and name[2:] in _SWITCHES and bare:
            spelled.append("true")
    return spelled


def _listed(text: str) -> str:
    return f"[{text}]" if re.fullmatch(r"\d+(,\d+)*", text) else text


def _check(values: Mapping[str, Any]) -> None:
    """Raise `UserError` for numbers beyond 64 bits, and texts that would move a cursor."""
    for name, value in values.items():
        check_sound(value, name)
        for text in value if isinstance(value, list | tuple) else [value]:
            if isinstance(text, str) and _MOVES.search(text):
                raise UserError(
                    f"{name}: names hold no control or direction characters; found '{shown(text)}'"
                )


def _preset(flags: list[str]) -> str | None:
    """The preset that the flags name, or a `--config` file does."""
    found = None
    for word, following in pairwise([*flags, ""]):
        name, equals, value = word.partition("=")
        value = value if equals else following
        if name == "--preset":
            found = value
        elif name == "--config":
            settings = _read_config(value)
            inner = settings.get("preset") if isinstance(settings, dict) else None
            found = inner if found is None and isinstance(inner, str) else found
    return found


def _read_config(name: str) -> Any:
    """Settings in a file, or in a text that begins with `{`; no file is the parser's to blame."""
    if name.lstrip().startswith("{"):
        return parse_yaml(name, "--config")
    path = Path(name)
    return parse_yaml(read_text(path, 1 << 20), name) if path.is_file() else None


def _one_line(verb: str, message: str) -> str:
    """jsonargparse's report of several lines as one: the flag, what it takes, what was found."""
    key = re.search(r'[Kk]ey "([\w.]+)"', message)
    found = re.findall(r"(?:Given|Got) value: (.*)", message)
    if key and found:
        kinds = dict.fromkeys(re.findall(r"Expected an? <class '(\w+)'>", message))
        names = {"int": "a whole number", "float": "a number", "bool": "true or false"}
        wanted = " or ".join(names.get(k, "none" if k == "NoneType" else k) for k in kinds)
        choices = re.search(r"Expected a \(?(?:typing\.)?Literal\[(.*?)\]", message)
        wanted = f"one of {choices[1]}" if choices else wanted
        if key[1] in ("bits", "squeeze"):
            off = "full precision" if key[1] == "bits" else "no squeezing"
            wanted = f"a whole number from 1 to 8, or none for {off}"
        return f"--{key[1]} takes {wanted or 'another value'}; found '{shown(found[-1])}'"
    text = re.sub(r"\s+", " ", message).strip()
    return f"{shown(text, 300)}: see `defquant {verb} --help`"


def _print_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    text = visible(" ".join(str(message).split("\n")))
    print(f"defquant: warning: {text}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
