"""The flags of every verb, typed from the configuration dataclasses. No torch."""

from collections.abc import Callable
from typing import Any, Literal

from jsonargparse import ArgumentParser, get_loader, set_loader
from yaml import YAMLError

from defquant.config import PRESETS, DataConfig, ModelConfig, TrainConfig
from defquant.errors import UserError
from defquant.flags_anyone import anyone_flags, rescore_flags

__all__ = ["VERBS", "parser_for"]

VERBS = {
    "demo": "the main job, small: train, attack and report on handwritten digits",
    "train": "train a network: float, vanilla-quantised, defensive or adversarial",
    "attack": "measure clean and robust accuracy of trained runs, or of a model of your own",
    "rescore": "score any model on adversarial images that attack has saved",
    "transfer": "what fools one run or bit width, shown to all others: a matrix",
    "diagnose": "say whether a run's robustness is real, and where its noise grows",
    "export": "write a trained run as an integer ONNX model, checked, attacked and priced",
    "verify": "check that an exported file computes what its run was trained to",
    "reproduce": "make the paper's tables and figures again, at a size of your choice",
    "report": "make one self-contained HTML page of a folder of runs",
    "data": "download and check a data set",
}


def parser_for(verb: str, preset: str | None = None) -> ArgumentParser:
    """The parser of one verb, typed from the configuration dataclasses."""
    parser = ArgumentParser(
        prog=f"defquant {verb}", description=VERBS[verb], exit_on_error=False, add_help=True,
        parser_mode="defquant",
    )  # fmt: skip
    parser.add_argument("--config", action="config", help="YAML file of any of these flags")
    _FLAGS[verb](parser)
    if preset is not None:
        if preset not in PRESETS:
            raise UserError(f"unknown preset {preset!r}: use one of {', '.join(PRESETS)}")
        parser.set_defaults(dict(PRESETS[preset]))
    return parser


def _load_yaml(text: str) -> Any:
    """YAML in which `bits: none` is none, as on the command line; `attack: none` is a name."""
    found = get_loader("yaml")(text)
    if not isinstance(found, dict):
        return found
    return {key: part if key == "attack" else _null(part) for key, part in found.items()}


def _null(part: Any) -> Any:
    if isinstance(part, list):
        return [_null(each) for each in part]
    return None if part == "none" else part


set_loader("defquant", _load_yaml, exceptions=(YAMLError,))


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
    parser.add_class_arguments(TrainConfig, skip={"attack_eps", "attack_sigma"})
    parser.add_argument(
        "--attack_eps", type=str | None, default=None,
        help="eps of the training attack, as 8/255; when not given: |N(0, sigma)| up to 2 sigma",
    )  # fmt: skip
    parser.add_argument(
        "--attack_sigma", type=str | float, default="8/255", help="that sigma, as 8/255"
    )


def _attack_flags(parser: ArgumentParser) -> None:
    parser.add_argument("runs", nargs="*", type=str, help="folders of runs, if no --model_file")
    anyone_flags(parser)
    parser.add_argument(
        "--attack", nargs="+", type=str,
        default=["random", "fgsm", "rfgsm", "pgd", "pgd-50x10", "adaptive"],
        help="random[-SAMPLES] fgsm rfgsm bim[-STEPS] pgd[-STEPS[xRESTARTS]] apgd[-...] "
        "apgd-dlr[-...] apgd-margin[-...] apgd-t[-...], through a surrogate as apgd@soft[-...] "
        "apgd@twin apgd@clipfree apgd@eot apgd@bits, then queries as apgd-50+200, fab[-...] "
        "fab-t[-...] square[-QUERIES] standard adaptive[-STEPS]; bim and pgd alone: the paper's "
        "schedule, weak at small eps",
    )  # fmt: skip
    parser.add_argument(
        "--eps", nargs="+", type=str | float, default=["2/255", "8/255", "16/255"],
        help="L-infinity radii in [0, 1], as 8/255",
    )  # fmt: skip
    parser.add_argument(
        "--substitute", type=str, default=None, help="run whose adversarials are transferred"
    )
    parser.add_argument(
        "--unaware", type=bool, default=False,
        help="also each attack as if it ignored the feature squeezing in front of the network",
    )  # fmt: skip
    parser.add_argument(
        "--detector", type=bool, default=False,
        help="also how many of each attack's images a detector by feature squeezing tells from "
        "clean ones: in detector.json",
    )  # fmt: skip
    parser.add_argument("--images", type=int | None, default=None, help="first so many test images")
    parser.add_argument(
        "--split", type=Literal["test", "validation"], default="test",
        help="validation: the held-out training images, to choose settings by",
    )  # fmt: skip
    parser.add_argument("--examples", type=int, default=8, help="pictures kept for the report")
    parser.add_argument("--seed", type=int, default=0, help="of the attacks' draws")
    parser.add_argument("--batch_size", type=int, default=256, help="rows at a time")
    parser.add_argument("--data_root", type=str | None, default=None, help="if the data moved")
    parser.add_argument("--device", type=str, default="auto", help="auto, cpu, cuda, cuda:N")
    parser.add_argument("--json", type=bool, default=False, help="JSON lines instead of a table")


def _export_flags(parser: ArgumentParser) -> None:
    _verify_flags(parser)
    parser.add_argument(
        "--weight_bits", type=Literal[8, 4, 2], default=8,
        help="of the weights, where the run was trained with float ones",
    )  # fmt: skip
    parser.add_argument(
        "--input", type=Literal["float", "uint8"], default="float",
        help="what the file takes: images in [0, 1], or pixels",
    )  # fmt: skip
    parser.add_argument(
        "--attack", nargs="+", type=str, default=["fgsm", "pgd-20"],
        help="attacks whose images are made on the trained network and shown to both; as in attack",
    )  # fmt: skip
    parser.add_argument(
        "--eps", nargs="+", type=str | float, default=["2/255", "8/255"], help="as 8/255"
    )
    parser.add_argument("--attacked", type=int, default=1000, help="first so many images for them")
    parser.add_argument(
        "--queries", type=int, default=500,
        help="of the random search (Square) on the file itself; 0 for none",
    )  # fmt: skip
    parser.add_argument("--few", type=int, default=200, help="first so many images for it")
    parser.add_argument("--seed", type=int, default=0, help="of the attacks' draws")
    parser.add_argument("--repeats", type=int, default=30, help="rounds of timing; 0 for none")
    parser.add_argument("--threads", type=int, default=2, help="of each engine while it is timed")


def _verify_flags(parser: ArgumentParser) -> None:
    parser.add_argument("run", type=str, help="folder of the run")
    parser.add_argument("model", type=str, help="the ONNX file; its card lies beside it as .json")
    parser.add_argument("--images", type=int | None, default=None, help="first so many test images")
    parser.add_argument(
        "--allow_float", type=bool, default=False,
        help="accept a file of which some convolutions run in float",
    )  # fmt: skip
    parser.add_argument("--data_root", type=str | None, default=None, help="if the data moved")
    parser.add_argument("--json", type=bool, default=False, help="the card as a JSON line")


def _transfer_flags(parser: ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", type=str, help="folders of runs of one data set")
    parser.add_argument(
        "--bits", nargs="+", type=int | None, default=[],
        help="each run at each of these, as 1 2 4 none, weights as trained; else at its own",
    )  # fmt: skip
    parser.add_argument("--attack", type=str, default="pgd-20", help="as of `defquant attack`")
    parser.add_argument("--eps", type=str | float, default="8/255", help="radius, as 8/255")
    parser.add_argument("--images", type=int | None, default=None, help="first so many test images")
    parser.add_argument("--out", type=str, default="transfer", help="folder of the file and figure")
    parser.add_argument("--seed", type=int, default=0, help="of the attack's draws")
    parser.add_argument("--batch_size", type=int, default=256, help="rows at a time")
    parser.add_argument("--data_root", type=str | None, default=None, help="if the data moved")
    parser.add_argument("--device", type=str, default="auto", help="auto, cpu, cuda, cuda:N")
    parser.add_argument("--json", type=bool, default=False, help="a JSON line for each cell")


def _diagnose_flags(parser: ArgumentParser) -> None:
    parser.add_argument("run", type=str, help="folder of the run")
    parser.add_argument(
        "--against", nargs="+", type=str, default=[],
        help="runs to set its error amplification beside: its float and its vanilla twin",
    )  # fmt: skip
    parser.add_argument(
        "--substitute", type=str, default=None, help="run through which the black box goes"
    )
    parser.add_argument("--eps", type=str | float, default="8/255", help="radius, as 8/255")
    parser.add_argument("--images", type=int | None, default=200, help="first so many test images")
    parser.add_argument("--steps", type=int, default=40, help="of the usual attack, PGD")
    parser.add_argument("--restarts", type=int, default=2, help="of the usual attack")
    parser.add_argument("--queries", type=int, default=500, help="of the random search")
    parser.add_argument("--audited", type=int, default=8, help="images of the Lipschitz audit")
    parser.add_argument("--no_audit", type=bool, default=False, help="leave the audit out")
    parser.add_argument("--seed", type=int, default=0, help="of the attacks' draws")
    parser.add_argument("--batch_size", type=int, default=256, help="rows at a time")
    parser.add_argument("--data_root", type=str | None, default=None, help="if the data moved")
    parser.add_argument("--device", type=str, default="auto", help="auto, cpu, cuda, cuda:N")
    parser.add_argument("--json", type=bool, default=False, help="the diagnosis as a JSON line")


def _reproduce_flags(parser: ArgumentParser) -> None:
    parser.add_argument(
        "names",
        nargs="*",
        type=str,
        help="fig1 fig3 fig5 fig6 fig7 table1 ... table6 surrogates, or all",
    )
    parser.add_argument(
        "--preset", type=str, default="small", help="how large: smoke, small, gpu or paper"
    )
    parser.add_argument(
        "--cell", type=str, nargs="+", default=None, metavar="KEY",
        help="make and show these cells alone; each number on the page names its cells",
    )  # fmt: skip
    parser.add_argument(
        "--out", type=str | None, default=None, help="folder of results; runs/PRESET if not given"
    )
    parser.add_argument(
        "--data_root", type=str | None, default=None, help="where CIFAR-10 lies; smoke needs none"
    )
    parser.add_argument("--svhn_root", type=str | None, default=None, help="where SVHN lies")
    parser.add_argument("--jobs", type=int | None, default=None, help="processes; one per core")
    parser.add_argument(
        "--workers", type=str, default="local",
        help="local, or a Ray cluster that sees --out: ray://HOST:10001",
    )  # fmt: skip
    parser.add_argument("--device", type=str, default="auto", help="auto, cpu, cuda, cuda:N")
    parser.add_argument("--list", type=bool, default=False, help="names, and what presets cost")
    parser.add_argument(
        "--dry_run", type=bool, default=False,
        help="what is missing, in cells, image passes and hours on this machine; nothing is made",
    )  # fmt: skip
    parser.add_argument(
        "--render_only", type=bool, default=False, help="show what is there; make nothing"
    )
    parser.add_argument("--json", type=bool, default=False, help="the measurements as JSON lines")


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
    "rescore": rescore_flags,
    "transfer": _transfer_flags,
    "diagnose": _diagnose_flags,
    "report": _report_flags,
    "export": _export_flags,
    "verify": _verify_flags,
    "reproduce": _reproduce_flags,
    "data": _data_flags,
}
