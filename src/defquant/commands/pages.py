"""Verbs that show or fetch: report, demo, reproduce, data."""

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from jsonargparse import Namespace

from defquant.commands.rows import print_json, print_measurements
from defquant.errors import UserError
from defquant.results import Measurement, read_folder

if TYPE_CHECKING:
    from rich.console import Console

    from defquant.paper.grid import Scale

__all__ = ["data", "demo", "report", "reproduce"]


def report(settings: Namespace) -> int:
    """`defquant report`: the page, and the summary on stdout."""
    from defquant.report import build_report, markdown_table, plot_curves

    folder = Path(settings.folder)
    page = build_report(folder, Path(settings.out))
    measurements = _measured(folder)
    if settings.markdown:
        from defquant.files import write_bytes

        write_bytes(Path(settings.markdown), markdown_table(measurements).encode())
    if settings.figure:
        plot_curves(measurements, Path(settings.figure))
    if measurements:
        _print_summary(measurements, as_json=settings.json)
    print(page)
    return 0


def demo(settings: Namespace) -> int:
    """`defquant demo`: train, attack, report on digits."""
    from defquant.paper.demo import run_demo
    from defquant.report import build_report

    if settings.seeds < 1:
        raise UserError(f"--seeds must be 1 or more; found {settings.seeds}")
    out = Path(settings.out)
    run_demo(out, seeds=settings.seeds, smoke=settings.smoke)
    page = build_report(out, out / "report.html")
    _print_summary(read_folder(out), as_json=settings.json)
    print(page)
    return 0


def reproduce(settings: Namespace) -> int:
    """`defquant reproduce`: tables and figures of the paper; what is missing is made first."""
    from defquant.paper import reproduce as paper

    if settings.list:
        paper.print_list()
        return 0
    scale = paper.scale_of(settings.preset, settings.data_root, settings.svhn_root, settings.device)
    keys = settings.cell or []
    names = paper.names_of(settings.names or ["all"] * bool(keys), scale)
    cells = paper.cells_to_make(names, scale, keys)
    out = Path(settings.out or f"runs/{scale.name}")
    if settings.jobs is not None and settings.jobs < 1:
        raise UserError(f"--jobs must be 1 or more; found {settings.jobs}")
    if settings.dry_run:
        paper.print_plan(cells, scale, out, settings.jobs)
        return 0
    failed: list[str] = []
    if not settings.render_only:
        failed = paper.make(cells, scale, out, settings.jobs, settings.workers)
    page = _show_cells if keys else _show
    print(page(keys or names, scale, out, as_json=settings.json))
    return 1 if failed else 0


def _show(names: Sequence[str], scale: "Scale", out: Path, *, as_json: bool) -> Path:
    """Sections as text on stdout and as `NAME.md`, `NAME.png` and `report.html` in `out`."""
    from defquant import report
    from defquant.files import write_bytes
    from defquant.paper import grid
    from defquant.paper.claims import verdicts
    from defquant.paper.figures import EXPERIMENTS, render

    results = grid.read(out)
    command = f"defquant reproduce {{}} --preset {scale.name}"
    every = [
        replace(render(name, scale, results), command=command.format(name))
        for name in EXPERIMENTS
        if name in names or any(c in results for c in EXPERIMENTS[name].cells(scale))
    ]
    judged = verdicts(scale, results)
    for section in every:
        if section.name in names:
            picture = f"{section.name}.png" if section.panels else ""
            if picture:
                report.section_figure(section, out / picture)
            text = report.section_markdown(section, figure=picture)
            write_bytes(out / f"{section.name}.md", text.encode())
    write_bytes(out / "claims.md", report.claims_markdown(judged).encode())
    if as_json:
        print_measurements(results.scores.values(), as_json=True)
    else:
        console = _console()
        for section in every:
            if section.name in names:
                report.print_section(section, console)
        if len(names) >= len(EXPERIMENTS) - 1:
            report.print_claims(judged, console)
    return report.build_report(out, out / "report.html", sections=every, verdicts=judged)


def _show_cells(keys: Sequence[str], scale: "Scale", out: Path, *, as_json: bool) -> Path:
    """The scores of the cells with these keys; values of other kinds as JSON."""
    from defquant.paper import grid

    results = grid.read(out)
    for key in keys:
        if key in results.scores:
            print_measurements([results.scores[key]], as_json=as_json)
        elif key in results.values:
            print_json({"cell": key, "values": results.values[key]})
    return out / "results.jsonl"


def data(settings: Namespace) -> int:
    """`defquant data fetch NAME`: download, check, unpack."""
    if settings.action != "fetch":
        raise UserError(f"unknown action {settings.action!r}: use `defquant data fetch NAME`")
    from defquant.data import fetch

    print(fetch(settings.name, Path(settings.data_root)))
    return 0


def _measured(folder: Path) -> list[Measurement]:
    """The folder's measurements; none where it holds cards of exported models alone."""
    try:
        return read_folder(folder)
    except UserError:
        return []


def _print_summary(measurements: list[Measurement], *, as_json: bool) -> None:
    if as_json:
        print_measurements(measurements, as_json=True)
        return
    from defquant.report import text_table

    _console().print(text_table(measurements))


def _console() -> "Console":
    from rich.console import Console

    # a pipe has no width: print it as wide as it needs
    return Console(width=None if sys.stdout.isatty() else 160)
