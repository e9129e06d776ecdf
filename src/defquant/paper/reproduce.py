"""The verb `reproduce`: names and presets in; lists, plans with their cost, measurements out.

Costs are counted in image passes: an image forward and fully backward. A probe of a few training
steps says how long one takes here.
"""

import math
import re
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase as fnmatch
from pathlib import Path
from statistics import NormalDist

from rich.console import Console
from rich.table import Table

from defquant.errors import UserError, near
from defquant.paper import grid
from defquant.paper.figures import EXPERIMENTS, WORDS, cells_of
from defquant.paper.grid import SCALES, Cell, Network, Scale, by_network
from defquant.paper.workers import cores
from defquant.progress import say

__all__ = ["cells_to_make", "make", "names_of", "passes_by_model", "print_list", "print_plan"]

PROBE_SECONDS = 10.0
STEPS = 4  # of a probe, in two epochs: the first also pays for what is made once
FORWARD, INPUT_GRADIENT = 1 / 3, 2 / 3  # of a pass, whose backward is twice its forward
WORST = {"adaptive": 2.2, "standard": 44.0}  # times the time of a PGD of its steps, or of 50
STANDING = 0.5  # share of images that long attacks work on, for those that fell cost nothing
_IMAGES = {"cifar10": (50_000, 10_000), "svhn": (73_257, 26_032), "digits": (1_347, 450)}
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
    for pattern in networks:
        if not any(fnmatch(cell.network.name, pattern) for cell in cells):
            raise UserError(
                f"no network {pattern!r} in {', '.join(names)} at {scale.flags}: --dry-run lists "
                "their names, of which a pattern such as '*_4bit_*' picks some"
            )
    if networks:
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
    kinds = {_kind(network): network for network in passes}
    rates = {kind: _rate(network, PROBE_SECONDS / len(kinds)) for kind, network in kinds.items()}
    for (model, data), rate in rates.items():
        shown = f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}"
        print(f"{model} on {data}: {shown} image passes a second in one process")
    from defquant.distributed import pick_device

    processes, (training, measuring) = jobs or cores(), map(sum, zip(*passes.values(), strict=True))
    on_gpu = any(pick_device(network.train.device).type == "cuda" for network in passes)
    seconds = sum(sum(both) / rates[_kind(network)] for network, both in passes.items())
    # as if processes of the CPU did not slow each other down
    hours = seconds / (1 if on_gpu else min(processes, len(passes))) / 3600
    long = f"{hours:,.1f} hours" if hours < 72 else f"{hours / 24:,.0f} days"
    print(
        f"{len(passes)} networks, {len(missing)} cells: {training + measuring:,.0f} image passes "
        f"({training:,.0f} of them training), about "
        f"{long if hours >= 1 else f'{max(1, round(60 * hours))} minutes'} with {processes} "
        "processes"
    )


def make(
    cells: Sequence[Cell], scale: Scale, out: Path, jobs: int | None, workers: str
) -> list[str]:
    """Train and measure what is missing of `cells`; returns what failed, a line each."""
    missing = grid.read(out).missing(cells)
    _check_data(scale, missing)
    there = f"{len(cells) - len(missing)} of {len(cells)} cells are there"
    say(f"reproduce: {there}")
    if not missing:
        return []
    from defquant.paper.run import run

    return run(cells, out, jobs=jobs, workers=workers)


def _check_data(scale: Scale, cells: Sequence[Cell]) -> None:
    """Raise `UserError` unless the images of `cells` can be read: once, not in every process."""
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


# --- cost ---------------------------------------------------------------------------------


def passes_by_model(cells: Iterable[Cell]) -> dict[Network, tuple[float, float]]:
    """Image passes of each network that `cells` need: of its training, of its measurements."""
    groups = by_network(cells)
    return {n: (_training_passes(n), sum(map(_cell_passes, own))) for n, own in groups.items()}


def _training_passes(network: Network) -> float:
    """Those of its attack among them."""
    data, train = network.data, network.train
    every = _IMAGES[data.data][0] - data.validation_images
    steps = float(train.attack in ("fgsm", "rfgsm"))
    if train.attack == "pgd" and train.attack_eps is not None:
        steps = _paper_steps(255 * train.attack_eps)
    elif train.attack == "pgd":  # mean over eps = clip(|N(0, sigma)|, 0, 2 sigma), by quantiles
        sigma = 255 * train.attack_sigma
        draws = (abs(NormalDist(0, sigma).inv_cdf(q / 1000)) for q in range(1, 1000))
        steps = sum(_paper_steps(min(eps, 2 * sigma)) for eps in draws) / 999
    images = min(every, data.train_images or every)
    return images * train.epochs * (1 + INPUT_GRADIENT * steps * train.mix)


def _cell_passes(cell: Cell) -> float:
    """Of a black box, only the answers."""
    data = cell.network.data
    split = data.validation_images if cell.split == "validation" else _IMAGES[data.data][1]
    images = min(split, cell.images or split)
    if cell.substitute is not None or cell.attack in ("clean", "random"):
        return images * FORWARD
    steps = _gradients(cell)
    return images * (FORWARD + INPUT_GRADIENT * steps * (STANDING if steps > 1 else 1))


def _gradients(cell: Cell) -> float:
    """Gradients of one image that stands, two queries for one: of `pgd-50x10`, `apgd@soft-9+40`."""
    kind, *numbers = re.split(r"-(?=\d)|[x+](?=\d)", cell.attack)
    if kind in WORST:
        return WORST[kind] * int(*numbers or [50])
    if not numbers:
        return 1.0 if kind in ("fgsm", "rfgsm") else _paper_steps(255 * cell.eps)
    queries = int(numbers.pop()) if "+" in cell.attack else 0
    return math.prod(map(int, numbers)) + queries * FORWARD / INPUT_GRADIENT


def _paper_steps(pixels: float) -> int:
    return max(1, math.floor(min(pixels + 4, 1.25 * pixels) + 1e-6))


def _kind(network: Network) -> tuple[str, str]:
    return network.model.model, network.data.data


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
        while size < (larger := min(most, int((end - time.perf_counter()) * rate / STEPS))):
            size, rate = larger, _steps(network, larger)
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
