"""Verbs that show or fetch: report, demo, reproduce, data."""

import sys
from pathlib import Path

from jsonargparse import Namespace

from defquant.commands.rows import print_measurements
from defquant.errors import UserError
from defquant.results import Measurement, read_folder

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
    from defquant.experiments.demo import run_demo
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
    from defquant.experiments import reproduction

    if settings.list:
        reproduction.print_list()
        return 0
    scale = reproduction.scale_of(
        settings.preset, settings.data_root, settings.svhn_root, settings.device
    )
    names = reproduction.names_of(settings.names, scale)
    out = Path(settings.out or f"runs/{scale.name}")
    if settings.jobs is not None and settings.jobs < 1:
        raise UserError(f"--jobs must be 1 or more; found {settings.jobs}")
    if settings.dry_run:
        reproduction.print_plan(names, scale, out, settings.jobs)
        return 0
    failed: list[str] = []
    if not settings.render_only:
        failed = reproduction.make(names, scale, out, settings.jobs, settings.workers)
    print(reproduction.show(names, scale, out, as_json=settings.json))
    return 1 if failed else 0


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
    from rich.console import Console

    from defquant.report import text_table

    # a pipe has no width: print it as wide as it needs
    Console(width=None if sys.stdout.isatty() else 160).print(text_table(measurements))
