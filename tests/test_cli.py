"""The command line as a user meets it: what it prints, where, and its exit status."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from defquant.cli import eps, main

TRAIN = [
    "train",
    "--data",
    "digits",
    "--train-images",
    "128",
    "--epochs",
    "1",
    "--batch-size",
    "32",
]


def call(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, list[str], list[str]]:
    status = main(words)
    captured = capsys.readouterr()
    return status, captured.out.splitlines(), captured.err.splitlines()


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """Exit 2, nothing on stdout, one line on stderr (after progress)."""
    status, out, err = call(capsys, *words)
    assert status == 2
    assert out == []
    assert err[-1].startswith("defquant: ")
    assert sum(line.startswith("defquant: ") for line in err) == 1
    assert "Traceback" not in "\n".join(err)
    return err[-1]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "dq4"
    assert main([*TRAIN, "--bits", "4", "--beta", "0.05", "--out", str(out)]) == 0
    return out


def test_train_attack_report(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = json.loads((trained / "config.json").read_text())
    assert config["model"]["convex"] is True  # where beta > 0, if not said otherwise
    assert config["train"]["beta"] == 0.05
    words = ["attack", str(trained), "--attack", "fgsm", "pgd-2x2", "--eps", "8/255", "0.1"]
    status, out, _ = call(capsys, *words, "--images", "30", "--json")
    assert status == 0
    records = [json.loads(line) for line in out[:-1]]
    assert [(r["attack"], round(r["eps"] * 255, 3)) for r in records] == [
        ("clean", 0), ("FGSM", 8), ("FGSM", 25.5), ("PGD-2x2", 8), ("PGD-2x2", 25.5),
    ]  # fmt: skip
    assert all(r["total"] == 30 and r["low"] <= r["accuracy"] <= r["high"] for r in records)
    assert out[-1] == str(trained / "results.jsonl")
    status, out, _ = call(capsys, *words[:-4], "--images", "20", "--substitute", str(trained))
    assert status == 0
    assert any("FGSM(B)" in line for line in out)
    page = tmp_path / "page.html"
    table = tmp_path / "table.md"
    status, out, _ = call(
        capsys, "report", str(trained.parent), "--out", str(page), "--markdown", str(table)
    )
    assert status == 0
    assert out[-1] == str(page)
    assert "DQ" in page.read_text()
    assert "| DQ" in table.read_text()


def test_flags_are_typed_and_refused_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert "whole number from 1 to 8" in refused(capsys, "train", "--bits", "four", "--out", "x")
    assert "found 0" in refused(capsys, "train", "--bits", "0", "--out", "x")
    assert "found 9" in refused(capsys, "train", "--bits", "9", "--out", "x")
    assert "write 8/255" in refused(capsys, "attack", "x", "--eps", "8")
    assert "found 'eight'" in refused(capsys, "attack", "x", "--eps", "eight")
    assert "unknown attack 'cw'" in refused(capsys, "attack", "x", "--attack", "cw")
    assert "--nope" in refused(capsys, "train", "--nope")
    assert "--out" in refused(capsys, "train")
    assert "unknown verb" in refused(capsys, "tain")
    assert "unknown preset" in refused(capsys, *TRAIN, "--preset", "x", "--out", "x")
    assert "unknown model" in refused(capsys, *TRAIN, "--model", "vgg-19", "--out", "/tmp/x")
    assert "unknown device" in refused(capsys, *TRAIN, "--device", "tpux", "--out", "/tmp/x")
    assert "epochs must be positive" in refused(capsys, *TRAIN, "--epochs", "0", "--out", "x")
    assert "milestones" in refused(capsys, *TRAIN, "--milestones", "x", "--out", "x")
    assert "schedule" in refused(capsys, *TRAIN, "--schedule", "cosine", "--out", "x")


def test_missing_and_unfinished_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no checkpoint at" in refused(capsys, "attack", str(tmp_path / "none"))
    assert "no folder" in refused(capsys, "report", str(tmp_path / "none"))
    assert "results.jsonl" in refused(capsys, "report", str(tmp_path))


def test_a_folder_is_not_trained_over(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (trained / "checkpoint.safetensors").read_bytes()
    words = [*TRAIN, "--bits", "4", "--beta", "0.05", "--out", str(trained)]
    assert "--resume" in refused(capsys, *words)
    assert "bits=4, not 3" in refused(capsys, *words, "--bits", "3", "--resume")
    status, _, _ = call(capsys, *words, "--resume")  # finished: nothing to do, and says so
    assert status == 0
    assert (trained / "checkpoint.safetensors").read_bytes() == before


def test_config_files_and_presets(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = call(capsys, "train", "--preset", "cifar10-paper", "--print_config")
    assert status == 0
    text = "\n".join(out)
    assert "model: wrn-28-10" in text
    assert "beta: 0.002" in text
    path = tmp_path / "c.yaml"
    path.write_text(text.replace("epochs: 200", "epochs: 3"))
    status, out, _ = call(capsys, "train", "--config", str(path), "--lr", "0.5", "--print_config")
    assert "epochs: 3" in "\n".join(out)
    assert "lr: 0.5" in "\n".join(out)
    path.write_text("epochs: many\n")
    assert "epochs" in refused(capsys, "train", "--config", str(path))
    path.write_text("{")
    refused(capsys, "train", "--config", str(path))
    refused(capsys, "train", "--config", str(tmp_path / "none.yaml"))


def test_none_and_lists_as_people_write_them(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["train", "--bits", "none", "--milestones", "60,120", "--attack", "none"]
    status, out, _ = call(capsys, *words, "--print_config")
    assert status == 0
    text = "\n".join(out)
    assert "bits: null" in text
    assert "- 60" in text or "[60" in text
    assert "attack: none" in text
    assert "a number" in refused(capsys, "train", "--lr", "abc", "--out", "x")


def test_a_preset_named_in_a_config_file_counts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("preset: svhn-paper\nepochs: 7\n")
    _, out, _ = call(capsys, "train", "--config", str(path), "--print_config")
    assert "model: wrn-16-4" in out
    assert "epochs: 7" in out


def test_mistakes_in_an_attack(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--batch_size" in refused(capsys, "attack", str(trained), "--batch-size", "0")
    assert "--examples" in refused(capsys, "attack", str(trained), "--examples", "-3")
    assert "450 images" in refused(capsys, "attack", str(trained), "--images", "451")


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    for words in ([], ["--help"], ["train", "--help"], ["attack", "-h"], ["--version"]):
        status, out, err = call(capsys, *words)
        assert status == 0
        assert out
        assert not err


def test_eps_as_people_write_it() -> None:
    assert eps("8/255") == 8 / 255
    assert eps(" 0.1 ") == 0.1
    assert eps("1e-2") == 0.01
    assert eps(0) == 0


@pytest.mark.slow
def test_ctrl_c_keeps_the_last_checkpoint_and_resumes(tmp_path: Path) -> None:
    words = [*TRAIN, "--epochs", "200", "--out", str(tmp_path / "run")]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "defquant", *words]
    # a job in the background of a script inherits that Ctrl-C is ignored
    heard = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.default_int_handler)}
    pipe = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=env, **pipe, **heard) as process:  # type: ignore[call-overload]
        assert process.stderr is not None
        for line in process.stderr:
            if "epoch 2/200" in line:
                process.send_signal(signal.SIGINT)
                break
        rest = process.stderr.read()
        assert process.wait(30) == 130
    assert "interrupted" in rest
    assert "Traceback" not in rest
    log = (tmp_path / "run" / "log.jsonl").read_text().splitlines()
    assert len(log) >= 2
    assert not [p for p in (tmp_path / "run").iterdir() if p.name.startswith(".checkpoint")]


@pytest.mark.slow
def test_two_runs_cannot_share_a_folder(tmp_path: Path) -> None:
    words = [*TRAIN, "--epochs", "200", "--out", str(tmp_path / "run")]
    command = [sys.executable, "-m", "defquant", *words]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        while not (tmp_path / "run" / ".lock").exists():
            time.sleep(0.05)
        second = subprocess.run(command, capture_output=True, text=True, check=False)
        process.kill()
    assert second.returncode == 2
    assert "in use by another run" in second.stderr


@pytest.mark.slow
def test_demo_smoke(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "demo"
    status, lines, _ = call(capsys, "demo", "--smoke", "--seeds", "1", "--out", str(out))
    assert status == 0
    assert lines[-1] == str(out / "report.html")
    assert len(list(out.glob("*/results.jsonl"))) == 6
    stamps = {p: p.stat().st_mtime_ns for p in out.glob("*/checkpoint.safetensors")}
    assert call(capsys, "demo", "--smoke", "--seeds", "1", "--out", str(out))[0] == 0
    assert stamps == {p: p.stat().st_mtime_ns for p in out.glob("*/checkpoint.safetensors")}
