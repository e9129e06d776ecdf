"""Verdicts on the paper's claims, and the report of an experiment's folder."""

import io
import json
import re
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from rich.console import Console

from conftest import undraw
from defquant.errors import UserError
from defquant.paper.figures import EXPERIMENTS, cells_of
from defquant.paper.grid import SCALES, by_network
from defquant.paper.section import Reading, Section, Verdict
from defquant.records import read_folder, record
from defquant.report import build_report, claims_markdown, markdown_table, print_claims
from defquant.report.page import tally
from pages import HOSTILE, check, page_of
from synthetic_results import fake_results
from synthetic_runs import append, measurement
from test_report import EPOCH

pytestmark = pytest.mark.usefixtures("undrawn")

FIRST = Reading("FGSM 8/255", 0.0834, 0.0612, 0.1041, "holds", "best bits minus full, 2 seeds")
STRONG = Reading("PGD-50x10 2/255", -0.0121, -0.0333, 0.0091, "not decided", "the same")
AGAINST = Reading("clean", -0.5123, -0.6, -0.4, "does not hold", "")
MISSING = Reading("FGSM(B) 8/255", None, None, None, "not decided", "no black box yet")
PGD = measurement(attack="PGD", eps=8 / 255)
CLAIMS = (
    Verdict("C1", "abstract", "DQ is more robust.", "+1.4 points", (FIRST, STRONG), "It errs.",
            "run it"),
    Verdict("C2", "section 5", "All is well.", "", (AGAINST, MISSING), "", ""),
    Verdict("C3", "section 6", "Not looked at.", "none", (), "", ""),
)  # fmt: skip
SHOWN = (
    "DQ is more robust.", "abstract", "+1.4 points", "FGSM 8/255", "+8.3", "[+6.1, +10.4]",
    "holds", "PGD-50x10 2/255", "−1.2", "[−3.3, +0.9]", "not decided", "✓", "✗", "?", "−51.2",
    "does not hold", "It errs.", "C3", "–",
)  # fmt: skip


def printed(*verdicts: Verdict, width: int = 160) -> str:
    console = Console(width=width, file=io.StringIO(), record=True)
    print_claims(verdicts, console)
    return console.export_text()


def test_claims_show_every_reading_everywhere(tmp_path: Path) -> None:
    page, text = page_of(tmp_path, PGD, *CLAIMS), claims_markdown(CLAIMS)
    assert "\\\\" not in text  # nothing is escaped twice
    text = text.replace("\\", "")
    for where in (page, text, printed(*CLAIMS)):
        assert not [found for found in SHOWN if found not in where]
    for found in ("best bits minus full, 2 seeds", "no black box yet", "run it"):
        assert found in page and found in text
    assert "| C1 DQ is more robust. The paper: +1.4 points | FGSM 8/255 | ✓ holds |" in text
    assert '<section id="claims">' in page


def test_claims_are_counted() -> None:
    assert tally(CLAIMS) == [
        ("✓", "holds", ["C1"], 1), ("✗", "does not hold", ["C2"], 1),
        ("?", "not decided", ["C3"], 2),
    ]  # fmt: skip
    assert claims_markdown(CLAIMS).startswith(
        "Of 3 claims under the paper's own attack: 1 ✓ holds, 1 ✗ does not hold, 1 ? not decided. "
        "Of 4 readings under all attacks: 1 ✓ holds, 1 ✗ does not hold, 2 ? not decided."
    )


def test_claims_are_escaped(tmp_path: Path, drawn: None) -> None:
    bad = Reading(HOSTILE, 0.1, None, None, "holds", HOSTILE)
    hostile = Verdict(HOSTILE, HOSTILE, HOSTILE, HOSTILE, (bad, bad), HOSTILE, HOSTILE)
    page = page_of(tmp_path, PGD, hostile)
    assert "<script>alert" not in page and "<img" not in page
    text = re.sub("`[^`]*`|</?sub>", "", claims_markdown((hostile,)))
    assert not re.findall(r"(?<!\\)<", text)
    assert "[red]" in printed(hostile, width=400)


def test_titles_and_sections_without_scores(tmp_path: Path) -> None:
    """Figures 3 and 7 measure no accuracy."""
    out, section = tmp_path / "page.html", Section("x", "X", ("Seen.",))
    (tmp_path / "probes.jsonl").write_text('{"cell": "x", "values": 1}\n')
    page = build_report(tmp_path, out, sections=(section,)).read_text()
    check(page)
    assert "<h1>Defensive Quantization, measured again</h1>" in page and "Seen." in page
    assert 'id="board"' not in page and 'id="claims"' not in page
    with pytest.raises(UserError, match="no results"):
        build_report(tmp_path, out)
    assert "<h1>Mine</h1>" in build_report(tmp_path, out, "Mine", verdicts=CLAIMS).read_text()
    append(tmp_path / "run" / "results.jsonl", measurement())
    assert "<title>Accuracy under attack" in build_report(tmp_path, out).read_text()
    (tmp_path / "results.jsonl").write_text("broken\n")
    with pytest.raises(UserError, match="line 1 is not JSON"):
        build_report(tmp_path, out, verdicts=CLAIMS)


@pytest.fixture(scope="module")
def experiment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that all experiments of a preset leave, the numbers made up."""
    out = tmp_path_factory.mktemp("experiment")
    cells = cells_of(EXPERIMENTS, SCALES["small"])
    results = fake_results(cells)
    held_out = {cell.key: ", validation" * (cell.split == "validation") for cell in cells}
    scores = [replace(m, data=m.data + held_out[m.cell]) for m in results.scores.values()]
    lines = (json.dumps(record(m)) + "\n" for m in scores)
    (out / "results.jsonl").write_text("".join(lines))
    for network in by_network(cells):
        place = out / "networks" / network.name
        place.mkdir(parents=True)
        (place / "config.json").write_text(json.dumps(asdict(network)))
        epochs = (json.dumps(EPOCH | {"epoch": i, "seconds": 9.0}) + "\n" for i in range(1, 31))
        (place / "log.jsonl").write_text("".join(epochs))
    return out


@pytest.fixture(scope="module")
def whole(experiment: Path) -> str:
    with pytest.MonkeyPatch.context() as patch:
        undraw(patch)
        return build_report(experiment, experiment / "page.html").read_text(encoding="utf-8")


def test_a_large_experiment_makes_a_page_that_is_small(experiment: Path, whole: str) -> None:
    assert len(whole.encode()) < 1_500_000


def test_trainings_of_an_experiment_find_their_measurements(whole: str) -> None:
    (table,) = check(whole).tables["training"]
    names = [row[0] for row in table]
    assert "DQ 4-bit (β = 0.1), wrn-10-1 on CIFAR-10 (JPEG)" in names
    assert not [name for name in names if "networks/" in name or ", validation" in name]


def test_a_run_of_the_same_name_elsewhere_is_no_network_of_the_experiment(tmp_path: Path) -> None:
    append(tmp_path / "results.jsonl", measurement("a", cell="0f", method="vanilla", bits=4))
    for place in ("networks/a", "other/a"):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "log.jsonl").write_text(json.dumps(EPOCH) + "\n")
    page = build_report(tmp_path, tmp_path / "page.html").read_text()
    (table,) = check(page).tables["training"]
    assert [row[0] for row in table[1:]] == ["vanilla 4-bit", "other/a"]


def test_validation_images_come_last_and_never_lead(experiment: Path, whole: str) -> None:
    measurements = read_folder(experiment)
    rows = [line for line in markdown_table(measurements).splitlines() if line.startswith("| ")][1:]
    held_out = [", validation" in row for row in rows]
    assert any(held_out)
    assert held_out == sorted(held_out)
    names = re.findall(r'<details id="group-.*?<summary>(.*?)</summary>', whole)
    assert [", validation" in name for name in names] == [False] * (len(names) - 1) + [True]
    assert ", validation</title>" not in whole
    alone = [m for m in measurements if m.data.endswith(", validation")]
    assert "PGD-20" in markdown_table(alone)  # and still there where nothing else is
