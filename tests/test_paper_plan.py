"""The order of work: what undecided claims need comes first, and how long it takes is learnt."""

import json
import math
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from conftest import refused
from defquant.files import claimed
from defquant.paper.ask import Ask, ask_all
from defquant.paper.figures import cells_of
from defquant.paper.grid import SCALES, Cell, Network, Results, keep, lock_of, read
from defquant.paper.plan import (
    SLOWER,
    UNKNOWN,
    Plan,
    Survey,
    gains,
    kind_of,
    needs,
    passes_by_model,
)
from defquant.paper.reproduce import merge, remove
from defquant.paper.verdict import Contrast, Evidence, Spread, stratum, versus
from synthetic_results import fake_measurement

SMALL = SCALES["small"].placed(None, None, "cpu")
TABLE = cells_of(["table1"], SMALL)


def world(cells: Iterable[Cell], gap: float = 0.1) -> Results:
    """Every bit is worth `gap`, a seed 0.02, and DQ nothing."""
    own = [(c, c.network.model.bits or 6, c.network.train.seed) for c in cells]
    share = {c: 0.3 + gap * bits + 0.02 * seed for c, bits, seed in own}
    return Results({c.key: fake_measurement(c, accuracy=s) for c, s in share.items()})


def contrast(results: Results) -> tuple[Contrast, Evidence, list[Cell]]:
    """Full precision minus 4 bits, of two seeds, FGSM at 8/255; trainings spread by 0.04."""
    trial = SMALL.trial("fgsm", 8 / 255)
    asks = [Ask({}, SMALL.by_seed(bits, 0.0), trial) for bits in (None, 4)]
    spreads = {stratum(asks[0].cells[0]): Spread(0.04, 3)}
    found = ask_all(asks, results)
    cells = [cell for ask in asks for cell in ask.cells]
    return versus("", [found[:1]], [found[1:]]), Evidence(results, spreads), cells


def test_a_gain_is_what_the_interval_loses() -> None:
    """V by hand: images p (1 - p) / n at the rounded-off p, trainings s^2 / k."""
    _, _, cells = contrast(Results())
    (full, full_1), (four, four_1) = cells[:2], cells[2:]
    able = frozenset(cell.key for cell in cells)
    pair, evidence, _ = contrast(Results())
    both = {cell.network.name: 2 * UNKNOWN for cell in (full, four)}
    shrinks = math.sqrt(2 * UNKNOWN) - math.sqrt(UNKNOWN)
    assert gains(pair, evidence, able) == pytest.approx(dict.fromkeys(both, shrinks))
    assert gains(pair, evidence, able - {four.key, four_1.key}) == {}  # cannot be measured here

    results = world([full, four, full_1])
    pair, evidence, _ = contrast(results)
    right = {c.key: results.scores[c.key].correct for c in (full, full_1, four)}
    images = results.scores[four.key].total
    both_full = (right[full.key] + right[full_1.key]) / 2
    shares = [(correct + 1) / (images + 2) for correct in (both_full, right[four.key])]
    whole = sum(p * (1 - p) for p in shares) / images + 0.04**2 / 2 + 0.04**2
    less = math.sqrt(whole) - math.sqrt(whole - 0.04**2 / 2)
    left = able - results.scores.keys()
    assert gains(pair, evidence, left) == pytest.approx({four_1.network.name: less})


def test_decided_claims_need_nothing_and_seed_0_of_all_comes_before_seed_1() -> None:
    need = needs(SMALL, Results(), TABLE)
    by_seed = {seed: {c.network for c in TABLE if c.network.train.seed == seed} for seed in (0, 1)}
    assert all(need.get(n.name, 0.0) > 0 for n in by_seed[0])
    assert not any(need.get(n.name, 0.0) for n in by_seed[1])
    last = [c for c in TABLE if c.network in by_seed[1] and c.network.model.bits == 5]
    last = [c for c in last if not c.network.train.beta]
    few, many = (
        needs(SMALL, world({*TABLE} - {*last}, gap), last)[last[0].network.name]
        for gap in (0.1, 0.0)  # bits make a difference, which decides, or none
    )
    assert 0 < few < many / 2


def logged(out: Path, network: Network, seconds: float, epochs: int | None = None) -> None:
    """The log of a training, of so many epochs or all."""
    folder = out / "networks" / network.name
    folder.mkdir(parents=True)
    count = network.train.epochs if epochs is None else epochs
    (folder / "log.jsonl").write_text(f"{json.dumps({'seconds': seconds})}\n" * count)


def test_time_is_learnt_from_what_is_alike(tmp_path: Path) -> None:
    """A network is told to take what its twin took, epoch by epoch and cell by cell."""
    first, second = SMALL.by_seed(4, 0.0)
    own = {n: [c for c in TABLE if c.network == n] for n in (first, second)}
    logged(tmp_path, first, 10.0)
    logged(tmp_path, second, 11.0, epochs=2)
    for i, cell in enumerate(own[first]):
        keep(tmp_path, cell, replace(fake_measurement(cell), seconds=float(1 + i)))
    survey = Survey([*own[first], *own[second]], tmp_path, {})
    rate = (5 * 10.0 + 2 * 11.0) / 7  # of both, an epoch
    measured = sum(range(1, 1 + len(own[first])))
    assert survey.left(first) == 0.0
    assert survey.left(second) == pytest.approx(3 * rate + measured)
    (line,) = survey.lines()
    assert line.startswith(second.name) and "epoch 2/5, 0/7 cells" in line
    assert "clean " in survey.scores(first)


def test_a_plan_fits_the_budget_and_tells_how_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock that stands until it is told; two at work, each network takes 300 s of one."""
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    seeds = [n for bits in (4, 5) for n in SMALL.by_seed(bits, 0.0)]
    cells = [c for c in TABLE if c.network in seeds]
    assert "an unknown time left" in Plan(SMALL, cells, tmp_path).tell("")[0]
    training, attacks = map(sum, zip(*passes_by_model(cells).values(), strict=True))
    pace = 4 * 300 / (training + attacks / SLOWER)
    plan = Plan(SMALL, cells, tmp_path, now + 340, {kind_of(seeds[0]): pace})
    plan.begin(2)
    assert plan.remaining == pytest.approx(600)
    now += 50  # imports; then an epoch, as long as was thought
    epoch = pace * training / 4 / 5
    logged(tmp_path, seeds[0], epoch, epochs=1)
    assert "0 of 28 cells" in plan.tell(seeds[0].name)[0]
    assert plan.remaining == pytest.approx((4 * 300 - epoch) / 2, rel=0.01)
    assert [n.name for n in plan.survey.at_work] == [seeds[0].name]
    assert plan.next([seeds[1].name, seeds[0].name]) == seeds[0].name  # the other does not fit
    now += 1800  # for one training more; the pace counts as if one network had been made as thought
    logged(tmp_path, seeds[1], epoch)
    plan.next([seeds[0].name])
    slow = (1800 + 300 / 2) / (5 * epoch + 300)
    assert plan.remaining == pytest.approx(plan.survey.all_left * slow, rel=0.01)
    soon, now = plan.remaining, now + 100
    assert plan.remaining == pytest.approx(soon - 100)


def test_copied_results_are_merged_once(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    there.mkdir()
    for cell in TABLE[:3]:
        keep(there, cell, fake_measurement(cell))
    probe = next(c for c in cells_of(["fig3"], SMALL) if c.kind == "layers")
    keep(there, probe, [{"layer": "x"}], {"seconds": 1.0})
    for _ in range(2):
        merge(here, [str(there)])
        assert read(here) == read(there)
        assert len((here / "results.jsonl").read_text().splitlines()) == 3
    (there / "probes.jsonl").write_text("no json\n")
    refused(lambda: merge(tmp_path / "other", [str(there)]), "probes.jsonl, line 1")
    assert not (tmp_path / "other").exists()
    refused(lambda: merge(here, [str(tmp_path)]), "--merge needs folders with results.jsonl")


@pytest.mark.parametrize("change", [{"data": "CIFAR-10"}, {"evidence": {"data_fingerprint": "b"}}])
def test_results_on_other_images_are_not_merged(tmp_path: Path, change: dict[str, Any]) -> None:
    for place, own in (("here", {"evidence": {"data_fingerprint": "a"}}), ("there", change)):
        (tmp_path / place).mkdir()
        found = fake_measurement(TABLE[place == "there"])
        keep(tmp_path / place, TABLE[place == "there"], replace(found, **own))
    refused(lambda: merge(tmp_path / "here", [str(tmp_path / "there")]), "has results on CIFAR-10")
    assert len(read(tmp_path / "here").scores) == 1


def test_weights_stay_where_they_are_named_or_needed(tmp_path: Path) -> None:
    cells = [c for c in cells_of(["fig5"], SMALL) if c.network.model.bits in (4, None)]
    networks = {c.network for c in cells} | {SMALL.substitute()}
    for network in networks:
        (tmp_path / "networks" / network.name).mkdir(parents=True)
    white, black = ([c for c in cells if bool(c.substitute) == box] for box in (False, True))
    for done, stays in ((white, len(networks)), (black[1:], 2 + 2), (black[:1], 2)):
        for cell in done:
            keep(tmp_path, cell, fake_measurement(cell))
        remove(cells, tmp_path, ["*_4bit_s*"])
        assert len(list((tmp_path / "networks").iterdir())) == stays


def test_weights_stay_while_another_call_is_at_them(tmp_path: Path) -> None:
    cell = cells_of(["fig1"], SMALL)[0]
    run = tmp_path / "networks" / cell.network.name
    run.mkdir(parents=True)
    keep(tmp_path, cell, fake_measurement(cell))
    with claimed(lock_of(tmp_path, cell.network), wait=False):
        remove([cell], tmp_path, [])
        assert run.is_dir()
    remove([cell], tmp_path, [])
    assert not run.is_dir()
