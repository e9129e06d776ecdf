"""The first screen says what the numbers say; and the page in a real browser."""

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from scipy import stats

from defquant.paper.section import Number
from defquant.paper.verdict import accuracy, decide, interval
from defquant.records import Measurement, read_folder, told_apart
from defquant.report import build_report, judged_page, plot_ladder
from defquant.report.answer import Place, gap, of_places, rows_of
from defquant.report.measured import chosen, table_eps
from defquant.report.names import over_seeds
from defquant.report.plot import looks
from pages import HOSTILE, check
from synthetic_runs import append, measurement, write_cards, write_runs

CHROMIUM = Path("/usr/bin/chromium")
RESULTS = Path(__file__).parents[1] / "results"
EPS = 24 / 255


def networks(right: dict[tuple[str, int | None], list[int]], attack: str) -> list[Measurement]:
    """So many of 450 images right, by network and seed; clean, all are."""
    return [
        measurement(
            f"{method}{bits}-{seed}", method=method, bits=bits, beta=0.05 * (method == "DQ"),
            seed=seed, attack=name, eps=EPS * (name != "clean"), correct=k, total=450,
        )
        for (method, bits), own in right.items()
        for seed, count in enumerate(own)
        for name, k in (("clean", 450), ("FGSM", count + 50), (attack, count))
    ]  # fmt: skip


def place_of(found: list[Measurement]) -> Place:
    return of_places(over_seeds(found), table_eps)[0]


FLOAT, DQ = [180, 200, 170, 190], [150, 140, 160, 155]


def test_the_verdict_is_the_paired_difference_under_the_strongest_attack() -> None:
    found = networks({("float", None): FLOAT, ("DQ", 4): DQ}, "Adaptive-20")
    place = place_of(found)
    assert (str(place.reference), str(place.candidate)) == ("float", "DQ 4-bit (β = 0.05)")
    answer = place.answer({}, None)
    ends = stats.ttest_rel(DQ, FLOAT).confidence_interval()
    values = (sum(DQ) - sum(FLOAT)) / 4, *ends
    mean, low, high = (f"{100 * value / 450:+.1f}".replace("-", "−") for value in values)
    said = f"{mean} points [{low}, {high}] under Adaptive-20 24/255, the strongest attack here: "
    assert answer.sentence.startswith(said)
    assert (answer.question, answer.word) == ("Is DQ 4-bit (β = 0.05) safer than float?", "No")
    assert "33.6 % of the images stay right, 41.1 % with float" in answer.sentence
    assert "over training on these test images, paired over 4 seeds" in answer.sentence
    assert [mark.word for mark in answer.marks] == ["fair", "not asked", "not exported"]
    swapped = networks({("float", None): DQ, ("DQ", 4): FLOAT}, "PGD-20")
    assert place_of(swapped).answer({}, None).word == "Yes"
    level = networks({("float", None): FLOAT, ("DQ", 4): FLOAT[::-1]}, "PGD-20")
    assert place_of(level).answer({}, None).word == "Not shown"


def test_few_seeds_are_not_paired_and_one_decides_little() -> None:
    two = place_of(networks({("float", None): FLOAT[:2], ("DQ", 4): DQ[:2]}, "PGD-20"))
    a, b = (two.networks[s][two.at] for s in (two.candidate or two.reference, two.reference))
    found, how = gap(a, b, (a, b))
    assert found.trained and how == "over test images and training, not paired"
    assert found.low < found.effect - 0.08  # wider than over images alone
    one = place_of(networks({("float", None): [180], ("DQ", 4): [150]}, "PGD-20"))
    a, b = (one.networks[s][one.at] for s in (one.candidate or one.reference, one.reference))
    terms = [(1, accuracy(150 / 450, 450, 1, None)), (-1, accuracy(180 / 450, 450, 1, None))]
    assert gap(a, b)[0] == interval(terms)
    assert decide(gap(a, b)[0]) == "not decided"
    assert gap(a, b)[1].endswith("only more than 20 points decide")
    assert "other seeds" in one.answer({}, None).missing


def test_seeds_on_other_images_are_not_paired_and_the_same_images_count_once() -> None:
    found = networks({("float", None): FLOAT, ("DQ", 4): DQ}, "PGD-20")
    a, b = (place_of(found).networks[s]["PGD-20", EPS] for s in place_of(found).pair)
    other = replace(b, found=tuple(replace(m, fingerprint="other") for m in b.found))
    fewer = replace(b, found=tuple(replace(m, correct=m.correct // 2, total=225) for m in b.found))
    assert "paired over" in gap(a, b, (a, b))[1]
    for unlike in (other, fewer):
        assert "not paired" in gap(a, unlike, (a, unlike))[1]
    alike = replace(b, found=(replace(b.found[0], seed=0), replace(b.found[0], seed=1)))
    assert (alike.n.low, alike.n.high) == pytest.approx(b.found[0].score.interval)
    mixed = replace(b, found=(b.found[0], replace(b.found[1], correct=9, total=10)))
    assert mixed.n.images == 10  # of the seed with the fewest


def test_equal_differences_are_no_certainty_and_the_order_of_lines_is_none() -> None:
    found = networks({("float", None): [180, 200, 170], ("DQ", 4): [181, 201, 171]}, "PGD-20")
    there, back = (of_places(over_seeds(chosen(own)), table_eps) for own in (found, found[::-1]))
    assert there[0].answer({}, None).word == "Not shown"
    image = [replace(m, correct=m.correct % 2, total=1) for m in found if m.attack == "PGD-20"]
    a, b = (place_of(image).networks[s]["PGD-20", EPS] for s in place_of(image).pair)
    assert gap(b, a)[0].high == 1.0
    assert rows_of(there) == rows_of(back)
    assert there[0].answer({}, None) == back[0].answer({}, None)


def test_of_several_betas_none_is_chosen_by_its_accuracy() -> None:
    betas = [
        measurement(f"d{beta}", method="DQ", bits=4, beta=beta, attack=a, eps=e, correct=c)
        for beta, right in ((0.01, 90), (0.03, 10), (0.1, 50))
        for a, e, c in (("clean", 0.0, 95), ("PGD", EPS, right))
    ]
    assert str(place_of([*betas, measurement()]).candidate) == "DQ 4-bit (β = 0.03)"
    assert (
        str(place_of(betas[-2:]).answer({}, None).question) == "How robust is DQ 4-bit (β = 0.1)?"
    )


@pytest.mark.parametrize(
    ("floats", "reference", "said"),
    [
        ([(60, 64), (15, 64)], 1, []),
        ([(15, 64), (60, 64)], 0, []),
        ([(60, 128), (60, 64)], 1, ["trained otherwise: epochs 60, not 15."]),
        ([(15, 32), (15, 128)], 0, ["the first is taken.", "otherwise: batch_size 32, not 64."]),
        ([(60, 64)], 0, ["float was trained otherwise: epochs 60, not 15."]),
    ],
)
def test_the_reference_shares_the_most_of_the_training(
    floats: list[tuple[int, int]], reference: int, said: list[str]
) -> None:
    """Of floats that differ in epochs and batch size; each row has its own reference."""

    def trained(method: str, bits: int | None, epochs: int, batch: int) -> list[Measurement]:
        train = {"epochs": epochs, "batch_size": batch}
        evidence = {"config_sha256": f"{batch:x}{epochs:x}aaaa", "train": train}
        found = networks({(method, bits): [200 + epochs]}, "PGD")
        return [replace(m, run=f"{m.run}-{epochs}-{batch}", evidence=evidence) for m in found]

    found = [m for own in floats for m in trained("float", None, *own)]
    found += trained("DQ", 4, 15, 64) + trained("vanilla", 4, 60, 64)
    place = place_of(told_apart(found))
    epochs, batch = floats[reference]
    cell = place.networks[place.reference]["PGD", EPS]
    assert cell.found[0].run == f"floatNone-0-{epochs}-{batch}"
    lines = [line for line in place.answer({}, None).beside if not line.startswith("Safer")]
    assert [line.endswith(end) for line, end in zip(lines, said, strict=True)] == [True] * len(said)
    (row,) = (r for r in rows_of([place]) if r.method == "vanilla" and r.bits and r.attack == "PGD")
    twin = 60 if (60, 64) in floats else epochs
    assert row.gap and row.gap.mean == pytest.approx((60 - twin) / 450)


def test_masked_gradients_and_what_ships_are_marks(tmp_path: Path) -> None:
    write_runs(tmp_path, seeds=1, networks=("float", "dq-4bit"))
    record = {"verdict": "OVERSTATED", "eps": 8 / 255, "images": 200, "kind": "x"}
    for name, verdict in (("float-s0", "PASS"), ("dq-4bit-s0", "OVERSTATED")):
        (tmp_path / name / "diagnosis.json").write_text(json.dumps(record | {"verdict": verdict}))
    write_cards(tmp_path)
    page = build_report(tmp_path, tmp_path / "p.html").read_text()
    check(page)
    for said in ("OVERSTATED of dq-4bit-s0 at 8/255, 200 images", "4 of 4 files answer as their"):
        assert said in page
    assert 'og:title" content="Is DQ 4-bit (β = 0.05) safer than float? ' in page
    (tmp_path / "float-s0" / "diagnosis.json").write_text('{"verdict": 1}')
    assert "left out in part" in build_report(tmp_path, tmp_path / "p.html").read_text()


def test_a_network_looks_the_same_everywhere() -> None:
    """Hue by method, mark by bits; DQ's and vanilla's bits share marks, and no two look alike."""
    names = [("float", "float")] + [
        (f"{method} {bits}-bit", method) for method in ("vanilla", "DQ") for bits in range(1, 9)
    ]
    found = looks(names)
    assert found == looks(names[::-1]) and len(set(found.values())) == len(names)
    by_kind = looks(zip("abc", ("DQ None-bit", "DQ 4-bit", "DQ 1-bit"), strict=True)).values()
    assert len({mark for _, mark in by_kind}) == 3  # a run of any name is known by its bits
    for bits in range(1, 9):
        assert found[f"vanilla {bits}-bit"][1] == found[f"DQ {bits}-bit"][1]
    assert found["float"][0] == "#777777" and found["DQ 8-bit"][0] == "#0072b2"
    assert found["vanilla 1-bit"][0] != found["vanilla 8-bit"][0]


def test_a_judgement_is_the_same_page() -> None:
    record = json.loads((RESULTS / "judged" / "judgement.json").read_text())
    page = judged_page(record)
    rows = check(page).tables["board"][0][1:]
    assert len(rows) == 9 and rows[0][4:6] == ["5.3 3–9", "−1.2 [−4.0, +0.5]"]
    assert "Real</strong>" in page and "NOT WORSE" in page
    record["model"]["name"] = record["data"] = record["why"] = HOSTILE
    assert "<script>alert" not in judged_page(record)


def test_stored_results_have_a_ladder(tmp_path: Path) -> None:
    measurements = read_folder(RESULTS / "small")
    place = of_places(over_seeds(chosen(measurements)), table_eps)[0]
    assert place.rungs == ["FGSM", "PGD-50x10", "Adaptive"] and place.at == ("Adaptive", place.eps)
    assert "Adaptive" in plot_ladder(measurements, tmp_path / "l.svg").read_text()
    answer = place.answer({}, None)
    assert answer.word == "No" and "5.8 % of the images stay right, 16.7 %" in answer.sentence
    assert all(isinstance(place.row(cell).n, Number) for cell in place.cells)


# --- in a browser ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api")
    if not CHROMIUM.exists():
        pytest.skip(f"no {CHROMIUM}")
    with api.sync_playwright() as play:
        yield play.chromium.launch(
            executable_path=str(CHROMIUM), args=["--no-sandbox", "--disable-dev-shm-usage"]
        )


@pytest.mark.slow
def test_the_leaderboard_sorts_filters_copies_and_keeps_its_state(
    browser: Any, tmp_path: Path
) -> None:
    path = build_report(write_runs(tmp_path, seeds=2), tmp_path / "p.html")
    page, wrong = browser.new_page(), list[str]()
    page.on("console", lambda message: wrong.append(message.text))
    page.goto(f"{path.as_uri()}#Bits=4&Attack=PGD&sort=-Accuracy")

    def shown(column: int) -> list[str]:
        row = "[...document.querySelectorAll('.board tbody tr')].filter(r => r.offsetParent)"
        return page.evaluate(f"{row}.map(r => r.cells[{column}].innerText.trim())")  # type: ignore

    def values() -> list[float]:
        return [float(text.split()[0]) for text in shown(4)]

    assert set(shown(1)) == {"4"} and set(shown(2)) == {"PGD"} and len(values()) == 8
    assert values() == sorted(values(), reverse=True)
    page.click("th:has-text('Accuracy') button")
    assert values() == sorted(values()) and "sort=Accuracy" in page.url
    page.select_option("select[aria-label=Bits]", "1")
    assert set(shown(1)) == {"1"} and "Bits=1" in page.url
    forms = {"CSV": ",".join(["vanilla 1-bit", "1"]), "Markdown": "| --- |", "LaTeX": r"\\"}
    for form, part in forms.items():
        page.click(f"text=Copy {form}")
        assert part in page.input_value("#copied")
    assert page.input_value("#copied").count("\n") == 1 + 1 + len(values())
    page.goto(path.as_uri() + "#")
    page.hover(".chart [class^=n]:has(title) >> nth=0", force=True)
    assert "opacity" in page.evaluate("document.head.lastElementChild.textContent")
    assert not wrong


@pytest.mark.slow
@pytest.mark.parametrize("script", [True, False])
def test_pages_fit_a_phone_print_short_and_have_no_findings(
    browser: Any, tmp_path: Path, script: bool
) -> None:
    """axe, of the smaller page in the dark, too; `results/small` prints on 12 pages at most."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright")
    large, small = RESULTS / "small" / "report.html", RESULTS / "judged" / "judgement.html"
    for path, theme in ((large, "light"), (small, "light"), (small, "dark")):
        assert path.stat().st_size < 2_000_000
        context = browser.new_context(
            bypass_csp=script, color_scheme=theme, java_script_enabled=script,
            viewport={"width": 390, "height": 844},
        )  # fmt: skip
        page = context.new_page()
        page.goto(path.as_uri())
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        if script:
            shut = "[...document.querySelectorAll('#all details')]"
            page.evaluate(f"{shut}.forEach((d) => (d.open = true))")
            found = axe.Axe().run(page)
            assert not found.response["violations"], found.generate_report()
        else:
            assert page.is_visible("table.board") and page.is_visible(".chart svg")
            printed = page.pdf(format="A4")
            assert len(re.findall(rb"/Type\s*/Page\b", printed)) <= 12
        context.close()


def test_a_page_asks_its_question_without_a_float_and_of_one_network(tmp_path: Path) -> None:
    for pair in combinations((("vanilla", 4), ("DQ", 4), ("DQ", None)), 2):
        found = networks(dict.fromkeys(pair, FLOAT), "PGD")
        answer = place_of(found).answer({}, None)
        assert answer.question.endswith("safer than vanilla 4-bit?" if pair[0][0] == "vanilla"
                                        and pair[1] != ("DQ", None) else "?")  # fmt: skip
        assert answer.figures
    append(tmp_path / "a" / "results.jsonl", measurement(method="your model (m.pt)"))
    assert "How robust is your model" in build_report(tmp_path, tmp_path / "p.html").read_text()
