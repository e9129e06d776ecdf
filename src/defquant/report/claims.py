"""What the measurements say of the paper's claims: as Markdown, in the terminal, for the page."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from defquant.errors import visible
from defquant.paper.section import Answer, Reading, Verdict
from defquant.report.drawing import Scale
from defquant.report.names import markdown, signed
from defquant.report.section_markdown import pipe_table
from defquant.report.values import NOTHING

__all__ = [
    "Claim",
    "Said",
    "all_counts",
    "claims",
    "claims_markdown",
    "counts",
    "print_claims",
    "reach",
]

ICONS: dict[Answer, str] = {"holds": "✓", "does not hold": "✗", "not decided": "?"}
CLASSES: dict[Answer, str] = {"holds": "right", "does not hold": "wrong", "not decided": "open"}
STYLES: dict[Answer, str] = {"holds": "green", "does not hold": "red", "not decided": "yellow"}
HEAD = ("", "Claim", "Paper", "Under", "Effect, points", "Verdict")
ABOUT = (
    "Effect: the difference of accuracies in the direction that the paper claims, in points, with "
    "its 95% interval over seeds and test images; positive supports the claim."
)
BAR, BAR_HEIGHT = 150, 16


@dataclass(frozen=True)
class Said:
    """A reading, ready to be shown."""

    attack: str
    effect: str
    interval: str
    bar: Markup
    icon: str
    css: str
    verdict: str
    detail: str


@dataclass(frozen=True)
class Claim:
    """A verdict with its readings, ready to be shown."""

    verdict: Verdict
    said: list[Said]

    @property
    def first(self) -> str:
        """The answer under the paper's own attack."""
        return self.said[0].verdict if self.said else "not decided"


def claims(verdicts: Sequence[Verdict]) -> list[Claim]:
    """For the page; all bars have one scale."""
    x = Scale(-reach(verdicts) / 100, reach(verdicts) / 100, 8, BAR - 8)
    return [Claim(verdict, [_said(r, x) for r in verdict.readings]) for verdict in verdicts]


def reach(verdicts: Sequence[Verdict]) -> int:
    """How many points the bars' ends stand for: nine in ten effects lie within, by fives."""
    readings = [reading for verdict in verdicts for reading in verdict.readings]
    effects = sorted(abs(r.effect) for r in readings if r.effect is not None)
    most = effects[int(0.9 * (len(effects) - 1))] if effects else 0.0
    return max(5, 5 * math.ceil(20 * most))


def claims_markdown(verdicts: Sequence[Verdict]) -> str:
    """A table with a row per reading, then what was compared, the notes and the commands."""
    rows = [row for verdict in verdicts for row in _rows(verdict)]
    table = pipe_table(HEAD, rows, words=len(HEAD))
    details = [_details(verdict) for verdict in verdicts]
    return "\n\n".join([all_counts(verdicts), table, ABOUT, *details]) + "\n"


def print_claims(verdicts: Sequence[Verdict], console: Console) -> None:
    """Each claim with its readings, one a line, and its note; the counts at the end."""
    for verdict in verdicts:
        console.print(Text(visible(f"{verdict.name}  {verdict.claim}"), style="bold"))
        about = f"{verdict.where}. Paper: {verdict.paper or NOTHING}. {verdict.note}".rstrip()
        console.print(Padding(Text(visible(about), style="dim"), (0, 0, 0, 5)))
        console.print(_readings(verdict), crop=False)
        console.print()
    console.print(Text(f"{ABOUT} {all_counts(verdicts)}"))


def _readings(verdict: Verdict) -> Table:
    table = Table(box=None, show_header=False, padding=(0, 0, 0, 2))
    for width in (3, 15, 6, 16, None):
        table.add_column(min_width=width, no_wrap=width is not None, justify="left")
    for reading in verdict.readings:
        attack, _, answer = _plain(reading)
        style = STYLES[reading.verdict]
        effect = [Text(_effect(reading), justify="right"), Text(_interval(reading))]
        table.add_row("", Text(answer, style), *effect, Text(visible(attack)))
    return table


def counts(verdicts: Sequence[Verdict]) -> str:
    """`Of 32 claims, 14 hold under the paper's own attack, 4 do not and 14 are not decided.`."""
    firsts = [verdict.readings[0].verdict for verdict in verdicts if verdict.readings]
    hold, fail, rest = map(firsts.count, ICONS)
    many = "Of 1 claim" if len(verdicts) == 1 else f"Of {len(verdicts)} claims"
    open_ = rest + len(verdicts) - len(firsts)
    return (
        f"{many}, {hold} hold{'s' * (hold == 1)} under the paper's own attack, {fail} "
        f"do{'es' * (fail == 1)} not and {open_} {'is' if open_ == 1 else 'are'} not decided."
    )


def all_counts(verdicts: Sequence[Verdict]) -> str:
    """The same, then all readings under every attack."""
    answers = [reading.verdict for verdict in verdicts for reading in verdict.readings]
    hold, fail, rest = map(answers.count, ICONS)
    return (
        f"{counts(verdicts)} Under all attacks and radii together there are {len(answers)} "
        f"readings: {hold} in favour of a claim, {fail} against one, {rest} not decided."
    )


def _rows(verdict: Verdict) -> list[list[str]]:
    claim = markdown(f"{verdict.claim} ({verdict.where})")
    names = [f"**{markdown(verdict.name)}**", claim, markdown(verdict.paper) or NOTHING]
    rows = []
    for reading in verdict.readings or (None,):
        rows.append([*names, *map(markdown, _plain(reading))])
        names = ["", "", ""]
    return rows


def _plain(reading: Reading | None) -> list[str]:
    """Attack, effect with its interval, answer."""
    if reading is None:
        return [NOTHING] * 3
    effect = f"{_effect(reading)} {_interval(reading)}".rstrip()
    return [reading.attack, effect, f"{ICONS[reading.verdict]} {reading.verdict}"]


def _details(verdict: Verdict) -> str:
    lines = [f"**{markdown(verdict.name)}.** {markdown(verdict.note)}".rstrip()]
    lines += [f"{markdown(r.attack)}: {markdown(r.detail)}." for r in verdict.readings if r.detail]
    command = [f"`{visible(verdict.command).replace('`', '')}`"] if verdict.command else []
    return "\n".join(f"{'  ' * (i > 0)}- {line}" for i, line in enumerate(lines + command))


def _said(reading: Reading, x: Scale) -> Said:
    answer = reading.verdict
    return Said(
        reading.attack, _effect(reading), _interval(reading), _bar(reading, x), ICONS[answer],
        CLASSES[answer], answer, reading.detail,
    )  # fmt: skip


def _effect(reading: Reading) -> str:
    return NOTHING if reading.effect is None else signed(reading.effect)


def _interval(reading: Reading) -> str:
    there = reading.low is not None and reading.high is not None
    return f"[{signed(reading.low or 0.0)}, {signed(reading.high or 0.0)}]" if there else ""


def _bar(reading: Reading, x: Scale) -> Markup:
    """The effect as a dot and its interval as a line, or an arrowhead where it lies beyond."""
    middle = BAR_HEIGHT / 2
    parts = [Markup('<path class="grid" d="M4 {0}H{1}"/>').format(middle, BAR - 4)]
    parts.append(Markup('<path class="tick" d="M{:.1f} 1V{}"/>').format(x(0), BAR_HEIGHT - 1))
    if reading.low is not None and reading.high is not None:
        line = Markup('<path class="reach" d="M{:.1f} {}H{:.1f}"/>')
        parts.append(line.format(_within(reading.low, x), middle, _within(reading.high, x)))
    if reading.effect is not None:
        parts.append(_dot(reading.effect, x, middle))
    frame = Markup('<svg class="effect" viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>')
    label = f"effect {_effect(reading)} points {_interval(reading)}".rstrip()
    return frame.format(BAR, BAR_HEIGHT, label, Markup("").join(parts))


def _dot(effect: float, x: Scale, middle: float) -> Markup:
    at = _within(effect, x)
    if x.low <= effect <= x.high:
        return Markup('<circle class="dot" cx="{:.1f}" cy="{}" r="3.6"/>').format(at, middle)
    tip = 6 if effect > 0 else -6
    arrow = Markup('<path class="dot" d="M{:.1f} {}l{} 5l{} 5z"/>')
    return arrow.format(at, middle - 5, tip, -tip)


def _within(value: float, x: Scale) -> float:
    return x(min(max(value, x.low), x.high))
