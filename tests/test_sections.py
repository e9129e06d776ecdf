"""Sections of the report: the right numbers in the right places, and words that follow them."""

import random
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import pytest

from defquant.experiments import beta, bits, paper
from defquant.experiments.catalog import EXPERIMENTS, cells_of
from defquant.experiments.cells import Cell
from defquant.experiments.defended import table_rows, table_substitute
from defquant.experiments.masking import table5_networks, table6_networks
from defquant.experiments.pictures import fig7_cells
from defquant.experiments.ranges import table4_networks
from defquant.experiments.scales import SCALES, Scale
from defquant.experiments.section import Number, Section
from defquant.experiments.standard import attacked, clean, substitute, vanilla
from defquant.experiments.store import Results
from defquant.experiments.surrogates import surrogates_networks
from defquant.experiments.words import against, listed, model_text, tally
from synthetic_results import fake_measurement, fake_results

SMALL = SCALES["small"].placed(None, "svhn", "cpu")
PAPER = SCALES["paper"].placed(None, "svhn", "cpu")
EVERY = {name: scale.placed(None, "svhn", "cpu") for name, scale in SCALES.items()}


def render(name: str, scale: Scale, results: Results) -> Section:
    return EXPERIMENTS[name].render(scale, results)


def scored(
    scale: Scale, name: str, accuracy: Callable[[Cell], float | None], total: int = 10_000
) -> Results:
    """Results of the experiment's cells by a rule; without those for which it gives None."""
    found = {cell: accuracy(cell) for cell in cells_of([name], scale) if cell.kind == "accuracy"}
    return Results(
        {
            cell.key: replace(fake_measurement(cell), correct=round(share * total), total=total)
            for cell, share in found.items()
            if share is not None
        }
    )


def entries(section: Section) -> Iterator[tuple[tuple[str, ...], Number]]:
    """Every number of the tables with its place: caption's first word, row's names, column."""
    for table in section.tables:
        for row in table.rows:
            names = tuple(entry for entry in row[:2] if isinstance(entry, str))
            for head, entry in zip(table.head, row, strict=True):
                if isinstance(entry, Number):
                    yield (table.caption, *names, head), entry


def stands(where: tuple[str, ...], place: tuple[str, ...]) -> bool:
    """Whether `where` is `place`: its column, and the beginnings of its other words."""
    *words, column = place
    begun = (any(w == p or w.startswith((f"{p} (", f"{p};")) for w in where) for p in words)
    return where[-1] == column and all(begun)


def numbers(section: Section) -> list[Number]:
    drawn = [n for panel in section.panels for line in panel.lines for _, n in line.points]
    return [n for _, n in entries(section)] + drawn


def said(section: Section) -> str:
    return "\n".join(section.text)


# --- every section, with any results ----------------------------------------------------------


@pytest.mark.parametrize("name", EXPERIMENTS)
@pytest.mark.parametrize("scale", EVERY.values(), ids=EVERY.keys())
def test_renders_with_any_results(name: str, scale: Scale) -> None:
    cells = cells_of([name], scale)
    some = random.Random(0).sample(cells, len(cells) // 2)
    for there in (cells, some, cells[:1], []):
        section = render(name, scale, fake_results(there))
        assert section.name == name
        assert section.missing == len(cells) - len(there)
        assert section.text and all(section.text)
        assert all(len(row) == len(t.head) for t in section.tables for row in t.rows)
        assert all(n.mean is None or n.points or n.mean >= 0 for n in numbers(section))


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_without_results_nothing_of_ours_is_said(name: str) -> None:
    section = render(name, PAPER, Results())
    assert all(n.mean is None for _, n in entries(section))
    assert all(
        line.paper or n.mean is None
        for p in section.panels
        for line in p.lines
        for _, n in line.points
    )
    assert "Ours" not in said(section) and "clearly" not in said(section)


def test_sections_need_no_torch() -> None:
    code = "import sys, defquant.experiments.catalog; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("scale", EVERY.values(), ids=EVERY.keys())
def test_strong_attacks_have_a_place_in_the_tables(scale: Scale) -> None:
    assert set(scale.hard_eps) <= set(scale.eps) and scale.paper_eps in scale.eps


@pytest.mark.parametrize(
    "name",
    [
        "fig1", "table1", "fig5", "table2", "table3", "table4", "table5", "table6", "fig6",
        "surrogates",
    ],
)  # fmt: skip
@pytest.mark.parametrize("scale", [SMALL, PAPER], ids=["small", "paper"])
def test_every_measurement_is_shown(name: str, scale: Scale) -> None:
    """Each cell has an accuracy of its own; all of them stand in the tables."""
    scale = replace(scale, seeds=scale.seeds[:1])
    cells = [cell for cell in cells_of([name], scale) if cell.kind == "accuracy"]
    own = {cell: (i + 1) / 100_000 for i, cell in enumerate(cells)}
    section = render(name, scale, scored(scale, name, own.__getitem__, 100_000))
    shown = {round(100_000 * n.mean) for _, n in entries(section) if n.mean is not None}
    assert set(range(1, len(cells) + 1)) <= shown
    drawn = {round(100_000 * n.mean) for n in numbers(section) if n.mean is not None}
    assert drawn <= shown | {
        round(100_000 * n.paper) for n in numbers(section) if n.paper is not None
    }


# --- the right cell in the right place --------------------------------------------------------

at = {eps: eps / 255 for eps in (2, 4, 8)}
wrn4 = vanilla(SMALL, 4)
row3 = {row.name: row.network for row in table_rows(SMALL, 3)}
t5, t6 = table5_networks(SMALL), table6_networks(SMALL)


def attack(network: Any, name: str, eps: int, through: Any = None, **options: Any) -> Cell:
    return attacked(SMALL, network, name, through=through, eps=[at[eps]], **options)[0]


PLACES: list[tuple[str, Cell, tuple[str, ...]]] = [
    ("fig1", clean(SMALL, wrn4), ("Wide ResNet", "clean", "4 bits")),
    (
        "fig1",
        attack(SMALL.network(SMALL.vgg, bits=2), "fgsm", 8),
        ("VGG-16", "FGSM 8/255", "2 bits"),
    ),
    ("table1", attack(wrn4, "fgsm", 2), ("vanilla", "FGSM 2/255", "4 bits")),
    (
        "table1",
        attack(SMALL.network(bits=3, beta=SMALL.table1_betas[1]), SMALL.strong[0], 2),
        (f"DQ (β = {SMALL.table1_betas[1]:g})", "PGD-50x10 2/255", "3 bits"),
    ),
    ("fig5", attack(wrn4, "fgsm", 4, substitute(SMALL)), ("vanilla", "FGSM(B) 4/255", "4 bits")),
    (
        "table3",
        attack(row3["Normal + DQ"], "pgd", 8),
        ("Accuracy at ε = 8/255", "Normal + DQ", "PGD"),
    ),
    (
        "table3",
        attack(row3["Adversarial PGD"], "pgd", 2, table_substitute(SMALL, 3)),
        ("Accuracy at ε = 2/255", "Adversarial PGD", "PGD(B)"),
    ),
    (
        "table3",
        attack(row3["Feature Squeezing + DQ (4-bit)"], "fgsm", 8, unaware=True),
        ("Feature Squeezing + DQ (4-bit)", "8/255", "FGSM (unaware)"),
    ),
    ("table4", clean(SMALL, table4_networks(SMALL)[True, 1.0]), ("DQ", "clean", "ReLU1")),
    (
        "table5",
        attack(t5["Tanh Quantized"], "pgd-20", 8),
        ("Tanh Quantized", "8/255", "White box PGD-20"),
    ),
    ("table6", attack(t6["Adversarial FGSM"], "pgd", 4), ("Adversarial FGSM", "4/255", "PGD")),
    ("fig6", attack(beta.fig6_networks(SMALL)[0.0], "fgsm", 4), ("0", "FGSM 4/255")),
]


@pytest.mark.parametrize(("name", "cell", "place"), PLACES)
def test_one_cell_is_one_entry(name: str, cell: Cell, place: tuple[str, ...]) -> None:
    """All others have 50 %, the cell 12.34 %."""
    scale = replace(SMALL, seeds=SMALL.seeds[:1])
    assert cell in cells_of([name], scale)
    section = render(name, scale, scored(scale, name, lambda c: 0.1234 if c == cell else 0.5))
    found = [where for where, n in entries(section) if n.mean == 0.1234]
    assert len(found) == 1 and stands(found[0], place)


def test_seeds_are_averaged() -> None:
    networks = [bits.table1_networks(SMALL, seed)[0.0][0] for seed in (0, 1)]
    shares = {clean(SMALL, n): share for n, share in zip(networks, (0.6, 0.8), strict=True)}
    section = render("table1", SMALL, scored(SMALL, "table1", shares.get))
    (found,) = [n for _, n in entries(section) if n.mean is not None]
    assert found.mean == pytest.approx(0.7) and found.seeds == 2 and found.spread > 0.14


# --- the paper's numbers ----------------------------------------------------------------------

TABLE1 = """
94.8 42.0 84.9 92.8 93.9 94.7 | 39.3 9.0 8.5 14.1 19.0 30.2 -9.1 39.3
95.3 95.2 95.3 95.1 95.1 95.1 | 41.8 43.2 41.1 40.1 39.8 39.3 +1.4 43.2
95.6 95.7 95.2 95.4 95.6 95.5 | 45.7 48.3 47.9 43.8 43.9 44.6 +2.6 48.3
95.9 95.8 95.6 95.6 95.8 95.8 | 49.1 51.3 50.4 51.3 49.8 51.8 +2.7 51.8
"""
TABLE2 = """
Normal: 96.8 97/97/96 74/42/26 86/55/35 77/05/00 90/62/40 92/58/30
Normal + DQ: 96.7 96/96/ 96 77/45/31 87/59/40 79/10/00 90/63/42 92/60/31
Feature Squeezing: 96.3 96/96/95 69/34/20 84/48/28 72/03/00 89/61/38 91/56/27
Feature Squeezing + DQ: 96.2 96/96/ 96 75/42/28 86/56/36 77/06/00 90/63/40 92/59/30
Adversarial R+FGSM: 96.6 97/96/96 84/53/38 91/70/57 87/30/06 93/74/54 94/83/72
Adversarial R+FGSM + DQ: 96.6 97 /96/95 88/59/40 93/77/61 91/47/17 94/80/61 95/89/84
"""
TABLE3 = """
Normal: 94.8 95/91/77 59/39/29 72/37/17 56/01/00 88/63/36 90/64/42
Normal + DQ: 95.9 96/94 /84 68/53/42 77/50/30 62/04/00 84/59/40 87/50/27
Feature Squeezing: 94.1 94/92/81 61/35/27 76/40/21 64/02/00 87/62/30 89/70/42
Feature Squeezing + DQ: 94.9 95/93/82 66/48/33 77/51/29 66/06/01 87/62/29 90/70/43
Adversarial R+FGSM: 91.6 92/91/91 81/52/38 87/69/48 84/43/11 92/89/85 92/91/89
Adversarial R+FGSM + DQ: 94.0 94/93/ 93 85/63/51 90/74/58 87/50/22 93/91/87 94/92/92
Adversarial PGD: 86.6 86/86/86 74/46/31 79/63/46 76/44/20 84/83/81 84/83/83
Adversarial PGD + DQ: 87.5 87/87/87 79/53/36 83/69/52 81/ 50/22 87/86/82 87/86/86
"""
ATTACKS = ("random", "fgsm", "rfgsm", "pgd", "fgsm(B)", "pgd(B)")


def floats(text: str) -> tuple[float, ...]:
    return tuple(float(word) for word in re.findall(r"[-+]?\d+(?:\.\d+)?", text))


def test_table_1_is_the_papers() -> None:
    for line, row in zip(TABLE1.strip().splitlines(), paper.TABLE1.values(), strict=True):
        clean_images, fgsm = line.split(" | ")
        assert row["clean"] == floats(clean_images)
        assert (*row["fgsm"], row["gain"], row["best"]) == floats(fgsm)


@pytest.mark.parametrize(("table", "text"), [(paper.TABLE2, TABLE2), (paper.TABLE3, TABLE3)])
def test_tables_2_and_3_are_the_papers(
    table: Mapping[tuple[str, bool], paper.Defense], text: str
) -> None:
    lines = text.strip().splitlines()
    assert len(table) == len(lines)
    for line, ((technique, dq), (clean_images, attacks)) in zip(lines, table.items(), strict=True):
        name, _, values = line.partition(": ")
        assert name == technique + " + DQ" * dq
        printed = floats(values)
        assert printed[0] == clean_images
        triples = [printed[i : i + 3] for i in range(1, len(printed), 3)]
        assert attacks == dict(zip(ATTACKS, triples, strict=True))


def test_tables_4_5_and_6_are_the_papers() -> None:
    assert tuple(paper.TABLE4.values()) == floats("93.49% 94.41% 95.14% 95.09%")
    for dq, gap in paper.TABLE4_DIFFERENCE.items():
        assert paper.TABLE4[dq, 1.0] - paper.TABLE4[dq, 6.0] == pytest.approx(gap)
    five = "83.47 50.51 65.58 81.60 71.03 61.57 78.97 48.90 59.44"
    six = "94.55 94.18 51.65 91.61 51.65 87.39"
    assert sum(paper.TABLE5.values(), ()) == floats(five)
    assert sum(paper.TABLE6.values(), ()) == floats(six)


def papers_own(cell: Cell) -> float | None:
    """The paper's number for a cell of Table 1 at its own scale, by another way than the code's."""
    row = list(paper.TABLE1).index(cell.network.train.beta)
    column = {None: 0, 1: 1, 2: 2, 3: 3, 4: 4, 5: 5}[cell.network.model.bits]
    values = [floats(half) for half in TABLE1.strip().splitlines()[row].split(" | ")]
    if cell.attack == "clean":
        return values[0][column] / 100
    return values[1][column] / 100 if (cell.attack, round(255 * cell.eps)) == ("fgsm", 8) else 0.5


def test_fed_with_the_papers_numbers_table_1_prints_its_gain_and_best() -> None:
    section = render("table1", PAPER, scored(PAPER, "table1", papers_own))
    compared = [n for _, n in entries(section) if n.paper is not None]
    assert len(compared) == 4 * (6 + 6 + 2)
    assert all(n.gap == pytest.approx(0, abs=1e-9) for n in compared)
    gains = [n.paper for n in compared if n.points]
    assert gains == pytest.approx([-0.091, 0.014, 0.026, 0.027])


PRINTED: list[tuple[str, tuple[str, ...], float]] = [
    ("fig1", ("Wide ResNet", "FGSM 8/255", "5 bits − full"), -0.092),
    ("fig1", ("Wide ResNet", "FGSM 8/255", "2 bits"), 0.085),
    ("table1", ("DQ (β = 0.0006)", "FGSM 8/255", "2 bits"), 0.479),
    ("fig5", ("DQ", "FGSM 8/255", "1 bit"), 0.513),
    ("table2", ("Accuracy at ε = 2/255", "Adversarial R+FGSM + DQ", "PGD(B)"), 0.95),
    ("table3", ("Accuracy at ε = 16/255", "Normal + DQ", "FGSM(B)"), 0.40),
    ("table3", ("Accuracy at ε = 8/255", "Adversarial PGD", "R+FGSM"), 0.63),
    ("table4", ("vanilla", "clean", "Difference"), -0.0092),
    ("table4", ("DQ", "clean", "ReLU1"), 0.9514),
    ("table5", ("Tanh Quantized", "8/255", "White box PGD-20"), 0.7103),
    ("table5", ("Tanh Quantized", "8/255", "White − black"), 0.0946),
    ("table6", ("Adversarial FGSM", "8/255", "Black box FGSM"), 0.5165),
    ("fig6", ("0.001", "FGSM 8/255"), 0.498),
    ("fig6", ("0", "clean"), 0.939),
]


@pytest.mark.parametrize(("name", "place", "value"), PRINTED)
def test_the_papers_number_stands_in_its_place(
    name: str, place: tuple[str, ...], value: float
) -> None:
    section = render(name, PAPER, Results())
    found = [n.paper for where, n in entries(section) if stands(where, place)]
    assert found == [pytest.approx(value)]


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_the_papers_numbers_stand_only_where_it_has_some(name: str) -> None:
    section = render(name, SMALL, fake_results(cells_of([name], SMALL)))
    defended = name in ("table2", "table3")
    printed = {"2", "8", "16"} if defended else {"8"}
    for where, n in entries(section):
        radii = set(re.findall(r"(\d+)/255", " ".join(where if defended else where[1:])))
        if n.paper is not None and where[-1] not in ("Clean", "clean"):
            assert radii <= printed, where
        assert n.paper is None or not defended or "4-bit" not in " ".join(where)


def test_other_images_have_no_paper_beside_them() -> None:
    digits = SCALES["smoke"].placed(None, None, "cpu")
    for name in EXPERIMENTS:
        section = render(name, digits, fake_results(cells_of([name], digits)))
        assert all(n.paper is None for n in numbers(section))
        assert not any(line.paper for panel in section.panels for line in panel.lines)
        assert "not the paper's" in said(section)


# --- words follow the numbers -----------------------------------------------------------------


def test_fig1_says_below_and_above() -> None:
    def rule(sign: int) -> Callable[[Cell], float]:
        return lambda cell: 0.5 if cell.network.model.bits is None else 0.5 + sign * 0.1

    words = "clean (50.0%) 10.0 points"
    assert f"{words} below" in said(render("fig1", SMALL, scored(SMALL, "fig1", rule(-1))))
    assert f"{words} above" in said(render("fig1", SMALL, scored(SMALL, "fig1", rule(+1))))


def test_table_1_gains_and_dq_turn() -> None:
    def rule(sign: int) -> Callable[[Cell], float]:
        return lambda c: 0.5 + sign * (0.1 if c.network.train.beta and c.network.model.bits else 0)

    up, down = (said(render("table1", SMALL, scored(SMALL, "table1", rule(s)))) for s in (1, -1))
    assert (
        "vanilla 0.0, DQ" in up
        and "+10.0" in up
        and "above at 15 of 18 (15 clearly), below at 0" in up
    )
    assert "−10.0" in down and "above at 0 of 18, below at 15 (15 clearly)" in down


def test_fewer_bits_are_counted() -> None:
    def rule(sign: int) -> Callable[[Cell], float]:
        return lambda cell: 0.5 + sign * 0.01 * (cell.network.model.bits or 0)

    up, down = (said(render("table1", SMALL, scored(SMALL, "table1", rule(s)))) for s in (1, -1))
    assert "lowers DQ's accuracy in 0 of 12 steps" in up
    assert "lowers DQ's accuracy in 12 of 12 steps" in down


def test_fig3_says_where_rounding_lowers_the_distance() -> None:
    cells = cells_of(["fig3"], SMALL)
    results = fake_results(cells)
    assert "lowers D at 1, 2 and 3 and raises it at 4, 5, 6, 7 and 8" in said(
        render("fig3", SMALL, results)
    )
    swapped = {
        key: {**v, "plain": v["quantized"], "quantized": v["plain"]} if "plain" in v else v
        for key, v in results.values.items()
    }
    assert "lowers D at 4, 5, 6, 7 and 8 and raises it at 1, 2 and 3" in said(
        render("fig3", SMALL, Results({}, swapped))
    )


def test_fig3_counts_layers() -> None:
    def layers(level: float) -> list[dict[str, Any]]:
        d = {"mean": level, "spread": 0.0, "whole": level, "left_out": 0, "examples": 128}
        return [{"layer": f"l{i}", "index": i, "bits": 4, "distance": d} for i in range(5)]

    cells = [c for c in cells_of(["fig3"], SMALL) if c.kind == "layers"]
    for sign, raised in ((1, 0), (-1, 25)):
        values = {c.key: layers(1 + sign * 0.1 * (c.network.model.bits or 9)) for c in cells}
        words = said(render("fig3", SMALL, Results({}, values)))
        assert f"Of 25 steps to the next smaller bit width at one layer, {raised} raise D" in words
    for dq, words in ((0.5, "has the smaller D at 5 of 5"), (2.0, "has the smaller D at 0 of 5")):
        values = {c.key: layers(dq if c.network.train.beta else 1.0) for c in cells}
        assert words in said(render("fig3", SMALL, Results({}, values)))


def test_distances_that_are_not_finite_are_nothing() -> None:
    results = fake_results(cells_of(["fig3"], SMALL))
    nothing = {"mean": None, "spread": 0.0, "whole": None, "left_out": 128, "examples": 128}
    values = {
        key: [{**layer, "distance": nothing} for layer in v]
        if isinstance(v, list)
        else v | {"plain": nothing}
        for key, v in results.values.items()
    }
    section = render("fig3", SMALL, Results({}, values))
    assert "Ours" not in said(section) and "D goes" not in said(section)


@pytest.mark.parametrize("name", ["table5", "table6", "fig5", "table3"])
def test_the_sign_of_masking_turns(name: str) -> None:
    def rule(white: float) -> Callable[[Cell], float]:
        return lambda cell: 0.5 if cell.substitute else white

    masked, honest = (said(render(name, SMALL, scored(SMALL, name, rule(w)))) for w in (0.7, 0.3))
    shown = {
        "table5": ("Tanh Quantized at 4 of 4 radii", "Tanh Quantized at 0 of 4 radii"),
        "table6": ("Adversarial FGSM at 4 of 4 radii", "Adversarial FGSM at 0 of 4 radii"),
        "fig5": ("the white box is above at 48 of 48", "the white box is above at 0 of 48"),
        "table3": ("Normal at 8 of 8", "at none of 88 pairs"),
    }[name]
    assert shown[0] in masked and shown[1] in honest


@pytest.mark.parametrize("name", ["table2", "table3"])
def test_dq_against_its_technique_turns(name: str) -> None:
    def rule(sign: int) -> Callable[[Cell], float]:
        return lambda cell: 0.5 + sign * 0.1 * bool(cell.network.train.beta)

    better, worse = (said(render(name, SMALL, scored(SMALL, name, rule(s)))) for s in (1, -1))
    rows = len([row for row in table_rows(SMALL, int(name[-1])) if row.dq])
    assert f"black box above at {8 * rows} of {8 * rows} ({8 * rows} clearly), below at 0" in better
    assert f"black box above at 0 of {8 * rows}, below at {8 * rows}" in worse


def test_the_papers_own_slips_are_named() -> None:
    words = said(render("table3", PAPER, Results()))
    assert "PGD(B) at 16 (42 to 27)" in words and "FGSM(B) at 2 (88 to 84)" in words
    assert "Normal + DQ at 16 (42 and 40)" in words
    assert "With DQ these fall" not in said(render("table2", PAPER, Results()))


def test_vanishing_gradients_are_told() -> None:
    results = scored(SMALL, "table5", lambda cell: 0.5)
    tanh = [c.key for c in cells_of(["table5"], SMALL) if c.network == t5["Tanh Quantized"]]
    changed = {key: replace(m, vanishing=0.25 * (key in tanh)) for key, m in results.scores.items()}
    assert "exactly zero" not in said(render("table5", SMALL, results))
    assert "images of Tanh Quantized (25.0%)" in said(render("table5", SMALL, Results(changed)))


def test_beta_is_chosen_on_validation_images() -> None:
    def results(best: float, missing: float | None = None) -> Results:
        def rule(cell: Cell) -> float | None:
            own = cell.network.train.beta
            if cell.split == "test":
                return 0.9 if own == SMALL.betas[0] else 0.1  # the test images do not choose
            return None if own == missing else 0.6 if own == best else 0.5

        return scored(SMALL, "fig6", rule)

    first, *_, last = SMALL.betas
    assert beta.chosen_beta(SMALL, results(last)) == last
    assert beta.chosen_beta(SMALL, results(first)) == first
    assert beta.chosen_beta(SMALL, results(0.0)) == min(SMALL.betas), "vanilla is no choice"
    assert beta.chosen_beta(SMALL, results(first, missing=last)) is None
    assert beta.chosen_beta(PAPER, fake_results(cells_of(["fig6"], PAPER))) is None
    assert f"β = {last:g} is the best" in said(render("fig6", SMALL, results(last)))
    assert "nothing chooses β" in said(render("fig6", PAPER, Results()))


def test_fig7_counts_and_compares() -> None:
    def record(right: str, confidence: float) -> dict[str, Any]:
        """`right` has a letter for each picture: y where the attacked one is classified rightly."""
        made = fake_results(fig7_cells(SMALL)[:1]).values[fig7_cells(SMALL)[0].key]
        pictures = [
            {
                **e,
                "adversarial": {
                    "prediction": e["label"] if y == "y" else -1,
                    "confidence": confidence,
                },
            }
            for e, y in zip(made["examples"], right, strict=False)
        ]
        return {**made, "examples": pictures}

    fp, vq, own = (cell.key for cell in fig7_cells(SMALL))
    values = {fp: record("yynn", 0.6), vq: record("nynn", 0.7), own: record("yyyn", 0.8)}
    section = render("fig7", SMALL, Results({}, values))
    assert [name for name, _ in section.pictures] == ["FP", "VQ", "DQ"]
    words = said(section)
    assert "FP on 2 of 4, VQ on 1 of 4 and DQ on 3 of 4" in words
    assert "DQ is right on 1 where FP fails, FP on 0 where DQ fails" in words
    assert "Both are right on 2; DQ is surer of the true class on 2 of them" in words
    assert "All three fail on 1; DQ is the least sure on 0 of them" in words
    turned = values | {own: record("nnnn", 0.1)}
    assert "All three fail on 2; DQ is the least sure on 2 of them" in said(
        render("fig7", SMALL, Results({}, turned))
    )


def test_what_is_overstated_is_the_usual_attack_minus_the_worst_case() -> None:
    rows = surrogates_networks(SMALL)
    two = rows["vanilla WRN-10-1"][2]
    left = {"pgd-50x10": 0.3, "adaptive": 0.1}

    def rule(cell: Cell) -> float:
        return left.get(cell.attack, 0.5) if cell.network == two else 0.25

    section = render("surrogates", SMALL, scored(SMALL, "surrogates", rule, 1000))
    assert "Vanilla WRN-10-1: PGD-50x10 leaves, against Adaptive," in said(section)
    assert "+20.0 points at 2 bits, 0.0 points at 3 bits" in said(section)
    gaps = {row[0]: row[1:] for row in section.tables[1].rows}
    at_2_bits = gaps["vanilla WRN-10-1"][2]
    assert isinstance(at_2_bits, Number) and at_2_bits.mean == pytest.approx(0.2)
    assert gaps["vanilla VGG-16 at 0.25 of its width"][6:] == (None,) * 3  # 6 to 8 bits
    titles = [name.removesuffix(" at 0.25 of its width") for name in rows]  # they would not fit
    assert [panel.title for panel in section.panels] == titles


def test_rows_are_named_as_in_the_paper() -> None:
    names = [row.name for row in table_rows(PAPER, 3)]
    assert names == [technique + " + DQ" * dq for technique, dq in paper.TABLE3]
    wide = replace(SMALL, defense_bits=(1, 4, None))
    names = [row.name for row in table_rows(wide, 2)][:4]
    assert names == ["Normal", "Normal + DQ", "Normal + DQ (4-bit)", "Normal + DQ (full precision)"]


def test_words() -> None:
    assert against([-0.012, -0.045]) == "1.2 to 4.5 points below"
    assert against([-0.012, 0.03]) == "between 1.2 points below and 3.0 above"
    assert against([0.02]) == "2.0 points above" and against([0.0001]) == "level with"
    assert (listed([]), listed("a"), listed("abc")) == ("none", "a", "a, b and c")
    assert model_text("resnet-18x0.25") == "ResNet-18 at 0.25 of its width"
    assert model_text("wrn-10-1") == "WRN-10-1"
    high = Number(0.6, low=0.58, high=0.62)
    near, low = Number(0.59, low=0.57, high=0.61), Number(0.5, low=0.48, high=0.52)
    words = tally([(high, near), (high, low), (low, high), (high, Number(None))])
    assert words == "above at 2 of 3 (1 clearly), below at 1 (1 clearly)"
    wide = replace(low, spread=0.2, seeds=2)
    assert tally([(high, wide)]) == "above at 1 of 1 (0 clearly), below at 0"
    assert tally([]) == ""
