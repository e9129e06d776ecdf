"""Is the masking verdict right? A confusion table over networks whose gradients are masked, or not.

Networks on scikit-learn's digits, trained on one core and kept in `build/masking-zoo`. Thresholds
were chosen on seed 0 of the kinds that are not held out; the rest, and other seeds, are. Exits
with 1 where a masked network does not FAIL, an honest one does though no attack proves it, or one
of undecided truth PASSes. An honest network may be OVERSTATED: that is proved.
"""

import argparse
import math
import platform
import sys
import time
import warnings
from dataclasses import dataclass

import torch
from torch import nn

import defquant as dq
from defquant.diagnose import Effort, Verdict
from masking_models import ZOO, Kind, digits, plain

EFFORT = Effort()
TRUTH = {True: "masked", False: "honest", None: "overstated"}


@dataclass(frozen=True)
class Row:
    kind: Kind
    seed: int
    verdict: Verdict
    seconds: float

    @property
    def held_out(self) -> bool:
        return self.kind.held_out or self.seed > 0

    @property
    def proved(self) -> bool:
        """A FAIL of a network that nobody masked, and all attacks leave less than PGD, certainly.

        Their 95 % intervals do not overlap: the network hides its gradients all the same.
        """
        usual, strongest = self.verdict.usual.interval, self.verdict.strongest.interval
        found = self.verdict.overall == "FAIL"
        return self.kind.masked is False and found and strongest[1] < usual[0]

    @property
    def found(self) -> str:
        return "FAIL, proved" if self.proved else self.verdict.overall

    @property
    def right(self) -> bool:
        if self.kind.masked is None:
            return self.found != "PASS"
        return (self.found == "FAIL") == self.kind.masked

    @property
    def cells(self) -> tuple[str, ...]:
        found = self.verdict
        raised = {
            word: [s.name for s in found.signs if s.verdict == word] for word in ("FAIL", "WARN")
        }
        signs = "; ".join(f"{word}: {', '.join(names)}" for word, names in raised.items() if names)
        return (
            self.kind.name, str(self.seed), "held out" if self.held_out else "tuned",
            TRUTH[self.kind.masked], f"{found.usual.accuracy:.0%}",
            f"{found.strongest.accuracy:.0%}", self.found + ("" if self.right else " (WRONG)"),
            signs or "-",
        )  # fmt: skip


def examined(kind: Kind, seed: int, images: int, substitute: nn.Module) -> Row:
    start = time.perf_counter()
    data = digits("test", images)
    model = kind.make(seed)
    found = dq.masking_verdict(model, data, kind.eps, substitute=substitute, effort=EFFORT)
    return Row(kind, seed, found, time.perf_counter() - start)


def table(rows: list[Row]) -> str:
    head = ("network", "seed", "", "truth", "PGD", "all attacks", "verdict", "signs")
    lines = [head, ("---",) * len(head), *(row.cells for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def confusion(rows: list[Row]) -> str:
    words = ("FAIL", "FAIL, proved", "OVERSTATED", "WARN", "PASS", "not decided")
    lines = [("", *words), ("---",) * (len(words) + 1)]
    for held in (False, True):
        for truth, name in TRUTH.items():
            mine = [r for r in rows if r.held_out == held and r.kind.masked is truth]
            counts = [sum(row.found == word for row in mine) for word in words]
            if mine:
                where = "held out" if held else "tuned"
                lines.append((f"{name}, {where}", *map(str, counts)))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=240)
    parser.add_argument("--seeds", type=int, default=3, help="of the kinds not held out")
    parser.add_argument("--fresh", type=int, default=2, help="seeds of the kinds held out")
    parser.add_argument("--only", default="", help="kinds whose name holds this")
    parser.add_argument("--minutes", type=float, default=math.inf, help="then begin no other")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", dq.DefquantWarning)
    substitute = plain(None, "substitute")(99)
    asked = [kind for kind in ZOO if options.only in kind.name]
    rows, end = list[Row](), time.monotonic() + 60 * options.minutes
    for seed in range(max(options.seeds, options.fresh)):
        for kind in asked:
            seeds = options.fresh if kind.held_out else options.seeds
            if seed < seeds and time.monotonic() < end:
                rows.append(examined(kind, seed, options.images, substitute))
                print(*rows[-1].cells, f"{rows[-1].seconds:.0f} s", file=sys.stderr, flush=True)
    rows.sort(key=lambda row: asked.index(row.kind))
    wrong = [row for row in rows if not row.right]
    print(table(rows) + "\n\n" + confusion(rows))
    print(
        f"\n{len(rows)} networks, {len(wrong)} wrong; {sum(row.seconds for row in rows):.0f} s; "
        f"{options.images} test images of digits; {EFFORT}; torch {torch.__version__}, Python "
        f"{platform.python_version()}, {platform.machine()}"
    )
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
