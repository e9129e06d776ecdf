"""A record of `defquant judge` as rows, an answer and chapters of the page. No torch."""

from collections.abc import Mapping, Sequence
from typing import Any

from defquant.paper.section import Number, eps_text, rate
from defquant.report.answer import Answer
from defquant.report.marks import Kind, Mark
from defquant.report.model import Chapter, Plain, Row, listing
from defquant.report.plot import differences
from defquant.report.sources import flatten

__all__ = ["answer", "chapters", "rows"]

Record = Mapping[str, Any]
KINDS: Mapping[str, Kind] = {"REAL": "right", "NOT WORSE": "right", "PASS": "right",
                             "NOT DECIDED": "open", "WARN": "open"}  # fmt: skip


def rows(r: Record) -> list[Row]:
    """The network under the usual and the strongest attack, and the reference under its own."""
    found = []
    names = {"strongest": r["model"]["name"], "usual": r["model"]["name"]}
    names |= {"reference": r["reference"]["name"]} if r["reference"] else {}
    for row in r["rows"]:
        for side, name in names.items():
            of, pair = row[side], row.get("paired") if side == "strongest" else None
            about = {"Right": f"{of['count']:,} of {of['total']:,}", "Interval":
                     "of a confidence sequence: it holds whenever one stops looking"}  # fmt: skip
            if pair:
                about["Paired"] = f"{pair['wins']} images won, {pair['losses']} lost"
            found.append(Row(
                r["data"], name, "float" if side == "reference" else "vanilla",
                r["model" if side != "reference" else "reference"]["kind"], None,
                "usual" if side == "usual" else "strongest", row["eps"], _number(of),
                _number(pair, points=True) if pair else None, True, about,
            ))  # fmt: skip
    return found


def _number(found: Record, points: bool = False) -> Number:
    ends = found["low"], found["high"]
    return Number(found["rate"], 0.0, 1, found["total"], *ends, points=points)


def answer(r: Record) -> Answer:
    """Is its robustness real, and no less than the reference's?"""
    name, every, signs = r["model"]["name"], rows(r), r["masking"]
    reference = r["reference"]["name"] if r["reference"] else ""
    word = r["verdict"].partition(" ")[0]
    beside = [f"Beside {reference}: {r['paired']}. {_sentence(r['beside'])}"] * bool(r["paired"])
    gaps = [row for row in every if row.gap]
    until = "as far as time or images went" if word == "NOT" else "until it was decided"
    return Answer(
        f"Is the robustness of {name} real?", r["verdict"].capitalize(),
        KINDS.get(r["verdict"], "wrong"), _sentence(r["why"]),
        [
            Mark("Evidence", f"{r['images']:,} images", "open" if word == "NOT" else "right",
                 f"of {r['of']:,}, in a drawn order, {until}; {r['seconds']:g} s"),
            Mark("Masked gradients", signs["verdict"], KINDS.get(signs["verdict"], "wrong"),
                 f"at {eps_text(signs['eps'])}, {signs['images']:,} images")
            if signs else
            Mark("Masked gradients", "not looked for", "open", r.get("no_masking", "")),
            Mark("What ships", "the thing itself", "right",
                 "attacked in its own runtime, as 8-bit pixels"),
        ],
        beside, ["other trainings of it", "other data", "other norms than L-infinity"],
        [differences(gaps, reference)] * bool(gaps),
    )  # fmt: skip


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}."


def chapters(r: Record) -> list[Chapter]:
    """What fools one and the other, the signs of masked gradients, what was judged and how."""
    moved: list[Plain] = [
        {"ε": eps_text(row["eps"]), "From": t["from"], "To": t["to"],
         "Fooled, too": rate((t["fooled"], t["total"])) if t["total"] else "none to show"}
        for row in r["rows"] for t in row.get("transfer", ())
    ]  # fmt: skip
    signs: list[Plain] = [
        {"Sign": s["name"], "Verdict": s["verdict"], "Images": f"{s['count']}/{s['total']}",
         "If raised": f"{s['means']}: {s['do']}" * (s["verdict"] in ("WARN", "FAIL"))}
        for s in (r["masking"] or {}).get("signs", ())
    ]  # fmt: skip
    tables: Sequence[tuple[str, str, list[Plain]]] = (
        ("transfer", "What fools one, fools the other", moved),
        ("signs", "Signs of masked gradients", signs),
        ("settings", "What was judged, and how", [
            {"": name, " ": value} for name, value in flatten(
                {k: v for k, v in r.items() if k not in ("rows", "masking", "why", "beside")}
            ).items()
        ]),
    )  # fmt: skip
    command = [r["evidence"]["command"]]
    return [
        Chapter(name, title, tables=[listing(own)], commands=command * (name == "settings"))
        for name, title, own in tables
        if own
    ]
