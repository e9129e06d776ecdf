"""What verbs share: measurements as rows or JSON lines on stdout, and the attack that is shown."""

import json
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from typing import TYPE_CHECKING, Any, TextIO

from defquant.results import Measurement, record

if TYPE_CHECKING:
    from defquant.attacks import Composition, Single

__all__ = ["json_alone", "print_json", "print_measurements", "shown_attack"]

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


def print_measurements(
    measurements: Iterable[Measurement], *, as_json: bool, width: int = 12
) -> None:
    for m in measurements:
        if as_json:
            print_json(record(m))
        else:
            eps = f"{m.eps * 255:.4g}/255" if m.eps else ""
            print(f"{m.run:24} {m.attack:{width}} {eps:>8}  {m.score}{_mark(m)}", flush=True)


def _mark(m: Measurement) -> str:
    share = f"{m.vanishing or 0:.1%}"
    return f"  † masked: {share} of the right images have no gradient" if m.masked else ""


def shown_attack(names: Sequence[str], eps: Sequence[float]) -> "Single | Composition":
    """The attack of the report's example pictures: the one of most steps, at the middle eps."""
    from defquant.attacks import FirstOrder
    from defquant.attacks.names import parse_attack

    middle = sorted(eps)[len(eps) // 2]
    attacks = [parse_attack(name, middle) for name in names]
    return max(
        attacks, key=lambda a: a.walk.steps * a.walk.restarts if isinstance(a, FirstOrder) else 0
    )


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
