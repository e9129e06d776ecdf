"""JSON, JSON lines and YAML from elsewhere: mutated, and the smallest that once did harm."""

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from defquant.checkpoint import Facts, _facts
from defquant.cli import main
from defquant.config import DataConfig, ModelConfig, TrainConfig
from defquant.errors import UserError, shown
from defquant.images import KIND, MANIFEST, Saved, read_manifest
from defquant.paper import grid
from defquant.records import Measurement, read_folder, read_jsonl
from defquant.report import build_report, plot_curves
from defquant.report.cards import read_cards
from harness import SECONDS, fuzz, outcome

pytestmark = pytest.mark.usefixtures("undrawn")  # of memory they take what is no input's fault
LINE = Measurement(
    "r", "DQ", "wrn-10-1", 4, 0.05, 0, "digits", "f0", "FGSM", 8 / 255, "FGSM(eps=8/255)", 5, 10
)
FACTS = Facts(
    ModelConfig("wrn-10-1", 4), DataConfig(), TrainConfig(epochs=1), 2, 1, ("a", "b"), "made",
    "0" * 16, ({"epoch": 1, "loss": 1.0},),
)  # fmt: skip
PICTURE = Saved("00-clean/000000.png", 0, 1, "clean", 0.0, "clean", 1, 1, 0, "0" * 64)
HEAD = {"kind": KIND, "format": 1, "pictures": 1, "shape": [1, 8, 8], "classes": ["a", "b"]}
ANSWER = {"prediction": 1, "confidence": 0.5}
STRIP = {
    "method": "DQ", "data": "digits", "model": "wrn-10-1", "attack": "FGSM", "eps": 0.1, "seed": 0,
    "examples": [{"id": 0, "label": 1, "clean": ANSWER, "adversarial": ANSWER}],
}  # fmt: skip
TOKENS = [
    b"1e400", b"NaN", b"-1", b"99999999999999999999", b"5.5", b'"x"', b"null", b"[]", b"{}",
    b"[" * 99, b'"\\ud800"', b'"\\u0000"', b"\xff", b"true", b'"' + b"n" * 5000 + b'"',
    b"&a", b"*a", b"\n",
]  # fmt: skip


def text(value: Any) -> bytes:
    return json.dumps(value).encode() + b"\n"


def results(folder: Path) -> Any:
    build_report(folder, folder / "page.html")
    return read_folder(folder)


def flags(folder: Path) -> Any:
    words = ["train", "--config", str(folder / "f.yaml"), "--out", "/dev/null/x"]
    assert main(words) == 2  # never trains, never raises


READERS: dict[str, tuple[str, Callable[[Path], Any], bytes]] = {
    "results": ("results.jsonl", results, text(asdict(LINE)) * 2),
    "probes": (grid.VALUES, grid.read, text({"cell": "a", "values": [1, 2]})),
    "manifest": (MANIFEST, read_manifest, text(HEAD) + text(asdict(PICTURE))),
    "config": ("f.yaml", flags, b"model: wrn-10-1\nbits: 4\nlr: 0.1\nmilestones: [1, 2]\n"),
    "header": (
        "h.json",
        lambda folder: _facts(folder, (folder / "h.json").read_text(errors="surrogateescape")),
        text({"format": 1, **asdict(FACTS)}),
    ),
}


def reader(name: str, folder: Path) -> Callable[[bytes], Any]:
    file, read, _ = READERS[name]
    return lambda raw: ((folder / file).write_bytes(raw), read(folder))


@pytest.mark.slow
@pytest.mark.parametrize("name", READERS)
def test_fuzz(name: str, tmp_path: Path) -> None:
    fuzz(reader(name, tmp_path), [READERS[name][2]], tokens=TOKENS, seconds=SECONDS)


@pytest.mark.slow
def test_fuzz_what_lies_beside_results(tmp_path: Path) -> None:
    """A broken one becomes a note on the page."""
    (tmp_path / "results.jsonl").write_bytes(text(asdict(LINE)))

    def read(raw: bytes) -> None:
        for name in ("config.json", "log.jsonl", "examples.json", "card.json"):
            (tmp_path / name).write_bytes(raw)
        build_report(tmp_path, tmp_path / "page.html")

    card = {"kind": "defquant deployed model", "format": 1, "convolutions": [1, 1]}
    seeds = [text({"epoch": 1, "loss": 1.0}) * 2, text(STRIP), text(card), text(asdict(FACTS))]
    fuzz(read, seeds, tokens=TOKENS)


@pytest.mark.parametrize(
    "raw",
    [
        b"\xff\xfe{\x00}\x00", "é".encode("latin-1"), b"[" * 10_000, b"{" * 10_000, b'"\\ud800"',
        b"9" * 5000, b"1e400", b"NaN", b"\0", b"[1]", b'{"format": 1}', b"null",
    ],
)  # fmt: skip
@pytest.mark.parametrize("name", READERS)
def test_no_text_of_ours_is_one_line(raw: bytes, name: str, tmp_path: Path) -> None:
    said = outcome(reader(name, tmp_path), raw + b"\n")
    assert name == "config" or said is not None


IMPOSSIBLE = [
    ("results", {"eps": 16}, "eps"), ("results", {"eps": -1}, "eps"),
    ("results", {"bits": -1}, "bits"),
    ("results", {"correct": 5.5}, "correct"), ("results", {"correct": 11}, "11 of 10"),
    ("results", {"seed": "0"}, "seed"), ("results", {"beta": float("nan")}, "beta"),
    ("results", {"vanishing": 5}, "vanishing"), ("results", {"method": ["x"]}, "method"),
    ("results", {"seed": 1 << 70}, "64 bits"), ("results", {"evidence": 3}, "evidence"),
    ("header", {"classes": ["a"] * 3}, "a name for each"), ("header", {"classes": "ab"}, "classes"),
    ("header", {"model": asdict(FACTS.model) | {"activation": "x"}}, "model.activation"),
    ("header", {"model": asdict(FACTS.model) | {"convex": "no"}}, "model.convex"),
    ("header", {"train": asdict(FACTS.train) | {"lr": 1e999}}, "train.lr"),
    ("header", {"history": [{"loss": "x"}]}, r"history\[0\].loss"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "changes", "message"), IMPOSSIBLE)
def test_impossible_values_are_refused_by_file_and_field(
    name: str, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    whole = json.loads(READERS[name][2].splitlines()[0])
    with pytest.raises(UserError, match=message):
        reader(name, tmp_path)(text(whole | changes))


@pytest.mark.parametrize(
    "settings",
    ["epochs: 1\nepochs: 2\n", "a: &a [1]\nb: *a\n", "lr: 1.0e400", "seed: 99999999999999999999",
     'data_root: "a\\0b"', 'data_root: "a\\e[2J"', "preset: [1]"],
)  # fmt: skip
def test_settings_that_cannot_be(
    settings: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "f.yaml").write_text(settings)
    flags(tmp_path)
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    "words",
    [["report", "a\udcff"], ["report", "a\x1b[2J"], ["report", "x" * 5000],
     ["train", "--seed", "9" * 20], ["train", "--milestones", "[" * 10_000],
     ["z\u202e" * 500], ["attack", "x", "--eps", "1e400"]],
)  # fmt: skip
def test_flags_that_cannot_be(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    line, end, rest = capsys.readouterr().err.partition("\n")
    assert line.isprintable() and end and not rest and len(line) < 500


def test_names_from_folders_reach_no_terminal_raw(tmp_path: Path) -> None:
    place = tmp_path / "a\x1b[2J\udcff"
    place.mkdir()
    (place / "results.jsonl").write_bytes(text(asdict(LINE)))
    (found,) = read_folder(tmp_path)
    assert found.run == "a\\x1b[2J\\udcff"
    build_report(tmp_path, tmp_path / "page.html")
    assert shown("x\u202e\n" * 99).isprintable()
    assert len(shown("x" * 10**6)) == 80
    assert str(UserError("two\nlines\x07")) == "two lines\\x07"


def test_byte_order_marks_and_a_power_loss_are_read(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + text(asdict(LINE)) + bytes(40))
    assert read_jsonl(path) == [LINE]


def test_a_name_is_no_formula(tmp_path: Path) -> None:
    names = (("_a$b_", "$x_"), ("$\\b$", "$"))
    found = [replace(LINE, method=method, attack=attack) for method, attack in names]
    svg = plot_curves(found, tmp_path / "f.svg").read_text()
    assert "$x_<" in svg and "_a$b_" in svg


def test_broken_cards_are_notes(tmp_path: Path) -> None:
    head = b'{"kind": "defquant deployed model", "format": '
    (tmp_path / "m.json").write_bytes(head + b"[" * 10_000)
    models, notes = read_cards(tmp_path)
    assert not models and "nested too deep" in notes[0]
