"""Sections of experiments: every number in Markdown, terminal, page and figure."""

import io
import re
import tempfile
from dataclasses import replace
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from defquant.errors import UserError
from defquant.paper.figures import EXPERIMENTS, render
from defquant.paper.grid import SCALES, read
from defquant.paper.section import Line, Number, Panel, Section, Table
from defquant.report import build_report, print_section, section_figure, section_markdown
from defquant.report.model import axis, bar, places, uncertainty_text
from defquant.report.plot import chart, figures, net, svg
from pages import HOSTILE, check, page_of
from synthetic_runs import measurement, png

pytestmark = pytest.mark.usefixtures("undrawn")

RESULTS = Path(__file__).parents[1] / "results" / "small"
PGD = measurement(attack="PGD", eps=8 / 255)
OURS = Number(0.6334, 0.0123, 2, 1000, 0.6243, 0.6421, paper=0.948)
ALONE = Number(0.5172, 0.0, 1, 10_000, 0.5072, 0.5274, paper=0.393)
MASKED = Number(0.8811, 0.0, 1, 1000, 0.8712, 0.8915, vanishing=0.25)
NOTHING = Number(None, paper=0.4321)
GAIN = Number(-0.0912, seeds=2, points=True, paper=0.0137)
TABLE = Table(
    ("Network", "Images", "Full prec.", "1 bit", "2 bits", "Gain"),
    (("vanilla", "FGSM 8/255", OURS, ALONE, MASKED, GAIN), ("", "PGD", NOTHING, None, OURS, None)),
    "Accuracy by activation bits.",
)
PANEL = Panel(
    "FGSM 8/255", "bits", "accuracy",
    (
        Line("vanilla", (("1", ALONE), ("2", NOTHING), ("full", OURS)), "vanilla"),
        Line("vanilla (paper)", (("1", Number(0.1234)), ("full", Number(0.948))), "vanilla", True),
        Line("DQ", (("1", Number(0.7773)), ("2", Number(0.7993)), ("full", OURS)), "DQ"),
    ),
)  # fmt: skip
WHOLE = Section(
    "table1", "Table 1: bits", ("What was done.", "What is seen."), (TABLE,), (PANEL,),
    missing=3, command="defquant reproduce table1",
)  # fmt: skip
SHOWN = (
    "63.3", "±1.2", "51.7", "51–53", "88.1", "†", "(94.8)", "(43.2)", "−9.1", "(+1.4)", "–",
    "What was done.", "What is seen.", "Accuracy by activation bits.", "still missing: 3",
    "defquant reproduce table1",
)  # fmt: skip
EVIDENCE = ("62.4 to 64.2", "50.7 to 52.7", "−31.5", "+12.4", "−10.5", "1,000 images", "10,000")
OF_THE_PANEL = ("12.3", "77.7", "79.9")


def printed(section: Section, width: int) -> str:
    console = Console(width=width, file=io.StringIO(), record=True)
    print_section(section, console)
    return console.export_text()


def test_every_number_is_in_markdown_and_on_the_page(tmp_path: Path) -> None:
    text, page = section_markdown(WHOLE), page_of(tmp_path, PGD, WHOLE)
    titles = " ".join(re.findall(' title="([^"]*)"', page))  # what each number rests on
    assert not [found for found in EVIDENCE if found not in titles]
    page = unescape(re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", page)))
    for found in (*SHOWN, *OF_THE_PANEL):
        assert found in page and found in text
    for row in (
        "| vanilla | FGSM 8/255 | **63.3** ±1.2 (94.8) | 51.7 51–53 (39.3) | 88.1 87–89† |",
        "|  | PGD | – (43.2) | – | 63.3 ±1.2 (94.8) | – |",
    ):
        assert row in text
    assert "![Table 1: bits](figures/a%20b.png)" in section_markdown(WHOLE, "figures/a b.png")
    assert "![" not in section_markdown(replace(WHOLE, panels=()), "a.png")


def test_the_page_has_every_stored_number_of_the_paper_once() -> None:
    """Each in its table, its cells in its title; `test_golden` holds them."""
    scale, results = SCALES["small"].placed(None, None, "cpu"), read(RESULTS)
    sections = [render(name, scale, results) for name in EXPERIMENTS if name != "table2"]
    with tempfile.TemporaryDirectory() as place:
        text = build_report(RESULTS, Path(place) / "p.html", sections=sections).read_text()
    page, titles = check(text), set(re.findall(r"[0-9a-f]{16}", text))
    for section in sections:
        shown = page.tables.get(f"paper-{section.name}", [])
        numbers = [n for t in section.tables for row in t.rows for n in row if type(n) is Number]
        for table, own in zip(section.tables, shown, strict=False):
            assert len(own) == 1 + len(table.rows)
            for row, texts in zip(table.rows, own[1:], strict=True):
                for n, text in zip(row, texts, strict=True):
                    assert text == (n or "–") if type(n) is not Number else written(n, text, table)
        assert {key for n in numbers for key in n.cells if key} <= titles


def written(n: Number, text: str, table: Table) -> bool:
    """Whether a page's text is that number, as someone else would write it."""
    factor, form = (100, "{:+.1f}" if n.points else "{:.1f}") if table.percent else (1, "{:#.3g}")
    value, *more = text.replace("−", "-").split(" ", 1)
    rest = " ".join(more).replace("+0.0", "0.0")
    paper = n.paper is None or f"({form.format(factor * n.paper)}" in rest
    mean = "–" if n.mean is None else form.format(factor * n.mean).replace("+0.0", "0.0")
    return value in (mean, mean.replace("-0.0", "0.0")) and paper and ("†" in text) == n.masked


@pytest.mark.parametrize("width", [30, 100, 200])
def test_the_terminal_has_the_numbers_whole_at_every_width(width: int) -> None:
    text = printed(WHOLE, width)
    assert not [f for f in SHOWN if " " not in f and "(" not in f and f not in text]
    assert "(94.8)" in text or "(paper 94.8)" in text
    assert ("63.3 ±1.2 (paper 94.8)" in text) == (width == 200)  # beside ours where there is room
    wide = [line for line in text.splitlines() if len(line.rstrip()) > width]
    assert not wide or width == 30
    alone = printed(replace(WHOLE, tables=()), 120)
    assert not [found for found in (*OF_THE_PANEL, "vanilla (paper)") if found not in alone]


def test_best_and_second_are_of_the_bits_and_never_masked() -> None:
    assert places(TABLE, 0) == [0, 0, 1, 0, 0, 0]  # of two rivals the lower is no second
    three = replace(TABLE, rows=(("a", "b", OURS, ALONE, replace(MASKED, vanishing=0.0), GAIN),))
    assert places(three, 0) == [0, 0, 2, 0, 1, 0]
    assert places(replace(three, head=tuple("abcdef")), 0) == [0] * 6
    assert places(replace(three, percent=False), 0) == [0] * 6


def test_the_rest_of_a_sections_notation_and_order() -> None:
    assert uncertainty_text(Number(0.5, seeds=3)) == "±0.0"
    assert uncertainty_text(GAIN) == ""
    assert uncertainty_text(replace(GAIN, low=-0.1, high=0.2)) == "[−10.0, +20.0]"
    assert uncertainty_text(Number(0.1234, 0.0456, 1), percent=False) == "±0.0456"
    distances = Panel("a", "layer", "D", (Line("x", (("0", Number(0.1)),)),), percent=False)
    assert "| x | 0.100 |" in section_markdown(Section("f", "F", (), panels=(distances,)))
    for names, merged in (("28 1248", "1248"), ("12 2f o", "12fo")):  # each line keeps its own
        lines = [Line("", tuple((at, OURS) for at in own)) for own in names.split()]
        assert axis(lines) == list(merged)


def test_charts_leave_gaps_and_say_all_of_a_point(drawn: None) -> None:
    spec = chart([PANEL])
    rows = {(row["line"], row["paper"]): row for row in spec["datasets"]["rows"]}
    ours = rows["vanilla", False]
    assert (ours["at"], ours["y"]) == (["1", "2", "full"], [51.72, None, 63.34])
    assert ours["low"] == [50.72, None, 62.11]
    assert ours["told"][2] == (
        f"{net('vanilla')}|vanilla; FGSM 8/255, bits full: 63.3 ±1.2, 95% interval 62.4 to 64.2, "
        "2 seeds, 1,000 images each"
    )
    paper = rows["vanilla", True]
    assert (paper["y"], paper["low"]) == ([12.34, 94.8], [None, None])
    layers = spec["spec"]["layer"]
    assert layers[1]["encoding"]["y"]["scale"] == {"zero": False, "nice": True}
    whole = chart([PANEL], whole=True)["spec"]["layer"]
    assert whole[1]["encoding"]["y"]["scale"] == {"domain": [0, 100]}
    shown = svg(spec)
    assert f'<path class="{net("DQ")}"' in shown and "DQ; FGSM 8/255, bits 1: 77.7</title>" in shown


def test_an_axis_of_numbers_is_one_and_bars_are_the_wider_of_interval_and_spread() -> None:
    line = Line("a", (("0", OURS), ("0.5", ALONE), ("16", OURS)))
    spec = chart([Panel("FGSM", "ε · 255", "accuracy", (line,))])
    assert spec["datasets"]["rows"][0]["at"] == [0.0, 0.5, 16.0]
    assert spec["spec"]["encoding"]["x"]["type"] == "quantitative"
    assert spec["spec"]["layer"][0]["mark"]["type"] == "area"
    assert bar(replace(OURS, spread=0.1)) == pytest.approx((0.5334, 0.7334))
    assert bar(OURS) == pytest.approx((0.6211, 0.6457))
    assert bar(ALONE) == (0.5072, 0.5274)


def test_kinds_have_colours_and_unlike_panels_their_own_figure() -> None:
    other = replace(PANEL, lines=(Line("a", (("1", OURS),), "DQ"), Line("b", (("1", OURS),), "k")))
    spec = chart([PANEL, other])["spec"]
    layer = spec["encoding"] | spec["layer"][2]["encoding"]
    names, colours = layer["color"]["scale"].values()
    assert names == layer["shape"]["scale"]["domain"] == ["vanilla", "DQ", "a", "b"]
    assert len(set(colours)) == 4
    assert layer["color"]["legend"]["values"] == names  # the paper's line has ours' name
    strange = replace(PANEL, lines=(Line("c", (("1", OURS),)),))
    assert figures([PANEL, strange, other]) == [[strange], [PANEL, other]]
    assert figures([replace(PANEL, lines=(Line("a", (("1", NOTHING),)),))]) == []


def test_everything_in_a_section_is_escaped(tmp_path: Path, drawn: None) -> None:
    bad = Section(
        HOSTILE, HOSTILE, (HOSTILE, "# no heading", "1. no list"),
        (Table((HOSTILE, "x"), ((HOSTILE, OURS), (HOSTILE, HOSTILE)), HOSTILE),),
        (Panel(HOSTILE, HOSTILE, HOSTILE, (Line(HOSTILE, ((HOSTILE, ALONE),), HOSTILE),)),),
        ((HOSTILE, pictures(HOSTILE)), (HOSTILE, {"examples": HOSTILE}), (HOSTILE, None)),
        command=f"{HOSTILE}\n```",
    )  # fmt: skip
    page = page_of(tmp_path, PGD, bad, bad)
    assert "<script>alert" not in page and "<img src=x" not in page
    assert page.count("no pictures") == 4
    text = section_markdown(bad)
    outside = re.sub(r"````.*````", "", text, flags=re.S)
    assert "\\\\" not in text  # nothing is escaped twice
    assert "\\# no heading" in text and "1\\. no list" in text
    assert not re.findall(r"(?<!\\)<(?!/?(?:sub|ins|details|summary)>)", outside)
    assert "[red]" in printed(bad, 100)


def pictures(word: str = "cat") -> dict[str, Any]:
    both = dict.fromkeys(("clean_png", "adversarial_png"), png(np.zeros((4, 4))))
    answers = {"clean": {"prediction": 0, "confidence": 0.93}, "adversarial": {"prediction": 1}}
    example = {"id": 7, "label": 0, **both, **answers}
    return {"examples": [example], "classes": [word, "dog"], "attack": "FGSM", "eps": 8 / 255}


def test_pictures_are_on_the_page_and_their_answers_in_markdown(tmp_path: Path) -> None:
    both = (("FP", pictures()), ("DQ", pictures()))
    section = replace(WHOLE, tables=(), panels=(), pictures=both, missing=0)
    page = page_of(tmp_path, PGD, section)
    assert page.count("<image ") == 2 and page.count("<use ") == 5  # each picture is kept once
    assert "FGSM at 8/255" in page
    forged = pictures()
    forged["examples"][0]["adversarial_png"] = 'x"><script>'
    assert "no picture<" in page_of(tmp_path, PGD, replace(section, pictures=(("FP", forged),)))
    text = section_markdown(section)
    assert "| 7 | cat | ✓ cat 93% | ✗ dog | ✓ cat 93% | ✗ dog |" in text
    assert "✗ dog" in printed(section, 100)


def test_sections_with_nothing_make_a_page(tmp_path: Path) -> None:
    empty = Section("x", "Empty", ())
    hollow = Section("x", "Hollow", ("Text.",), (Table(("a",), ()),), (Panel("", "x", "y", ()),))
    page = page_of(tmp_path, PGD, empty, hollow, replace(WHOLE, tables=(), panels=()))
    for anchor in ("paper-x", "paper-x-1", "paper-table1", "all", "settings"):
        assert f'id="{anchor}"' in page
    assert section_markdown(empty) == "## Empty\n"
    assert "Hollow" in printed(hollow, 80)


def test_names_in_a_sequence_are_said_once(tmp_path: Path) -> None:
    rows = tuple((name, attack, OURS) for name in ("vanilla", "DQ") for attack in ("clean", "FGSM"))
    page = page_of(tmp_path, PGD, replace(WHOLE, tables=(Table(("a", "b", "c"), rows),), panels=()))
    assert page.count('<th scope="row" rowspan="2" class="family">') == 2


@pytest.mark.parametrize("kind", ["png", "svg", "pdf"])
def test_figures_of_sections_are_the_same_each_time(tmp_path: Path, kind: str) -> None:
    first = section_figure(WHOLE, tmp_path / f"a.{kind}").read_bytes()
    assert first.startswith({"png": b"\x89PNG", "svg": b"<svg", "pdf": b"%PDF"}[kind])
    again = section_figure(WHOLE, tmp_path / f"b.{kind}").read_bytes()
    assert again == first or (kind == "pdf" and len(again) == len(first))  # in another order
    assert b"CreationDate" not in first
    other = replace(WHOLE, panels=(replace(PANEL, lines=PANEL.lines[:2]),))
    assert section_figure(other, tmp_path / f"c.{kind}").read_bytes() != first
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{n}.{kind}" for n in "abc"]


def test_a_figure_is_wide_enough_to_read_and_none_is_of_nothing(tmp_path: Path) -> None:
    many = replace(WHOLE, panels=tuple(replace(PANEL, title=str(i)) for i in range(7)))
    with Image.open(section_figure(many, tmp_path / "a.png")) as image:
        assert image.width > 1500 and image.height > 1000
    with pytest.raises(UserError, match="ends in"):
        section_figure(WHOLE, tmp_path / "b.txt")
    hollow = replace(PANEL, lines=(Line("a", (("1", NOTHING),)),))
    with pytest.raises(UserError, match="nothing to draw"):
        section_figure(replace(WHOLE, panels=(hollow,)), tmp_path / "b.png")
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]
