"""The verb `reproduce`: names and presets in; lists, plans with their cost, measurements out."""

import math
import shutil
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase as fnmatch
from pathlib import Path

from rich.console import Console
from rich.table import Table

from defquant.errors import UserError, near
from defquant.files import append_line, claimed, make_folder, read_lines
from defquant.paper import grid
from defquant.paper.figures import EXPERIMENTS, WORDS, cells_of
from defquant.paper.grid import SCALES, Cell, Network, Results, Scale, by_network
from defquant.paper.plan import Plan, Survey, kind_of, long, passes_by_model
from defquant.progress import say

__all__ = [
    "cells_to_make", "check_patterns", "make", "merge", "names_of", "print_list", "print_plan",
    "remove",
]  # fmt: skip

PROBE_SECONDS = 10.0
STEPS = 4  # of a probe, in two epochs: the first also pays for what is made once
_SHAPES = {"digits": (1, 8), "cifar10": (3, 32), "svhn": (3, 32)}  # channels, side


def names_of(words: Sequence[str], scale: Scale) -> list[str]:
    """Names of experiments. Raises `UserError` for unknown ones and for none.

    `all` is every one, but for Table 2 where no place of SVHN was given.
    """
    every = list(EXPERIMENTS)
    if scale.svhn.data == "svhn" and scale.svhn.data_root is None and "table2" not in words:
        every.remove("table2")
    if not words:
        raise UserError(f"reproduce needs a name: {', '.join(every)} or all; --list explains them")
    for word in words:
        if word != "all" and word not in EXPERIMENTS:
            known = ", ".join(every)
            raise UserError(
                f"unknown table or figure {word!r}{near(word, every)}: use {known} or all"
            )
    return every if "all" in words else list(dict.fromkeys(words))


def print_list() -> None:
    """Every experiment with the cost of every preset, in networks and millions of image passes."""
    table = Table(box=None, pad_edge=False)
    for head in ("name", "what", *SCALES):
        table.add_column(head, justify="right" if head in SCALES else "left", no_wrap=True)
    scales = [scale.placed(None, None, "cpu") for scale in SCALES.values()]
    rows = {name: ([name], WORDS[name]["what"]) for name in EXPERIMENTS}
    for name, (own, what) in {**rows, "all": ([*rows], "the union, no network twice")}.items():
        costs = [[*passes_by_model(cells_of(own, scale)).values()] for scale in scales]
        shown = (f"{len(cost)} / {sum(map(sum, cost)) / 1e6:,.2f}" for cost in costs)
        table.add_row(name, what, *shown)
    Console(width=None if sys.stdout.isatty() else 160).print(table)
    print("\nnetworks / millions of image passes: an image forward and backward in training or in")
    print("an attack; --dry-run says how many hours that is on this machine\n")
    for scale in SCALES.values():
        print(f"{scale.name:6} {scale.about}")


def cells_to_make(
    names: Sequence[str], scale: Scale, keys: Sequence[str] = (), networks: Sequence[str] = ()
) -> list[Cell]:
    """The experiments' cells; with `keys` those alone, and the smaller radii that they rest on;
    with `networks`, patterns of names (`*_4bit_*`), theirs alone.

    Raises `UserError` for a key of none of them, and for a pattern of no network.
    """
    cells = cells_of(names, scale)
    if networks:
        check_patterns(names, scale, networks)
        cells = [c for c in cells if any(fnmatch(c.network.name, p) for p in networks)]
    known = {cell.key: cell for cell in cells}
    for key in keys:
        if key not in known:
            raise UserError(
                f"no cell {key!r} in {', '.join(names)} at {scale.flags}: take its key from "
                "`cell` in results.jsonl or probes.jsonl, or from the evidence on the page"
            )
    ends = [(known[key].family, known[key].eps) for key in keys]
    return [c for c in cells if not keys or any(c.family == f and c.eps <= eps for f, eps in ends)]


def check_patterns(names: Sequence[str], scale: Scale, patterns: Iterable[str]) -> None:
    """Raise `UserError` for a pattern of no network: a slip in `--keep` would keep nothing."""
    every = by_network(cells_of(names, scale))
    for pattern in patterns:
        if not any(fnmatch(network.name, pattern) for network in every):
            raise UserError(
                f"no network {pattern!r} in {', '.join(names)} at {scale.flags}: --dry-run lists "
                "their names, of which a pattern such as '*_4bit_*' picks some"
            )


def print_plan(cells: Sequence[Cell], scale: Scale, out: Path, jobs: int | None) -> None:
    """The missing cells by network and what they cost here, after a probe of ten seconds."""
    missing = grid.read(out).missing(cells)
    passes = passes_by_model(missing)
    for network, (training, measuring) in passes.items():
        count = sum(cell.network == network for cell in missing)
        trained = (out / "networks" / network.name).is_dir()
        state = "begun or done" if trained else f"{training:,.0f} passes to train"
        print(f"{network.name:48} {state:>24}  {count:3} cells, {measuring:,.0f} passes")
    print(f"{len(cells) - len(missing)} of {len(cells)} cells are there")
    if not missing:
        return
    try:
        _check_data(scale, missing)
    except UserError as error:
        print(f"without its images nothing can be made: {error}")
    pace = _pace(passes, PROBE_SECONDS)
    for (model, data), seconds in pace.items():
        shown = f"{1 / seconds:,.0f}" if seconds <= 0.1 else f"{1 / seconds:.2g}"
        print(f"{model} on {data}: {shown} image passes a second in one process")
    from defquant.paper.run import on_gpu, processes

    jobs = jobs or processes(passes)
    training, measuring = map(sum, zip(*passes.values(), strict=True))
    # as if processes of the CPU did not slow each other down
    seconds = Survey(cells, out, pace).all_left / (1 if on_gpu(passes) else min(jobs, len(passes)))
    print(
        f"{len(passes)} networks, {len(missing)} cells: {training + measuring:,.0f} image passes "
        f"({training:,.0f} of them training), about {long(seconds)} with {jobs} processes"
    )


def make(
    cells: Sequence[Cell],
    scale: Scale,
    out: Path,
    jobs: int | None,
    workers: str,
    budget: float | None = None,
    keep: Sequence[str] | None = None,
) -> list[str]:
    """Train and measure what is missing of `cells`; returns what failed, a line each.

    Half a minute or a tenth of the `budget`, in seconds, is left for the page. With `keep`,
    networks of other names than these patterns are removed at the end, where all that needs them
    is measured.
    """
    until = time.monotonic() + (math.inf if budget is None else max(0.9 * budget, budget - 30))
    results = grid.read(out)
    missing = results.missing(cells)
    _check_same(out, results, _check_data(scale, missing))
    say(f"reproduce: {len(cells) - len(missing)} of {len(cells)} cells are there")
    failed: list[str] = []
    if missing:
        from defquant.paper.run import on_gpu, run

        known = {kind_of(n) for n in by_network(cells) if (out / "networks" / n.name).is_dir()}
        new = [n for n in by_network(missing) if kind_of(n) not in known]
        local = workers == "local" or workers.isdecimal()  # a cluster's pace is not ours
        pace = _pace(new, PROBE_SECONDS / 3) if local and not on_gpu(new) else {}
        plan = Plan(scale, cells, out, until, pace)
        failed = run(cells, out, jobs=jobs, workers=workers, plan=plan)
        if time.monotonic() >= until:
            left = len(grid.read(out).missing(cells))
            say(f"reproduce: the budget is spent, {left} cells are missing: call it again to go on")
    if keep is not None:
        remove(cells, out, keep)
    return failed


def remove(cells: Sequence[Cell], out: Path, keep: Sequence[str]) -> None:
    results = grid.read(out)
    for network, own in by_network(cells).items():
        users = [*own, *(cell for cell in cells if cell.substitute == network)]
        if not any(fnmatch(network.name, pattern) for pattern in keep) and not (
            results.missing(users)
        ):
            with claimed(grid.lock_of(out, network), wait=False) as mine:
                if mine:  # else another call on the folder needs it now
                    shutil.rmtree(out / "networks" / network.name, ignore_errors=True)


def merge(out: Path, others: Sequence[str]) -> None:
    """Take over the results in these folders, copied from other machines, whose cells have none
    in `out`. Raises `UserError` for a folder without results, for lines that are none, and for
    results on other images than those in `out`.
    """
    for other in map(Path, others):
        files = [name for name in (grid.SCORES, grid.VALUES) if (other / name).is_file()]
        if not files:
            raise UserError(f"--merge needs folders with {grid.SCORES}; found none in {other}")
        there = grid.read(other)  # refuses broken lines before one is taken
        here, taken = grid.read(out), 0
        _check_same(out, here, there.data)
        known = {*here.scores, *here.values}
        make_folder(out)
        for name in files:
            for _, line in read_lines(other / name):
                if line.get("cell") and line["cell"] not in known:
                    append_line(out / name, line)
                    known, taken = known | {line["cell"]}, taken + 1
        say(f"reproduce: {taken} results taken from {other}")


def _check_same(out: Path, results: Results, data: Iterable[tuple[str, str]]) -> None:
    """Raise `UserError` where `data`, names and hashes, are other images of one data set than the
    results': a mean over seeds would be one over data. Older lines have no hashes.
    """
    pairs = [(one, other) for one in results.data for other in data]
    for (known, digest), (name, other) in pairs:
        if known.split(" (")[0] == name.split(" (")[0] and (
            known != name or (digest and other and digest != other)
        ):
            words = (f"{known} [{digest[:6]}]", f"{name} [{other[:6]}]")
            raise UserError(
                f"{out} has results on {words[0]}, and these are of {words[1]}: give each data a "
                "folder of its own"
            )


def _check_data(scale: Scale, cells: Sequence[Cell]) -> list[tuple[str, str]]:
    """Names and hashes of the test images of `cells`. Raises `UserError` unless these and those of
    training can be read: once, not in every process.
    """
    needed = {cell.network.data for cell in cells}
    for data, what, flag in ((scale.data, "CIFAR-10", "data"), (scale.svhn, "SVHN", "svhn")):
        if data in needed and data.data != "digits" and data.data_root is None:
            raise UserError(
                f"preset {scale.name} needs {what}: give its place with --{flag}-root, or run "
                f"`defquant data fetch {data.data}`"
            )
    if needed:
        from defquant.runs import load_images

        for data in needed:
            load_images(data, "train")
        tests = [load_images(data, "test") for data in needed]
        return [(images.name, images.source) for images in tests]
    return []


# --- a probe ------------------------------------------------------------------------------


def _pace(networks: Iterable[Network], seconds: float) -> dict[tuple[str, str], float]:
    """Seconds of a training's pass by kind of network, after a probe of so many `seconds`."""
    kinds = {kind_of(network): network for network in networks}
    return {kind: 1 / _rate(network, seconds / len(kinds)) for kind, network in kinds.items()}


def _rate(network: Network, seconds: float) -> float:
    """Image passes a second in one process of one thread or on the GPU, from training steps on
    random images, at the batch size of the training where `seconds` allow for it.
    """
    import torch

    threads, most = torch.get_num_threads(), network.train.batch_size
    torch.set_num_threads(1)
    try:
        size, rate = 2, _steps(network, 2)  # pays for imports, too
        end = time.perf_counter() + seconds
        while size < most and (left := end - time.perf_counter()) > 0:
            # twice as many, too, where a busy machine made the first steps look slow
            size = min(most, max(2 * size, int(left * rate / STEPS)))
            rate = _steps(network, size)
        return rate
    finally:
        torch.set_num_threads(threads)


def _steps(network: Network, size: int) -> float:
    import torch

    from defquant.data import Dataset
    from defquant.models import build
    from defquant.training import train

    channels, side = _SHAPES[network.data.data]
    generator = torch.Generator().manual_seed(0)
    shape = (STEPS // 2 * size, channels, side, side)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    data = Dataset(images, torch.arange(len(images)) % 10, tuple("0123456789"), "probe")
    config = replace(network.train, epochs=2, batch_size=size, attack="none")
    history = train(build(network.model, num_classes=10, in_channels=channels), data, config)
    return history[-1]["images_per_second"]
