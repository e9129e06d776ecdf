"""Pages as a browser sees them."""

import base64
import hashlib
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from defquant.paper.section import Section, Verdict
from defquant.records import Measurement
from defquant.report import build_report
from synthetic_runs import append

HOSTILE = "<script>alert('x')</script>\"><img src=x onerror=y>|`*[red]"


class Page:
    """What a browser would load or run, and the tables, by section, of a page that is well formed.

    A page without its scripts and with its void tags closed is XML.
    """

    def __init__(self, text: str) -> None:
        self.scripts = re.findall(r"<script([^>]*)>(.*?)</script>", text, re.DOTALL)
        bare = re.sub(r"<script.*?</script>|<!doctype html>", "", text, flags=re.DOTALL)
        root = ElementTree.fromstring(re.sub(r"<((?:meta|input|br|link)\b[^>]*)>", r"<\1/>", bare))
        self.tags = [element.tag.split("}")[-1] for element in root.iter()]
        self.loads, self.policy, place = list[str](), "", ""
        self.tables: dict[str, list[list[list[str]]]] = {}  # of a section's or folded part's id
        for element in root.iter():
            assert not [name for name in element.attrib if name.startswith("on")]
            names = ("src", "href", "{http://www.w3.org/1999/xlink}href", "srcset")
            self.loads += [value for name in names if (value := element.get(name))]
            if element.get("http-equiv") == "Content-Security-Policy":
                self.policy = element.get("content", "")
            if element.tag in ("section", "details"):
                place = element.get("id", place)
            if element.tag == "table":
                self.tables.setdefault(place, []).append(_rows(element))


def _rows(table: ElementTree.Element) -> list[list[str]]:
    rows, spans = [], list[tuple[str, int]]()
    for row in table.iter("tr"):
        texts = [text for text, _ in spans]
        spans = [(text, left - 1) for text, left in spans if left > 1]
        for cell in row:
            shown = cell.find("details/summary")  # what a row of the leaderboard opens on, aside
            texts.append(" ".join("".join((cell if shown is None else shown).itertext()).split()))
            if (left := int(cell.get("rowspan", "1"))) > 1:
                spans.append((texts[-1], left - 1))
        rows.append(texts)
    return rows


def check(text: str) -> Page:
    """The page, of which nothing loads or runs but what its policy names by hash."""
    page = Page(text)
    assert not {"iframe", "object", "base", "form"} & set(page.tags)
    assert all(target.startswith(("#", "data:image/png;base64,")) for target in page.loads)
    assert not re.search(r"url\((?!#)|@import", text)
    assert [kind for kind, _ in page.scripts] == [""]
    own = hashlib.sha256(page.scripts[0][1].encode()).digest()
    start = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src "
    assert page.policy == f"{start}'sha256-{base64.b64encode(own).decode()}'"
    return page


def page_of(folder: Path, *parts: Measurement | Section | Verdict) -> str:
    """The report of `folder`, with these measurements, sections and verdicts, checked."""
    kinds: dict[type, list[Any]] = {Measurement: [], Section: [], Verdict: []}
    for part in parts:
        kinds[type(part)].append(part)
    for m in kinds[Measurement]:
        append(folder / m.run / "results.jsonl", m)
    sections, verdicts = kinds[Section], kinds[Verdict]
    out = build_report(folder, folder / "page.html", sections=sections, verdicts=verdicts)
    check(page := out.read_text("utf-8"))
    return page
