"""What the measurements say of the paper's claims, as tables. No torch."""

from collections.abc import Sequence

from defquant.paper.section import Answer, Number, Reading, Section, Table, Verdict
from defquant.report.model import NOTHING

__all__ = ["ABOUT", "ICONS", "claims", "tally"]

ICONS: dict[Answer, str] = {"holds": "✓", "does not hold": "✗", "not decided": "?"}
ABOUT = (
    "Effect: the difference of accuracies in the direction that the paper claims, in points, with "
    "its 95% interval over seeds and test images; positive supports the claim. The first line of "
    "a claim is the paper's own attack."
)


def claims(verdicts: Sequence[Verdict]) -> tuple[Section, Table]:
    """A row per reading; and what is said of each claim beside, with its command."""
    rows = tuple(_row(v, reading) for v in verdicts for reading in v.readings or (None,))
    head = ("Claim", "Under", "Verdict", "Effect, points", "What was compared")
    notes = tuple(
        (v.name, v.where, v.note, v.command) for v in verdicts if v.note or v.command or v.where
    )
    beside = Table(("Claim", "Where", "Note", "Command"), notes, "Notes and commands")
    return Section("claims", "The paper's claims", (), (Table(head, rows, ABOUT),)), beside


def _row(verdict: Verdict, reading: Reading | None) -> tuple[str | Number, ...]:
    claim = f"{verdict.name} {verdict.claim} The paper: {verdict.paper or NOTHING}"
    if reading is None:
        return (claim, NOTHING, NOTHING, Number(None, points=True), NOTHING)
    effect = Number(reading.effect, low=reading.low, high=reading.high, points=True)
    answer = f"{ICONS[reading.verdict]} {reading.verdict}"
    return (claim, reading.attack, answer, effect, reading.detail)


def tally(verdicts: Sequence[Verdict]) -> dict[Answer, tuple[list[str], int]]:
    """By answer: the claims that have it under the paper's own attack, and how many readings."""
    firsts = {v.name: v.readings[0].verdict if v.readings else "not decided" for v in verdicts}
    readings = [reading.verdict for verdict in verdicts for reading in verdict.readings]
    return {
        answer: ([name for name, own in firsts.items() if own == answer], readings.count(answer))
        for answer in ICONS
    }
