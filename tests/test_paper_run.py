"""Experiments survive kills at any moment, neighbours, cut lines and bad networks."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, replace
from functools import partial
from multiprocessing import active_children
from pathlib import Path
from typing import Any

import pytest
import torch

from defquant.config import DataConfig, ModelConfig, TrainConfig
from defquant.errors import UserError
from defquant.paper import grid
from defquant.paper import run as run_module
from defquant.paper.figures import EXPERIMENTS, cells_of
from defquant.paper.grid import SCALES, Cell, Network, Trial
from defquant.paper.run import run
from defquant.paper.workers import Job, cores, each
from small_experiment import (
    CELLS,
    DATA,
    DQ,
    FAMILY,
    FLOAT,
    SUBSTITUTE,
    TRAIN,
    counts,
    each_once,
    make_undisturbed,
    same,
    stamps,
    until,
)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_undisturbed(tmp_path_factory.mktemp("undisturbed"))


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Jobs run in this process, one after the other."""

    def one_by_one(title: str, jobs: Any, processes: int, **how: Any) -> Iterator[Any]:
        yield from ((name, job()) for name, job in jobs)

    monkeypatch.setattr(run_module, "each", one_by_one)


# ------------------------------------------------------------ killed, and side by side


def start(out: Path, jobs: int = 2) -> subprocess.Popen[str]:
    """`run(CELLS, out)` as the leader of a group of processes, as a shell starts it."""
    code = (
        "import sys; from pathlib import Path; from small_experiment import CELLS\n"
        "from defquant.paper.run import run\n"
        "try: sys.exit(len(run(CELLS, Path(sys.argv[1]), jobs=int(sys.argv[2]))))\n"
        "except KeyboardInterrupt: sys.exit(130)"
    )
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    hears = partial(signal.signal, signal.SIGINT, signal.default_int_handler)
    return subprocess.Popen(
        [sys.executable, "-c", code, str(out), str(jobs)], text=True, stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": path}, start_new_session=True, preexec_fn=hears,
    )  # fmt: skip


def finished(process: subprocess.Popen[str]) -> str:
    """What it said; it must have failed in nothing."""
    _, said = process.communicate(timeout=200)
    assert process.returncode == 0, said
    return said


def gone(group: int) -> bool:
    """Whether no process of the group is left."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return True
    return False


@pytest.mark.slow
def test_killed_at_any_moment_it_ends_as_if_undisturbed(undisturbed: Path, tmp_path: Path) -> None:
    draw = random.Random(0)
    for _ in range(6):
        before = stamps(tmp_path)
        with start(tmp_path) as process:
            while process.poll() is None and stamps(tmp_path) == before:
                time.sleep(0.02)
            time.sleep(draw.uniform(0, 0.7))
            process.kill()
        assert until(partial(gone, process.pid), 20)  # its children end, and with them the claims
    finished(start(tmp_path))
    assert each_once(tmp_path)
    assert same(tmp_path, undisturbed)


@pytest.mark.slow
def test_two_at_once_share_the_work(undisturbed: Path, tmp_path: Path) -> None:
    first, second = start(tmp_path, jobs=1), start(tmp_path, jobs=2)
    finished(first)
    finished(second)
    assert each_once(tmp_path)
    assert same(tmp_path, undisturbed)


@pytest.mark.slow
def test_ctrl_c_ends_all_processes(tmp_path: Path) -> None:
    for wait in (0.0, 0.1, 1.0, None):  # while the children start, and when they are at work
        out = tmp_path / str(wait)
        process = start(out)
        assert until((out / grid.SCORES).exists if wait is not None else partial(stamps, out), 100)
        time.sleep(wait or 0.0)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all of the group
        _, said = process.communicate(timeout=20)
        assert process.returncode == 130, said
        assert said == ""
        assert until(partial(gone, process.pid), 20)


# ------------------------------------------------------------------------ one process


def test_undisturbed(undisturbed: Path) -> None:
    assert each_once(undisturbed)
    assert len(counts(undisturbed)) == 3 + 2 * 5
    assert len(grid.read(undisturbed).values) == 2


def test_what_is_there_is_not_made_again(
    undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Results without networks are enough: no network is trained, nothing is written."""
    for name in (grid.SCORES, grid.VALUES):
        shutil.copy(undisturbed / name, tmp_path)
    monkeypatch.delattr(run_module, "each")
    assert run(CELLS, tmp_path) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == [grid.VALUES, grid.SCORES]


def without(out: Path, cell: Cell) -> None:
    """Take the lines of `cell` out of the results."""
    lines = (out / grid.SCORES).read_text().splitlines(keepends=True)
    kept = [line for line in lines if json.loads(line)["cell"] != cell.key]
    (out / grid.SCORES).write_text("".join(kept))


def test_a_family_is_measured_as_a_whole(undisturbed: Path, tmp_path: Path, at_once: None) -> None:
    shutil.copytree(undisturbed, tmp_path, dirs_exist_ok=True)
    without(tmp_path, FAMILY[2])
    assert run(CELLS, tmp_path) == []
    assert same(tmp_path, undisturbed)
    assert each_once(tmp_path)  # the smaller eps were measured again, and not written again
    without(tmp_path, FAMILY[2])
    assert run(FAMILY[2:], tmp_path) == []  # alone it is another count: fewer have fallen before
    assert counts(tmp_path)[FAMILY[2].key][0] > counts(undisturbed)[FAMILY[2].key][0]


def test_a_cut_last_line_is_mended(undisturbed: Path, tmp_path: Path, at_once: None) -> None:
    shutil.copytree(undisturbed, tmp_path, dirs_exist_ok=True)
    for name in (grid.SCORES, grid.VALUES):
        text = (tmp_path / name).read_text()
        for end in (-2, -40, text.rindex("\n", 0, -1) + 3):
            (tmp_path / name).write_text(text[:end])
            assert len(grid.read(tmp_path).missing(CELLS)) == 1
            assert run(CELLS, tmp_path) == []
            assert each_once(tmp_path)
            assert same(tmp_path, undisturbed)


def test_a_foreign_line_is_one_error(undisturbed: Path, tmp_path: Path, at_once: None) -> None:
    for name in (grid.SCORES, grid.VALUES):
        shutil.copytree(undisturbed, tmp_path, dirs_exist_ok=True)
        lines = (tmp_path / name).read_text().splitlines(keepends=True)
        for foreign in ("no json\n", "[1]\n", '{"cell": "0123456789abcdef"}\n'):
            (tmp_path / name).write_text("".join([lines[0], foreign, *lines[1:]]))
            with pytest.raises(UserError, match=rf"{name}, line 2") as error:
                run(CELLS, tmp_path)
            assert "\n" not in str(error.value)


def test_one_bad_network_does_not_stop_the_others(
    tmp_path: Path, at_once: None, capsys: pytest.CaptureFixture[str]
) -> None:
    wild = replace(FLOAT, train=replace(TRAIN, lr=1e18, clip=0.0))
    homeless = replace(FLOAT, data=DataConfig("cifar10", str(tmp_path / "none")))
    on_10 = Trial(images=10)
    bad_substitute = Trial("fgsm", 8 / 255, 10, substitute=wild).cell(FLOAT)
    cells = [on_10.cell(wild), Trial().cell(homeless), bad_substitute, on_10.cell(FLOAT)]
    failed = run(cells, tmp_path, jobs=1)
    assert [line.split(":")[0] for line in failed] == [wild.name, homeless.name, FLOAT.name]
    for line, words in zip(failed, ("training diverged", "none", "training diverged"), strict=True):
        assert words in line and "\n" not in line
    assert grid.read(tmp_path).missing(cells) == cells[:3]  # the good one stands
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("defquant:")]
    assert said == [f"defquant: {line}" for line in failed]


def test_what_finds_the_card_full_comes_again_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four side by side have a quarter of the memory each; at the end one has all of it."""
    needed, shares = {FLOAT.name: 0.5, DQ.name: 0.2, SUBSTITUTE.name: 2.0}, list[list[float]]()

    def pool(title: str, jobs: Any, processes: int, **how: Any) -> Iterator[Any]:
        calls = list(jobs)
        shares.append([job.keywords["share"] for _, job in calls])
        yield from ((name, job()) for name, job in calls)

    def train(out: Path, network: Network) -> None:
        if needed[network.name] > shares[-1][0]:
            raise torch.OutOfMemoryError("CUDA out of memory")
        raise UserError("trained")

    monkeypatch.setattr(run_module, "each", pool)
    monkeypatch.setattr(run_module, "_train", train)
    cells = [Trial(images=40).cell(network) for network in (FLOAT, DQ, SUBSTITUTE)]
    failed = run(cells, tmp_path, workers="3")
    assert shares == [[1 / 3] * 3, [1.0] * 2]
    ends = {DQ: "trained", FLOAT: "trained", SUBSTITUTE: "the GPU's memory is not enough"}
    assert failed == [f"{network.name}: {end}" for network, end in ends.items()]


def test_results_that_do_not_arrive_are_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when another machine writes them on a disk of its own."""
    monkeypatch.setattr(
        run_module, "each", lambda _, jobs, __, **how: ((name, "done") for name, _ in jobs)
    )
    (lost,) = run(FAMILY, tmp_path)
    assert lost.startswith(f"{FLOAT.name}: done, but 3 results are not in {tmp_path}")


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        run(CELLS, tmp_path / "file" / "below")


# ---------------------------------------------------------------------- the pool itself


SLEEPER = ("slow", partial(time.sleep, 60))


def leaked() -> bool:
    """Whether the bars of torch's compiler lock by a semaphore that a killed process leaves."""
    lock = getattr(vars(torch.hub)["tqdm"], "get_lock", threading.RLock)()
    return not isinstance(lock, type(threading.RLock()))


def test_pool_names_results_and_gives_one_thread_that_hears_no_ctrl_c(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("TORCHINDUCTOR_COMPILE_THREADS", raising=False)
    asks = partial(signal.pthread_sigmask, signal.SIG_BLOCK, ())
    jobs = [(str(n), partial(max, n, 3)) for n in range(5)]
    every: list[Job[Any]] = [*jobs, ("threads", torch.get_num_threads), ("mask", asks)]
    every += [("leaked", leaked)]
    every += [("compilers", partial(os.getenv, "TORCHINDUCTOR_COMPILE_THREADS"))]
    found = dict(each("t", every, 2))
    assert signal.SIGINT in found.pop("mask") and signal.SIGINT not in asks()
    assert found.pop("compilers") == str(max(1, cores() // 2))
    assert found == {"0": 3, "1": 3, "2": 3, "3": 3, "4": 4, "threads": 1, "leaked": False}
    assert not active_children()


def test_pool_ends_all_when_the_caller_stops(capsys: pytest.CaptureFixture[str]) -> None:
    quick: list[Job[Any]] = [(f"n-{a}", partial(str, a)) for a in ("done", "busy", "no data")]
    results = each("t", quick + [SLEEPER] * 3, 2)
    assert {next(results) for _ in quick} == {("n-done", "done"), ("n-busy", "busy"),
                                              ("n-no data", "no data")}  # fmt: skip
    results.close()
    assert not active_children()
    assert capsys.readouterr().err.splitlines() == ["t: n-done done"]  # and no more


def test_pool_asks_for_a_job_when_it_can_do_it_and_stops_in_time() -> None:
    asked: list[str] = []

    def jobs() -> Iterator[Job[Any]]:
        for name in ("0", "1", "2"):
            asked.append(name)
            yield name, partial(str, name)
        yield SLEEPER

    began = time.monotonic()
    for i, _ in enumerate(each("t", jobs(), 1, total=4, until=began + 25)):
        assert len(asked) == i + 1
    assert asked == ["0", "1", "2"] and 25 <= time.monotonic() - began < 50
    assert not active_children()


@pytest.mark.parametrize(
    ("job", "error", "words"),
    [
        (partial(int, "x"), ValueError, "^invalid literal"),
        (partial(signal.raise_signal, signal.SIGKILL), UserError, "^one of 2 processes died .*$"),
    ],
    ids=["raises", "dies"],
)
def test_pool_ends_all_when_one_fails(
    job: Callable[[], object], error: type[Exception], words: str
) -> None:
    jobs: list[Job[object]] = [("bad", job), *[SLEEPER] * 3]
    began = time.monotonic()
    with pytest.raises(error, match=words) as found:
        list(each("t", jobs, 2))
    assert "\n" not in str(found.value) and not active_children()
    assert time.monotonic() - began < 40


# ------------------------------------------------------------------------ names and keys


def test_keys_do_not_change() -> None:
    """A changed key orphans every result kept under it: change none of these strings."""
    data = DataConfig("cifar10", "anywhere", train_images=20_000, validation_images=5_000)
    train = TrainConfig(epochs=5, batch_size=64, clip=1.0, beta=0.1, device="cuda")
    network = Network(ModelConfig("wrn-10-1", bits=4, convex=True), data, train)
    vgg = Network(ModelConfig("vgg-16x0.25"), data, replace(train, beta=0.0, seed=1000))
    assert network.name == "wrn-10-1_4bit_beta0.1_s0_6920163c"
    assert vgg.name == "vgg-16x0.25_float_s1000_d744ebc1"
    assert Trial().cell(network).key == "ac4c359f4f65eec8"
    black = Trial("fgsm", 8 / 255, 1000, substitute=vgg).cell(network)
    assert black.key == "b31aacd806a63330"
    assert Trial("fgsm", 8 / 255, 128, kind="layers").cell(network).key == "de52a225ed69aee8"
    adversarial = replace(train, attack="pgd", milestones=(60, 120), schedule="step")
    assert Trial().cell(replace(network, train=adversarial)).key == "6a49c3cedd5ff702"


def test_defaults_do_not_change() -> None:
    """Keys leave out what is at its default: another one gives old results new meanings."""
    defaults = {
        ModelConfig: "wrn-10-1 None 6.0 False relu None",
        DataConfig: "digits None 0",
        TrainConfig: "15 128 0.1 one-cycle () 0.2 0.9 False 0.0005 0.0 0.0 fused none None "
        f"{8 / 255} 1.0 True 0 0 False True",
        Trial: "clean 0.0 None None False test accuracy",
    }
    later = (
        "data_root", "device", "weight_bits", "deployable", "round_sums", "tf32", "deterministic",
    )  # fmt: skip
    for kind, known in defaults.items():
        found = [str(f.default) for f in fields(kind) if f.name not in later]
        assert found == known.split(" "), kind  # fields that come later go into `later`


def test_keys_tell_apart_what_differs_and_only_that() -> None:
    changes: dict[str, list[dict[str, Any]]] = {
        "model": [
            {"model": "vgg-16"}, {"bits": 3}, {"bits": 4}, {"high": 1.0}, {"convex": True},
            {"activation": "tanh"}, {"squeeze": 5},
        ],
        "data": [{"data": "cifar10"}, {"train_images": 100}, {"validation_images": 0}],
        "train": [
            {"seed": 1}, {"epochs": 4}, {"lr": 0.2}, {"beta": 0.1}, {"clip": 0.0},
            {"attack": "pgd"}, {"attack_eps": 8 / 255}, {"attack_sigma": 4 / 255}, {"amp": True},
            {"milestones": (1,)},
        ],
    }  # fmt: skip
    networks = [
        replace(FLOAT, **{part: replace(getattr(FLOAT, part), **change)})
        for part, some in changes.items()
        for change in some
    ]
    trials = [
        Trial(kind="layers"), Trial("fgsm"), Trial(eps=0.1), Trial(images=10), Trial(unaware=True),
        Trial(split="validation"), Trial(substitute=DQ),
    ]  # fmt: skip
    cells = [trial.cell(FLOAT) for trial in (Trial(), *trials)] + [*map(Trial().cell, networks)]
    assert len({c.key for c in cells}) == len(cells)
    assert len({n.name for n in (FLOAT, *networks)}) == 1 + len(networks)
    away = {"data": replace(DATA, data_root="/data"), "train": replace(TRAIN, device="cuda")}
    elsewhere = replace(FLOAT, **away)  # type: ignore[arg-type]
    assert (elsewhere.name, Trial().cell(elsewhere).key) == (FLOAT.name, cells[0].key)
    assert len({Trial(substitute=own).cell(DQ).key for own in (elsewhere, FLOAT)}) == 1


def test_cells_of_all_scales_can_live_in_one_folder() -> None:
    """Names and keys are unique, and no experiment asks for half of another's family."""
    every = {cell for scale in SCALES.values() for cell in cells_of(EXPERIMENTS, scale)}
    networks = {cell.network for cell in every} | {c.substitute for c in every if c.substitute}
    assert len({network.name for network in networks}) == len(networks)
    assert len({cell.key for cell in every}) == len(every)
    for scale in SCALES.values():
        whole = families(cells_of(EXPERIMENTS, scale))
        for name in EXPERIMENTS:
            for family, eps in families(cells_of([name], scale)).items():
                assert eps == whole[family], (scale.name, name, family)
    # a network that waited for itself, or for one that waits for it, would wait for ever
    through = {cell.substitute for cell in every if cell.substitute}
    assert not any(cell.substitute for cell in every if cell.network in through)


def families(cells: Sequence[Cell]) -> dict[object, set[float]]:
    found: dict[object, set[float]] = {}
    for cell in cells:
        found.setdefault(cell.family, set()).add(cell.eps)
    return found
