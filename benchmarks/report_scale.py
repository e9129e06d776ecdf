"""What a report costs, in seconds and megabytes, on many runs and on one run of many radii.

Made-up lines: `--runs` runs (a seed each of networks of 1 to 8 bits) of `--lines` lines, then one
run of `--radii` radii. Every call is a process of its own, whose peak memory is its own.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from defquant.records import Measurement, record
from defquant.report import build_report

ATTACKS = ("Random", "FGSM", "R+FGSM", "PGD", "PGD-50x10")


def lines(run: int, count: int) -> Iterator[Measurement]:
    """`count` lines of one run: clean, then the attacks at as many radii as that takes."""
    for i in range(count):
        attack = ATTACKS[i % len(ATTACKS)] if i else "clean"
        eps = i / count if i else 0.0
        settings = f"{attack}(eps={255 * eps:.3f}/255)" if i else "clean"
        versions = {"python": "3.11", "torch": "2.13.0", "threads": "1"}
        evidence = {
            "versions": versions, "command": "defquant attack runs",
            "weights_sha256": f"{run:064x}", "config_sha256": f"{run % 8:064x}",
            "train_fingerprint": "0" * 16,
        }  # fmt: skip
        yield Measurement(
            f"r{run}", "vanilla", "wrn-10-1", 1 + run % 8, 0.0, run // 8, "digits", "0" * 16,
            attack, eps, settings, round(900 * (1 - eps)), 1000, 0.0, 0, 1.0, evidence,
        )  # fmt: skip


def write(folder: Path, runs: int, count: int) -> None:
    """`runs` folders with `results.jsonl` of `count` lines."""
    for run in range(runs):
        place = folder / f"r{run}"
        place.mkdir()
        text = "".join(json.dumps(record(m)) + "\n" for m in lines(run, count))
        (place / "results.jsonl").write_text(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=2000)
    parser.add_argument("--lines", type=int, default=50)
    parser.add_argument("--radii", type=int, default=20_000)
    parser.add_argument("--report", help="of this folder, in this process")
    options = parser.parse_args()
    if options.report:
        start = time.process_time()
        page = build_report(options.report, Path(options.report) / "report.html")
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        size = page.stat().st_size / 1e6
        print(
            f"{time.process_time() - start:.1f} s of a core, {peak:.0f} MB, a page of {size:.1f} MB"
        )
        return
    for runs, count in ((options.runs, options.lines), (1, options.radii)):
        with tempfile.TemporaryDirectory() as folder:
            write(Path(folder), runs, count)
            print(f"{runs:,} runs of {count:,} lines: ", end="", flush=True)
            subprocess.run([sys.executable, __file__, "--report", folder], check=True)


if __name__ == "__main__":
    main()
