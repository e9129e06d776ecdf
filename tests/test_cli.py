"""The command line as a user meets it: what it prints, where, and its exit status."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from defquant.cli import VERBS, main
from defquant.progress import TrainingProgress, keep_log, spoken
from defquant.records import read_folder

TRAIN = [
    "train", "--data", "digits", "--train-images", "128", "--epochs", "1", "--batch-size", "32",
]  # fmt: skip


def call(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, list[str], list[str]]:
    status = main(words)
    captured = capsys.readouterr()
    return status, captured.out.splitlines(), captured.err.splitlines()


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """Exit 2, nothing on stdout, one line on stderr (after progress)."""
    status, out, err = call(capsys, *words)
    assert (status, out) == (2, [])
    assert [line for line in err if line.startswith("defquant: ")] == err[-1:]
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
    status, out, err = call(capsys, *words, "--images", "30", "--json")
    records = [json.loads(line) for line in out]
    pairs = [("FGSM", 8), ("FGSM", 25.5), ("PGD-2x2", 8), ("PGD-2x2", 25.5)]
    found = [(r["attack"], round(r["eps"] * 255, 3)) for r in records]
    assert (status, found) == (0, [("clean", 0), *pairs])
    assert all(r["total"] == 30 and r["low"] <= r["accuracy"] <= r["high"] for r in records)
    assert err[-1] == str(trained / "results.jsonl")
    said = [f"dq4: {name} {eps}/255 ({i} of 4)" for i, (name, eps) in enumerate(pairs, 1)]
    assert [line for line in err if "(" in line] == said
    status, out, _ = call(capsys, *words[:-4], "--images", "20", "--substitute", str(trained))
    assert status == 0 and any("FGSM(B)" in line for line in out)
    page, table = tmp_path / "page.html", tmp_path / "table.md"
    words = ["report", str(trained.parent), "--out", str(page), "--markdown", str(table)]
    status, out, _ = call(capsys, *words)
    assert (status, out[-1]) == (0, str(page))
    assert "DQ" in page.read_text() and "| DQ" in table.read_text()


@pytest.mark.parametrize(
    ("words", "written"),
    [
        ("train --train-images 64 --epochs 1 --out {tmp}/new", "{tmp}/new"),
        ("attack {run} --attack fgsm --images 9 --examples 0 --detector", "{run}/detector.json"),
        ("transfer {run} --bits 1 none --images 9 --out {tmp}", "{tmp}/transfer.json"),
        ("diagnose {run} --images 9 --steps 1 --queries 1 --no-audit", "{run}/diagnosis.json"),
        ("report {run} --out {tmp}/page.html", "{tmp}/page.html"),
        ("reproduce all --preset smoke --render-only --out {tmp}", "{tmp}/report.html"),
    ],
)
def test_with_json_all_of_stdout_is_json(
    words: str, written: str, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The path of what was written goes to stderr then, so that `| jq .` works."""
    run = shutil.copytree(trained, tmp_path / "run")
    assert main(["attack", str(run), "--attack", "fgsm", "--images", "9", "--examples", "0"]) == 0
    capsys.readouterr()
    made = words.format(run=run, tmp=tmp_path).split()
    status, out, err = call(capsys, *made, "--json")
    assert status in (0, 1)
    assert all(isinstance(json.loads(line), dict) for line in out)
    assert out or "reproduce" in words
    assert err[-1] == written.format(run=run, tmp=tmp_path)


def test_one_black_box_for_two_runs_scores_as_the_attack_itself(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from defquant.attacks import FGSM, PGD, Transfer
    from defquant.evaluate import sweep
    from defquant.measure import load_on
    from defquant.runs import test_images

    runs = [tmp_path / "a", tmp_path / "b"]
    for run in runs:
        shutil.copytree(trained, run)
        (run / "results.jsonl").unlink(missing_ok=True)
    other = tmp_path / "s"
    given = f"{other}/"  # as typed, so it stands in the results
    assert main([*TRAIN, "--epochs", "2", "--seed", "1", "--out", str(other)]) == 0
    words = ["--attack", "random", "fgsm", "pgd-2", "--eps", "0.1", "--images", "60"]
    words += ["--substitute", given, "--seed", "4", "--examples", "0"]
    assert call(capsys, "attack", *map(str, runs), *words)[0] == 0
    assert len(list((other / "transfer").iterdir())) == 2  # Random asks no network

    cpu = torch.device("cpu")
    (model, facts), (substitute, _) = load_on(runs[0], cpu), load_on(other, cpu)
    live = [Transfer(attack, substitute, given) for attack in (FGSM(0.1), PGD(0.1, steps=2))]
    scored = list(sweep(model, test_images(facts, limit=60), live, seed=4))
    expected = [(repr(s.attack), s.score) for s in scored[1:]]
    assert len({score for _, score in expected} | {scored[0].score}) == 3
    for run in runs:
        found = read_folder(run)
        boxes = [(m.settings, m.score) for m in found if m.attack.endswith("(B)")]
        assert boxes == expected
        assert [m.attack for m in found if not m.attack.endswith("(B)")] == [
            "clean", "Random", "FGSM", "PGD-2",
        ]  # fmt: skip
    assert len(read_folder(tmp_path)) == 12  # what the substitute's folder keeps is no run
    assert call(capsys, "report", str(tmp_path), "--out", str(tmp_path / "page.html"))[0] == 0


@pytest.fixture(scope="module")
def squeezed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("squeezed") / "run"
    assert main([*TRAIN, "--train-images", "256", "--squeeze", "5", "--out", str(out)]) == 0
    return out


def test_unaware_and_detector_are_what_python_finds(
    squeezed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from defquant.attacks import FGSM, PGD, FirstOrder
    from defquant.checkpoint import load_model
    from defquant.defenses import Detector, FeatureSqueezing, Unaware
    from defquant.evaluate import robust_accuracy
    from defquant.runs import test_images

    words = ["attack", str(squeezed), "--attack", "random", "fgsm", "pgd-2", "--eps", "0.1"]
    words += ["--images", "60", "--examples", "0", "--unaware", "--detector"]
    status, out, err = call(capsys, *words, "--json")
    written = [str(squeezed / name) for name in ("results.jsonl", "detector.json")]
    assert (status, err[-2:]) == (0, written)
    rows = [json.loads(line) for line in out]
    assert {r["method"] for r in rows} == {"float + squeezing"}
    scores = {r["attack"]: (r["correct"], r["total"]) for r in rows if "detected" not in r}
    assert list(scores) == ["clean", "Random", "FGSM", "PGD-2", "FGSM (unaware)", "PGD-2 (unaware)"]
    model, facts = load_model(squeezed)
    assert isinstance(model, FeatureSqueezing)
    images, train = test_images(facts, limit=60), test_images(facts, split="train")
    attacks: list[FirstOrder] = [FGSM(0.1), PGD(0.1, steps=2)]
    for attack in attacks:
        score = robust_accuracy(model, images, Unaware(attack))
        assert scores[f"{attack.name} (unaware)"] == (score.correct, score.total)

    records = json.loads((squeezed / "detector.json").read_text())
    assert records == [r for r in rows if "detected" in r]
    assert [r["attack"] for r in records] == ["Random", "FGSM", "PGD-2"]
    x, y = images.take(torch.arange(60))
    made, right = FGSM(0.1)(model.model, x, y), model.model(x).argmax(1) == y
    detector = Detector().fit(model.model, train.images)
    found = detector.rates(model.model, images.images, made[right], y[right])
    assert found.detected is not None
    k, n, false = found.detected.correct, found.detected.total, found.false_positives.correct
    counts = ("detected", "fooling", "false_positives", "clean")
    assert [records[1][name] for name in counts] == [k, n, false, 60]
    assert records[1]["calibration"] == {"fingerprint": train.fingerprint, "images": 256}

    lines = [row for row in call(capsys, *words)[1] if row.startswith("detector  ")]
    assert f"25.5/255  detects {k}/{n} ({k / n:.1%})" in lines[1] and "FGSM" in lines[1]
    assert lines[1].endswith(f"  false positives {false}/60 ({false / 60:.1%})")
    for column in (" detects ", " false positives "):
        assert len({line.index(column) for line in lines}) == 1


def test_unaware_needs_a_squeezing_in_every_run(
    trained: Path, squeezed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.stat().st_mtime_ns for path in squeezed.iterdir()}
    message = refused(capsys, "attack", str(squeezed), str(trained), "--unaware", "--images", "20")
    assert f"{trained} has none" in message and "--squeeze 5" in message
    assert before == {path: path.stat().st_mtime_ns for path in squeezed.iterdir()}  # no attack


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("train --bits four --out x", "1 to 8, or none for full precision; found 'four'"),
        ("train --bits 0 --out x", "found 0"),
        ("train --bits 9 --out x", "found 9"),
        ("train --squeeze 9", "squeeze must be a whole number from 1 to 8, or none for no squeez"),
        ("train --squeeze x", "1 to 8, or none for no squeezing; found 'x'"),
        ("train --lr abc --out x", "--lr must be a finite number; found 'abc'"),
        ("train --milestones x --out x", "--milestones must be a whole number"),
        ("train --schedule cosine", "one of step, one-cycle, constant; found 'cosine'"),
        ("train --epochs 0 --out x", "epochs must be positive"),
        ("train --model vgg-19 --out {tmp}/x", "unknown model"),
        ("train --device tpux --out {tmp}/x", "unknown device"),
        ("train --preset x --out x", "unknown preset 'x'"),
        ("train --nope", "--nope"),
        ("train --presett x", "Did you mean --preset?"),
        ("train --schedule setp", "found 'setp' (did you mean step?)"),
        ("train --preset digits-shrt", "(did you mean digits-short?)"),
        ("train --data digts --out {tmp}/x", "(did you mean digits?)"),
        ("train --quiet -v --out x", "the opposite"),
        ("train", "--out"),
        ("tarin", "unknown verb 'tarin' (did you mean train?)"),
        ("attack x --attack pdg-20", "unknown attack 'pdg-20' (did you mean pgd?)"),
        ("reproduce tabel1", "(did you mean table1?)"),
        ("attack x --eps 8", "write 8/255"),
        ("attack x --eps 300/255", "eps must lie in [0, 1]; found 1.17647"),
        ("attack x --eps inf", "eps must lie in [0, 1]; found inf"),
        ("attack x --eps eight", "found 'eight'"),
        ("attack x --attack cw", "unknown attack 'cw'"),
        ("attack {run} --batch-size 0", "--batch_size must be 1 or more; found 0"),
        ("attack {run} --examples -3", "--examples must be 0 or more; found -3"),
        ("attack {run} --images 451", "450 images"),
        ("attack {tmp}/none", "no checkpoint at"),
        ("report {tmp}/none", "no folder"),
        ("report {tmp}", "results.jsonl"),
        ("data get x", "use `defquant data fetch NAME`, or `defquant data pack NAME --out FILE`, "),
        ("data pack digits", "not of digits; found pack digits"),
    ],
)
def test_mistakes_are_one_line(
    words: str, message: str, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in refused(capsys, *words.format(run=trained, tmp=tmp_path).split())


def test_quiet_verbose_and_the_log_of_a_run(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The log gets what is said, quiet or not, after what was there; a refused command none."""
    run = shutil.copytree(trained, tmp_path / "run")
    log = run / "run.log"
    before = log.read_text()
    assert "defquant train --data digits" in before and "dq4: epoch 1/1" in before
    refused(capsys, *TRAIN, "--bits", "4", "--out", str(run))
    assert log.read_text() == before
    words = ["attack", str(run), "--attack", "fgsm", "--eps", "0.1", "--images", "9"]
    status, out, err = call(capsys, "-q", *words, "--examples", "0")
    assert (status, len(out), err) == (0, 3, [])
    (command, *said) = log.read_text().removeprefix(before).splitlines()
    assert command.endswith(f"$ defquant -q {shlex.join(words)} --examples 0")
    lines = [line.partition(" ") for line in said]
    assert all(datetime.fromisoformat(at).tzinfo for at, _, _ in lines)
    assert [line for _, _, line in lines if line in out] == out
    assert [line for _, _, line in lines if line not in out] == ["run: FGSM 25.5/255 (1 of 1)"]
    status, loud, err = call(capsys, *words, "--examples", "0", "-v")
    assert (status, loud) == (0, out) and "eps: [0.1]" in err and err[-1].endswith(" s")
    assert read_folder(run)  # it is no result


def test_on_a_terminal_epochs_are_logged_and_left_to_the_bar(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    record = dict.fromkeys(("epoch", "loss", "accuracy", "penalty", "images_per_second"), 1.0)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with spoken("defquant x"), TrainingProgress("r", 1, 0) as progress:
        keep_log(tmp_path / "later")
        progress.epoch(1, record)  # no folder yet: it waits
        (tmp_path / "later").mkdir()
        print("\x1b[1mloss", end=" ")
        print("1\x1b[0m")
    first, *rest = (tmp_path / "later" / "run.log").read_text().splitlines()
    assert first.endswith("$ defquant x") and "r: epoch 1/1" in rest[0]
    assert rest[1].endswith(" loss 1") and "epoch" not in capsys.readouterr().err


def test_completion_knows_the_verbs_and_flags(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    status, out, _ = call(capsys, "--install-completion", "--shell", "bash")
    text = Path(out[-1]).read_text()
    assert status == 0 and tmp_path in Path(out[-1]).parents
    assert all(word in text for word in (*VERBS, "--weight-bits", "digits-short", "one-cycle"))


def test_a_folder_is_not_trained_over(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (trained / "checkpoint.safetensors").read_bytes()
    words = [*TRAIN, "--bits", "4", "--beta", "0.05", "--out", str(trained)]
    assert "--resume" in refused(capsys, *words)
    assert "bits=4, not 3" in refused(capsys, *words, "--bits", "3", "--resume")
    status, _, _ = call(capsys, *words, "--resume")  # finished: nothing to do, and says so
    assert status == 0
    assert (trained / "checkpoint.safetensors").read_bytes() == before


def printed(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    """What `--print_config` says, as YAML."""
    status, out, err = call(capsys, *words, "--print_config")
    assert (status, err) == (0, [])
    found: dict[str, Any] = yaml.safe_load("\n".join(out))
    return found


def test_config_files_and_presets(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "c.yaml"
    config = ("--config", str(path))
    paper = printed(capsys, "train", "--preset", "cifar10-paper")
    assert (paper["model"], paper["beta"], paper["epochs"]) == ("wrn-28-10", 0.002, 200)
    path.write_text(yaml.safe_dump(paper | {"epochs": 3}))
    assert printed(capsys, "train", *config, "--lr", "0.5") == paper | {"epochs": 3, "lr": 0.5}
    path.write_text("bits: none\nsqueeze: none\nattack: none\n")
    found = printed(capsys, "train", "--preset", "cifar10-paper", *config)
    assert (found["bits"], found["squeeze"], found["attack"]) == (None, None, "none")
    path.write_text("preset: svhn-paper\nepochs: 7\n")
    found = printed(capsys, "train", *config)
    assert (found["model"], found["epochs"]) == ("wrn-16-4", 7)
    path.write_text("bits: [1, none]\n")
    assert printed(capsys, "transfer", "x", *config)["bits"] == [1, None]
    for text in ("epochs: many\n", "epochs: [[1]]\n", "nope: 1\n", "{", "[1]"):
        path.write_text(text)
        refused(capsys, "train", *config)
    refused(capsys, "train", "--config", str(tmp_path / "none.yaml"))


def test_values_as_people_write_them(capsys: pytest.CaptureFixture[str]) -> None:
    words = "train --bits none --squeeze 5 --squeeze none --milestones 60,120 --attack none"
    words += " --data_root a --train-images 9 --augment false --nesterov --attack-eps 8/255"
    words += " --convex none"
    found = printed(capsys, *words.split())
    wanted = {
        "bits": None, "squeeze": None, "milestones": [60, 120], "attack": "none",
        "data_root": "a", "train_images": 9, "augment": False, "nesterov": True,
        "attack_eps": 8 / 255, "amp": False, "convex": None,
    }  # fmt: skip
    assert {name: found[name] for name in wanted} == wanted
    found = printed(capsys, "attack", "x", "--eps", "8/255", " 0.1 ", "1e-2", "0", "--json")
    assert (found["eps"], found["json"]) == ([8 / 255, 0.1, 0.01, 0], True)


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    for words in ([], ["--help"], ["train", "--help"], ["attack", "-h"], ["--version"]):
        status, out, err = call(capsys, *words)
        assert status == 0 and out and not err


@pytest.mark.slow
def test_a_folder_has_one_run_and_ctrl_c_keeps_its_last_checkpoint(tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = [sys.executable, "-m", "defquant", *TRAIN, "--epochs", "200", "--out", str(run)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    # a job in the background of a script inherits that Ctrl-C is ignored
    heard = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.default_int_handler)}
    pipe = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=env, **pipe, **heard) as process:  # type: ignore[call-overload]
        next(line for line in process.stderr if "epoch 2/200" in line)
        second = subprocess.run(command, capture_output=True, text=True, check=False)
        process.send_signal(signal.SIGINT)
        rest = process.stderr.read()
        assert process.wait(30) == 130
    assert second.returncode == 2 and "in use by another run" in second.stderr
    assert "interrupted" in rest and "Traceback" not in rest
    assert len((run / "log.jsonl").read_text().splitlines()) >= 2
    assert not list(run.glob(".checkpoint*"))


def test_what_fails_before_it_writes_leaves_no_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    there = tmp_path / "there"
    there.mkdir()
    for out in (tmp_path / "new", there):
        words = ["train", "--data", "npz", "--out", str(out)]
        assert "no data at" in refused(capsys, *words, "--data-root", str(tmp_path / "nowhere"))
    message = refused(capsys, *TRAIN, "--validation-images", "1347", "--out", str(tmp_path / "new"))
    said = "digits has 1,347 training images, of which validation_images holds out"
    assert said in message and "correct the data root" in message
    assert [path.name for path in tmp_path.iterdir()] == ["there"]  # what was there stays


def test_a_demo_of_other_settings_is_refused_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from defquant.paper import demo
    from defquant.runs import train_run

    name, first = next(iter(demo.networks(1, smoke=True).items()))
    train_run(*first.settings, tmp_path / name, show=False)
    monkeypatch.setattr(demo, "each", lambda *_: pytest.fail("it began to work"))
    assert "started with train_images=256, not None: choose another folder" in refused(
        capsys, "demo", "--out", str(tmp_path)
    )


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
