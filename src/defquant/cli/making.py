"""Verbs that make networks: demo, train and reproduce. No torch on import."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter

from defquant.cli import rows
from defquant.cli.rows import print_json, print_measurements
from defquant.cli.scores import Device, Json, Root, least
from defquant.config import PRESETS, DataConfig, ModelConfig, TrainConfig
from defquant.errors import UserError
from defquant.progress import keep_log
from defquant.records import read_folder

if TYPE_CHECKING:
    from defquant.paper.grid import Results, Scale

__all__ = ["demo", "reproduce", "seconds_of", "train"]

Flat = Parameter(name="*")


@dataclass(frozen=True)
class _Model(ModelConfig):
    __doc__ = (ModelConfig.__doc__ or "").replace(
        "(Parseval, section 4 of the paper)", "(Parseval); when not given: where beta > 0"
    )
    convex: bool | None = None  # type: ignore[assignment]


_MODEL, _DATA, _TRAIN = _Model(), DataConfig(), TrainConfig()


def demo(*, out: str = "demo", seeds: int = 3, smoke: bool = False, json: Json = False) -> None:
    """The main job, small: train, attack and report on handwritten digits.

    Args:
        out: folder of the runs and the page.
        seeds: networks of each kind.
        smoke: a few seconds, to try it out.
    """
    least(1, seeds=seeds)
    from defquant.paper.demo import run_demo
    from defquant.report import build_report

    folder = Path(out)
    keep_log(folder)
    run_demo(folder, seeds=seeds, smoke=smoke)
    page = build_report(folder, folder / "report.html")
    rows.print_summary(read_folder(folder), as_json=json)
    print(page)


def train(
    *,
    out: str | None = None,
    preset: Annotated[str | None, Parameter(choices=tuple(PRESETS))] = None,
    resume: bool = False,
    json: Json = False,
    model: Annotated[_Model, Flat] = _MODEL,
    data: Annotated[DataConfig, Flat] = _DATA,
    config: Annotated[TrainConfig, Flat] = _TRAIN,
) -> None:
    """Train a network: float, vanilla-quantised, defensive or adversarial.

    Args:
        out: folder of the run (required).
        resume: go on where a run stopped.
    """
    if out is None:
        raise UserError("train needs --out FOLDER, the folder of the run")
    convex = config.beta > 0 if model.convex is None else model.convex
    network = ModelConfig(**asdict(model) | {"convex": convex})
    from defquant.distributed import leads
    from defquant.runs import train_run

    keep_log(Path(out))
    last = train_run(network, data, config, Path(out), resume=resume).history[-1]
    if not leads():
        return
    if json:
        print_json({"run": out, **last})
    else:
        print(f"loss {last['loss']:.4f}  accuracy {last['accuracy']:.2%}", end="  ")
        print(f"test accuracy {last['test_accuracy']:.2%}  epochs {last['epoch']}")
    print(Path(out))


def seconds_of(text: str) -> float:
    """`90s`, `10m`, `1h`, or a number of seconds."""
    units = {"s": 1, "m": 60, "h": 3600}
    try:
        found = float(text.rstrip("smh")) * units.get(text[-1:], 1)
    except ValueError:
        found = 0.0
    if not 0 < found < 1e7:
        raise UserError(f"--budget is a time, as 90s, 10m or 1h; found {text!r}")
    return found


def reproduce(
    names: tuple[str, ...] = (),
    *,
    preset: Literal["smoke", "hour", "small", "gpu", "paper"] = "small",
    seeds: tuple[int, ...] | None = None,
    epochs: int | None = None,
    networks: tuple[str, ...] | None = None,
    cell: tuple[str, ...] | None = None,
    out: str | None = None,
    budget: str | None = None,
    merge: tuple[str, ...] = (),
    keep: tuple[str, ...] | None = None,
    data_root: Root = None,
    svhn_root: str | None = None,
    jobs: int | None = None,
    workers: str = "local",
    device: Device = "auto",
    list: bool = False,
    dry_run: bool = False,
    render_only: bool = False,
    json: Json = False,
) -> int:
    """Make the paper's tables and figures again, at a size of your choice; only what is missing.

    Args:
        names: fig1 fig3 fig5 fig6 fig7 table1 ... table6 surrogates, or all.
        preset: how large.
        seeds: of the trainings of Table 1, instead of the preset's.
        epochs: of every training, instead of the preset's: other networks, with other keys.
        networks: make these alone, by patterns of their names, as `*_4bit_*`.
        cell: make and show the cells of these keys alone; each number on the page names its cells.
        out: folder of results; runs/PRESET if not given.
        budget: of time, as 90s, 10m or 1h: what undecided claims need most comes first, and what
            is missing then is made by the same command again.
        merge: folders of results from other machines, to take over what is missing here.
        keep: networks whose weights stay, by patterns; all if not given.
        svhn_root: where SVHN lies.
        jobs: processes; one per core, four on a GPU.
        workers: local, a number of processes, or a Ray cluster that sees --out: ray://HOST:10001.
        list: names, and what presets cost.
        dry_run: what is missing, in cells, image passes and hours on this machine; nothing is made.
        render_only: show what is there; make nothing.
    """
    from defquant.paper import grid
    from defquant.paper import reproduce as paper

    if list:
        paper.print_list()
        return 0
    scale = grid.SCALES[preset].placed(data_root, svhn_root, device).changed(seeds, epochs)
    chosen = paper.names_of(names or ["all"] * bool(cell), scale)
    cells = paper.cells_to_make(chosen, scale, cell or (), networks or ())
    paper.check_patterns(chosen, scale, keep or ())
    folder = Path(out or f"runs/{preset}")
    least(1, jobs=jobs, workers=int(workers) if workers.isdecimal() else None)
    seconds = None if budget is None else seconds_of(budget)
    if merge and dry_run:
        raise UserError("--merge takes results over, --dry-run makes nothing: leave one out")
    if render_only and not merge and not folder.is_dir():
        raise UserError(f"there is no folder {folder} to show: leave out --render-only to make it")
    if merge:
        paper.merge(folder, merge)
    if dry_run:
        paper.print_plan(cells, scale, folder, jobs)
        return 0
    keep_log(folder)
    failed = []
    if not render_only:
        failed = paper.make(cells, scale, folder, jobs, workers, seconds, keep)
    results = grid.read(folder)
    for key in cell or ():
        if key in results.scores:
            print_measurements([results.scores[key]], as_json=json)
        elif key in results.values:
            print_json({"cell": key, "values": results.values[key]})
    print(folder / grid.SCORES if cell else _show(chosen, scale, results, folder, as_json=json))
    return int(bool(failed))


def _show(
    names: Sequence[str], scale: "Scale", results: "Results", out: Path, *, as_json: bool
) -> Path:
    """Sections as text on stdout and as `NAME.md`, `NAME.png` and `report.html` in `out`."""
    from defquant import report
    from defquant.files import write_bytes
    from defquant.paper.claims import verdicts
    from defquant.paper.figures import EXPERIMENTS, render

    judged, shown, every = verdicts(scale, results), rows.console(), []
    for name, experiment in EXPERIMENTS.items():
        if name in names or any(results.of(cell) is not None for cell in experiment.cells(scale)):
            every.append(section := render(name, scale, results))
        if name in names:
            picture = f"{name}.png" if section.panels else ""
            if picture:
                report.section_figure(section, out / picture)
            text = report.section_markdown(section, figure=picture)
            write_bytes(out / f"{name}.md", text.encode())
            if not as_json:
                report.print_section(section, shown)
    write_bytes(out / "claims.md", report.claims_markdown(judged).encode())
    if as_json:
        print_measurements(results.scores.values(), as_json=True)
    elif len(names) >= len(EXPERIMENTS) - 1:
        report.print_claims(judged, shown)
    return report.build_report(out, out / "report.html", sections=every, verdicts=judged)
