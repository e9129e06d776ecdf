"""Train and measure what is missing of some cells, over processes or a cluster."""

import sys
from collections.abc import Generator, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path

from defquant.errors import UserError
from defquant.paper import grid
from defquant.paper.grid import Cell, Network, by_network
from defquant.paper.pool import Job, cores, each
from defquant.paper.work import work

__all__ = ["run"]


def run(
    cells: Sequence[Cell], out: Path, *, jobs: int | None = None, workers: str = "local"
) -> list[str]:
    """Make the missing ones of `cells` in the folder `out`; returns what failed, a line each.

    Killed at any moment and started again, it goes on where it stopped. Several calls may work
    on one folder at a time: each network is claimed by one of them, and the others wait for it
    only when nothing else is left.

    Args:
        cells: in the order in which they matter.
        out: results, and the networks' runs below `networks/`.
        jobs: processes; as many as cores when None.
        workers: `local`, or the address of a Ray cluster, whose nodes must see `out`.

    Raises:
        UserError: `out` cannot be written or holds foreign lines; the workers cannot be had.
    """
    if jobs is not None and jobs < 1:
        raise UserError(f"jobs must be 1 or more; found {jobs}")
    out = out.absolute()  # another machine has another working directory
    todo = list(by_network(grid.read(out).missing(cells)))
    own = by_network(cells)
    failed: list[str] = []
    if todo:
        grid.begin(out)
    for wait in (False, True):
        if not todo:
            break
        calls = [(n.name, partial(work, out, n, own.get(n, []), wait=wait)) for n in todo]
        names = {network.name: network for network in todo}
        todo = []
        with closing(_each(calls, list(names.values()), jobs, workers)) as states:
            for name, state in states:
                if state == "busy":
                    todo.append(names[name])
                    continue
                if state == "done":
                    state = _lost(out, names[name], own.get(names[name], []))
                if state:
                    failed.append(state)
                    print(f"defquant: {state}", file=sys.stderr, flush=True)
    return failed


def _lost(out: Path, network: Network, cells: list[Cell]) -> str:
    """What is wrong where a network is done and its results are not here; else nothing."""
    lost = len(grid.read(out).missing(cells))
    if not lost:
        return ""
    return f"{network.name}: done, but {lost} results are not in {out}: does every worker see it?"


def _each(
    calls: Sequence[Job[str]], networks: Sequence[Network], jobs: int | None, workers: str
) -> Generator[tuple[str, str], None, None]:
    if workers == "local":
        return each("reproduce", calls, min(jobs or cores(), len(calls)))
    from defquant.paper.cluster import each_on_cluster

    devices = {network.train.device for network in networks}
    gpus = None if "auto" in devices else int(devices != {"cpu"})
    return each_on_cluster("reproduce", calls, workers, gpus=gpus)
