"""One JSON line per measurement, and read back. No torch.

A line of `results.jsonl` is a `Measurement`: what was measured (`correct` of `total`), on which
network (`method`, `bits`, `seed`, ...), by which attack, and the evidence (data fingerprint,
versions, machine, command).
"""

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from html import escape
from pathlib import Path
from typing import Annotated, Any

from defquant.config import TrainConfig, check_bits, check_eps
from defquant.errors import UserError, visible
from defquant.files import append_line, read_lines
from defquant.typed import NOT_NEGATIVE, UNIT, from_mapping

__all__ = [
    "ABOUT", "BLACK", "EIGHT_BIT", "FOREIGN", "MASKED", "UNAWARE", "Measurement", "Rows", "Score",
    "append", "blind", "html_table", "mean_between", "read_folder", "read_jsonl", "record",
    "results", "run_name", "told_apart", "wilson",
]  # fmt: skip

ABOUT = ("run", "method", "model", "bits", "beta", "seed", "data", "fingerprint")  # is measured
EIGHT_BIT = " (8-bit)"  # ends the name of an attack whose images were rounded as files hold them
FOREIGN = "your model"  # begins the method of a network that `defquant train` did not make
BLACK, UNAWARE = "(B)", " (unaware)"  # made on another network; blind to a feature squeezing
MASKED = 0.01  # share of vanishing gradients above which a robust accuracy proves nothing
_NO_GRADIENT = ("clean", "Random", "Square")
_ASIDE = ("beta", "penalty", "device", "test_every")  # told by the name, or of no weight


_ONE_STEP = re.compile(r"\b(PGD|BIM)\(eps=([^,()]+)(?=[,)])(?!, steps=)")
_PACE = r"\1(eps=\2, steps=1, alpha=1/255"  # at 1/255 repr once left the paper's one step out


@dataclass(frozen=True)
class Score:
    """`correct` of `total` examples.

    The interval is `wilson`'s.
    """

    correct: int
    total: int

    def __post_init__(self) -> None:
        if not 0 <= self.correct <= self.total or self.total == 0:
            raise UserError(
                f"a score needs 0 <= correct <= total > 0; found {self.correct} of {self.total}"
            )

    @classmethod
    def of(cls, right: Any) -> "Score":
        """Of a bool tensor or array (n,): how many of them are true."""
        return cls(int(right.sum()), len(right))

    @property
    def accuracy(self) -> float:
        return self.correct / self.total

    @property
    def interval(self) -> tuple[float, float]:
        return wilson(self.accuracy, self.total)

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.accuracy:.1%} [{low:.1%}, {high:.1%}] ({self.correct}/{self.total})"

    def _repr_html_(self) -> str:
        low, high = self.interval
        interval = f"{low:.1%} to {high:.1%}"
        row = {"accuracy": f"{self.accuracy:.1%}", "95 % interval": interval, **asdict(self)}
        return html_table([row])


def wilson(p: float, n: int) -> tuple[float, float]:
    """The 95 % interval of a share `p` of `n` images, in [0, 1] (Wilson 1927):

    (p + z²/2n ± z sqrt(p(1-p)/n + z²/4n²)) / (1 + z²/n), z = 1.96.
    """
    z = 1.959963984540054
    centre = p + z * z / (2 * n)
    spread = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low, high = (centre - spread) / (1 + z * z / n), (centre + spread) / (1 + z * z / n)
    return (0.0 if p == 0 else low, 1.0 if p == 1 else high)


def html_table(rows: Sequence[Mapping[str, object]], caption: str = "", most: int = 100) -> str:
    """The first `most` rows as an HTML table, as a notebook shows them; all text is escaped."""

    def cells(kind: str, values: Iterable[object]) -> str:
        texts = (f"{v:.4g}" if isinstance(v, float) else "" if v is None else v for v in values)
        return "".join(f"<{kind}>{escape(visible(str(text)))}</{kind}>" for text in texts)

    head = dict.fromkeys(column for row in rows for column in row)
    lines = [cells("th", head), *(cells("td", map(row.get, head)) for row in rows[:most])]
    more = f"{len(rows) - most:,} more rows" * (len(rows) > most)
    about = escape(visible("; ".join(filter(None, (caption, more)))))
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f"<table>{f'<caption>{about}</caption>' * bool(about)}{body}</table>"


def mean_between(wins: float, losses: float, n: float, level: float = 0.95) -> tuple[float, float]:
    r"""Where the mean of X in {-1, 0, 1} lies, with +1 `wins` and -1 `losses` times in `n` draws.

    A confidence sequence: at that level *all* intervals, of however many looks at growing samples
    whenever one stops, hold the mean. An end is the mean mu against which a mixture of bets has
    not yet made 2 / (1 - level) of 1: W(mu) = mean over theta of
    prod_i (1 - theta + theta (1 + X_i) / (1 + mu)), no factor of which gains on average where the
    mean is mu or less, so that W ever reaches c with a chance of 1 / c at most (Ville 1939;
    Waudby-Smith & Ramdas, Estimating means of bounded random variables by betting, 2024, for
    their hedged capital; here theta is mixed over instead of learnt).

    >>> [round(end, 3) for end in mean_between(0, 0, 300)]
    [-0.016, 0.016]
    """
    stake = math.log(2 / (1 - level))

    def least(up: float, down: float) -> float:
        low, high = -1.0, 1.0
        for _ in range(40):
            mu = (low + high) / 2
            low, high = (mu, high) if _wealth(mu, up, down, n) >= stake else (low, mu)
        return low

    return least(wins, losses), -least(losses, wins)


_THETAS = tuple(0.999 * 1.8**-k for k in range(8))


def _wealth(mu: float, wins: float, losses: float, n: float) -> float:
    """log W(mu)."""
    logs = [
        wins * math.log1p(theta * ((1 - mu) / (1 + mu)))
        + (n - wins - losses) * math.log1p(theta * (-mu / (1 + mu)))
        + losses * math.log1p(-theta)
        for theta in _THETAS
    ]
    top = max(logs)
    return top + math.log(sum(math.exp(value - top) for value in logs) / len(logs))


def blind(attack: str, vanishing: float | None) -> float:
    """Share of the images on which the attack of that name is blind; above `MASKED`, it is masked.

    That is the share of `vanishing` gradients, and 0 for one that does not follow this network's:
    clean images, Random, Square, a black box, one unaware of a squeezing.
    """
    name = attack.removesuffix(EIGHT_BIT)
    parts = name.removeprefix("Worst(").removesuffix(")").split(", ")
    searches = all(part.split("-")[0] in _NO_GRADIENT for part in parts)
    return 0.0 if searches or name.endswith((BLACK, UNAWARE)) else vanishing or 0.0


@dataclass(frozen=True)
class Measurement:
    """One score with its evidence.

    Attributes:
        run: name of the run's folder.
        method: `float`, `vanilla` or `DQ` (convex sums or penalty); then, where they are not the
            usual ones, `ReLU1`, `tanh`, ... ; then `+ squeezing` and `+ ATTACK` where trained so;
            or `your model (WEIGHTS)`.
        model: as in `ModelConfig`.
        bits: activation bits; none for full precision.
        beta: weight of the penalty.
        seed: of the training.
        data: data set, as shown to the reader; `fingerprint` is the hash of the test images.
        attack: family, as shown: `clean`, `Random`, `FGSM`, `R+FGSM`, `BIM`, `PGD`, `PGD-50x10`,
            `FGSM(B)`, ... ((B) is black box), `FGSM (unaware)` (of a feature squeezing),
            `FGSM (8-bit)` (on images as files hold them).
        eps: L-infinity radius in [0, 1]; 0 for clean.
        settings: the attack's repr, whole.
        correct: examples classified rightly under every attempt.
        total: examples attacked.
        vanishing: share of the rightly classified images whose loss gradient is exactly zero:
            gradient attacks are blind there.
        attack_seed: of the attack's random draws.
        seconds: wall-clock time of the measurement.
        evidence: versions, machine, threads, command, epochs and training images; and hashes, of
            the weights, the user's file, the configuration but its seed, the training images and
            the whole data set. Older lines lack the hashes.
        cell: key of the experiment's cell that it belongs to, where there is one.
    """

    run: str
    method: str
    model: str
    bits: int | None
    beta: Annotated[float, NOT_NEGATIVE]
    seed: int
    data: str
    fingerprint: str
    attack: str
    eps: float
    settings: str
    correct: int
    total: int
    vanishing: Annotated[float, UNIT] | None = None
    attack_seed: int = 0
    seconds: float = 0.0
    evidence: dict[str, Any] = field(default_factory=dict)
    cell: str = ""

    def __post_init__(self) -> None:
        check_eps(self.eps)
        check_bits(self.bits)
        _ = self.score

    @property
    def score(self) -> Score:
        return Score(self.correct, self.total)

    @property
    def masked(self) -> bool:
        """Whether the attack was blind on over 1 % of the images: it proves no robustness."""
        return blind(self.attack, self.vanishing) > MASKED

    @property
    def key(self) -> tuple[object, ...]:
        """What it measures by name; see `replaces`."""
        identity = (self.run, self.method, self.model, self.bits, self.beta, self.seed)
        attack = (self.attack, self.eps, _ONE_STEP.sub(_PACE, self.settings), self.attack_seed)
        return (*identity, self.fingerprint, *attack, self.total)

    @cached_property
    def network(self) -> tuple[str, str]:
        """Hashes of the weights and of the user's file; empty where unknown."""
        return self._hash("weights_sha256"), self._hash("file_sha256")

    @cached_property
    def make(self) -> tuple[str, str]:
        """Hashes of what all seeds of one network share: its configuration and training images.

        Of a model of the user's own, whose seed nobody knows: of its weights and file. Empty where
        the first is unknown.
        """
        first, second = self.network
        if not second:
            first, second = self._hash("config_sha256"), self._hash("train_fingerprint")
        return (first, second) if first else ("", "")

    @cached_property
    def trained(self) -> dict[str, str]:
        """What is known of the training that the name does not tell: epochs, images, seed, ..."""
        known = self.evidence if isinstance(self.evidence, dict) else {}
        names = ("epochs", "train_images", "train_fingerprint")  # all that older lines have
        found = {name: known[name] for name in names if name in known} | {"seed": self.seed}
        if isinstance(own := known.get("train"), dict):
            found |= {**asdict(TrainConfig()), **own, "seed": self.seed}
        return {name: json.dumps(value) for name, value in found.items() if name not in _ASIDE}

    @cached_property
    def source(self) -> tuple[str]:
        """Fingerprint of the whole data set, of which the first images are measured."""
        return (self._hash("data_fingerprint"),)

    def replaces(self, other: "Measurement") -> bool:
        """Whether it measures the same as an `other`, earlier one: the key and each known hash.

        An older line, which knows no hashes, is taken for one of the network that its run has now.
        """
        pairs = zip(self.network, other.network, strict=True)
        return self.key == other.key and all(a == b or not (a and b) for a, b in pairs)

    def _hash(self, name: str) -> str:
        found = self.evidence.get(name) if isinstance(self.evidence, dict) else None
        return str(found or "")


def append(path: Path, measurement: Measurement) -> None:
    """Append `measurement` to the JSON lines of `path`."""
    append_line(path, record(measurement))


def record(measurement: Measurement) -> dict[str, Any]:
    """Its fields and what follows from them: accuracy, low, high, masked."""
    low, high = measurement.score.interval
    derived = {"accuracy": measurement.score.accuracy, "low": low, "high": high}
    return asdict(measurement) | derived | {"masked": measurement.masked}


def read_jsonl(path: Path, run: str | None = None) -> list[Measurement]:
    """The measurements of one file. A last line that a crash cut short is left out.

    Lines of no cell are said to be of `run`, where it is given. Raises `UserError`, naming file,
    line and field, where another line is not a measurement.
    """
    found = list[Measurement]()
    for where, line in read_lines(path):
        if run is not None and isinstance(line, dict) and not line.get("cell"):
            line = line | {"run": run}
        new = from_mapping(Measurement, line, where)
        if found and found[-1].evidence == new.evidence:  # most of a line; kept once
            object.__setattr__(new, "evidence", found[-1].evidence)
        found.append(new)
    return found


def read_folder(folder: Path) -> list[Measurement]:
    """All measurements of every `results.jsonl` below `folder`, the latest of each key.

    Raises `UserError` when there are none.
    """
    if not folder.is_dir():
        raise UserError(f"no folder {folder}: give the folder that holds the runs")
    latest: dict[tuple[object, ...], list[Measurement]] = {}
    for path in sorted(folder.rglob("results.jsonl")):
        for m in read_jsonl(path, run_name(path.parent, folder)):
            same = latest.setdefault(m.key, [])
            same[:] = [old for old in same if not m.replaces(old)] + [m]
    if not latest:
        raise UserError(f"no results.jsonl below {folder}: run `defquant attack` on a run first")
    return [m for same in latest.values() for m in same]


class Rows(list[dict[str, Any]]):
    """Measurements as flat dictionaries, which a notebook shows as a table."""

    def _repr_html_(self) -> str:
        return html_table(self)


def results(folder: Path | str) -> Rows:
    """All measurements below `folder`, each a flat dictionary: `pandas.DataFrame(results(folder))`.

    Keys are the fields of `Measurement` but its evidence (`run`, `method`, `bits`, `seed`,
    `attack`, `eps`, `correct`, `total`, ...), then `accuracy`, the ends `low` and `high` of its
    95 % interval (Wilson's), in [0, 1], and `masked`. `method` and `data` are told apart by hashes
    where one name stands for several. Raises `UserError` where there are none, or one is broken.
    """
    found = told_apart(read_folder(Path(folder)))
    return Rows({k: v for k, v in record(m).items() if k != "evidence"} for m in found)


def run_name(run: Path, folder: Path) -> str:
    """A run's name among those below `folder`: its path from there, or its own name."""
    return visible(run.resolve().name if run == folder else str(run.relative_to(folder)))


def told_apart(measurements: Iterable[Measurement]) -> list[Measurement]:
    """The same, where each name stands for one data set and for networks that differ in seed alone.

    Where a name stands for several, the first six digits of their hashes are added to it:
    `test.npz [3fa29c]`, `your model (w.safetensors) [0b77d1]`. Lines that know no hash keep it.
    """
    found = list(measurements)
    tags = _tags([(m.data, m.source) for m in found])
    if any(tags):
        pairs = zip(found, tags, strict=True)
        found = [replace(m, data=m.data + tag) if tag else m for m, tag in pairs]
    tags = _tags([((m.method, m.model, m.bits, m.beta, m.data), m.make) for m in found])
    return [
        replace(m, method=m.method + tag) if tag else m for m, tag in zip(found, tags, strict=True)
    ]


def _tags(pairs: Sequence[tuple[object, tuple[str, ...]]]) -> list[str]:
    """For each (name, hashes) what to add to the name; empty where it stands for one thing."""
    kinds: dict[object, set[tuple[str, ...]]] = {}
    for name, hashes in dict.fromkeys(pairs):
        kinds.setdefault(name, set()).update([hashes] if hashes[0] else [])
    if all(len(known) < 2 for known in kinds.values()):  # as nearly always
        return [""] * len(pairs)

    def tag(name: object, hashes: tuple[str, ...]) -> str:
        known = kinds[name]
        if len(known) < 2 or not hashes[0]:
            return ""
        enough = len({first for first, *_ in known}) == len(known)
        return f" [{' '.join(part[:6] for part in hashes[: 1 if enough else None])}]"

    return [tag(*pair) for pair in pairs]
