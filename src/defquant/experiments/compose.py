"""What all sections share: the trials that a network is put to, and the making of a section."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from defquant.config import DataConfig
from defquant.experiments.cells import Cell, Network
from defquant.experiments.scales import Scale
from defquant.experiments.section import Entry, Line, Number, Panel, Section, Table
from defquant.experiments.standard import attacked, clean
from defquant.experiments.store import Results
from defquant.experiments.words import CLEARLY, attack_text, eps_text

__all__ = ["Trial", "paper_line", "section", "strong_trials", "trials"]


@dataclass(frozen=True)
class Trial:
    """The images of a row or a panel: clean, or attacked in one way at one radius."""

    scale: Scale
    attack: str = "clean"
    eps: float = 0.0
    through: Network | None = None
    unaware: bool = False

    @property
    def name(self) -> str:
        """`clean`, `FGSM 8/255`, `FGSM(B) 8/255` through a substitute."""
        return "clean" if self.attack == "clean" else f"{self.column} {eps_text(self.eps)}"

    @property
    def column(self) -> str:
        """Without the radius: `Clean`, `FGSM`, `FGSM(B)`."""
        black_box = "(B)" * (self.through is not None)
        return "Clean" if self.attack == "clean" else attack_text(self.attack) + black_box

    def cell(self, network: Network) -> Cell:
        """The measurement of `network`, as `experiments.standard` asks for it."""
        if self.attack == "clean":
            return clean(self.scale, network)
        options: dict[str, Any] = {"through": self.through, "unaware": self.unaware}
        return attacked(self.scale, network, self.attack, eps=(self.eps,), **options)[0]


def trials(scale: Scale) -> list[Trial]:
    """Clean, FGSM at the paper's radius and then the others, the strong attacks."""
    radii = sorted(scale.eps, key=lambda eps: eps != scale.paper_eps)
    attacks = [Trial(scale, "fgsm", eps) for eps in radii]
    return [Trial(scale), *attacks, *strong_trials(scale)]


def strong_trials(scale: Scale) -> list[Trial]:
    """Each strong attack at each of its radii."""
    return [Trial(scale, attack, eps) for attack in scale.strong for eps in scale.hard_eps]


def paper_line(line: Line) -> list[Line]:
    """The paper's numbers beside those of `line` as a line; none where it has not two of them."""
    points = tuple((at, Number(n.paper)) for at, n in line.points if n.paper is not None)
    name = f"{line.label} (paper)"
    return [Line(name, points, line.kind, paper=True)] if len(points) > 1 else []


def section(
    name: str,
    title: str,
    text: Iterable[str],
    cells: Sequence[Cell],
    results: Results,
    *,
    images: tuple[DataConfig, str],
    tables: Sequence[Table] = (),
    panels: Sequence[Panel] = (),
    pictures: Sequence[tuple[str, Any]] = (),
) -> Section:
    """The section, “clearly” explained, its missing `cells` counted; nothing empty is in it.

    Paragraphs without words and panels without a point are left out. `images` are ours and the
    name of the paper's data set. Where they are others, the paper's numbers are taken away, for
    they would compare nothing.
    """
    said = [paragraph for paragraph in text if paragraph]
    said += [CLEARLY] * any("clearly" in paragraph for paragraph in said)
    whole = Section(
        name=name,
        title=title,
        text=tuple(said),
        tables=tuple(tables),
        panels=tuple(panels),
        pictures=tuple(pictures),
        missing=len(results.missing(cells)),
    )
    shown = whole if images[0].data == images[1] else _without_paper(whole)
    return replace(shown, panels=tuple(filter(_is_drawn, shown.panels)))


def _is_drawn(panel: Panel) -> bool:
    return any(n.mean is not None for line in panel.lines for _, n in line.points)


def _without_paper(whole: Section) -> Section:
    note = "The images are not the paper's, so its numbers do not stand beside ours."
    tables = [replace(t, rows=tuple(tuple(map(_ours, r)) for r in t.rows)) for t in whole.tables]
    panels = [replace(panel, lines=tuple(_our_lines(panel.lines))) for panel in whole.panels]
    return replace(whole, text=(*whole.text, note), tables=tuple(tables), panels=tuple(panels))


def _our_lines(lines: Iterable[Line]) -> list[Line]:
    return [
        replace(line, points=tuple((at, replace(n, paper=None)) for at, n in line.points))
        for line in lines
        if not line.paper
    ]


def _ours(entry: Entry) -> Entry:
    return replace(entry, paper=None) if isinstance(entry, Number) else entry
