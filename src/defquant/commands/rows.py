"""What verbs share: measurements as rows or JSON lines on stdout, and the attack that is shown."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from defquant.results import Measurement

if TYPE_CHECKING:
    from defquant.attacks import Composition, Single

__all__ = ["print_measurements", "shown_attack"]


def print_measurements(
    measurements: Iterable[Measurement], *, as_json: bool, width: int = 12
) -> None:
    for m in measurements:
        if as_json:
            print(json.dumps(_record(m)), flush=True)
        else:
            eps = f"{m.eps * 255:.4g}/255" if m.eps else ""
            print(f"{m.run:24} {m.attack:{width}} {eps:>8}  {m.score}", flush=True)


def _record(m: Measurement) -> dict[str, Any]:
    low, high = m.score.interval
    return asdict(m) | {"accuracy": m.score.accuracy, "low": low, "high": high}


def shown_attack(names: Sequence[str], eps: Sequence[float]) -> "Single | Composition":
    """The attack of the report's example pictures: the one of most steps, at the middle eps."""
    from defquant.attacks import FirstOrder
    from defquant.attacks.names import parse_attack

    middle = sorted(eps)[len(eps) // 2]
    attacks = [parse_attack(name, middle) for name in names]
    return max(
        attacks, key=lambda a: a.walk.steps * a.walk.restarts if isinstance(a, FirstOrder) else 0
    )
