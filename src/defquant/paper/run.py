"""Train and measure what is missing of some cells, over processes or a cluster.

A network is one job: trained where it is missing, then measured, by one process that claims it.
"""

import sys
import time
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from defquant.attacks import Attack, Composition, Single
from defquant.attacks.names import parse_attack, parse_first_order
from defquant.checkpoint import Facts, versions
from defquant.data import Dataset
from defquant.defenses import CALIBRATION, Unaware, detection
from defquant.diagnose import first_block_distances, layer_distances
from defquant.distributed import pick_device
from defquant.errors import UserError
from defquant.files import claimed
from defquant.measure import examples, load_on, measure, replay
from defquant.paper import grid
from defquant.paper.grid import Cell, Network, by_network
from defquant.paper.plan import Plan
from defquant.paper.workers import Job, cores, each, each_on_cluster
from defquant.progress import say
from defquant.records import Measurement
from defquant.runs import load_images, test_images, train_run

__all__ = ["on_gpu", "processes", "run", "work"]

PICTURES = 8
ON_GPU = 4  # networks side by side on one card: 1.3 times the throughput of one on an H200


def run(
    cells: Sequence[Cell],
    out: Path,
    *,
    jobs: int | None = None,
    workers: str = "local",
    plan: Plan | None = None,
) -> list[str]:
    """Make the missing ones of `cells` in the folder `out`; returns what failed, a line each.

    Killed at any moment and started again, it goes on where it stopped. Several calls may work
    on one folder at a time: each network is claimed by one of them, and the others wait for it
    only when nothing else is left. Results lie in `out`, networks below `networks/`. `plan` says
    which network is next and when to stop; without one they are made in their order. `jobs`
    processes, when None as many as cores, or `ON_GPU` on a GPU, each with its share of the memory:
    a network that finds too little comes again at the end, alone. `workers` is `local`, a number of
    `jobs`, or the address of a Ray cluster, whose nodes must see `out`.

    Raises `UserError` where `out` cannot be written or holds foreign lines, and where the workers
    cannot be had.
    """
    out = out.absolute()  # another machine has another working directory
    if workers.isdecimal():
        workers, jobs = "local", int(workers)
    own = by_network(cells)
    todo = {network.name: network for network in by_network(grid.read(out).missing(cells))}
    failed: list[str] = []
    if todo:
        _begin(out)
    local, full = workers == "local", False
    for again in (False, True):
        if not todo or (plan and time.monotonic() >= plan.until):
            break
        many = 1 if full or not local else min(jobs or processes(todo.values()), len(todo))
        if plan:
            plan.begin(many)
            left = plan.tell("")[0].partition(", ")[2]
            say(f"reproduce: {len(todo)} networks {'once more' if again else 'to make'}, {left}")
        job, later = partial(work, out, wait=again, share=1 / many), {}
        queue = ((n.name, partial(job, n, own[n])) for n in _following(dict(todo), plan))
        with closing(_states(queue, todo, workers, many, plan)) as states:
            for name, state in states:
                if state in ("busy", "full") and not again:
                    later[name], full = todo[name], full or state == "full"
                elif wrong := _wrong(out, name, own[todo[name]], state):
                    failed.append(wrong)
                    print(f"defquant: {wrong}", file=sys.stderr, flush=True)
        todo = later
    return failed


def _states(
    queue: Iterator[Job[str]], todo: dict[str, Network], workers: str, many: int, plan: Plan | None
) -> Generator[tuple[str, str], None, None]:
    """What comes of each network, by its name, from where it is made."""
    how: Any = {"tell": plan.tell, "until": plan.until} if plan else {}
    if workers == "local":
        return each("reproduce", queue, many, total=len(todo), **how)
    devices = {network.train.device for network in todo.values()}
    gpus = None if "auto" in devices else int(devices != {"cpu"})
    return each_on_cluster("reproduce", queue, workers, gpus=gpus, total=len(todo), **how)


def _following(left: dict[str, Network], plan: Plan | None) -> Iterator[Network]:
    """All of `left`, each chosen when it is asked for."""
    while left:
        yield left.pop(plan.next(left) if plan else next(iter(left)))


def _begin(out: Path) -> None:
    """Make the folder and its files: a file made later shows up late on a network disk."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name in (grid.SCORES, grid.VALUES):
            (out / name).open("a").close()
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror or error}") from None


def _wrong(out: Path, name: str, cells: list[Cell], state: str) -> str:
    """Why a network that came to `state` is none; nothing where it is done and its results here."""
    if state != "done":
        return f"{name}: the GPU's memory is not enough" if state == "full" else state
    lost = len(grid.read(out).missing(cells))
    what = f"{name}: done, but {lost} results are not in {out}: does every worker see it?"
    return what if lost else ""


# --- one network --------------------------------------------------------------------------


def work(
    out: Path, network: Network, cells: Sequence[Cell], *, wait: bool, share: float = 1.0
) -> str:
    """Train `network` into `out/networks` and make those of its `cells` that are missing.

    Returns "done"; "busy" where another process is at this network and `wait` is false; "full"
    where `share` of the GPU's memory is too little; else, in one line, why the network cannot be
    had. The claim dies with its process, and what was finished before stands: a checkpoint each
    epoch, a line each cell.
    """
    with claimed(grid.lock_of(out, network), wait=wait) as mine:
        if not mine:
            return "busy"
        try:
            if pick_device(network.train.device).type == "cuda":
                torch.cuda.set_per_process_memory_fraction(share)
            missing = grid.read(out).missing(cells)
            if missing or not cells:
                _train(out, network)
            for group in _together(cells, missing):
                _measure(out, network, group, set(missing))
        except torch.OutOfMemoryError:
            return "full"
        except UserError as error:
            return f"{network.name}: {error}"
    return "done"


def processes(networks: Iterable[Network]) -> int:
    """How many work side by side: one on each core, or `ON_GPU` on a GPU."""
    return ON_GPU if on_gpu(networks) else cores()


def on_gpu(networks: Iterable[Network]) -> bool:
    return any(pick_device(network.train.device).type == "cuda" for network in networks)


def _train(out: Path, network: Network) -> Path:
    run = out / "networks" / network.name
    train_run(*network.settings, run, resume=True, show=False)
    return run


def _together(cells: Sequence[Cell], missing: Sequence[Cell]) -> list[list[Cell]]:
    """Cells to measure in one go: scores on the same images in one sweep, all others alone.

    A family goes as a whole: what fell at a smaller eps must be known at a larger one. Black
    boxes come last: their substitute may be in training, or impossible.
    """
    families = {cell.family for cell in missing}
    groups: dict[object, list[Cell]] = {}
    for cell in (cell for cell in cells if cell.family in families):
        if cell.kind == "accuracy":
            groups.setdefault((cell.images, cell.split, cell.substitute), []).append(cell)
        elif cell in missing:
            groups[cell] = [cell]
    return sorted(groups.values(), key=lambda group: group[0].substitute is not None)


def _measure(out: Path, network: Network, cells: list[Cell], missing: set[Cell]) -> None:
    run, first = out / "networks" / network.name, cells[0]
    device = pick_device(network.train.device)
    model, facts = load_on(run, device)
    facts = replace(facts, data=replace(facts.data, data_root=network.data.data_root))
    few = first.kind in ("layers", "first-block")  # take as many as there are, where that is fewer
    images = test_images(facts, None, None if few else first.images, first.split)
    if first.kind != "accuracy":
        start = time.perf_counter()
        values = _values(model, facts, images, first)
        seconds = round(time.perf_counter() - start, 3)
        grid.keep(out, first, values, {"versions": versions(device), "seconds": seconds})
        return
    asked = {_label(cell): cell for cell in cells}
    attacks: list[Single | Composition] = []
    others: list[Attack] = []
    for cell in cells:
        if cell.substitute is not None:
            with claimed(grid.lock_of(out, cell.substitute), wait=True):
                substitute = _train(out, cell.substitute)
                name, attack = cell.substitute.name, parse_first_order(cell.attack, cell.eps)
                others.append(replay(attack, substitute, images, device=device, source=name))
        elif cell.unaware:
            others.append(Unaware(parse_first_order(cell.attack, cell.eps)))
        elif cell.attack != "clean":
            attacks.append(parse_attack(cell.attack, cell.eps))

    def write(m: Measurement) -> None:
        cell = asked.get((m.attack, m.eps))
        if cell in missing:  # not asked for: the clean pass, or a smaller eps that stood already
            grid.keep(out, cell, m)

    for _ in measure(run, model, facts, images, [*attacks, *others], write=write):
        pass


def _label(cell: Cell) -> tuple[str, float]:
    """How the measurement of `cell` will be called: attack and eps."""
    if cell.attack == "clean":
        return "clean", 0.0
    return parse_attack(cell.attack, cell.eps).name + cell.ways, cell.eps


def _values(model: nn.Module, facts: Facts, images: Dataset, cell: Cell) -> Any:
    """What a cell finds that is no accuracy, as JSON holds it."""
    if cell.kind == "examples":
        attack, run = parse_attack(cell.attack, cell.eps), Path(cell.network.name)
        return examples(run, model, facts, images, attack, PICTURES)
    moved = parse_first_order(cell.attack, cell.eps)
    if cell.kind == "detector":  # [correct, total] of the fooling images and of the clean ones
        train = load_images(facts.data, "train")
        found = detection(model, images, train.first(min(len(train), CALIBRATION)), moved)
        scores = {"detected": found.detected, "false_positives": found.false_positives}
        return {name: score and [score.correct, score.total] for name, score in scores.items()}
    on = images.to(next(model.parameters()).device)
    x, y = on.take(torch.arange(min(cell.images or len(on), len(on))))
    x_adv = moved.last(model, x, y, generator=torch.Generator().manual_seed(0))
    if cell.kind == "layers":
        return [asdict(layer) for layer in layer_distances(model, x, x_adv)]
    return asdict(first_block_distances(model, x, [(cell.eps, x_adv)])[0])
