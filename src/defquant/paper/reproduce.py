"""The verb `reproduce`: names and presets in; lists, plans and measurements out."""

import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from defquant.errors import UserError
from defquant.paper import grid
from defquant.paper.cost import hours, passes_by_model, rates
from defquant.paper.figures import EXPERIMENTS, WORDS, cells_of
from defquant.paper.grid import SCALES, Cell, Scale
from defquant.paper.pool import cores

__all__ = ["cells_to_make", "make", "names_of", "print_list", "print_plan", "scale_of"]


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
            raise UserError(f"unknown table or figure {word!r}: use {', '.join(every)} or all")
    return every if "all" in words else list(dict.fromkeys(words))


def scale_of(preset: str, data_root: str | None, svhn_root: str | None, device: str) -> Scale:
    """The preset with its data in place. Raises `UserError` for an unknown one."""
    if preset not in SCALES:
        raise UserError(f"unknown preset {preset!r}: use one of {', '.join(SCALES)}")
    return SCALES[preset].placed(data_root, svhn_root, device)


def print_list() -> None:
    """Every experiment with the cost of every preset, in networks and millions of image passes."""
    table = Table(box=None, pad_edge=False)
    for head in ("name", "what", *SCALES):
        table.add_column(head, justify="right" if head in SCALES else "left", no_wrap=True)
    scales = [scale.placed(None, None, "cpu") for scale in SCALES.values()]
    costs = {name: [_cost(cells_of([name], scale)) for scale in scales] for name in EXPERIMENTS}
    costs["all"] = [_cost(cells_of(EXPERIMENTS, scale)) for scale in scales]
    for name, cost in costs.items():
        title = WORDS[name].what if name in WORDS else "the union, no network twice"
        table.add_row(name, title, *cost)
    Console(width=None if sys.stdout.isatty() else 160).print(table)
    print("\nnetworks / millions of image passes: an image forward and backward in training or in")
    print("an attack; --dry-run says how many hours that is on this machine\n")
    for scale in SCALES.values():
        print(f"{scale.name:6} {scale.about}")


def _cost(cells: Sequence[Cell]) -> str:
    passes = passes_by_model(cells)
    return f"{len(passes)} / {sum(map(sum, passes.values())) / 1e6:,.2f}"


def cells_to_make(names: Sequence[str], scale: Scale, keys: Sequence[str] = ()) -> list[Cell]:
    """The experiments' cells; with `keys` those alone, and the smaller radii that they rest on.

    Raises `UserError` for a key of none of them.
    """
    cells = cells_of(names, scale)
    known = {cell.key: cell for cell in cells}
    for key in keys:
        if key not in known:
            raise UserError(
                f"no cell {key!r} in {', '.join(names)} at preset {scale.name}: take its key from "
                "`cell` in results.jsonl or probes.jsonl, or from the evidence on the page"
            )
    largest = {known[key].family: 0.0 for key in keys}
    for key in keys:
        largest[known[key].family] = max(largest[known[key].family], known[key].eps)
    return [c for c in cells if not keys or c.eps <= largest.get(c.family, -1.0)]


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
    found = rates(passes)
    for (model, data), rate in found.items():
        shown = f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}"
        print(f"{model} on {data}: {shown} image passes a second in one process")
    training, measuring = map(sum, zip(*passes.values(), strict=True))
    processes = jobs or cores()
    print(
        f"{len(passes)} networks, {len(missing)} cells: {training + measuring:,.0f} image passes "
        f"({training:,.0f} of them training), about {_duration(hours(passes, found, processes))} "
        f"with {processes} processes"
    )


def _duration(hours: float) -> str:
    if hours < 1:
        return f"{max(1, round(60 * hours))} minutes"
    return f"{hours:,.1f} hours" if hours < 72 else f"{hours / 24:,.0f} days"


def make(
    cells: Sequence[Cell], scale: Scale, out: Path, jobs: int | None, workers: str
) -> list[str]:
    """Train and measure what is missing of `cells`; returns what failed, a line each."""
    missing = grid.read(out).missing(cells)
    _check_data(scale, missing)
    print(
        f"reproduce: {len(cells) - len(missing)} of {len(cells)} cells are there", file=sys.stderr
    )
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
