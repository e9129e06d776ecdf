"""What the results say of a few cells, with the chance in training. No torch."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from defquant.experiments.bits_cells import fig5_cells, table1_cells
from defquant.experiments.cells import Cell
from defquant.experiments.claims.contrasts import Sample, Spread, accuracy, pooled
from defquant.experiments.scales import Scale
from defquant.experiments.store import Results
from defquant.experiments.words import UNTRAINED, bits_text
from defquant.results import Measurement

__all__ = ["Evidence", "Row", "evidence_of", "stratum"]

Row = tuple[Cell, ...]
"""Cells that differ in their seed alone."""

Stratum = tuple[str, float, bool]

KINDS = {"fgsm": "one step", "rfgsm": "one step", "adaptive": "worst case"}
HARDLY = ", hardly trained"


def stratum(cell: Cell) -> Stratum:
    """What the spread between trainings depends on: kind of attack, eps, and 1 bit or not.

    In the demo, clean accuracies of equal 1-bit networks have a standard deviation of 6 to 12
    points between seeds, those of all others of at most 1. Vanilla and DQ at 1 bit share a stratum:
    two seeds of one network alone give one degree of freedom, which decides nothing.
    """
    one_bit = cell.network.model.bits == 1
    if cell.attack in ("clean", "random"):
        return "clean", 0.0, one_bit
    name = cell.attack.partition("-")[0]
    kind = KINDS.get(name, "many steps")
    return ("black box" if cell.substitute else kind), cell.eps, one_bit


@dataclass(frozen=True)
class Evidence:
    """Results, the spread between trainings in each stratum where it is known, and the networks
    whose clean accuracy is hardly above a guess.
    """

    results: Results
    spreads: Mapping[Stratum, Spread]
    untrained: frozenset[str] = frozenset()

    def sample(self, row: Row) -> Sample | None:
        """The accuracy over the seeds that are there; None where none is."""
        found = self._found(row)
        if not found:
            return None
        shares = [m.score.accuracy for _, m in found]
        return accuracy(shares, min(m.total for _, m in found), self.spread(row[0]))

    def spread(self, cell: Cell) -> Spread | None:
        """That of the cell's stratum; at an eps without one, the largest of its kind."""
        kind, eps, one_bit = stratum(cell)
        alike = {e: s for (k, e, b), s in self.spreads.items() if (k, b) == (kind, one_bit)}
        return alike.get(eps) or max(alike.values(), key=lambda s: s.sd, default=None)

    def masked(self, row: Row) -> list[str]:
        """Networks of `row` whose accuracy under attack is no robustness: `vanilla at 1 bit`.

        The attack was blind, or the network hardly trained: it keeps what it answers to anything.
        """
        found = self._found(row)
        names = [f"{m.method} at {bits_text(m.bits)}" for _, m in found if m.masked]
        hardly = [m for cell, m in found if cell.attack != "clean" and m.run in self.untrained]
        names += [f"{m.method} at {bits_text(m.bits)}" + HARDLY for m in hardly]
        probed = [cell.network for cell in row if cell.kind != "accuracy"]
        weak = [network for network in probed if network.name in self.untrained]
        return names + [bits_text(network.model.bits) + HARDLY for network in weak]

    def _found(self, row: Row) -> list[tuple[Cell, Measurement]]:
        pairs = [(cell, self.results.score(cell)) for cell in row]
        return [(cell, m) for cell, m in pairs if m is not None]


def evidence_of(scale: Scale, results: Results) -> Evidence:
    """Spreads are pooled over the networks of Table 1 and Figure 5, which have several seeds.

    Elsewhere (other architectures, adversarial training, SVHN) there is one training of each, and
    these spreads are taken for theirs.
    """
    found: dict[Stratum, list[Sequence[float]]] = {}
    for row in _by_seed(table1_cells(scale) + fig5_cells(scale)):
        shares = [m.score.accuracy for cell in row if (m := results.score(cell)) is not None]
        found.setdefault(stratum(row[0]), []).append(shares)
    spreads = {key: pooled(groups) for key, groups in found.items()}
    clean = (m for m in results.scores.values() if m.attack == "clean")
    untrained = frozenset(m.run for m in clean if m.score.accuracy < UNTRAINED)
    return Evidence(results, {key: s for key, s in spreads.items() if s is not None}, untrained)


def _by_seed(cells: Iterable[Cell]) -> list[Row]:
    rows: dict[Cell, list[Cell]] = {}
    for cell in dict.fromkeys(cells):
        network = cell.network
        seedless = replace(network, train=replace(network.train, seed=0))
        rows.setdefault(replace(cell, network=seedless), []).append(cell)
    return [tuple(row) for row in rows.values()]
