"""Verdicts on the paper's claims: their intervals cover, their rules hold, and they can turn."""

import statistics
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
from scipy import stats

from defquant.paper.ask import NUMBERS, Ask, ask_all
from defquant.paper.claims import CLAIMS, verdicts
from defquant.paper.figures import EXPERIMENTS, cells_of
from defquant.paper.grid import SCALES, Cell, Results, Trial
from defquant.paper.section import Number, Reading, Verdict
from defquant.paper.verdict import (
    ALONE,
    Evidence,
    Interval,
    Sample,
    Spread,
    accuracy,
    answer,
    counted,
    decide,
    evidence_of,
    interval,
    pooled,
    stratum,
    trend,
    versus,
)  # fmt: skip
from synthetic_results import fake_measurement

Rule = Callable[[Cell], float | None]

SMALL = replace(
    SCALES["small"].placed(None, "svhn", "cpu"),
    table1_betas=(0.01, 0.03, 0.1),
    betas=(0.003, 0.01, 0.03, 0.1, 0.3),
    beta=0.1,
    few=None,
)
PAPER = replace(SCALES["paper"].placed(None, "svhn", "cpu"), seeds=(0, 1))


# --- intervals -------------------------------------------------------------------------------


def test_trend_is_last_minus_first_of_the_fitted_line() -> None:
    values = [3.0, 1.0, 4.0, 1.0, 5.0]
    slope = np.polyfit(range(5), values, 1)[0]
    assert sum(w * v for w, v in zip(trend(5), values, strict=True)) == pytest.approx(4 * slope)
    assert trend(2) == (-1.0, 1.0)


def spread_of(*groups: list[float]) -> Spread | None:
    """Pooled over seeds."""
    sds = [(len(g), statistics.stdev(g) if len(g) > 1 else 0.0) for g in groups]
    return pooled(Number(0.5, spread=sd, seeds=count) for count, sd in sds)


def test_pooled_spread() -> None:
    found = spread_of([0.1, 0.3], [0.5], [0.2, 0.2, 0.5])
    assert found == pytest.approx(((0.02 + 0.06) ** 0.5 / 3**0.5, 3))
    assert spread_of([0.1], []) is None


def test_zero_of_n_is_no_certainty() -> None:
    assert accuracy(0.0, 100, 1, None).variance > 0
    found = interval([(1.0, accuracy(0.5, 10_000, 1, None))])
    assert found.high - 0.5 == pytest.approx(1.96 * 0.005, rel=1e-3)


@pytest.mark.parametrize("equal", [True, False])
def test_without_images_it_is_students_or_welchs_interval(equal: bool) -> None:
    a, b = [0.31, 0.35, 0.30, 0.37][: 4 - equal], [0.25, 0.11, 0.29]
    groups = ([a, b], [a, b]) if equal else ([a], [b])
    pairs = zip((1.0, -1.0), (a, b), groups, strict=True)
    found = interval(
        [(w, Sample(statistics.fmean(x), 0.0, len(x), spread_of(*of))) for w, x, of in pairs]
    )
    oracle = stats.ttest_ind(a, b, equal_var=equal).confidence_interval(0.95)
    assert [found.low, found.high] == pytest.approx([oracle.low, oracle.high])


def test_a_count_has_an_exact_interval() -> None:
    found = counted("", "", [True] * 3 + [False] * 5, 0.25)
    oracle = stats.binomtest(3, 8).proportion_ci(0.95)
    assert (found.low, found.high) == pytest.approx((oracle.low - 0.25, oracle.high - 0.25))
    assert counted("", "", [True] * 20, 0.5).verdict == "holds"


N, NETWORKS, SEEDS = 400, 8, 2


def simulated(generator: np.random.Generator, sd: float, shared: float) -> list[list[float]]:
    """Accuracies of networks that are equal but for the chance of training, on the same images.

    An image is right where sqrt(shared) * its ease + noise + the training's quality > 0, so that
    all are right on half of the images on average, whatever the chance in training.
    """
    ease = generator.standard_normal(N)
    quality = generator.normal(0, sd, (NETWORKS, SEEDS, 1))
    noise = generator.standard_normal((NETWORKS, SEEDS, N))
    right = shared**0.5 * ease + (1 - shared) ** 0.5 * noise + quality > 0
    return [[float(share) for share in row] for row in right.mean(2)]


def covered(shares: list[list[float]], weights: dict[int, float], comparisons: int = 1) -> bool:
    spread = spread_of(*shares)
    means = {i: statistics.fmean(shares[i]) for i in weights}
    terms = [(w, accuracy(means[i], N, len(shares[i]), spread)) for i, w in weights.items()]
    found = interval(terms, comparisons)
    return found.low <= 0 <= found.high


@pytest.mark.parametrize(
    "weights",
    [{0: 1, 1: -1}, {0: 0.25, 1: 0.25, 2: 0.25, 3: 0.25, 4: -1}, {0: 1, 1: -1, 2: -1, 3: 1}],
)
@pytest.mark.parametrize(("sd", "shared"), [(0.0, 0.0), (0.1, 0.0), (0.1, 0.6), (0.3, 0.6)])
def test_coverage(weights: dict[int, float], sd: float, shared: float) -> None:
    generator = np.random.default_rng(7)
    hits = sum(covered(simulated(generator, sd, shared), weights) for _ in range(500))
    assert hits / 500 > 0.93


def test_coverage_is_not_bought_by_width() -> None:
    """Where training is all the chance there is, 95 of 100 intervals cover, not all."""
    generator, hits = np.random.default_rng(3), 0
    for _ in range(1000):
        shares = generator.normal(0.5, 0.05, (NETWORKS, SEEDS)).tolist()
        spread = spread_of(*shares)
        a, b = (Sample(statistics.fmean(s), 1e-9, 2, spread) for s in shares[:2])
        found = interval([(1.0, a), (-1.0, b)])
        hits += found.low <= 0 <= found.high
    assert 0.93 < hits / 1000 < 0.97


def test_simultaneous_coverage() -> None:
    """All of seven intervals against one reference, at the same time."""
    generator, alone, together = np.random.default_rng(5), 0, 0
    contrasts = [{i: 1.0, 7: -1.0} for i in range(7)]
    for _ in range(300):
        shares = simulated(generator, 0.2, 0.0)
        alone += all(covered(shares, c) for c in contrasts)
        together += all(covered(shares, c, comparisons=7) for c in contrasts)
    assert together / 300 > 0.93 > alone / 300


def test_more_seeds_do_not_replace_images() -> None:
    """Networks that are right on the very same images: seeds say nothing of other images."""
    generator, hits = np.random.default_rng(11), 0
    for _ in range(500):
        shares = (generator.random((2, N)) < 0.5).mean(1)
        hits += covered([[float(share)] * 4 for share in shares], {0: 1, 1: -1})
    assert hits / 500 > 0.93


@pytest.mark.parametrize(
    ("low", "high", "margin", "trained", "verdict"),
    [
        (0.01, 0.03, 0.0, True, "holds"),
        (-0.01, 0.03, 0.0, True, "not decided"),
        (-0.03, -0.01, 0.0, True, "does not hold"),
        (-0.005, 0.03, 0.01, True, "holds"),
        (-0.015, 0.0, 0.01, True, "not decided"),
        (-0.03, -0.015, 0.01, True, "does not hold"),
        (0.06, 0.3, 0.0, False, "not decided"),
        (-0.3, -0.06, 0.0, False, "not decided"),
        (0.01, 0.5, 0.0, False, "holds"),
        (-0.5, -0.01, 0.0, False, "does not hold"),
    ],
)
def test_decide(low: float, high: float, margin: float, trained: bool, verdict: str) -> None:
    assert decide(Interval((low + high) / 2, low, high, trained), margin) == verdict


def test_equal_single_trainings_are_seldom_told_apart() -> None:
    """Of trainings with a standard deviation of 7 points, as on the demo's digits."""
    assert 2 * stats.norm.sf(ALONE, scale=0.07 * 2**0.5) < 0.05


# --- rules -----------------------------------------------------------------------------------


def made(rule: Rule, asked: Iterable[Cell], vanishing: Rule = lambda cell: 0.0) -> Results:
    """Results with the accuracies of `rule`, none where it gives None."""
    scores = {}
    for cell in asked:
        share = rule(cell) if cell.kind == "accuracy" else None
        if share is not None:
            m = fake_measurement(cell, accuracy=share, vanishing=vanishing(cell) or 0.0)
            scores[cell.key] = m
    return Results(scores, {})


FGSM = Trial("fgsm", 2 / 255)


def on(beta: float, bits: int | None, trial: Trial = FGSM) -> Cell:
    return trial.cell(SMALL.network(bits=bits, beta=beta))


A, B, C = on(0.1, None), on(0.1, 3), on(0.0, 3)


def asked(
    shares: dict[Cell, float],
    *plus: Cell,
    minus: Cell = C,
    known: bool = True,
    vanishing: Rule = lambda cell: 0.0,
    options: tuple[Any, ...] = (),
) -> Reading:
    """Each of `plus` minus one other; the spread between trainings is known to be 1 point."""
    results = made(shares.get, shares, vanishing)
    evidence = evidence_of(SMALL, results)
    if known:
        evidence = replace(evidence, spreads={stratum(cell): Spread(0.01, 20) for cell in shares})
    trial = {cell: replace(FGSM, **{k: getattr(cell, k) for k in ("attack", "eps", "substitute")})
             for cell in (*plus, minus)}  # fmt: skip
    row = {c: ask_all([Ask({}, (c.network,), t)], results) for c, t in trial.items()}
    names = {A: "A", B: "B"}
    pairs = [versus(names.get(p, ""), [row[p]], [row[minus]], *options) for p in plus]
    return answer("FGSM 2/255", "A and B minus C", pairs, evidence)


@pytest.mark.parametrize(
    ("b", "verdict", "effect"),
    [(0.5, "holds", 0.2), (0.31, "not decided", 0.01), (0.2, "does not hold", -0.1)],
)
def test_all_must_hold_and_the_worst_is_shown(b: float, verdict: str, effect: float) -> None:
    reading = asked({A: 0.6, B: b, C: 0.3}, A, B)
    assert reading.verdict == verdict and reading.effect == pytest.approx(effect, abs=1e-3)
    assert "worst: B" in reading.detail and "A and B minus C" in reading.detail
    assert verdict != "does not hold" or (reading.high or 0) < 0


def test_several_contrasts_widen_each_interval_and_a_margin_helps() -> None:
    shares = {A: 0.9, B: 0.5, C: 0.3}
    alone, together = asked(shares, B), asked(shares, A, B)
    assert alone.effect == together.effect
    assert (alone.low or 0) > (together.low or 0)
    equal = {A: 0.5, B: 0.3, C: 0.3}
    assert asked(equal, A, B).verdict == "not decided"
    reading = asked(equal, A, B, options=(0.1,))
    assert reading.verdict == "holds" and "margin 10 point" in reading.detail


def test_what_is_missing() -> None:
    reading = asked({A: 0.6, C: 0.3}, A, B)
    assert reading.verdict == "not decided" and "1 of 2 not measured" in reading.detail
    assert asked({A: 0.1, C: 0.3}, A, B).verdict == "does not hold"
    nothing = asked({A: 0.6, B: 0.3}, A, B)
    assert (nothing.effect, nothing.low, nothing.high) == (None, None, None)
    assert (nothing.verdict, nothing.detail) == ("not decided", "not measured")


def test_one_seed_decides_only_large_effects() -> None:
    for gap, verdict in ((ALONE - 0.02, "not decided"), (ALONE + 0.02, "holds")):
        reading = asked({A: 0.3 + gap, C: 0.3}, A, known=False)
        assert reading.verdict == verdict
        assert "one seed: training not in the interval" in reading.detail


def test_a_masked_network_supports_nothing() -> None:
    shares = {A: 0.6, B: 0.6, C: 0.3}

    def verdict(who: Cell, *options: Any, of: dict[Cell, float] = shares) -> str:
        blind = {who: 0.02}
        found = asked(of, A, B, vanishing=lambda cell: blind.get(cell, 0.01), options=options)
        named = {B: "DQ at 3 bits", C: "vanilla at 3 bits"}.get(who, "")
        assert named in found.detail or found.verdict != "not decided"
        return found.verdict

    against = {A: 0.2, B: 0.2, C: 0.3}
    assert (verdict(B), verdict(C)) == ("not decided", "holds")
    assert (verdict(C, of=against), verdict(A, of=against)) == ("not decided", "does not hold")
    assert (verdict(C, 0.0, "any"), verdict(B, 0.0, "none")) == ("not decided", "holds")


def test_a_network_that_learnt_nothing_supports_nothing() -> None:
    for share, verdict in ((0.19, "not decided"), (0.21, "holds")):
        reading = asked({A: 0.6, B: 0.6, C: 0.3, on(0.1, 3, Trial()): share}, A, B)
        assert reading.verdict == verdict
        assert ("DQ at 3 bits, hardly trained" in reading.detail) == (share < 0.2)


def test_what_cannot_be_masked() -> None:
    for trial in (Trial(), replace(FGSM, substitute=C.network)):
        one, other = on(0.1, None, trial), on(0.0, 3, trial)
        found = asked({one: 0.6, other: 0.3}, one, minus=other, vanishing=lambda cell: 0.5)
        assert found.verdict == "holds"


def test_spreads_come_from_table_1_in_strata() -> None:
    def rule(cell: Cell) -> float:
        step = 0.08 if cell.network.model.bits == 1 else 0.02
        return 0.3 + step * cell.network.train.seed * (cell.attack == "fgsm")

    evidence = evidence_of(SMALL, made(rule, cells_of(["table1", "fig5"], SMALL)))
    changes: list[dict[str, Any]] = [
        {}, {"eps": 0.5}, {"attack": "pgd-20"}, {"attack": "adaptive"}, {"substitute": C.network}
    ]  # fmt: skip
    found = [evidence.spread(c) for c in (on(0.0, 1), *(replace(A, **one) for one in changes))]
    sds = [round(spread.sd * 2**0.5, 4) for spread in found if spread is not None]
    assert sds == [0.08, 0.02, 0.02, 0.0, 0.0, 0.02]  # at another eps: the largest of its kind
    assert [spread and spread.df for spread in found] == [4, 20, 20, 20, 20, 10]
    single = replace(SMALL, seeds=(0,))
    assert not evidence_of(single, made(rule, cells_of(["table1"], single))).spreads


# --- claims ----------------------------------------------------------------------------------


def test_a_claim_reads_what_its_command_makes() -> None:
    for claim in CLAIMS:
        assert {name for one in claim.asks for name in one.of} <= {*claim.made.split()}, claim.slug


@pytest.mark.parametrize("name", SCALES)
def test_nothing_is_decided_by_nothing(name: str) -> None:
    found = verdicts(SCALES[name], Results())
    for verdict in found:
        assert verdict.readings and verdict.command.endswith(f"--preset {name}")
        assert len({reading.attack for reading in verdict.readings}) == len(verdict.readings)
        for reading in verdict.readings:
            assert (reading.effect, reading.verdict) == (None, "not decided")
            assert reading.detail == "not measured"
    assert [verdict.name for verdict in found] == [f"C{i + 1}" for i in range(len(CLAIMS))]


BETAS = {0.003: 0.5, 0.01: 1, 0.03: 2, 0.1: 3, 0.3: 1}
TRAINED = {  # white box, black box, strong; by activation and bits
    ("relu", None): (0.50, 0.65, 0.50), ("tanh", 2): (0.80, 0.58, 0.75),
    ("relu", 2): (0.45, 0.55, 0.45),
}  # fmt: skip


def supporting(cell: Cell) -> float:
    """A world in which every claim on accuracies holds, at every eps alike."""
    model, train = cell.network.model, cell.network.train
    dq, strong = train.beta > 0, cell.attack in SMALL.strong
    if cell.attack == "clean":
        if model.model == SMALL.resnet:
            return 0.95 if dq else 0.85 if model.high == 1 else 0.90
        vanilla = {None: 0.90, 5: 0.93, 4: 0.93}.get(model.bits, 0.5 + 0.1 * (model.bits or 0))
        return 0.97 if dq else vanilla
    if model.model == SMALL.resnet and train.attack == "pgd":
        white, black, hard = TRAINED[model.activation, model.bits]
        return black if cell.substitute else hard if strong else white
    if train.attack == "fgsm":
        return 0.5 if cell.substitute else {"fgsm": 0.9}.get(cell.attack, 0.05)
    if cell.attack == "random":
        return 0.95
    better = {"rfgsm": 0.1, "pgd": -0.1}.get(cell.attack, -0.12 if strong else 0.0)
    if cell.substitute:
        better = 0.3 if train.attack == "rfgsm" else 0.15 if cell.attack == "fgsm" else 0.17
    if model.squeeze or train.attack != "none":
        return (0.35 if model.squeeze else 0.55) + 0.08 * dq + better
    if not dq:
        return better + (0.40 if model.bits is None else 0.16 + 0.04 * model.bits)
    level = BETAS[train.beta]
    gained = 0.0 if model.bits is None else 0.03 * level + 0.02 * (3 - model.bits)
    return better + 0.40 + 0.05 * level + gained


def distance(mean: float) -> dict[str, Any]:
    return {"mean": mean, "spread": mean / 10, "whole": mean, "left_out": 0, "examples": 128}


def probed(cell: Cell, contrary: bool) -> Any:
    """A value of another kind that supports the claims, or says the contrary."""
    bits, dq = cell.network.model.bits, cell.network.train.beta > 0
    if cell.kind == "first-block":
        plain = 0.01 * 255 * cell.eps
        sides = (plain, plain * (0.7 if 255 * cell.eps < 3.5 else 1.3))[:: -1 if contrary else 1]
        return dict(zip(("plain", "quantized"), map(distance, sides), strict=True))
    if cell.kind == "layers":
        size = float((bits or 6) if contrary else 7 - (bits or 6)) / (3 if dq != contrary else 1)
        growth = [1.0 - 0.1 * i if contrary else 0.1 + 0.1 * i for i in range(8)]
        return [{"layer": "", "distance": distance(size * g)} for g in growth]
    # six pictures that fool VQ alone (or DQ), twelve that fool all, six that fool none
    who = "DQ" if dq else "FP" if bits is None else "VQ"
    fooled = [who == ("DQ" if contrary else "VQ")] * 6 + [True] * 12 + [False] * 6
    sure = {False: who == ("FP" if contrary else "DQ"), True: who != ("VQ" if contrary else "DQ")}
    answers = [{"prediction": int(w), "confidence": 0.9 if sure[w] else 0.5} for w in fooled]
    return {"examples": [{"label": 0, "adversarial": answer} for answer in answers]}


@cache
def judged(rule: Rule, *, contrary: bool = False, **options: Any) -> dict[str, Verdict]:
    results = made(rule, _all_cells(), **options)
    others = [cell for cell in _all_cells() if cell.kind not in ("accuracy", "detector")]
    values = {cell.key: probed(cell, contrary) for cell in others}
    found = verdicts(SMALL, Results(results.scores, values))
    return {claim.slug: verdict for claim, verdict in zip(CLAIMS, found, strict=True)}


@cache
def _all_cells() -> tuple[Cell, ...]:
    return tuple(cells_of([name for name in EXPERIMENTS if name != "surrogates"], SMALL))


def wrong(verdict: Verdict, expected: str) -> list[Reading]:
    return [reading for reading in verdict.readings if reading.verdict != expected]


def test_every_claim_holds_in_a_world_made_for_it() -> None:
    for slug, verdict in judged(supporting).items():
        assert not wrong(verdict, "holds"), slug


def test_every_claim_fails_in_the_contrary_world() -> None:
    """1.2 - accuracy turns every contrast and leaves no guesses; what is equal or a range stays."""
    found = judged(lambda cell: min(1.0, 1.2 - supporting(cell)), contrary=True)
    for slug in found.keys() - {"relu1-gap-closed", "clean-more-stable"}:
        assert not wrong(found[slug], "does not hold"), slug


def gap_stays_open(cell: Cell) -> float:
    relu1 = cell.network.model.high == 1 and cell.attack == "clean"
    return supporting(cell) - 0.05 * (relu1 and cell.network.train.beta > 0)


def less_stable_clean(cell: Cell) -> float:
    beta = cell.network.train.beta
    return 0.9 - 2 * beta if cell.attack == "clean" else 0.5 + 0.1 * beta


@pytest.mark.parametrize(
    ("rule", "slug", "verdict"),
    [
        (gap_stays_open, "relu1-gap-closed", "does not hold"),
        (less_stable_clean, "clean-more-stable", "does not hold"),
        (lambda cell: 0.5, "beta-peak", "not decided"),
        (lambda cell: 0.5, "clean-more-stable", "not decided"),
    ],
)
def test_what_the_contrary_world_leaves_out_can_turn(rule: Rule, slug: str, verdict: str) -> None:
    assert not wrong(judged(rule)[slug], verdict)


def test_choosing_the_peak_costs_width() -> None:
    """Four betas inside, two ends: the interval is one of eight."""
    reading = judged(supporting)["beta-peak"].readings[0]
    assert "worst: beta 0.1 minus 0.3" in reading.detail
    ends = [accuracy(share, 10_000, 1, None).variance for share in (0.62, 0.46)]
    assert reading.high is not None and reading.effect is not None
    half = (reading.high - reading.effect) / sum(ends) ** 0.5
    assert half == pytest.approx(stats.norm.ppf(1 - 0.05 / (2 * 8)), rel=1e-6)


def test_equal_networks_decide_nothing_but_equality() -> None:
    equal = {"clean-kept", "relu1-gap-closed", "relu6-no-gain"}
    probes = {"rounding-threshold", "noise-amplified", "fewer-bits-amplify"}
    probes |= {"penalty-suppresses-noise", "surer"}
    for slug, verdict in judged(lambda cell: 0.97).items():
        if slug not in probes:
            assert not wrong(verdict, "holds" if slug in equal else "not decided"), slug


@pytest.mark.parametrize("contrary", [False, True])
def test_distances_of_a_network_that_learnt_nothing_decide_nothing(contrary: bool) -> None:
    def rule(cell: Cell) -> float:
        hardly = cell.network.model.model == SMALL.vgg and cell.network.model.bits == 1
        return 0.15 if hardly and cell.attack == "clean" else supporting(cell)

    found = judged(rule, contrary=contrary)
    alone = ("fewer-bits-amplify",)  # where noise fades at other bits too, they decide
    for slug in alone if contrary else (*alone, "noise-amplified"):
        assert not wrong(found[slug], "not decided"), slug
        assert all("1 bit, hardly trained" in r.detail for r in found[slug].readings), slug
    sound = judged(supporting, contrary=contrary)["fewer-bits-amplify"]
    assert not wrong(sound, "does not hold" if contrary else "holds")


def test_masked_dq_proves_nothing() -> None:
    found = judged(supporting, vanishing=lambda cell: 0.3 * (cell.network.train.beta > 0))
    for slug in ("dq-above-vanilla", "dq-above-float", "penalty-alone", "no-masking"):
        assert not wrong(found[slug], "not decided"), slug
        assert all("masked" in reading.detail for reading in found[slug].readings)
    for slug in ("dq-clean", "dq-black-box", "vanilla-less-robust", "tanh-masks"):
        assert not wrong(found[slug], "holds"), slug


def test_the_gain_tells_the_paper_s_maximum_too() -> None:
    detail = judged(supporting)["quantize-gain"].readings[0].detail
    assert "biased upward" in detail
    assert "+7.0 at beta 0.01" in detail and "+13.0 at beta 0.1" in detail


# --- the paper's own tables -------------------------------------------------------------------


def test_what_the_papers_own_tables_decide() -> None:
    """On 10,000 images (SVHN 26,032), were the chance in training nil."""
    asks = [ask for experiment in EXPERIMENTS.values() for ask in experiment.asks(PAPER)]
    numbers = {cell: ask.paper for ask in asks for cell in ask.cells if ask.paper is not None}
    sure = {stratum(c): Spread(0.0, 20) for c in cells_of(["table1", "fig5"], PAPER)}
    results = made(numbers.get, numbers)
    pairs = zip(CLAIMS, verdicts(PAPER, results, Evidence(results, sure)), strict=True)
    found = {
        (claim.slug, reading.attack): reading.verdict
        for claim, verdict in pairs
        for reading in verdict.readings
        if "not measured" not in reading.detail
    }
    black, svhn = "helps-black-box", ", SVHN"
    assert {key: verdict for key, verdict in found.items() if verdict != "holds"} == {
        ("quantize-gain", "FGSM 8/255"): "not decided",  # -1.1, 0.0, +1.8
        ("fewer-bits-better", "FGSM 8/255"): "not decided",  # -0.5 at the largest beta
        ("dq-clean", "clean, ResNet-18"): "not decided",  # +0.68 with ReLU6
        (black, "FGSM(B) 8/255, 1 bit"): "does not hold",  # 63 to 59
        (black, "PGD(B) 8/255, 1 bit"): "does not hold",  # 64 to 50
        (black, "FGSM(B) 2/255, 1 bit"): "does not hold",  # 88 to 84
        (black, "PGD(B) 2/255, 1 bit"): "does not hold",  # 90 to 87
        (black, f"FGSM(B) 8/255, 1 bit{svhn}"): "not decided",  # 62 to 63
        (black, f"FGSM(B) 2/255, 1 bit{svhn}"): "not decided",  # 90 to 90
        (black, f"PGD(B) 2/255, 1 bit{svhn}"): "not decided",  # 92 to 92
        ("pgd-strongest", "PGD 2/255"): "not decided",  # FGSM 71.6, PGD 72.0
        ("pgd-strongest", f"PGD 2/255{svhn}"): "does not hold",  # FGSM 77.8, PGD 80.5
    }
    assert len(found) == 47


def test_the_means_in_the_notes_are_those_of_the_tables() -> None:
    by_slug = {claim.slug: claim for claim in CLAIMS}
    rows = [[*NUMBERS["table1"][f"{b} fgsm@8"].values()][:6] for b in (0.0003, 0.0006, 0.001)]
    gains = [100 * (statistics.fmean(quantised) - full) for full, *quantised in rows]
    assert [round(gain, 1) for gain in gains] == [-1.1, 0.0, 1.8]
    assert "-1.1, 0.0 and +1.8" in by_slug["quantize-gain"].note
    assert [f"{100 * statistics.fmean(row):.1f}" for row in rows] == ["40.9", "45.7", "50.6"]
    assert "40.9% at beta 3e-4, 45.7 at 6e-4, 50.6" in by_slug["grows-with-beta"].paper
    table3 = NUMBERS["table3"].values()
    for eps in (8, 2):
        for name in ("fgsm", "pgd"):
            mean = 100 * statistics.fmean(row[f"{name}@{eps}"] for row in table3)
            assert f"{mean:.1f}" in by_slug["pgd-strongest"].paper
    assert sum(row["pgd@2"] > row["fgsm@2"] for row in table3) == 5
    assert all(row["pgd@2"] > row["fgsm@2"] for row in NUMBERS["table2"].values())
