"""Measurements as rows, or as JSON lines, on stdout."""

import json
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from defquant.results import Measurement

__all__ = ["print_measurements"]


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
