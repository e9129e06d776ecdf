"""Is this network's robustness real, and is it no less than another's? Asked until it is decided.

Images are looked at in growing batches. Every interval is one of a confidence sequence
(`defquant.records.mean_between`), which holds whenever one stops; over all radii together a
question is answered wrongly with a chance of 5 % at most.
"""

import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from defquant.attacks import lint
from defquant.checkpoint import stamp
from defquant.config import check_eps
from defquant.data import Dataset
from defquant.data.dataset import in_unit
from defquant.diagnose import Effort, masking_verdict
from defquant.diagnose.masking import OVERSTATED as SHARE
from defquant.diagnose.masking import RULES
from defquant.errors import DefquantWarning, UserError
from defquant.foreign import warn_of_chance
from defquant.judging.suspects import QUERIES, STEPS, Side, Suspect, suspect
from defquant.records import Score, html_table, mean_between

__all__ = ["Judgement", "judge"]

LEVEL = 0.95
FIRST, MASKING, PROBED = 64, 128, 256
"""Images of the first look; most of those on which signs of masked gradients, and usual mistakes,
are looked for."""
CLAIMED = 0.10  # of the images: where the usual attack leaves fewer, nothing can be masked
NO_TIME = "no time was left"
_FAR = 1 << 20


@dataclass(frozen=True)
class Judgement:
    """What `judge` found; `record` is what its JSON file holds.

    Attributes:
        verdict: `REAL`, `OVERSTATED by x points`, `MASKED` or `NOT DECIDED`.
        paired: beside the reference `NOT WORSE`, `WORSE` or `NOT DECIDED`; "" without one.
    """

    verdict: str
    paired: str
    record: dict[str, Any]

    @property
    def finding(self) -> bool:
        """Whether a gate should close: masked, or worse than the margin."""
        return self.verdict == "MASKED" or self.paired == "WORSE"

    def _repr_html_(self) -> str:
        about, names = self.record, ("usual", "strongest", "overstated", "reference", "paired")
        beside = f"; beside {about['reference']['name']}: {self.paired}" if self.paired else ""
        rows = [
            {"eps": _eps(row)} | {n: _rate(row[n]) for n in names if n in row}
            for row in about["rows"]
        ]
        said = f"{about['model']['name']}: {self.verdict}{beside}; {about['images']} images"
        return html_table(rows, said)


def judge(
    model: str | Path | nn.Module | Suspect,
    data: Any,
    *,
    reference: str | Path | nn.Module | Suspect | None = None,
    eps: Sequence[float] = (1 / 255, 2 / 255, 8 / 255),
    margin: float = 1.0,
    budget: float = 600.0,
    images: int | None = None,
    weights: str | None = None,
    reference_weights: str | None = None,
    input: str | None = None,
    reference_input: str | None = None,
    seed: int = 0,
    masking: bool = True,
    tell: Callable[[str], object] | None = None,
) -> Judgement:
    """Whether the robustness of `model` is real, and no more than `margin` below the reference's.

    Every image that counts as fooled has fooled the thing itself, in its own runtime, as 8-bit
    pixels within eps of the image.

    Args:
        model: as `suspect` takes it.
        reference: its float twin, likewise.
        data: a `Dataset`, or (images, labels); its images are taken in an order drawn by `seed`.
        eps: L-infinity radii in (0, 1]; 8-bit images move by whole 1/255.
        margin: points of robust accuracy, on the same images.
        budget: seconds; what is not decided by then is `NOT DECIDED`.
        images: at most so many are attacked; None for all.
        weights: of `my.py:make`, a .safetensors file.
        reference_weights: of the reference, likewise.
        input, reference_input: how an ONNX file takes its images, where it is known: as it is
            printed, `0..1, NHWC`, or a part of it. What is not said is found on the data.
        seed: of the order and of the attacks' draws.
        masking: look for the signs of masked gradients, too.
        tell: called with a line after each look.

    Returns:
        A `Judgement`. MASKED: the usual attack overstates, and signs say that gradients are
        hidden. OVERSTATED by x points: straight-through PGD leaves x points more than the
        strongest attack, more than 10 for sure. REAL: no more than 10 for sure. NOT DECIDED: more
        images are needed, or a staircase could not be opened.

    Raises:
        UserError: no such model, data that do not fit, an eps below 1/255, a budget of nothing.
    """
    begun = time.monotonic()
    eps, data = sorted({_on_grid(e) for e in eps}), _dataset(data)
    if not eps or not budget > 0 or not margin >= 0:
        raise UserError(
            f"judge needs an eps, a budget above 0 and a margin of 0 points or more; found "
            f"{len(eps)} eps, a budget of {budget:g} s and a margin of {margin:g}"
        )
    known, data = data, data.first(images) if images else data
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))
    shown, labels = data.images[order], data.labels[order]
    named = [(model, weights, input), (reference, reference_weights, reference_input)]
    found = [_doubted(*one, known, shown[:PROBED], labels[:PROBED])
             for one in named if one[0] is not None]  # fmt: skip
    sides = [Side(one, shown, labels, seed) for one in found]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DefquantWarning)  # said in the verdict, with numbers
        count = 0
        for some in _batches(len(data), begun + 0.8 * budget * (1 if masking else 1.25)):
            for side in sides:
                side.look(torch.arange(count, some), eps)
            count = some
            rows = [_row(sides, e, count, len(eps), margin) for e in eps]
            if tell is not None:
                tell(f"{count} of {len(data)} images, {time.monotonic() - begun:.0f} s")
            if _decided(rows):
                break
        left = budget - (time.monotonic() - begun)
        signs = _signs(sides[0], rows, left, seed) if masking else "not asked for"
    return _judgement(sides, rows, count, data, signs, {
        "margin": margin, "level": LEVEL, "share": 100 * SHARE, "seed": seed,
        "steps": STEPS, "seconds": round(time.monotonic() - begun, 1),
    })  # fmt: skip


def _doubted(
    spec: Any, weights: str | None, fed: str | None, data: Dataset, images: Tensor, labels: Tensor
) -> Suspect:
    """The suspect, and what warnings say of it and of some images: its `doubts`."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", DefquantWarning)
        found = suspect(spec, data, weights, fed)
        right = found.answers(images) == labels
        lint.suspect(found.model, images, labels, right)
        warn_of_chance(Score.of(right), data.num_classes)
    return replace(found, doubts=(*found.doubts, *dict.fromkeys(str(w.message) for w in said)))


def _on_grid(eps: float) -> float:
    """The largest k / 255 that is no more than eps: no 8-bit image lies further in its ball."""
    whole = math.floor(check_eps(eps) * 255 + 1e-6)
    if whole < 1:
        raise UserError(f"8-bit images differ by 1/255 or more: found eps {eps * 255:g}/255")
    return whole / 255


def _dataset(data: Any) -> Dataset:
    if isinstance(data, Dataset):
        return data
    images, labels = data
    images = in_unit(images)
    pixels = images if images.dtype == torch.uint8 else (images * 255).round().to(torch.uint8)
    labels = torch.as_tensor(labels)
    return Dataset(pixels, labels, tuple(map(str, range(int(labels.max()) + 1))), "images")


def _batches(total: int, end: float) -> Iterator[int]:
    """How many images to have looked at next: twice as many, as long as time and images last."""
    count, last, begun = 0, 0, time.monotonic()
    while count < total:
        now = time.monotonic()
        room = int((end - now) * last / max(now - begun, 1e-6)) if count else FIRST
        if room < min(16, total - count):  # at the pace of the last look
            return
        begun, last = now, min(count or FIRST, room, total - count)
        count += last
        yield count


def _row(sides: Sequence[Side], eps: float, n: int, radii: int, margin: float) -> dict[str, Any]:
    """All that is known at one eps after `n` images."""
    level = 1 - (1 - LEVEL) / radii
    usual, strongest = (held[eps][:n] for held in (sides[0].usual, sides[0].strongest))
    over = _between(usual, strongest, level, SHARE, ("OVERSTATED", "REAL"))
    over["low"] = max(over["low"], 0.0)
    row: dict[str, Any] = {
        "eps": eps, "usual": _share(usual), "strongest": _share(strongest), "overstated": over,
    }  # fmt: skip
    if len(sides) > 1:
        other = sides[1].strongest[eps][:n]
        paired = _between(strongest, other, level, -margin / 100, ("NOT WORSE", "WORSE"))
        row |= {"reference": _share(other), "paired": paired}
        row["transfer"] = [_transfer(a, b, eps, n) for a, b in (sides, sides[::-1])]
    return row


def _between(
    one: Tensor, other: Tensor, level: float, limit: float, words: tuple[str, str]
) -> dict[str, Any]:
    """By how much `one` stands more often than `other`: above `limit`, or not, in two words.

    `more` images would decide it at the rates seen so far; 0 where it is decided.
    """
    n, wins, losses = len(one), int((one & ~other).sum()), int((other & ~one).sum())
    low, high = mean_between(wins, losses, n, level)
    size, ends = float(n), (low, high)
    while size < _FAR and ends[0] <= limit < ends[1]:
        size *= 1.1
        ends = mean_between(wins * size / n, losses * size / n, size, level)
    said = words[0] if low > limit else words[1] if high <= limit else "NOT DECIDED"
    return {
        "wins": wins, "losses": losses, "total": n, "rate": (wins - losses) / n, "low": low,
        "high": high, "verdict": said, "more": math.ceil(size) - n,
    }  # fmt: skip


def _share(stands: Tensor) -> dict[str, Any]:
    count, total = int(stands.sum()), len(stands)
    low, high = mean_between(count, 0, total, LEVEL)
    return {"count": count, "total": total, "rate": count / total, "low": max(low, 0.0),
            "high": high}  # fmt: skip


def _decided(rows: Sequence[Mapping[str, Any]]) -> bool:
    def of(name: str, bad: str) -> bool:
        found = [row[name]["verdict"] for row in rows if name in row]
        return bad in found or "NOT DECIDED" not in found

    return of("overstated", "-") and of("paired", "WORSE")


def _transfer(a: Side, b: Side, eps: float, n: int) -> dict[str, Any]:
    """How many images that fool `a`, as they fell, fool `b`, too, where both were right."""
    ids = [i for i in a.fooling[eps] if i < n and bool(a.clean[i] & b.clean[i])]
    pixels = [a.fooling[eps][i] for i in ids]
    wrong = b.suspect.answers(torch.stack(pixels)) != b.labels[ids] if ids else torch.zeros(0)
    names = {"from": Path(a.suspect.name).name, "to": Path(b.suspect.name).name}
    return names | {"fooled": int(wrong.sum()), "total": len(ids)}


def _signs(
    side: Side, rows: Sequence[Mapping[str, Any]], left: float, seed: int
) -> dict[str, Any] | str:
    """Signs of masked gradients at the largest eps at which the usual attack leaves something.

    Or why they were not looked for.
    """
    claimed = [row["eps"] for row in rows if row["usual"]["rate"] >= CLAIMED]
    if not claimed or left <= 0:
        return NO_TIME if claimed else "the usual attack leaves too little to hide"
    effort = Effort(steps=STEPS // 2, restarts=1, queries=QUERIES // 2, draws=8, seed=seed)
    images = side.images[:MASKING], side.labels[:MASKING]
    found = masking_verdict(side.model, images, claimed[-1], effort=effort)
    return {
        "eps": claimed[-1], "verdict": found.overall, "images": len(images[1]),
        "signs": [
            {"name": s.name, "verdict": s.verdict, "count": s.finding.correct,
             "total": s.finding.total, "means": s.means, "do": s.do}
            for s in found.signs
        ],
    }  # fmt: skip


def _judgement(
    sides: Sequence[Side],
    rows: Sequence[Mapping[str, Any]],
    n: int,
    data: Dataset,
    found: Mapping[str, Any] | str,
    how: Mapping[str, Any],
) -> Judgement:
    signs = None if isinstance(found, str) else found
    verdict, why = _verdict(sides[0].suspect, rows, signs, found == NO_TIME)
    doubts = [f"{Path(side.suspect.name).name}: {d}" for side in sides for d in side.suspect.doubts]
    paired, beside = _paired(rows, float(how["margin"]), doubts)
    record = {
        "format": 1, "kind": "defquant judgement", "verdict": verdict, "why": why,
        "paired": paired, "beside": beside, "model": _described(sides[0], n),
        "reference": _described(sides[1], n) if len(sides) > 1 else None, "data": data.name,
        "fingerprint": data.fingerprint, "images": n, "of": len(data), **how, "rows": list(rows),
        "masking": signs, "no_masking": found if signs is None else "",
        "evidence": stamp(torch.device("cpu")),
    }  # fmt: skip
    return Judgement(verdict, paired, record)


def _described(side: Side, n: int) -> dict[str, Any]:
    found = side.suspect
    return {
        "name": Path(found.name).name, "kind": found.kind, "sha256": found.sha256,
        "own": found.own, "contract": [*found.contract, *found.doubts],
        "staircases": len(found.staircases), "closed": list(found.closed),
        "clean": _share(side.clean[:n]),
    }  # fmt: skip


def _verdict(
    found: Suspect,
    rows: Sequence[Mapping[str, Any]],
    signs: Mapping[str, Any] | None,
    hurried: bool = False,
) -> tuple[str, str]:
    """The word, and a sentence; `hurried`: the signs were not looked for, for want of time."""
    over = [row for row in rows if row["overstated"]["verdict"] == "OVERSTATED"]
    undecided = [row["overstated"]["more"] for row in rows
                 if row["overstated"]["verdict"] == "NOT DECIDED"]  # fmt: skip
    raised = {s["name"]: s["verdict"] for s in (signs or {}).get("signs", ())}
    failed = [name for name, said in raised.items() if said == "FAIL"]
    if failed and (over or found.own or not found.closed):
        hidden = f"gradients are hidden from the usual attack: {', '.join(failed)}"
        return "MASKED", "; ".join((hidden, *found.doubts[:1]))
    if found.doubts:
        return "NOT DECIDED", found.doubts[0]
    if over:
        worst = max(over, key=lambda row: row["overstated"]["rate"])
        points = 100 * worst["overstated"]["rate"]
        return f"OVERSTATED by {points:.1f} points", (
            f"straight-through PGD leaves {worst['usual']['rate']:.1%} at {_eps(worst)}, the "
            f"strongest attack {worst['strongest']['rate']:.1%}: quote the latter"
        )
    if undecided:
        return "NOT DECIDED", f"{_images(max(undecided))} are needed at the rates seen so far"
    if found.closed:
        return "NOT DECIDED", (
            f"its numbers are upper bounds: {', '.join(found.closed[:4])} could not be opened, and "
            "an attack that follows gradients may be blind there"
        )
    if raised.get("flat") == "WARN":
        return "NOT DECIDED", f"its numbers are upper bounds: flat: {RULES['flat'].means}"
    if hurried:
        return "NOT DECIDED", "signs of masked gradients were not looked for: give more --budget"
    left = ", ".join(f"{row['strongest']['rate']:.1%} at {_eps(row)}" for row in rows)
    return "REAL", (
        f"the strongest attack leaves {left}: no {100 * SHARE:g} points less than the usual one"
    )


def _paired(
    rows: Sequence[Mapping[str, Any]], margin: float, doubts: Sequence[str]
) -> tuple[str, str]:
    found = [(row["paired"], row) for row in rows if "paired" in row]
    if not found:
        return "", ""
    for pair, row in found:
        if pair["verdict"] == "WORSE":
            return "WORSE", (
                f"at {_eps(row)} it loses {-100 * pair['rate']:.1f} points to the reference, "
                f"surely more than {margin:g}"
            )
    if doubts:
        return "NOT DECIDED", doubts[0]
    open_ = [pair["more"] for pair, _ in found if pair["verdict"] == "NOT DECIDED"]
    if open_:
        return "NOT DECIDED", (
            f"whether it stays within {margin:g} points of the reference: {_images(max(open_))} "
            "are needed at the rates seen so far"
        )
    return "NOT WORSE", f"it stays within {margin:g} points of the reference at every eps"


def _images(more: int) -> str:
    return f"{more:,} more images" if more < _FAR / 2 else "more images than anyone has"


def _eps(row: Mapping[str, Any]) -> str:
    return f"{row['eps'] * 255:g}/255"


def _rate(found: Mapping[str, Any]) -> str:
    return f"{found['rate']:.1%} [{found['low']:.1%}, {found['high']:.1%}]"
