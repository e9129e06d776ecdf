"""What the demo's networks differ by: paired over seeds, with 95 % intervals (Student's t).

    defquant demo --seeds 10 --out demo10
    python benchmarks/demo_seeds.py demo10

The interval covers the chance in training; all seeds are attacked on the same test images. Several
folders, as of other machines, stand beside each other.
"""

import argparse
import math
from pathlib import Path
from statistics import fmean, stdev

from scipy.special import stdtrit

from defquant.records import Measurement, read_folder

PAIRS = (
    (("vanilla", 4), ("float", None)),
    (("DQ", 4), ("vanilla", 4)),
    (("DQ", 4), ("float", None)),
    (("DQ", 4), ("DQ", None)),
    (("DQ", None), ("float", None)),
)


def paired(found: list[Measurement], one: object, other: object) -> list[float]:
    """Accuracy of `one` minus that of `other`, in points, seed by seed."""
    shares = {(m.method, m.bits, m.seed): 100 * m.score.accuracy for m in found}
    seeds = sorted({seed for *kind, seed in shares if tuple(kind) == one})
    return [shares[(*one, s)] - shares[(*other, s)] for s in seeds]  # type: ignore[misc]


def interval(values: list[float]) -> str:
    mean, n = fmean(values), len(values)
    half = float(stdtrit(n - 1, 0.975)) * stdev(values) / math.sqrt(n)
    return f"{mean:+.1f} [{mean - half:+.1f}, {mean + half:+.1f}]"


def threes(values: list[float]) -> str:
    """Lowest and highest mean of three seeds in a row, as the demo has."""
    means = [fmean(values[i : i + 3]) for i in range(0, len(values) - 2, 3)]
    return f"{min(means):+.1f} to {max(means):+.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--eps", type=float, default=24, help="in pixels")
    options = parser.parse_args()
    for folder in options.folders:
        every = [m for m in read_folder(folder) if round(255 * m.eps, 3) == options.eps]
        for attack in dict.fromkeys(m.attack for m in every):
            found = [m for m in every if m.attack == attack]
            for one, other in PAIRS:
                values = paired(found, one, other)
                name = " - ".join(f"{k} {b or ''}".strip() for k, b in (one, other))
                print(f"{folder.name:12} {attack:12} {name:20} {interval(values):22}", end=" ")
                print(f"n = {len(values)}, of three seeds {threes(values)}")


if __name__ == "__main__":
    main()
