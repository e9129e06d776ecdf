"""White box beside black box, whose order tells of masked gradients: rows of Tables 5 and 6."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from defquant.experiments import paper
from defquant.experiments.cells import Network
from defquant.experiments.compose import Trial, strong_trials
from defquant.experiments.scales import Scale
from defquant.experiments.section import Entry, Number, Table, difference, number
from defquant.experiments.store import Results
from defquant.experiments.words import attack_text, eps_text, listed, tally

__all__ = ["MaskedRow", "masked_against", "masked_rows", "masked_sign", "masked_table"]


@dataclass(frozen=True)
class MaskedRow:
    """A network at one radius; `others` are further attacks, None where not asked for."""

    name: str
    eps: float
    clean: Number
    white: Number
    black: Number
    others: tuple[Number | None, ...]

    @property
    def gap(self) -> Number:
        """White box minus black box."""
        both = self.white.paper, self.black.paper
        printed = None if both[0] is None or both[1] is None else both[0] - both[1]
        return difference(self.white, self.black, printed)

    @property
    def entries(self) -> tuple[Entry, ...]:
        three = (self.clean, self.white, self.black)
        return (self.name, eps_text(self.eps), *three, self.gap, *self.others)


def masked_rows(
    scale: Scale,
    results: Results,
    table: int,
    networks: Mapping[str, Network],
    attack: str,
    through: Network,
    *,
    others: Sequence[str] = (),
) -> list[MaskedRow]:
    """Every network at every radius; the strong attacks where the scale asks for them."""

    def row(name: str, network: Network, eps: float) -> MaskedRow:
        def found(trial: Trial, column: str) -> Number:
            return number(results, [trial.cell(network)], paper.masking(table, name, column, eps))

        more = [number(results, [Trial(scale, a, eps).cell(network)]) for a in others]
        hard = {(t.attack, t.eps): t.cell(network) for t in strong_trials(scale)}
        asked = [hard.get((attack, eps)) for attack in scale.strong]
        return MaskedRow(
            name,
            eps,
            found(Trial(scale), "clean"),
            found(Trial(scale, attack, eps), "white"),
            found(Trial(scale, attack, eps, through), "black"),
            (*more, *(number(results, [cell]) if cell else None for cell in asked)),
        )

    return [row(name, network, eps) for name, network in networks.items() for eps in scale.eps]


def masked_table(
    scale: Scale, rows: Iterable[MaskedRow], attack: str, *, others: Sequence[str] = ()
) -> Table:
    name = attack_text(attack)
    more = [attack_text(other) for other in (*others, *scale.strong)]
    heads = ("Network", "ε", "Clean", f"White box {name}", f"Black box {name}", "White − black")
    caption = "Accuracy; more under the white box than under the black box is a sign of masking."
    return Table((*heads, *more), tuple(row.entries for row in rows), caption)


def masked_sign(rows: Sequence[MaskedRow]) -> str:
    """At how many radii each network keeps more under the white box; empty for nothing found."""
    known = [(row.name, row.eps, row.gap.mean) for row in rows if row.gap.mean is not None]
    parts = []
    for name in dict.fromkeys(name for name, _, _ in known):
        gaps = {eps: gap for own, eps, gap in known if own == name}
        above = [eps_text(eps) for eps, gap in gaps.items() if gap > 0]
        parts.append(f"{name} at {len(above)} of {len(gaps)} radii" + _in_brackets(above))
    return f"Ours, white box above black box: {'; '.join(parts)}." if parts else ""


def _in_brackets(words: Sequence[str]) -> str:
    return f" ({listed(words)})" if words else ""


def masked_against(rows: Sequence[MaskedRow], first: str, second: str) -> str:
    """One network against another under the white box and the black box, over the radii."""
    pairs = [
        (a, b) for a in rows for b in rows if (a.name, b.name) == (first, second) and a.eps == b.eps
    ]
    boxes = {
        "white box": tally((a.white, b.white) for a, b in pairs),
        "black box": tally((a.black, b.black) for a, b in pairs),
    }
    parts = [f"under the {box} {counted}" for box, counted in boxes.items() if counted]
    return f"{first} against {second}, over the radii: {'; '.join(parts)}." if parts else ""
