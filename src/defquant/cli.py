"""The command line: a verb, its flags, its function. `--help` and mistakes import no torch."""

import re
import sys
import warnings
from argparse import ArgumentError
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser, Namespace

from defquant.config import PRESETS, DataConfig, ModelConfig, TrainConfig, check_eps
from defquant.errors import UserError

__all__ = ["main", "parser_for"]

VERBS = {
    "demo": "the main job, small: train, attack and report on handwritten digits",
    "train": "train a network: float, vanilla-quantised, defensive or adversarial",
    "attack": "measure clean and robust accuracy of trained runs",
    "report": "make one self-contained HTML page of a folder of runs",
    "data": "download and check a data set",
}
_SWITCHES = ("augment", "nesterov", "amp", "channels_last", "convex", "resume", "json", "smoke")


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
        print("\n".join(f"  {verb:8} {what}" for verb, what in VERBS.items()))
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

    run: Callable[[Namespace], int] = getattr(commands, verb)
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
    if verb == "attack":
        settings.eps = [eps(text) for text in settings.eps]
    if verb == "train" and settings.attack_eps is not None:
        settings.attack_eps = eps(settings.attack_eps)
    return settings


def parser_for(verb: str, preset: str | None = None) -> ArgumentParser:
    """The parser of one verb, typed from the configuration dataclasses."""
    parser = ArgumentParser(
        prog=f"defquant {verb}", description=VERBS[verb], exit_on_error=False, add_help=True
    )
    parser.add_argument("--config", action="config", help="YAML file of any of these flags")
    _FLAGS[verb](parser)
    if preset is not None:
        if preset not in PRESETS:
            raise UserError(f"unknown preset {preset!r}: use one of {', '.join(PRESETS)}")
        parser.set_defaults(dict(PRESETS[preset]))
    return parser


def _train_flags(parser: ArgumentParser) -> None:
    parser.add_argument("--out", type=str, default=None, help="folder of the run (required)")
    parser.add_argument("--preset", type=str, default=None, help=", ".join(PRESETS))
    parser.add_argument("--resume", type=bool, default=False, help="go on where a run stopped")
    parser.add_argument("--json", type=bool, default=False, help="the last epoch as a JSON line")
    parser.add_class_arguments(ModelConfig, skip={"convex"})
    parser.add_argument(
        "--convex",
        type=bool | None,
        default=None,
        help="residual sums as learned convex combinations; when not given: where beta > 0",
    )
    parser.add_class_arguments(DataConfig)
    parser.add_class_arguments(TrainConfig, skip={"attack_eps"})
    parser.add_argument(
        "--attack_eps", type=str | None, default=None,
        help="eps of the training attack, as 8/255; when not given: |N(0, 8)| clipped to 16, /255",
    )  # fmt: skip


def _attack_flags(parser: ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", type=str, help="folders of runs")
    parser.add_argument(
        "--attack", nargs="+", type=str, default=["random", "fgsm", "rfgsm", "pgd", "pgd-50x10"],
        help="random[-SAMPLES] fgsm rfgsm bim[-STEPS] pgd[-STEPS[xRESTARTS]]; bim and pgd alone: "
        "the paper's schedule, which is weak at small eps",
    )  # fmt: skip
    parser.add_argument(
        "--eps", nargs="+", type=str | float, default=["2/255", "8/255", "16/255"],
        help="L-infinity radii in [0, 1], as 8/255",
    )  # fmt: skip
    parser.add_argument(
        "--substitute", type=str, default=None, help="run whose adversarials are transferred"
    )
    parser.add_argument("--images", type=int | None, default=None, help="first so many test images")
    parser.add_argument("--examples", type=int, default=8, help="pictures kept for the report")
    parser.add_argument("--seed", type=int, default=0, help="of the attacks' draws")
    parser.add_argument("--batch_size", type=int, default=256, help="rows at a time")
    parser.add_argument("--data_root", type=str | None, default=None, help="if the data moved")
    parser.add_argument("--device", type=str, default="auto", help="auto, cpu, cuda, cuda:N")
    parser.add_argument("--json", type=bool, default=False, help="JSON lines instead of a table")


def _report_flags(parser: ArgumentParser) -> None:
    parser.add_argument("folder", type=str, help="folder that holds runs")
    parser.add_argument("--out", type=str, default="report.html", help="the page")
    parser.add_argument("--markdown", type=str | None, default=None, help="also a Markdown table")
    parser.add_argument("--figure", type=str | None, default=None, help="also a PNG, SVG or PDF")
    parser.add_argument("--json", type=bool, default=False, help="the measurements as JSON lines")


def _data_flags(parser: ArgumentParser) -> None:
    parser.add_argument("action", type=str, help="fetch")
    parser.add_argument("name", type=str, help="cifar10 or svhn")
    parser.add_argument("--data_root", type=str, default="data", help="where the files go")


def _demo_flags(parser: ArgumentParser) -> None:
    parser.add_argument("--out", type=str, default="demo", help="folder of the runs and the page")
    parser.add_argument("--seeds", type=int, default=3, help="networks of each kind")
    parser.add_argument("--smoke", type=bool, default=False, help="a few seconds, to try it out")
    parser.add_argument("--json", type=bool, default=False, help="JSON lines instead of a table")


_FLAGS: dict[str, Callable[[ArgumentParser], None]] = {
    "demo": _demo_flags,
    "train": _train_flags,
    "attack": _attack_flags,
    "report": _report_flags,
    "data": _data_flags,
}


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
        if key[1] == "bits":
            wanted = "a whole number from 1 to 8, or none for full precision"
        return f"--{key[1]} takes {wanted or 'another value'}; found {found[-1]!r}"
    text = re.sub(r"\s+", " ", message).strip()
    return f"{text}: see `defquant {verb} --help`"


def _print_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    print(f"defquant: warning: {message}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
