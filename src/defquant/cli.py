"""The command line: a verb, its flags, its function. `--help` and mistakes import no torch."""

import re
import sys
import warnings
from argparse import ArgumentError
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import Namespace

from defquant.config import check_eps
from defquant.errors import UserError
from defquant.flags import VERBS, parser_for

__all__ = ["eps", "main"]

_SWITCHES = (
    "augment", "nesterov", "amp", "channels_last", "convex", "resume", "json", "smoke", "unaware",
    "detector", "list", "dry_run", "render_only", "deployable", "allow_float",
    "no_audit",
)  # fmt: skip


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
        raise UserError(f"unknown verb {verb!r}: use one of {', '.join(VERBS)}")
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
    parser = parser_for(verb, _preset(flags) if verb == "train" else None)
    try:
        settings: Namespace = parser.parse_args(_spelled(flags))
    except ArgumentError as error:
        raise UserError(_one_line(verb, str(error))) from None
    except SystemExit as stop:
        if stop.code:
            raise UserError(f"bad flags: see `defquant {verb} --help`") from None
        return None
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
        raise UserError(f"eps is a number in [0, 1], as 8/255 or 0.03; found {text!r}")
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


def _preset(flags: list[str]) -> str | None:
    """The preset that the flags name, or a `--config` file does."""
    for word, following in pairwise([*flags, ""]):
        if word == "--preset":
            return following
        if word.startswith("--preset="):
            return word.partition("=")[2]
        if word == "--config" and Path(following).is_file():
            return _preset_of(Path(following))
    return None


def _preset_of(config: Path) -> str | None:
    try:
        found = yaml.safe_load(config.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return None  # the parser will say what is wrong with it
    return found.get("preset") if isinstance(found, dict) else None


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
        return f"--{key[1]} takes {wanted or 'another value'}; found {found[-1]!r}"
    text = re.sub(r"\s+", " ", message).strip()
    return f"{text}: see `defquant {verb} --help`"


def _print_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    print(f"defquant: warning: {message}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
