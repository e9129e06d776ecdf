"""The page of a folder of runs: its summary, whole, offline, and safe whatever the files hold."""

import io
import json
import re
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from defquant.errors import UserError
from defquant.paper.section import eps_number, eps_text, signed
from defquant.records import Measurement, read_folder
from defquant.report import build_report, markdown_table, plot_curves, summary, text_table
from defquant.report.measured import chosen, summary_table, table_eps
from defquant.report.model import places
from defquant.report.names import Series, attack_order, over_seeds
from pages import HOSTILE, check, page_of
from synthetic_runs import append, measurement, write_run, write_runs

pytestmark = pytest.mark.usefixtures("undrawn")
PAPER = {  # Table 1: full precision, then 1 to 5 bits; clean and adversarial
    ("vanilla", 0.0): ([94.8, 42.0, 84.9, 92.8, 93.9, 94.7], [39.3, 9.0, 8.5, 14.1, 19.0, 30.2]),
    ("DQ", 3e-4): ([95.3, 95.2, 95.3, 95.1, 95.1, 95.1], [41.8, 43.2, 41.1, 40.1, 39.8, 39.3]),
    ("DQ", 6e-4): ([95.6, 95.7, 95.2, 95.4, 95.6, 95.5], [45.7, 48.3, 47.9, 43.8, 43.9, 44.6]),
    ("DQ", 1e-3): ([95.9, 95.8, 95.6, 95.6, 95.8, 95.8], [49.1, 51.3, 50.4, 51.3, 49.8, 51.8]),
}
EPOCH = {"epoch": 1, "loss": 1.0, "accuracy": 0.5}


def network(method: str, bits: int | None, seed: int = 0, **changes: object) -> Measurement:
    beta = 0.1 * (method == "DQ")
    run = f"{method}{bits}-{seed}"
    return measurement(run, method=method, bits=bits, beta=beta, seed=seed, **changes)


def paper_table() -> list[Measurement]:
    found = []
    for (method, beta), rows in PAPER.items():
        for attack, eps, row in zip(("clean", "FGSM"), (0.0, 8 / 255), rows, strict=True):
            for bits, value in zip((None, 1, 2, 3, 4, 5), row, strict=True):
                name = "float" if method == "vanilla" and bits is None else method
                counts = {"correct": round(10 * value), "total": 1000}
                new = network(name, bits, attack=attack, eps=eps, **counts)
                found.append(replace(new, beta=beta, run=f"{method}{bits}{beta}"))
    return found


def two(dq: tuple[int, ...], vanilla: tuple[int, ...]) -> list[Measurement]:
    pgd = {"attack": "PGD", "eps": 32 / 255}
    both = {"DQ": dq, "vanilla": vanilla}
    return [
        network(m, 4, s, correct=c, **pgd) for m, own in both.items() for s, c in enumerate(own)
    ]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_runs(tmp_path_factory.mktemp("runs"))


# --- the summary --------------------------------------------------------------------------


def test_summary_is_the_papers_table_1() -> None:
    rows = summary(paper_table())
    heads = ("Full precision", "1 bit", "2 bits", "3 bits", "4 bits", "5 bits")
    assert summary_table(rows).head == ("Method", "Images", *heads, "Quantize gain", "Best")
    names = ["vanilla", "DQ (β = 0.0003)", "DQ (β = 0.0006)", "DQ (β = 0.001)"]
    assert [str(row.family) for row in rows[::2]] == names
    assert [signed(row.gain or 0) for row in rows[1::2]] == ["−9.1", "+1.4", "+2.6", "+2.7"]
    assert [round(100 * row.best, 1) for row in rows[1::2]] == [39.3, 43.2, 48.3, 51.8]
    assert [row.gain for row in rows if row.attack == "clean"] == [None] * 4


def test_best_and_second_are_the_papers() -> None:
    table = summary_table(summary(paper_table())[1::2])
    assert [places(table, i)[2:-2] for i in range(4)] == [
        [1, 0, 0, 0, 0, 2], [2, 1, 0, 0, 0, 0], [0, 1, 2, 0, 0, 0], [0, 2, 0, 2, 0, 1],
    ]  # fmt: skip


@pytest.mark.parametrize("full", [True, False])
def test_gain_needs_full_precision_and_a_quantised_network(full: bool) -> None:
    rows = summary([m for m in paper_table() if (m.bits is None) == full])
    assert [row.gain for row in rows] == [None] * 8
    assert ("Full precision" in summary_table(rows).head) == full
    ranks = {rank for i in range(8) for rank in places(summary_table(rows), i)}
    assert ranks == ({0} if full else {0, 1, 2})


def test_a_cell_is_over_seeds_and_a_run_measured_twice_is_none() -> None:
    cell = summary(two((30, 40, 50), (20, 20, 20)))[1].cells[4]
    assert (cell.mean, cell.n.spread) == pytest.approx((0.4, 0.1))
    few = measurement(attack="PGD", eps=0.1, correct=9, total=10, settings="quick")
    many = replace(few, correct=50, total=100, settings="slow")
    (row,) = summary([few, many, replace(many, correct=60, settings="weak")])
    assert (row.cells[None].mean, row.cells[None].seeds) == (0.5, (0,))


def test_the_tables_eps_is_where_the_strongest_attack_halves_float() -> None:
    def at(attack: str, eps: float, correct: int, method: str = "float") -> Measurement:
        bits = None if method == "float" else 4
        return network(method, bits, attack=attack, eps=eps, correct=correct)

    float_ = [at("clean", 0.0, 80), at("PGD", 0.1, 70), at("PGD", 0.2, 45), at("PGD", 0.3, 2)]
    noise = [at("Random", eps, 78) for eps in (0.1, 0.2, 0.3)]
    quantised = [at("PGD", eps, 40, "vanilla") for eps in (0.1, 0.3)]
    assert table_eps(over_seeds(float_ + noise + quantised)) == 0.2
    assert table_eps(over_seeds(quantised[:1])) == 0.1
    strong = [at("PGD-50x10", 0.1, 60), at("PGD-50x10", 0.3, 1)]  # not measured at 0.2
    assert table_eps(over_seeds(float_ + noise + strong)) == 0.1
    assert table_eps([]) == 0.0


def test_the_telling_radius_takes_linear_time() -> None:
    """4,000 radii of two networks in a second or two; each against all would take a minute."""
    cells = [
        replace(cell, series=Series(method, None, 0), eps=i / 4000, attack="PGD" if i else "clean")
        for cell in over_seeds([measurement(correct=100)])
        for method in ("float", "DQ")
        for i in range(4001)
    ]
    start = time.process_time()
    assert table_eps(cells) in {cell.eps for cell in cells}
    assert time.process_time() - start < 2


def test_markdown_marks_best_and_second_and_both_texts_escape() -> None:
    hostile = replace(paper_table()[0], model=HOSTILE, data="a|b\nc\x1b[2J", run="other")
    lines = markdown_table(paper_table()).splitlines()
    assert "| vanilla | FGSM 8/255 | **39.3** 36–42 | 9.0 7–11 | 8.5 7–10 |" in lines[3]
    assert "<ins>30.2</ins> 27–33 | −9.1 | 39.3 |" in lines[3]
    assert len(lines) == 12
    assert lines[-1].startswith("<sub>1 seed, 1,000 images each. ")
    several = markdown_table([*paper_table(), hostile])
    assert "\\<script\\>" in several and "a\\|b\\\\nc" in several
    console = Console(width=300, record=True, file=io.StringIO())
    console.print(text_table([*paper_table(), hostile]))
    text = console.export_text()
    assert "*[red]" in text and "a|b\\nc\\x1b[2J" in text and "39.3 36–42" in text


def test_names_and_orders() -> None:
    assert [eps_text(e) for e in (0.1255, 8 / 255, 0.5 / 255)] == ["32/255", "8/255", "0.5/255"]
    assert signed(-0.0001) == "0.0"
    ordered = [
        "clean", "FGSM", "PGD", "PGD-50x10", "odd", "FGSM (unaware)", "PGD (unaware)",
        "PGD-50x10 (unaware)", "FGSM(B)", "PGD(B)",
    ]  # fmt: skip
    assert sorted({*ordered}, key=attack_order) == ordered
    kinds = [
        ("vanilla", 4), ("float", None), ("DQ", 4), ("vanilla + squeezing", 4),
        ("float + squeezing", None), ("DQ + squeezing", 1), ("vanilla + RFGSM", 4),
        ("DQ + squeezing + RFGSM", 4),
    ]  # fmt: skip
    series = [Series(method, bits, 0.1 * ("DQ" in method)) for method, bits in kinds]
    families = sorted({each.family for each in reversed(series)}, key=lambda family: family.order)
    assert families == list(dict.fromkeys(each.family for each in series))
    assert [each.short for each in series[1:4]] == [
        "float",
        "DQ 4-bit",
        "vanilla 4-bit + squeezing",
    ]
    rows = summary([network(method, bits) for method, bits in kinds])
    (row,) = [row for row in rows if row.family.method == "vanilla + squeezing"]
    assert {bits: cell.series.method for bits, cell in row.cells.items()} == {
        None: "float + squeezing", 4: "vanilla + squeezing"
    }  # fmt: skip


# --- the page -----------------------------------------------------------------------------


def test_page_is_whole_small_and_loads_nothing(runs: Path, drawn: None) -> None:
    page = page_of(runs)
    found = check(page)
    assert {"table", "svg", "image", "details", "figure"} <= set(found.tags)
    assert len(page) < 1_000_000
    assert not re.search("https?://", page.replace("http://www.w3.org/", ""))
    for text in (
        "accuracy over ε · 255: Random", 'id="group-1"', 'id="examples"', "float",
        'id="training"', 'id="settings"', "vanilla 4-bit", "DQ full precision (β = 0.05)",
    ):  # fmt: skip
        assert text in page
    assert page_of(runs) == page


def test_every_cell_is_listed_once_and_the_summary_has_one_radius(runs: Path) -> None:
    tables = check(page_of(runs)).tables
    (shown,), ((head, *listed),) = tables["group-1"], tables["board"]
    assert head == ["Network", "Bits", "Attack", "ε · 255", "Accuracy", "less float",
                    "Seeds × images"]  # fmt: skip
    expected = {
        (str(c.series), str(c.series.bits or "–"), c.attack, eps_number(c.eps)): (
            f"{100 * c.mean:.1f} ±{100 * c.n.spread:.1f}{'†' * c.n.masked}",
            f"{len(c.seeds)} × {c.n.images:,}",
        )
        for c in over_seeds(chosen(read_folder(runs)))
    }  # fmt: skip
    assert len(listed) == len(expected)
    assert {tuple(row[:4]): (row[4], row[6]) for row in listed} == expected
    assert {tuple(row[:2]) for row in shown[1:]} == {
        (str(row.family), row.images) for row in summary(read_folder(runs))
    }


def test_everything_in_the_files_is_escaped(tmp_path: Path, drawn: None) -> None:
    names = dict.fromkeys(("run", "method", "model", "data", "attack", "settings"), HOSTILE)
    evidence = {HOSTILE: {HOSTILE: HOSTILE}, "command": HOSTILE}
    run = tmp_path / "run"
    append(run / "results.jsonl", measurement(**names, eps=0.1, evidence=evidence))
    guess = {"prediction": 0, "confidence": 0.5}
    example = {"id": HOSTILE, "label": 0, "clean": guess, "adversarial": guess}
    strip = names | {"seed": 0, "eps": 0.1, "classes": [HOSTILE], "examples": [example]}
    files = {"config": {"model": {HOSTILE: HOSTILE}}, "examples": strip}
    for name, content in files.items():
        (run / f"{name}.json").write_text(json.dumps(content))
    (run / "log.jsonl").write_text(json.dumps(EPOCH | {HOSTILE: 2}) + "\n")
    page = build_report(tmp_path, tmp_path / "r.html", title=HOSTILE).read_text()
    check(page)
    assert "<script>alert" not in page and "<img" not in page


def test_only_png_pictures_reach_the_page(tmp_path: Path) -> None:
    write_run(tmp_path / "float-s0", "float", 0)
    path = tmp_path / "float-s0" / "examples.json"
    strip = json.loads(path.read_text())
    good = strip["examples"][0]["clean_png"]
    for bad in ("not base64!", "PHN2Zz48L3N2Zz4=", '"><script>', None, good + "A" * 200_000):
        strip["examples"][0]["adversarial_png"] = bad
        path.write_text(json.dumps(strip))
        page = page_of(tmp_path)
        assert check(page).tags.count("image") == 3 * len(strip["examples"]) - 2
        assert "no picture" in page


def test_missing_and_broken_files_leave_a_report(tmp_path: Path) -> None:
    plain = page_of(tmp_path, *two((30,), (20,)))
    assert 'id="examples"' not in plain and 'id="training"' not in plain
    (tmp_path / "DQ4-0" / "config.json").write_text("{cut")
    (tmp_path / "vanilla4-0" / "examples.json").write_text('{"examples": [1]}')
    log = '{"epoch": 1, "loss": NaN, "accuracy": 0.5}\n{"ep'
    (tmp_path / "vanilla4-0" / "log.jsonl").write_text(log)
    page = page_of(tmp_path)
    assert page.count("left out in part") == 2
    assert 'id="training"' in page and "PGD-10, watched" not in page


def test_the_monitor_of_adversarial_training_has_columns(tmp_path: Path) -> None:
    page_of(tmp_path, *two((30,), (20,)))
    watched = [{"monitor_fgsm": fgsm, "monitor_pgd": 0.0} for fgsm in (0.4, 0.78125)]
    (tmp_path / "DQ4-0" / "log.jsonl").write_text(json.dumps(EPOCH))
    log = "\n".join(json.dumps(EPOCH | epoch) for epoch in watched)
    (tmp_path / "vanilla4-0" / "log.jsonl").write_text(log)
    (table,) = check(page_of(tmp_path)).tables["training"]
    assert table[0][-3:] == ["PGD-10, watched", "FGSM, watched", "Time a run"]
    assert {row[0]: row[-3:-1] for row in table[1:]} == {
        "DQ 4-bit (β = 0.1)": ["–", "–"], "vanilla 4-bit": ["0.0%", "78.1%"]
    }  # fmt: skip


def test_folders_without_results_are_the_users_mistake(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no results"):
        build_report(tmp_path, tmp_path / "r.html")
    assert not (tmp_path / "r.html").exists()
    (tmp_path / "results.jsonl").write_text(json.dumps(vars(measurement()) | {"bits": "4"}) + "\n")
    with pytest.raises(UserError, match=r"line 1: bits must be .* found '4'"):
        build_report(tmp_path, tmp_path / "r.html")


@pytest.mark.parametrize("networks", [("float",), ("dq-4bit", "vanilla-4bit"), ("dq-full",)])
def test_any_selection_of_runs_makes_a_page(tmp_path: Path, networks: tuple[str, ...]) -> None:
    for seeds in (1, 2):
        assert page_of(write_runs(tmp_path / str(seeds), seeds=seeds, networks=networks))


def test_mixed_data_and_two_runs_of_one_seed(tmp_path: Path) -> None:
    other = measurement("l" * 200, data="cifar", fingerprint="ab", attack="FGSM", eps=0.03)
    page = page_of(tmp_path, measurement(), other, replace(other, run="b", fingerprint="c"))
    assert "<summary>wrn-10-1 on cifar</summary>" in page
    assert "those of two fingerprints must not be compared" in page
    assert "several runs of one seed" in page


def test_a_blind_attack_is_marked_everywhere(tmp_path: Path) -> None:
    tried = (("clean", 0.0), ("PGD", 8 / 255), ("PGD(B)", 8 / 255))
    sound = [network("float", None, attack=attack, eps=eps) for attack, eps in tried]
    masked = [replace(m, run="b", method="vanilla", bits=1, vanishing=0.5) for m in sound]
    assert "†" not in markdown_table(sound)
    # PGD's cell and the note; clean and black box are not blind
    assert markdown_table(sound + masked).count("†") == 2
    assert "masked, not robust" in page_of(tmp_path, *sound, *masked)


def test_curves_are_drawn_the_same_every_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = (("clean", 0.0, 95), ("FGSM", 8 / 255, 50), ("PGD", 8 / 255, 20))
    found = [
        network(method, None if method == "float" else 4, seed, attack=a, eps=e, correct=c)
        for method in ("float", "vanilla")
        for seed in (0, 1)
        for a, e, c in tried
    ]
    first = plot_curves(found, tmp_path / "a.png").read_bytes()
    assert first.startswith(b"\x89PNG")
    assert plot_curves(found, tmp_path / "b.png").read_bytes() == first
    assert "<svg" in plot_curves(found, tmp_path / "c.svg").read_text()
    assert plot_curves(found, tmp_path / "d.pdf").read_bytes().startswith(b"%PDF")
    with pytest.raises(UserError, match="ends in"):
        plot_curves(found, tmp_path / "a.txt")
    with pytest.raises(UserError, match="no attacks"):
        plot_curves(found[::3], tmp_path / "a.png")
    monkeypatch.setitem(sys.modules, "vl_convert", None)
    with pytest.raises(UserError, match="charts need vl-convert-python"):
        plot_curves(found, tmp_path / "e.png")
