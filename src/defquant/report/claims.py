"""What the measurements say of the paper's claims. No torch."""

from collections.abc import Sequence

from defquant.paper.section import Answer, Number, Reading, Table, Verdict
from defquant.report.model import NOTHING, WORDS, Chapter, Plain, listing

__all__ = ["claims", "tally"]

ICONS: dict[Answer, str] = {"holds": "✓", "does not hold": "✗", "not decided": "?"}
EMPTY = Reading(NOTHING, None, None, None, "not decided", NOTHING)


def claims(verdicts: Sequence[Verdict]) -> Chapter:
    """A row per reading; what is said of each claim, and its command, folded."""
    rows: list[Plain] = [
        {
            "Claim": f"{v.name} {v.claim} The paper: {v.paper or NOTHING}",
            "Under": r.attack,
            "Verdict": "" if r is EMPTY else f"{ICONS[r.verdict]} {r.verdict}",
            "Effect, points": Number(r.effect, low=r.low, high=r.high, points=True),
            "What was compared": r.detail,
        }
        for v in verdicts
        for r in v.readings or (EMPTY,)
    ]
    notes = [(v.name, v.where, v.note, v.command) for v in verdicts]
    kept = tuple(note for note in notes if any(note[1:]))
    beside = Table(("Claim", "Where", "Note", "Command"), kept, "Notes and commands")
    return Chapter(
        "claims", "The paper's claims", tables=[listing(rows, WORDS["claims"])], verdicts=verdicts,
        folded=[(beside.caption, [beside])] * bool(kept),
    )  # fmt: skip


def tally(verdicts: Sequence[Verdict]) -> list[tuple[str, str, list[str], int]]:
    """Icon, answer, the claims that have it under the paper's own attack, how many readings."""
    firsts = {v.name: v.readings[0].verdict if v.readings else "not decided" for v in verdicts}
    readings = [reading.verdict for verdict in verdicts for reading in verdict.readings]
    return [
        (icon, answer, [name for name, own in firsts.items() if own == answer],
         readings.count(answer))
        for answer, icon in ICONS.items()
    ]  # fmt: skip
