"""What work costs, how far it is, and which of it the undecided claims need first. No torch.

Costs are counted in image passes: an image forward and fully backward.
"""

import json
import math
import re
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from statistics import NormalDist
from typing import Any

from defquant.paper import grid
from defquant.paper.claims import CLAIMS
from defquant.paper.figures import EXPERIMENTS
from defquant.paper.grid import Cell, Network, Results, Scale, by_network
from defquant.paper.verdict import Contrast, Evidence, evidence_of

__all__ = ["Plan", "Survey", "gains", "kind_of", "needs", "passes_by_model"]

FORWARD, INPUT_GRADIENT = 1 / 3, 2 / 3  # of a pass, whose backward is twice its forward
WORST = {"adaptive": 2.2, "standard": 44.0}  # times the time of a PGD of its steps, or of 50
STANDING = 0.5  # share of images that long attacks work on, for those that fell cost nothing
UNKNOWN = 1 / 12  # variance of an accuracy that nobody measured: that of any in [0, 1]
SPREADS = {False: 0.03, True: 0.1}  # between trainings, at 1 bit or not, where no two were made
_IMAGES = {"cifar10": (50_000, 10_000), "svhn": (73_257, 26_032), "digits": (1_347, 450)}


# --- need ---------------------------------------------------------------------------------


def needs(scale: Scale, results: Results, missing: Iterable[Cell]) -> Mapping[str, float]:
    """By name of a network: how much shorter its next cells make the undecided readings' intervals.

    A reading of the claims compares sums of accuracies, whose variance V is that of the images and
    of the trainings (`verdict.interval`); one that is missing has that of any number in [0, 1].
    What takes dV from V is worth sqrt(V) - sqrt(V - dV), summed over the contrasts that may still
    be decided by what is `missing` here. Substitutes are worth what their neediest user is.
    """
    evidence, todo = evidence_of(scale, results), list(missing)
    able = frozenset(cell.key for cell in todo)
    answers = {name: experiment.found(scale, results) for name, experiment in EXPERIMENTS.items()}
    found: dict[str, float] = defaultdict(float)
    asked = (ask for claim in CLAIMS for one in claim.asks for ask in one.asked(scale, answers))
    for _, _, contrasts, choices in asked:
        for contrast in contrasts:
            if contrast.undecided(evidence, choices or len(contrasts)):
                for name, gain in gains(contrast, evidence, able).items():
                    found[name] += gain
    for cell in todo:
        if cell.substitute is not None:
            name = cell.substitute.name
            found[name] = max(found[name], found[cell.network.name])
    return found


def gains(contrast: Contrast, evidence: Evidence, able: frozenset[str]) -> dict[str, float]:
    whole, parts = 0.0, dict[str, float]()
    for weight, (ask, n) in contrast.terms:
        cells = ask.cells
        there = sum(evidence.results.of(cell) is not None for cell in cells)
        after = [cell for cell in cells if cell.key in able]
        spread = evidence.spread(cells[0])
        chance = spread.sd if spread else SPREADS[cells[0].network.model.bits == 1]
        if there and ask.trial.kind == "accuracy":
            sample = evidence.sample(ask, n, alone=False)
            before = (sample.variance if sample else 0.0) + chance**2 / there
            gain = chance**2 / (there * (there + 1))
        else:
            before = gain = 0.0 if there else UNKNOWN
        if not there and not after:
            return {}  # not to be had from what is made here
        whole += weight**2 * before
        if after:
            name = after[0].network.name
            parts[name] = parts.get(name, 0.0) + weight**2 * gain
    return {n: math.sqrt(whole) - math.sqrt(max(0.0, whole - d)) for n, d in parts.items()}


# --- what is done, what is left -----------------------------------------------------------


class Survey:
    """A folder of results as it is now: what of `cells` is there, what is left and how long it
    takes, learnt from the seconds that like work took. Counts what other machines do there, too.
    """

    def __init__(self, cells: Sequence[Cell], out: Path) -> None:
        self.results, self.own = grid.read(out), by_network(cells)
        self.missing = {n: self.results.missing(own) for n, own in self.own.items()}
        self.epochs = {n: _epochs(out / "networks" / n.name / "log.jsonl") for n in self.own}
        trained, measured = _Rates(), _Rates()
        for network, own in self.own.items():
            share = len(self.epochs[network]) / network.train.epochs
            trained.add(kind_of(network), sum(self.epochs[network]), share * _training(network))
            for cell in own:
                if (m := self.results.scores.get(cell.key)) is not None:
                    measured.add(_alike(cell), m.seconds, _cell_passes(cell))
        self.done = trained.seconds + measured.seconds
        self._trained, self._measured = trained, measured if measured.passes else trained

    def left(self, network: Network) -> float:
        """Seconds of its training and of its missing cells, in one process."""
        missing = self.missing[network]
        share = 1 - len(self.epochs[network]) / network.train.epochs
        training = share * _training(network) * self._trained.of(kind_of(network))
        used = missing or not self.own[network]  # a substitute is trained, whatever else is there
        cells = sum(_cell_passes(cell) * self._measured.of(_alike(cell)) for cell in missing)
        return training * bool(used) + cells

    @property
    def all_left(self) -> float:
        return sum(map(self.left, self.own))

    def scores(self, network: Network) -> str:
        """`clean 68.1, FGSM 8/255 4.0`: the row of the table that this network fills."""
        there = [(c, self.results.scores.get(c.key)) for c in self.own[network]]
        return ", ".join(f"{c.name} {100 * m.score.accuracy:.1f}" for c, m in there if m)

    def lines(self) -> list[str]:
        """One for each network that is begun and not done."""
        found = []
        for network, own in self.own.items():
            done, missing = len(self.epochs[network]), len(self.missing[network])
            if done and (missing or done < network.train.epochs):
                state = (
                    f"epoch {done}/{network.train.epochs}, {len(own) - missing}/{len(own)} cells"
                )
                found.append(f"{network.name}  {state}  {self.scores(network)}")
        return found


class _Rates:
    """Seconds a pass, by kind; of a kind that was never seen, those of all."""

    def __init__(self) -> None:
        self._kinds: dict[Any, tuple[float, float]] = {}
        self.seconds = self.passes = 0.0

    def add(self, kind: Any, seconds: float, passes: float) -> None:
        if passes:
            before = self._kinds.get(kind, (0.0, 0.0))
            self._kinds[kind] = before[0] + seconds, before[1] + passes
            self.seconds, self.passes = self.seconds + seconds, self.passes + passes

    def of(self, kind: Any) -> float:
        seconds, passes = self._kinds.get(kind, (self.seconds, self.passes))
        return seconds / passes if passes else 1e-3


def _epochs(log: Path) -> list[float]:
    """Seconds of each epoch that is done."""
    with suppress(OSError, ValueError, KeyError, TypeError):  # written anew at this moment
        lines = log.read_text(encoding="utf-8").splitlines()
        return [float(json.loads(line)["seconds"]) for line in lines]
    return []


def _alike(cell: Cell) -> tuple[object, ...]:
    """Cells that cost as much on the networks of one kind."""
    return kind_of(cell.network), cell.mark, cell.images, cell.split


class Plan:
    """Which network is next, and what there is to tell meanwhile.

    Next is what shortens the intervals of undecided readings most for its time (see `needs`),
    of those networks that can be done before `until` on the monotonic clock.
    """

    def __init__(
        self, scale: Scale, cells: Sequence[Cell], out: Path, until: float = math.inf
    ) -> None:
        self.until, self._scale, self._cells, self._out = until, scale, cells, out
        self._begun = self._seen = time.monotonic()
        self._first = self._survey = Survey(cells, out)
        self._moved = False

    def _look(self) -> Survey:
        first, now = self._first, Survey(self._cells, self._out)
        self._survey, self._seen = now, time.monotonic()
        if not self._moved and now.done > first.done:  # what came before is imports, no pace
            both = [(s.epochs, s.missing) for s in (first, now)]
            at_work = sum(any(a[n] != b[n] for a, b in zip(*both, strict=True)) for n in now.own)
            begun = self._seen - (now.done - first.done) / at_work
            self._begun, self._moved = max(self._begun, begun), True
        return now

    def next(self, left: Iterable[str]) -> str:
        """One of these names; where none is needed by any claim, the first."""
        survey = self._look()
        missing = [cell for cells in survey.missing.values() for cell in cells]
        need = needs(self._scale, survey.results, missing)
        seconds = {network.name: survey.left(network) for network in survey.own}
        time_left = self.until - time.monotonic()
        worth = {n: (seconds[n] <= time_left, need.get(n, 0.0) / (seconds[n] or 1)) for n in left}
        return max(worth, key=worth.__getitem__)

    @property
    def remaining(self) -> float | None:
        """Seconds until all is done at the pace since this plan was made; None before any work.

        Work of other machines on the same folder counts.
        """
        done = self._survey.done - self._first.done
        return self._survey.all_left * (self._seen - self._begun) / done if done > 0 else None

    def tell(self, name: str) -> list[str]:
        """Of all together, then of each network that is begun; or, in one line, of that `name`."""
        survey = self._look() if name or time.monotonic() > self._seen + 2 else self._survey
        left = self.remaining
        missing = sum(map(len, survey.missing.values()))
        cells = len(dict.fromkeys(self._cells))
        words = f"{cells - missing} of {cells} cells, {_long(left)} left"
        if self.until < math.inf:
            words += f", {_long(self.until - time.monotonic())} of the budget"
        rows = [survey.scores(network) for network in survey.own if network.name == name]
        return [*filter(None, rows), words] if name else [words, *survey.lines()]


def _long(seconds: float | None) -> str:
    """`40 s`, `12 min`, `3.5 h`."""
    if seconds is None:
        return "an unknown time"
    if seconds < 90:
        return f"{max(0.0, seconds):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


# --- cost ---------------------------------------------------------------------------------


def passes_by_model(cells: Iterable[Cell]) -> dict[Network, tuple[float, float]]:
    """Image passes of each network that `cells` need: of its training, of its measurements."""
    groups = by_network(cells)
    return {n: (_training(n), sum(map(_cell_passes, own))) for n, own in groups.items()}


def _training(network: Network) -> float:
    """Those of its attack among them."""
    data, train = network.data, network.train
    every = _IMAGES[data.data][0] - data.validation_images
    steps = float(train.attack in ("fgsm", "rfgsm"))
    if train.attack == "pgd" and train.attack_eps is not None:
        steps = _paper_steps(255 * train.attack_eps)
    elif train.attack == "pgd":  # mean over eps = clip(|N(0, sigma)|, 0, 2 sigma), by quantiles
        sigma = 255 * train.attack_sigma
        draws = (abs(NormalDist(0, sigma).inv_cdf(q / 1000)) for q in range(1, 1000))
        steps = sum(_paper_steps(min(eps, 2 * sigma)) for eps in draws) / 999
    images = min(every, data.train_images or every)
    return images * train.epochs * (1 + INPUT_GRADIENT * steps * train.mix)


def _cell_passes(cell: Cell) -> float:
    """Of a black box, only the answers."""
    data = cell.network.data
    split = data.validation_images if cell.split == "validation" else _IMAGES[data.data][1]
    images = min(split, cell.images or split)
    if cell.substitute is not None or cell.attack in ("clean", "random"):
        return images * FORWARD
    steps = _gradients(cell)
    return images * (FORWARD + INPUT_GRADIENT * steps * (STANDING if steps > 1 else 1))


def _gradients(cell: Cell) -> float:
    """Gradients of one image that stands, two queries for one: of `pgd-50x10`, `apgd@soft-9+40`."""
    kind, *numbers = re.split(r"-(?=\d)|[x+](?=\d)", cell.attack)
    if kind in WORST:
        return WORST[kind] * int(*numbers or [50])
    if not numbers:
        return 1.0 if kind in ("fgsm", "rfgsm") else _paper_steps(255 * cell.eps)
    queries = int(numbers.pop()) if "+" in cell.attack else 0
    return math.prod(map(int, numbers)) + queries * FORWARD / INPUT_GRADIENT


def _paper_steps(pixels: float) -> int:
    return max(1, math.floor(min(pixels + 4, 1.25 * pixels) + 1e-6))


def kind_of(network: Network) -> tuple[str, str]:
    return network.model.model, network.data.data
