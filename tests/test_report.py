import base64
import gzip
import hashlib
import io
import json
import re
import subprocess
import sys
import time
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console

from defquant.errors import UserError
from defquant.paper.section import eps_text, signed
from defquant.report import build_report, markdown_table, summary, text_table
from defquant.report.measured import Row, chosen, summary_table, table_eps
from defquant.report.model import places
from defquant.report.names import Series, attack_order, series_of
from defquant.results import Measurement, aggregate, read_folder
from synthetic_runs import append, measurement, write_run, write_runs

pytestmark = pytest.mark.usefixtures("undrawn")
PAPER = {  # Table 1: full precision, then 1 to 5 bits; clean and adversarial
    ("vanilla", 0.0): ([94.8, 42.0, 84.9, 92.8, 93.9, 94.7], [39.3, 9.0, 8.5, 14.1, 19.0, 30.2]),
    ("DQ", 3e-4): ([95.3, 95.2, 95.3, 95.1, 95.1, 95.1], [41.8, 43.2, 41.1, 40.1, 39.8, 39.3]),
    ("DQ", 6e-4): ([95.6, 95.7, 95.2, 95.4, 95.6, 95.5], [45.7, 48.3, 47.9, 43.8, 43.9, 44.6]),
    ("DQ", 1e-3): ([95.9, 95.8, 95.6, 95.6, 95.8, 95.8], [49.1, 51.3, 50.4, 51.3, 49.8, 51.8]),
}
HOSTILE = "<script>alert('x')</script>\"><img src=x onerror=y>|`*[red]"


def paper_table() -> list[Measurement]:
    found = []
    for (method, beta), rows in PAPER.items():
        for attack, eps, row in zip(("clean", "FGSM"), (0.0, 8 / 255), rows, strict=True):
            for bits, value in zip((None, 1, 2, 3, 4, 5), row, strict=True):
                name = "float" if method == "vanilla" and bits is None else method
                new = measurement(method=name, bits=bits, beta=beta, attack=attack, eps=eps)
                run = f"{method}{bits}{beta}"
                found.append(replace(new, run=run, correct=round(10 * value), total=1000))
    return found


def two(dq: tuple[int, ...], vanilla: tuple[int, ...]) -> list[Measurement]:
    pgd = measurement(attack="PGD", eps=32 / 255, bits=4, total=100)
    rows = [
        replace(pgd, run=f"d{s}", method="DQ", beta=0.1, seed=s, correct=c)
        for s, c in enumerate(dq)
    ]
    return rows + [
        replace(pgd, run=f"v{s}", method="vanilla", seed=s, correct=c)
        for s, c in enumerate(vanilla)
    ]


def page_of(folder: Path) -> str:
    return build_report(folder, folder / "report.html").read_text(encoding="utf-8")


def folder_of(place: Path, measurements: list[Measurement]) -> Path:
    for m in measurements:
        append(place / m.run / "results.jsonl", m)
    return place


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_runs(tmp_path_factory.mktemp("runs"))


def adversarial(rows: list[Row]) -> list[Row]:
    return [row for row in rows if row.attack != "clean"]


def test_summary_is_the_papers_table_1() -> None:
    rows = summary(paper_table())
    heads = ("Full precision", "1 bit", "2 bits", "3 bits", "4 bits", "5 bits")
    assert summary_table(rows).head == ("Method", "Images", *heads, "Quantize gain", "Best")
    assert [str(row.family) for row in rows[::2]] == [
        "vanilla",
        "DQ (β = 0.0003)",
        "DQ (β = 0.0006)",
        "DQ (β = 0.001)",
    ]
    gains = [signed(row.gain or 0) for row in adversarial(rows)]
    assert gains == ["−9.1", "+1.4", "+2.6", "+2.7"]
    assert [round(100 * row.best, 1) for row in adversarial(rows)] == [39.3, 43.2, 48.3, 51.8]
    assert [row.gain for row in rows if row.attack == "clean"] == [None] * 4


def test_best_and_second_are_the_papers() -> None:
    table = summary_table(adversarial(summary(paper_table())))
    assert [places(table, i)[2:-2] for i in range(4)] == [
        [1, 0, 0, 0, 0, 2],
        [2, 1, 0, 0, 0, 0],
        [0, 1, 2, 0, 0, 0],
        [0, 2, 0, 2, 0, 1],
    ]


def test_gain_needs_full_precision_and_a_quantised_network() -> None:
    rows = summary([m for m in paper_table() if m.bits is not None])
    assert [row.gain for row in rows] == [None] * 8
    assert "Full precision" not in summary_table(rows).head
    rows = summary([m for m in paper_table() if m.bits is None])
    assert [row.gain for row in rows] == [None] * 8
    assert {rank for i in range(8) for rank in places(summary_table(rows), i)} == {0}


def test_mean_and_spread_are_over_seeds() -> None:
    (row, _) = summary(two((30, 40, 50), (20, 20, 20)))[::-1]
    cell = row.cells[4]
    assert cell.mean == pytest.approx(0.4)
    assert cell.spread == pytest.approx(0.1)


def test_a_run_measured_twice_is_no_second_seed() -> None:
    few = measurement(attack="PGD", eps=0.1, correct=9, total=10, settings="quick")
    many = replace(few, correct=50, total=100, settings="slow")
    weak = replace(many, correct=60, settings="weak")
    (row,) = summary([few, many, weak])
    assert row.cells[None].accuracies == (0.5,)


def test_the_tables_eps_is_where_the_strongest_attack_halves_float() -> None:
    def at(attack: str, eps: float, correct: int, method: str = "float") -> Measurement:
        bits = None if method == "float" else 4
        made = measurement(attack=attack, eps=eps, correct=correct, total=100)
        return replace(made, run=method, method=method, bits=bits)

    float_ = [at("clean", 0.0, 80), at("PGD", 0.1, 70), at("PGD", 0.2, 45), at("PGD", 0.3, 2)]
    noise = [at("Random", eps, 78) for eps in (0.1, 0.2, 0.3)]
    quantised = [at("PGD", eps, 40, "vanilla") for eps in (0.1, 0.3)]
    assert table_eps(aggregate(float_ + noise + quantised)) == 0.2
    assert table_eps(aggregate(quantised[:1])) == 0.1
    strong = [at("PGD-50x10", 0.1, 60), at("PGD-50x10", 0.3, 1)]  # not measured at 0.2
    assert table_eps(aggregate(float_ + noise + strong)) == 0.1
    assert table_eps([]) == 0.0


def test_markdown_marks_best_and_second_and_escapes() -> None:
    table = markdown_table([replace(m, model=HOSTILE, data="a|b\nc") for m in paper_table()])
    lines = table.splitlines()
    assert "| vanilla | FGSM 8/255 | **39.3** 36–42 | 9.0 7–11 | 8.5 7–10 |" in lines[3]
    assert "<ins>30.2</ins> 27–33 | −9.1 | 39.3 |" in lines[3]
    assert len(lines) == 12
    assert lines[-1].startswith("<sub>1 seed, 1,000 images each. ")
    several = markdown_table([*paper_table(), measurement(model=HOSTILE, data="a|b\nc")])
    assert "\\<script\\>" in several
    assert "a\\|b\\\\nc" in several


def test_text_table_prints_hostile_names_as_they_are() -> None:
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(text_table([*paper_table(), measurement(model="[red]x\x1b[2J")]))
    text = console.export_text()
    assert "[red]x\\x1b[2J" in text
    assert "39.3 36–42" in text


def test_names() -> None:
    assert [eps_text(e) for e in (0.1255, 8 / 255, 0.5 / 255)] == ["32/255", "8/255", "0.5/255"]
    attacks = ["PGD(B)", "PGD-50x10", "odd", "PGD", "FGSM", "clean"]
    expected = ["clean", "FGSM", "PGD", "PGD-50x10", "odd", "PGD(B)"]
    assert sorted(attacks, key=attack_order) == expected
    unaware = ["PGD(B)", "FGSM(B)", "PGD-50x10 (unaware)", "PGD", "PGD (unaware)", "FGSM (unaware)"]
    assert sorted(unaware, key=attack_order) == [
        "PGD", "FGSM (unaware)", "PGD (unaware)", "PGD-50x10 (unaware)", "FGSM(B)", "PGD(B)",
    ]  # fmt: skip
    assert signed(-0.0001) == "0.0"


def test_squeezed_networks_are_families_of_their_own() -> None:
    kinds = [
        ("DQ + squeezing + RFGSM", 4, 0.1), ("vanilla + RFGSM", 4, 0.0), ("DQ", 4, 0.1),
        ("vanilla + squeezing", 4, 0.0), ("float", None, 0.0), ("float + squeezing", None, 0.0),
        ("DQ + squeezing", 1, 0.1), ("vanilla", 4, 0.0),
    ]  # fmt: skip
    series = [Series(*kind) for kind in kinds]
    families = sorted({each.family for each in series}, key=lambda family: family.order)
    assert [family.method for family in families] == [
        "vanilla", "DQ", "vanilla + squeezing", "DQ + squeezing", "vanilla + RFGSM",
        "DQ + squeezing + RFGSM",
    ]  # fmt: skip
    assert [each.short for each in series[2:6]] == [
        "DQ 4-bit", "vanilla 4-bit + squeezing", "float", "float + squeezing",
    ]  # fmt: skip
    cells = [measurement(run=m, method=m, bits=b, beta=beta, correct=90) for m, b, beta in kinds]
    (row,) = [row for row in summary(cells) if row.family.method == "vanilla + squeezing"]
    assert {bits: cell.method for bits, cell in row.cells.items()} == {
        None: "float + squeezing", 4: "vanilla + squeezing",
    }  # fmt: skip


class Page(HTMLParser):
    """What a browser would load or run and the tables, by section; tags are closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []
        self.tags: list[str] = []
        self.policy = ""
        self.scripts: list[tuple[str, str]] = []  # type, text
        self.tables: dict[str, list[list[list[str]]]] = {}  # of a section's or folded part's id
        self.place, self.spans, self.texts = "", [], []  # type: ignore[var-annotated]
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        names = {name: value or "" for name, value in attrs}
        assert not [name for name in names if name.startswith("on")]
        self.loads += [names[k] for k in ("src", "href", "xlink:href", "srcset") if k in names]
        if names.get("http-equiv") == "Content-Security-Policy":
            self.policy = names["content"]
        if tag in ("section", "details") and "id" in names:
            self.place = names["id"]
        if tag == "table":
            self.tables.setdefault(self.place, []).append([])
            self.spans = []
        if tag == "tr":
            self.tables[self.place][-1].append([])
            self.spans = [(text, left - 1) for text, left in self.spans if left > 1]
            self.tables[self.place][-1][-1] += [text for text, _ in self.spans]
        if tag in ("td", "th"):
            self.texts = []
            self.rows = int(names.get("rowspan", "1"))
        if tag == "script":
            self.scripts.append((names.get("type", ""), ""))
        if tag not in ("meta", "img", "br", "link"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        self.texts.append(data)
        if self.open and self.open[-1] == "script":
            kind, text = self.scripts[-1]
            self.scripts[-1] = (kind, text + data)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        if tag in ("td", "th"):
            text = " ".join("".join(self.texts).split())
            self.tables[self.place][-1][-1].append(text)
            if self.rows > 1:
                self.spans.append((text, self.rows))


def check(text: str) -> Page:
    page = Page(text)
    assert page.open == []
    assert not {"iframe", "object", "base", "form"} & set(page.tags)
    assert all(target.startswith(("#", "data:image/png;base64,")) for target in page.loads)
    assert not re.search(r"url\((?!#)|@import", text)
    own = [content for kind, content in page.scripts if not kind]
    vega = [content for kind, content in page.scripts if kind == "text/plain"]
    run = own + [gzip.decompress(base64.b64decode(packed)).decode() for packed in vega]
    hashes = {base64.b64encode(hashlib.sha256(each.encode()).digest()).decode() for each in run}
    allowed = re.search(r"script-src ([^;]*)", page.policy)
    assert allowed is not None
    assert set(re.findall(r"'sha256-([^']*)'", allowed[1])) == hashes
    assert re.sub(r"'sha256-[^']*'", "", allowed[1]).split() == (["'none'"] if not run else [])
    specs = [json.loads(content) for kind, content in page.scripts if kind == "application/json"]
    assert len(specs) + len(own) + len(vega) == len(page.scripts)
    assert page.policy.startswith("default-src 'none'; img-src data:; style-src 'unsafe-inline'; ")
    return page


def test_page_is_whole_small_and_loads_nothing(runs: Path, drawn: None) -> None:
    page = page_of(runs)
    found = check(page)
    assert {"table", "svg", "img", "details", "figure", "nav"} <= set(found.tags)
    assert len(page) < 1_000_000
    assert not re.search("https?://", page.replace("http://www.w3.org/", ""))
    assert "accuracy over activation bits: clean, Random" in page
    for name in ("group-1", "examples", "training", "settings"):
        assert f'id="{name}"' in page
    for series in ("float", "vanilla 4-bit", "DQ full precision (β = 0.05)"):
        assert series in page
    assert page_of(runs) == page


def test_every_cell_is_listed_once_and_the_summary_has_one_radius(runs: Path) -> None:
    page = check(page_of(runs))
    cells = aggregate(chosen(read_folder(runs)))
    shown, listing = page.tables["group-1"]
    listed = [tuple(row[:3]) for row in listing[1:]]
    assert len(listed) == len(set(listed)) == len(cells)
    for cell in cells:
        eps = "–" if cell.attack == "clean" else eps_text(cell.eps)
        row = listing[1 + listed.index((cell.attack, eps, str(series_of(cell))))]
        low, high = cell.pooled.interval
        assert row[3:] == [
            f"{100 * cell.mean:.1f} ±{100 * cell.spread:.1f}{'†' * cell.masked}",
            f"{100 * low:.1f} to {100 * high:.1f}",
            f"{cell.pooled.correct:,} / {cell.pooled.total:,}", ", ".join(map(str, cell.seeds)),
        ]  # fmt: skip
    assert {tuple(row[:2]) for row in shown[1:]} == {
        (str(row.family), row.images) for row in summary(read_folder(runs))
    }


def test_everything_in_the_files_is_escaped(tmp_path: Path, drawn: None) -> None:
    hostile = measurement(
        method=HOSTILE, model=HOSTILE, data=HOSTILE, attack=HOSTILE, settings=HOSTILE, eps=0.1
    )
    evidence = {HOSTILE: {HOSTILE: HOSTILE}, "command": HOSTILE}
    run = tmp_path / "run"
    append(run / "results.jsonl", replace(hostile, run=HOSTILE, evidence=evidence))
    (run / "config.json").write_text(json.dumps({"model": {HOSTILE: HOSTILE}}))
    (run / "log.jsonl").write_text(json.dumps({"epoch": 1, "loss": 1.0, HOSTILE: 2}) + "\n")
    guess = {"prediction": 0, "confidence": 0.5}
    example = {"id": HOSTILE, "label": 0, "clean": guess, "adversarial": guess}
    strip = {"method": HOSTILE, "model": HOSTILE, "seed": 0, "data": HOSTILE, "attack": HOSTILE}
    strip |= {"eps": 0.1, "classes": [HOSTILE], "examples": [example]}
    (run / "examples.json").write_text(json.dumps(strip))
    page = build_report(tmp_path, tmp_path / "r.html", title=HOSTILE).read_text()
    check(page)
    assert "<script>alert" not in page
    assert "<img" not in page


def test_only_png_pictures_reach_the_page(tmp_path: Path) -> None:
    write_run(tmp_path / "float-s0", "float", 0)
    path = tmp_path / "float-s0" / "examples.json"
    strip = json.loads(path.read_text())
    good = strip["examples"][0]["clean_png"]
    for bad in ("not base64!", "PHN2Zz48L3N2Zz4=", '"><script>', None, good + "A" * 200_000):
        strip["examples"][0]["adversarial_png"] = bad
        path.write_text(json.dumps(strip))
        page = page_of(tmp_path)
        check(page)
        assert page.count("<img") == 2 * len(strip["examples"]) - 1
        assert "no picture" in page


def test_missing_and_broken_files_leave_a_report(tmp_path: Path) -> None:
    folder_of(tmp_path, two((30,), (20,)))
    plain = page_of(tmp_path)
    check(plain)
    for name in ("examples", "training"):
        assert f'id="{name}"' not in plain
    (tmp_path / "d0" / "config.json").write_text("{cut")
    (tmp_path / "v0" / "examples.json").write_text('{"examples": [1]}')
    (tmp_path / "v0" / "log.jsonl").write_text('{"epoch": 1, "loss": NaN, "accuracy": 0.5}\n{"ep')
    page = page_of(tmp_path)
    check(page)
    assert page.count("left out in part") == 2
    assert 'id="training"' in page


def test_the_monitor_of_adversarial_training_has_a_column_where_there_is_one(
    tmp_path: Path,
) -> None:
    folder_of(tmp_path, two((30,), (20,)))
    record = {"epoch": 1, "loss": 1.0, "accuracy": 0.5}
    for run in ("d0", "v0"):
        (tmp_path / run / "log.jsonl").write_text(json.dumps(record))
    assert "PGD-10, watched" not in page_of(tmp_path)
    watched = [(0.5, 0.4), (0.78125, 0.03125)]
    lines = [
        json.dumps({**record, "epoch": i, "monitor_fgsm": fgsm, "monitor_pgd": pgd})
        for i, (fgsm, pgd) in enumerate(watched, 1)
    ]
    (tmp_path / "v0" / "log.jsonl").write_text("\n".join(lines))
    page = page_of(tmp_path)
    check(page)
    (table,) = check(page).tables["training"]
    assert table[0][-3:] == ["PGD-10, watched", "FGSM, watched", "Time a run"]
    assert {row[0]: row[-3:-1] for row in table[1:]} == {
        "DQ 4-bit (β = 0.1)": ["–", "–"], "vanilla 4-bit": ["3.1%", "78.1%"]
    }  # fmt: skip


def test_folders_without_results_are_the_users_mistake(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no results"):
        build_report(tmp_path, tmp_path / "r.html")
    assert not (tmp_path / "r.html").exists()
    (tmp_path / "results.jsonl").write_text(
        json.dumps({**vars(measurement()), "bits": "4"}) + "\n", encoding="utf-8"
    )
    with pytest.raises(UserError, match=r"line 1: bits must be .* found '4'"):
        build_report(tmp_path, tmp_path / "r.html")


@pytest.mark.parametrize("networks", [("float",), ("dq-4bit", "vanilla-4bit"), ("dq-full",)])
@pytest.mark.parametrize("seeds", [1, 2])
def test_any_selection_of_runs_makes_a_page(
    tmp_path: Path, networks: tuple[str, ...], seeds: int
) -> None:
    page = page_of(write_runs(tmp_path, seeds=seeds, networks=networks))
    check(page)
    assert "accuracy over activation bits" not in page


def test_clean_only_one_eps_and_mixed_data(tmp_path: Path) -> None:
    other = measurement(run="long" * 60, data="cifar", fingerprint="ab", attack="FGSM", eps=0.03)
    page = page_of(
        folder_of(tmp_path, [measurement(), other, replace(other, run="b", fingerprint="c")])
    )
    check(page)
    assert "<h2>wrn-10-1 on cifar</h2>" in page
    assert "those of two fingerprints must not be compared" in page


def test_the_telling_radius_takes_linear_time() -> None:
    """4,000 radii of two networks in a second or two; each against all would take a minute."""
    cells = [
        replace(cell, method=method, eps=i / 4000, attack="PGD" if i else "clean")
        for cell in aggregate([measurement(correct=100)])
        for method in ("float", "DQ")
        for i in range(4001)
    ]
    start = time.process_time()
    assert table_eps(cells) in {cell.eps for cell in cells}
    assert time.process_time() - start < 2


def test_the_report_needs_no_torch() -> None:
    code = "import sys, defquant.report; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_blind_attack_is_marked_everywhere(tmp_path: Path) -> None:
    sound = [
        Measurement("a", "float", "wrn", None, 0.0, 0, "d", "f", attack, eps, attack, right, 100)
        for attack, eps, right in (
            ("clean", 0.0, 90),
            ("PGD", 8 / 255, 60),
            ("PGD(B)", 8 / 255, 70),
        )
    ]
    masked = [replace(m, run="b", method="vanilla", bits=1, vanishing=0.5) for m in sound]
    assert "†" not in markdown_table(sound)
    table = markdown_table(sound + masked)
    assert table.count("†") == 2  # PGD's cell and the note; clean and black box are not blind
    for m in sound + masked:
        append(tmp_path / m.run / "results.jsonl", m)
    page = build_report(tmp_path, tmp_path / "page.html").read_text()
    assert "masked, not robust" in page


def test_two_runs_of_one_seed_are_noticed(tmp_path: Path) -> None:
    for run in ("a/x", "b/x"):
        m = Measurement(run, "float", "wrn", None, 0.0, 0, "d", "f", "clean", 0.0, "clean", 9, 10)
        append(tmp_path / run / "results.jsonl", m)
    page = build_report(tmp_path, tmp_path / "page.html").read_text()
    assert "several runs of one seed" in page
