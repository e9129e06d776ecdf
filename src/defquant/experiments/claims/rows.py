"""Rows of cells that claims compare, and the attacks under which they do. No torch."""

from collections.abc import Callable, Iterable, Iterator

from defquant.experiments.bits_cells import fig1_networks, table1_networks
from defquant.experiments.claims.evidence import Evidence, Row
from defquant.experiments.claims.questions import Asked, Contrast, Question
from defquant.experiments.compose import Trial, strong_trials
from defquant.experiments.scales import Scale
from defquant.experiments.standard import substitute

__all__ = ["Rows", "Table", "ask", "black_box", "table1", "vgg", "white_box", "widths"]

Rows = dict[int | None, Row]
Table = dict[float, Rows]


def table1(scale: Scale, trial: Trial) -> Table:
    """Table 1 by beta (0 for vanilla) and bits, over the seeds."""
    by_seed = [table1_networks(scale, seed) for seed in scale.seeds]
    return {
        beta: {
            bits: tuple(trial.cell(networks[beta][i]) for networks in by_seed)
            for i, bits in enumerate(scale.bits)
        }
        for beta in by_seed[0]
    }


def vgg(scale: Scale, trial: Trial) -> Rows:
    """The VGG of Figure 1 by bits."""
    networks = fig1_networks(scale)["VGG-16"]
    return {bits: (trial.cell(n),) for bits, n in zip(scale.bits, networks, strict=True)}


def widths(rows: Rows) -> list[int]:
    """1 to 5 bits."""
    return [bits for bits in rows if bits is not None]


def white_box(scale: Scale) -> list[Trial]:
    """FGSM at the paper's eps, and where small networks are right at times; the strong."""
    trials = [Trial(scale, "fgsm", eps) for eps in (scale.paper_eps, scale.hard_eps[0])]
    return list({trial.name: trial for trial in [*trials, *strong_trials(scale)]}.values())


def black_box(scale: Scale) -> list[Trial]:
    """FGSM through the substitute of section 5.1, at the radii of the white box."""
    through = substitute(scale)
    radii = dict.fromkeys((scale.paper_eps, scale.hard_eps[0]))
    return [Trial(scale, "fgsm", eps, through) for eps in radii]


def ask(
    what: str,
    contrasts: Callable[[Table], Iterable[Contrast]],
    trials: Callable[[Scale], Iterable[Trial]] = white_box,
    *,
    suffix: str = "",
    extra: Callable[[Evidence, Question], str] | None = None,
) -> Callable[[Scale], Iterator[Asked]]:
    """What makes one question to Table 1 under each of `trials`."""

    def questions(scale: Scale) -> Iterator[Asked]:
        for trial in trials(scale):
            found = tuple(contrasts(table1(scale, trial)))
            yield Question(trial.name + suffix, what, found, extra=extra)

    return questions
