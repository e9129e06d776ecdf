"""What verbs print: JSON lines, or aligned rows for people."""

import json
import math
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from typing import TYPE_CHECKING, Any, TextIO

from defquant.errors import visible
from defquant.records import Measurement, record

if TYPE_CHECKING:
    from rich.console import Console

    from defquant.images import Rescored

__all__ = [
    "console", "detection_row", "diagnosis_rows", "eps_column", "json_alone", "judged_rows",
    "print_json", "print_measurements", "print_rescored", "print_summary",
]  # fmt: skip

_lines: list[TextIO] = []  # the real stdout, while `json_alone` keeps it


@contextmanager
def json_alone() -> Iterator[None]:
    """Give stdout to `print_json` alone: what others print, the user's own code too, is stderr's.

    So `defquant VERB --json | jq .` never meets a line that is no JSON.
    """
    _lines.append(sys.stdout)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        _lines.pop()


def print_json(record: object) -> None:
    """One line of JSON on stdout; numbers that JSON lacks, NaN and infinity, are null."""
    line = json.dumps(_finite(record), allow_nan=False)
    print(line, file=_lines[-1] if _lines else sys.stdout, flush=True)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def console() -> "Console":
    from rich.console import Console

    # a pipe has no width: print it as wide as it needs
    return Console(width=None if sys.stdout.isatty() else 160)


def print_summary(measurements: Sequence[Measurement], *, as_json: bool) -> None:
    """All of them as JSON lines, or their table."""
    if as_json:
        print_measurements(measurements, as_json=True)
    elif measurements:
        from defquant.report import text_table

        console().print(text_table(measurements))


def print_measurements(
    measurements: Iterable[Measurement], *, as_json: bool, width: int = 12
) -> None:
    for m in measurements:
        if as_json:
            print_json(record(m))
        else:
            share = f"  † masked: {m.vanishing or 0:.1%} of the right images have no gradient"
            row = f"{m.run:24} {m.attack:{width}} {eps_column(m.eps)}  {m.score}"
            print(row + share * m.masked, flush=True)


def print_rescored(found: "Iterable[Rescored]", *, as_json: bool) -> None:
    for r in found:
        low, high = r.score.interval
        if as_json:
            print_json({
                "attack": r.attack, "eps": r.eps, "settings": r.settings,
                "correct": r.score.correct, "total": r.score.total, "accuracy": r.score.accuracy,
                "low": low, "high": high, "saved_correct": r.saved.correct,
            })  # fmt: skip
        else:
            saved = f"{r.saved.accuracy:.1%} ({r.saved.correct}/{r.saved.total})"
            row = f"{visible(r.attack):20} {eps_column(r.eps)}  {r.score!s:34}  when saved {saved}"
            print(row, flush=True)


def detection_row(r: Mapping[str, Any], width: int) -> str:
    detected = _part(r["detected"], r["fooling"])
    false = _part(r["false_positives"], r["clean"])
    return (
        f"detector  {r['attack']:{width}} {eps_column(r['eps'])}  detects {detected:20}  "
        f"false positives {false}"
    )


def diagnosis_rows(record: Mapping[str, Any]) -> Iterator[str]:
    """The record as aligned lines for people."""
    yield from _amplification(record["amplification"])
    yield ""
    yield from _audit(record["audit"])
    for part, why in record["left_out"].items():
        yield f"  {part}: {why}"
    yield ""
    yield from _masking(record)


def _amplification(networks: list[dict[str, Any]]) -> Iterator[str]:
    yield "Error amplification: ||A - A_adv|| / ||A|| at each layer's input (Eq. 4)"
    for network in networks:
        values = [layer["mean"] for layer in network["layers"]]
        shown = (
            "  ".join("-" if value is None else f"{value:.3f}" for value in values) or "left out"
        )
        yield f"  {network['name']:20} {network['method']:12} {shown}"
        first, last = (values or [None])[0], (values or [None])[-1]
        if first and last is not None:
            yield f"  {'':20} {'':12} image to last layer: x {last / first:.2f}"


def _audit(found: Mapping[str, Any] | None) -> Iterator[str]:
    if found is None:
        yield "Lipschitz audit: left out"
        return
    yield f"Lipschitz audit of the straight-through surrogate, {found['images']} images"
    yield f"  {'layer':24} {'matrix':>8} {'norm':>8} {'with BN':>8} {'residual':>9}"
    for layer in found["layers"]:
        numbers = [layer[name] for name in ("matrix_norm", "norm", "gain", "residual")]
        a, b, c, d = (float("nan") if number is None else number for number in numbers)
        yield f"  {layer['layer']:24} {a:8.3f} {b:8.3f} {c:8.3f} {d:9.3f}"
    low, high = ("-" if n is None else f"{n:.3g}" for n in (found["lower"], found["bound"]))
    if found["bound"] is None:
        yield f"  Lipschitz constant: {low} or more; {found['unbounded']}"
        return
    yield f"  Lipschitz constant: {low} to {high}"
    radius = found["surrogate_radius_linf"] * 255
    yield f"  largest certified radius (of the surrogate, not of the network): {radius:.2g}/255"


def _masking(record: Mapping[str, Any]) -> Iterator[str]:
    found, eps = record["masking"], eps_column(record["eps"]).strip()
    kind = "quantised" if found["quantized"] else "float"
    yield f"Masked gradients? {found['verdict']} at eps {eps}, {record['images']} images, {kind}"
    yield f"  robust under PGD {_rate(found['usual'])}, under all {_rate(found['strongest'])}"
    for sign in found["signs"]:
        yield f"  {sign['verdict']:11} {sign['name']:13} {_rate(sign)}"
        if sign["verdict"] in ("WARN", "FAIL"):
            yield f"  {'':11} {sign['means']}: {sign['do']}"


def _rate(found: Mapping[str, Any]) -> str:
    interval = f"[{found['low']:.1%}, {found['high']:.1%}]"
    return f"{found['rate']:.1%} {interval} ({found['count']}/{found['total']})"


def judged_rows(record: Mapping[str, Any]) -> Iterator[str]:
    """A judgement as lines for people, the verdict first."""
    yield f"{record['model']['name']}: {record['verdict']}: {record['why']}"
    if record["paired"]:
        yield f"beside {record['reference']['name']}: {record['paired']}: {record['beside']}"
    for name in ("model", "reference"):
        found = record[name]
        for line in () if found is None else found["contract"]:
            yield f"  {found['name']:32} {line}"
        if found and found["closed"]:
            shut = ", ".join(found["closed"])
            yield f"  {found['name']:32} upper bounds: not opened: {shut}"
    for row in record["rows"]:
        yield f"  eps {eps_column(row['eps']):>6}  usual {_rate(row['usual'])}"
        yield f"  {'':10}  strongest {_rate(row['strongest'])}  {_points(row['overstated'])}"
        if "paired" in row:
            yield f"  {'':10}  reference {_rate(row['reference'])}  {_points(row['paired'])}"
            ways = (f"{t['from']} -> {t['to']} {_part(t['fooled'], t['total'])}"
                    for t in row["transfer"])  # fmt: skip
            yield f"  {'':10}  transfer {', '.join(ways)}"
    if record["masking"] is None:
        yield f"  signs of masked gradients were not looked for: {record.get('no_masking', '')}"
    for sign in (record["masking"] or {}).get("signs", ()):
        if sign["verdict"] in ("WARN", "FAIL"):
            part = _part(sign["count"], sign["total"])
            yield f"  {sign['verdict']:11} {sign['name']:13} {part}: {sign['means']}"


def _points(found: Mapping[str, Any]) -> str:
    ends = f"[{100 * found['low']:+.1f}, {100 * found['high']:+.1f}]"
    return f"{100 * found['rate']:+.1f} points {ends} {found['verdict']}"


def _part(part: int, whole: int) -> str:
    """`3/40 (7.5%)`."""
    return f"{part}/{whole} ({part / whole:.1%})" if whole else "0/0"


def eps_column(eps: float) -> str:
    """`8/255` on the right of eight places; nothing for 0."""
    return f"{f'{eps * 255:.4g}/255' if eps else '':>8}"
