import json
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

import defquant as dq
from conftest import refused
from defquant.cli.rows import print_measurements
from defquant.diagnose.masking import Sign, Verdict
from defquant.judging.verdict import Judgement
from defquant.records import (
    Measurement,
    Rows,
    Score,
    append,
    read_folder,
    read_jsonl,
    told_apart,
    wilson,
)
from defquant.report.names import Cell, over_seeds

LINE = Measurement(
    "r", "DQ", "wrn-10-1", 4, 0.05, 0, "digits", "f00", "FGSM", 8 / 255, "FGSM(eps=8/255)", 5, 10
)
measurement = partial(replace, LINE)


def aggregate(found: list[Measurement]) -> list[Cell]:
    return over_seeds(told_apart(found))


def known(m: Measurement, **hashes: str) -> Measurement:
    return replace(m, evidence=hashes)


@given(st.integers(1, 10_000), st.data())
def test_interval_is_wilsons_as_scipy_has_it(total: int, data: st.DataObject) -> None:
    correct = data.draw(st.integers(0, total))
    low, high = Score(correct, total).interval
    peer = binomtest(correct, total).proportion_ci(0.95, "wilson")
    assert (low, high) == pytest.approx((peer.low, peer.high), abs=1e-9)
    assert low <= correct / total <= high


@pytest.mark.parametrize("counts", [(1, 0), (2, 1), (-1, 3)])
def test_a_score_must_make_sense(counts: tuple[int, int]) -> None:
    refused(lambda: Score(*counts), "0 <= correct <= total")


def test_lines_are_read_back_and_later_ones_replace(tmp_path: Path) -> None:
    path = tmp_path / "a" / "results.jsonl"
    path.parent.mkdir()
    (tmp_path / "b").mkdir()
    append(path, measurement(correct=5))
    append(path, measurement(correct=6))
    append(tmp_path / "b" / "results.jsonl", measurement(run="b", seed=1, correct=7))
    record = json.loads(path.read_text().splitlines()[0])
    assert record["low"] < record["accuracy"] == 0.5 < record["high"]
    assert [m.correct for m in read_folder(tmp_path)] == [6, 7]
    (cell,) = aggregate(read_folder(tmp_path))
    assert (cell.seeds, cell.n.low, cell.n.high) == ((0, 1), *wilson(cell.mean, 10))  # once each
    assert cell.mean == pytest.approx(0.65)
    assert cell.n.spread == pytest.approx(0.0707, abs=1e-4)


def test_results_are_plain_rows(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    w = known(measurement(bits=None), config_sha256="ab", weights_sha256="1")
    append(path, w)
    append(path, replace(known(w, config_sha256="cd", weights_sha256="2"), seed=1, vanishing=0.5))
    found = dq.results(str(tmp_path))
    kinds = {str, int, float, bool, type(None)}
    assert {type(value) for row in found for value in row.values()} <= kinds
    assert [row["method"] for row in found] == ["DQ [ab]", "DQ [cd]"]  # one name, two networks
    low, high = w.score.interval
    wanted = {"bits": None, "total": 10, "accuracy": 0.5, "low": low, "high": high, "masked": False}
    assert wanted.items() <= found[0].items() and found[1]["masked"] is True


RESULTS = Path(__file__).parents[1] / "results"
JUDGED = json.loads((RESULTS / "judged" / "judgement.json").read_text())
SIGN = Sign("<b>noise & all", Score(3, 9), "WARN", "more\u202e\n", "x")


@pytest.mark.parametrize(
    ("shown", "lines", "said"),
    [
        (Score(1, 2), 2, "50.0%"),
        (Rows([{"run": "<b>", "eps": 8 / 255}, {"bits": None}]), 3, "0.03137"),
        (Rows({"run": str(i)} for i in range(1200)), 101, "1,100 more rows"),
        (Verdict(8 / 255, Score(9, 10), Score(7, 10), True, (SIGN,)), 2, "WARN at eps 8/255"),
        (Judgement("REAL", "NOT WORSE", JUDGED), 1 + len(JUDGED["rows"]), "NOT WORSE"),
    ],
)
def test_a_notebook_shows_a_small_escaped_table(
    shown: Score | Rows | Verdict | Judgement, lines: int, said: str
) -> None:
    table = ElementTree.fromstring(shown._repr_html_())
    text = "".join(table.itertext())
    assert (table.tag, len(table.findall("tr"))) == ("table", lines)
    assert said in text and not table.findall(".//b") and text.isprintable()


def test_a_cut_last_line_is_left_out_but_a_broken_one_is_named(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    append(path, measurement())
    whole = path.read_text()
    path.write_text(whole + whole[:40])
    assert len(read_jsonl(path)) == 1
    for broken in ("[]", "{}", whole[:40], '{"run": 1}', whole.strip().replace("10", '"x"')):
        path.write_text(broken + "\n" + whole)
        refused(lambda: read_jsonl(path), "line 1")


def test_lines_of_other_weights_or_code_stand_beside_each_other(tmp_path: Path) -> None:
    path, old = tmp_path / "results.jsonl", measurement(correct=1)
    one, other = ({"weights_sha256": w, "file_sha256": "f"} for w in ("a1" * 32, "b2" * 32))
    edited = one | {"file_sha256": "g"}
    for correct, hashes in enumerate((one, other, edited, one), 2):
        append(path, known(measurement(correct=correct), **hashes))
    found = read_folder(tmp_path)
    assert [m.correct for m in found] == [3, 4, 5]  # the rerun of `one` replaced its line
    cells = aggregate(found)
    assert [(cell.mean, len(cell.seeds)) for cell in cells] == [(0.3, 1), (0.4, 1), (0.5, 1)]
    names = [cell.series.method for cell in cells]
    assert names == ["DQ [b2b2b2 f]", "DQ [a1a1a1 g]", "DQ [a1a1a1 f]"]
    assert told_apart(told_apart(found)) == told_apart(found)
    path.write_text("")
    for m in (old, known(measurement(correct=2), **one)):  # a line without hashes, then its rerun
        append(path, m)
    assert [m.correct for m in read_folder(tmp_path)] == [2]


def test_seeds_are_seeds_where_configuration_and_data_agree() -> None:
    runs = [measurement(run=f"r{seed}", seed=seed) for seed in range(3)]
    make = {"config_sha256": "c0ffee00", "train_fingerprint": "t"}
    long = [known(m, **make, weights_sha256=m.run) for m in runs]
    assert [cell.seeds for cell in aggregate([*long, *runs])] == [(0, 0, 1, 1, 2, 2)]
    other = known(runs[2], **make | {"train_fingerprint": "u"})
    short = known(runs[1], **make | {"config_sha256": "badbad00"})
    cells = {c.series.method: c.seeds for c in aggregate([*long[:2], other])}
    assert cells == {"DQ [c0ffee t]": (0, 1), "DQ [c0ffee u]": (2,)}
    assert [c.series.method for c in aggregate([long[0], short])] == ["DQ [c0ffee]", "DQ [badbad]"]


def test_two_data_sets_of_one_name_are_told_apart_but_a_part_of_one_is_not() -> None:
    whole, part, other = (
        measurement(attack=attack, fingerprint=cut, evidence={"data_fingerprint": whole * 4})
        for attack, cut, whole in (("FGSM", "d1", "d1"), ("PGD", "cut", "d1"), ("FGSM", "e2", "e2"))
    )
    assert [c.data for c in aggregate([whole, part])] == ["digits"] * 2
    found = [c.data for c in aggregate([whole, part, other])]
    assert found == ["digits [d1d1d1]"] * 2 + ["digits [e2e2e2]"]


def test_a_line_that_left_out_the_one_step_is_the_same_measurement() -> None:
    for attack in (dq.PGD(1 / 255), dq.BIM(1 / 255), dq.PGD(1 / 255, restarts=3)):
        now = repr(attack)
        assert ", steps=1, alpha=1/255" in now
        for old in (now.replace(", steps=1, alpha=1/255", ""), now):
            for form in ("{}", "Transfer(attack={}, source='vgg')", "{} as 8-bit images"):
                a, b = (measurement(settings=form.format(s)) for s in (old, now))
                assert b.replaces(a)
    assert repr(dq.FGSM(1 / 255)) == "FGSM(eps=1/255)"
    assert not measurement(settings="PGD(eps=2/255)").replaces(LINE)
    assert not measurement(fingerprint="f01").replaces(LINE)


@pytest.mark.parametrize(
    "attack",
    ["clean", "Random", "Random-20", "Square", "Square-200", "Square (8-bit)", "PGD(B)",
     "FGSM (unaware)", "Worst(Random-20, Square)"],
)  # fmt: skip
def test_only_what_follows_the_gradient_is_masked(attack: str) -> None:
    assert not measurement(attack=attack, vanishing=0.5).masked
    for name in ("FGSM", "PGD-20", "Adaptive", "FAB", "PGD (8-bit)", "Worst(PGD, Square)", "mine"):
        m = measurement(attack=name, vanishing=0.5)
        assert m.masked and aggregate([m])[0].n.masked
        assert not any(replace(m, vanishing=least).masked for least in (None, 0.0, 0.01))


def test_attack_marks_a_masked_row(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [measurement(attack=a, vanishing=0.5) for a in ("clean", "Square", "PGD")]
    print_measurements(rows, as_json=False)
    clean, square, pgd = capsys.readouterr().out.splitlines()
    assert "masked" not in clean + square
    assert pgd.endswith("† masked: 50.0% of the right images have no gradient")


def test_an_empty_folder_is_one_line(tmp_path: Path) -> None:
    refused(lambda: read_folder(tmp_path), "run `defquant attack`")
    refused(lambda: read_folder(tmp_path / "none"), "no folder")
