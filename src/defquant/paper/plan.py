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
from dataclasses import dataclass, field
from pathlib import Path
from statistics import NormalDist
from typing import Any

from defquant.paper import grid
from defquant.paper.claims import CLAIMS
from defquant.paper.figures import EXPERIMENTS
from defquant.paper.grid import Cell, Network, Results, Scale, by_network
from defquant.paper.section import eps_text
from defquant.paper.verdict import Contrast, Evidence, evidence_of

__all__ = ["Plan", "Survey", "gains", "kind_of", "long", "needs", "passes_by_model"]

FORWARD, INPUT_GRADIENT = 1 / 3, 2 / 3  # of a pass, whose backward is twice its forward
# times the time of a PGD of its steps, or of 50
WORST = {"adaptive": 2.2, "adaptive-t": 5.6, "standard": 37.0}
SLOWER = 2.0  # a pass of training, with its small batches, than one of an attack
STANDING = 0.5  # share of images that long attacks work on, for those that fell cost nothing
SHOWN = 10  # cells of a network in its line
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
    takes, learnt from the seconds that like work took; before any, by `pace`, the seconds of a
    training's pass by kind of network. Counts what other machines do there, too.
    """

    def __init__(self, cells: Iterable[Cell], out: Path, pace: Mapping[Any, float]) -> None:
        self.results, self.own, self._pace = grid.read(out), by_network(cells), pace
        self.missing = {n: self.results.missing(own) for n, own in self.own.items()}
        folders = {n: out / "networks" / n.name for n in self.own}
        self.epochs = {n: _epochs(folder / "log.jsonl") for n, folder in folders.items()}
        undone = (n for n in self.own if self.missing[n] or len(self.epochs[n]) < n.train.epochs)
        self.at_work = [n for n in undone if folders[n].is_dir()]  # begun and not done
        self._seconds, self._passes = defaultdict[Any, float](float), defaultdict[Any, float](float)
        for network, own in self.own.items():
            share, kind = len(self.epochs[network]) / network.train.epochs, kind_of(network)
            self._add(sum(self.epochs[network]), share * _training(network), "all", ("train", kind))
            for cell in own:
                if (m := self.results.scores.get(cell.key)) is not None:
                    self._add(m.seconds, _cell_passes(cell), "all", kind, _alike(cell))
        self.done = self._seconds["all"]

    def _add(self, seconds: float, passes: float, *kinds: object) -> None:
        for kind in kinds:
            self._seconds[kind] += seconds
            self._passes[kind] += passes

    def _rate(self, *kinds: object) -> float | None:
        """Seconds a pass, of the first of these kinds that was seen."""
        seen = (kind for kind in kinds if self._passes[kind])
        return next((self._seconds[kind] / self._passes[kind] for kind in seen), None)

    def left(self, network: Network) -> float:
        """Seconds of its training and of its missing cells, in one process."""
        missing, kind = self.missing[network], kind_of(network)
        share = 1 - len(self.epochs[network]) / network.train.epochs
        pace = self._rate(("train", kind)) or self._pace.get(kind) or self._rate("all") or 1e-3
        used = missing or not self.own[network]  # a substitute is trained, whatever else is there
        cells = (_cell_passes(c) * (self._rate(_alike(c), kind) or pace / SLOWER) for c in missing)
        return share * _training(network) * pace * bool(used) + sum(cells)

    @property
    def all_left(self) -> float:
        return sum(map(self.left, self.own))

    def scores(self, network: Network) -> str:
        """`clean 68.1, FGSM 8/255 4.0, 2/255 31.0`: the row of the table that it fills."""
        words, column = list[str](), ""
        for cell in self.own[network]:
            if (m := self.results.scores.get(cell.key)) is not None:
                name = eps_text(cell.eps) if cell.column == column else cell.name
                words.append(f"{name} {100 * m.score.accuracy:.1f}")
                column = cell.column
        return ", ".join([*words[:SHOWN], *[f"{len(words) - SHOWN} more"] * (len(words) > SHOWN)])

    def lines(self) -> list[str]:
        """One for each network at work."""
        found, wide = list[str](), max((len(n.name) for n in self.at_work), default=0)
        for n in self.at_work:
            own, missing = len(self.own[n]), len(self.missing[n])
            state = f"epoch {len(self.epochs[n])}/{n.train.epochs}, {own - missing}/{own} cells"
            found.append(f"{n.name:{wide}}  {state}  {self.scores(n)}")
        return found


def _epochs(log: Path) -> list[float]:
    """Seconds of each epoch that is done."""
    with suppress(OSError, ValueError, KeyError, TypeError):  # written anew at this moment
        lines = log.read_text(encoding="utf-8").splitlines()
        return [float(json.loads(line)["seconds"]) for line in lines]
    return []


def _alike(cell: Cell) -> tuple[object, ...]:
    """Cells that cost as much on the networks of one kind."""
    return kind_of(cell.network), cell.mark, cell.images, cell.split


@dataclass
class Plan:
    """Which network is next, and what there is to tell meanwhile.

    Next is what shortens the intervals of undecided readings most for its time (see `needs`),
    of those networks that can be done before `until` on the monotonic clock. With a `pace` as in
    `Survey`, or where something is there already, the time left is known at once.
    """

    scale: Scale
    cells: Sequence[Cell]
    out: Path
    until: float = math.inf
    pace: Mapping[Any, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.survey, self._left = Survey(self.cells, self.out, self.pace), math.inf
        self._begun: tuple[float, float] | None = None  # the time, and what was done
        self._moved = 0.0
        self.begin(1)

    def begin(self, processes: int) -> None:
        """Now so many are at work."""
        self._processes, self._seen = processes, time.monotonic()
        if self.pace or self.survey.done:
            self._left = self.survey.all_left / processes

    def _look(self) -> Survey:
        """What is done since the start, on all machines, tells anew how long the rest takes."""
        before, now = self.survey.done, Survey(self.cells, self.out, self.pace)
        self.survey, self._seen = now, time.monotonic()
        if now.done != before:
            # the clock starts with the first that is done: what came before is imports
            self._begun = self._begun or (self._seen, now.done)
            # as if all processes had made one network before: the first that are done say little
            one = (now.done + now.all_left) / len(now.own)
            many = max(self._processes, len(now.at_work))  # other machines' among them
            elapsed = self._seen - self._begun[0] + one / many
            self._left = now.all_left * elapsed / (now.done - self._begun[1] + one)
            self._moved = self._seen
        return now

    def next(self, left: Iterable[str]) -> str:
        """One of these names; where none is needed by any claim, the first."""
        survey = self._look()
        missing = [cell for cells in survey.missing.values() for cell in cells]
        need = needs(self.scale, survey.results, missing)
        seconds = {network.name: survey.left(network) for network in survey.own}
        time_left = self.until - time.monotonic()
        worth = {n: (seconds[n] <= time_left, need.get(n, 0.0) / (seconds[n] or 1)) for n in left}
        return max(worth, key=worth.__getitem__)

    @property
    def remaining(self) -> float:
        """Seconds until all is done, infinite where nothing tells; fewer and fewer, but for the
        time in which the processes start.
        """
        return max(0.0, self._left - (time.monotonic() - self._moved if self._begun else 0.0))

    def tell(self, name: str) -> list[str]:
        """Of all together, then of each network that is begun; or, in one line, of that `name`."""
        survey = self._look() if name or time.monotonic() > self._seen + 2 else self.survey
        missing = sum(map(len, survey.missing.values()))
        cells = len(dict.fromkeys(self.cells))
        words = f"{cells - missing} of {cells} cells, {long(self.remaining)} left"
        if self.until < math.inf:
            words += f", {long(self.until - time.monotonic())} of the budget"
        rows = [survey.scores(network) for network in survey.own if network.name == name]
        return [words, *filter(None, rows)] if name else [words, *survey.lines()]


def long(seconds: float) -> str:
    """`40 s`, `12 min`, `3.5 h`, `12 days`."""
    if seconds == math.inf:
        return "an unknown time"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{max(0.0, seconds):.0f} s"
    hours = seconds / 3600
    return f"{hours:.1f} h" if hours < 72 else f"{hours / 24:,.0f} days"


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
