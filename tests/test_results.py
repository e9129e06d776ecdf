import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from defquant.errors import UserError
from defquant.results import Measurement, Score, aggregate, append, read_folder, read_jsonl


def measurement(
    run: str = "r", seed: int = 0, correct: int = 5, attack: str = "FGSM"
) -> Measurement:
    return Measurement(
        run, "DQ", "wrn-10-1", 4, 0.05, seed, "digits", "f00", attack, 8 / 255, "FGSM(eps=8/255)",
        correct, 10,
    )  # fmt: skip


@given(st.integers(1, 10_000), st.data())
def test_interval_is_wilsons_as_scipy_has_it(total: int, data: st.DataObject) -> None:
    correct = data.draw(st.integers(0, total))
    low, high = Score(correct, total).interval
    peer = binomtest(correct, total).proportion_ci(0.95, "wilson")
    assert low == pytest.approx(peer.low, abs=1e-9)
    assert high == pytest.approx(peer.high, abs=1e-9)
    assert low <= correct / total <= high


def test_a_score_must_make_sense() -> None:
    for correct, total in ((1, 0), (2, 1), (-1, 3)):
        with pytest.raises(UserError):
            Score(correct, total)


def test_lines_are_read_back_and_later_ones_replace(tmp_path: Path) -> None:
    path = tmp_path / "a" / "results.jsonl"
    append(path, measurement(correct=5))
    append(path, measurement(correct=6))
    append(tmp_path / "b" / "results.jsonl", measurement("b", seed=1, correct=7))
    record = json.loads(path.read_text().splitlines()[0])
    assert record["accuracy"] == 0.5
    assert record["low"] < 0.5 < record["high"]
    assert [m.correct for m in read_folder(tmp_path)] == [6, 7]
    (cell,) = aggregate(read_folder(tmp_path))
    assert (cell.accuracies, cell.seeds, cell.pooled) == ((0.6, 0.7), (0, 1), Score(13, 20))
    assert cell.mean == pytest.approx(0.65)
    assert cell.spread == pytest.approx(0.0707, abs=1e-4)


def test_a_cut_last_line_is_left_out_but_a_broken_one_is_named(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    append(path, measurement())
    whole = path.read_text()
    path.write_text(whole + whole[:40])
    assert len(read_jsonl(path)) == 1
    for broken in ("[]", "{}", whole[:40], '{"run": 1}', whole.strip().replace("10", '"x"')):
        path.write_text(broken + "\n" + whole)
        with pytest.raises(UserError, match="line 1"):
            read_jsonl(path)


def test_an_empty_folder_is_one_line(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(UserError) as error:
            read_folder(folder)
        assert "\n" not in str(error.value)
