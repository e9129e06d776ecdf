"""Tables and figures of the paper: the right numbers of ours and of its in the right places."""

import hashlib
import json
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product
from typing import Any

import pytest

from defquant.paper import tables
from defquant.paper.ask import NUMBERS, Ask, ask_all
from defquant.paper.figures import EXPERIMENTS, WORDS, cells_of, render
from defquant.paper.grid import SCALES, Cell, Network, Results, Scale, Trial
from defquant.paper.section import Number, Section, listed, model_text
from defquant.paper.tables import chosen_beta, defended
from synthetic_results import fake_measurement, fake_results

SMALL = SCALES["small"].placed(None, "svhn", "cpu")
PAPER = SCALES["paper"].placed(None, "svhn", "cpu")
EVERY = {name: scale.placed(None, "svhn", "cpu") for name, scale in SCALES.items()}


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


def test_probes_are_of_the_images_on_which_their_networks_were_scored() -> None:
    found = scored(SMALL, "table1", lambda cell: 0.5).scores
    jpeg = Results({key: replace(m, data="CIFAR-10 (JPEG)") for key, m in found.items()})
    assert "CIFAR-10 (JPEG)" in render("fig3", SMALL, jpeg).text[0]


# --- every section, with any results ----------------------------------------------------------


@pytest.mark.parametrize("name", EXPERIMENTS)
@pytest.mark.parametrize("scale", EVERY.values(), ids=EVERY.keys())
def test_renders_with_any_results(name: str, scale: Scale) -> None:
    cells = cells_of([name], scale)
    some = random.Random(0).sample(cells, len(cells) // 2)
    for there in (cells, some, cells[:1], []):
        section = render(name, scale, fake_results(there))
        assert (section.name, section.missing) == (name, len(cells) - len(there))
        captions = [table.caption for table in section.tables]
        assert section.text and all(captions)
        assert not re.search(r"[{}]|EPS", " ".join([*section.text, *captions]))
        assert all(panel.drawn for panel in section.panels)
        assert all(len(row) == len(t.head) for t in section.tables for row in t.rows)
        assert all(n.mean is None or n.points or n.mean >= 0 for n in numbers(section))
    assert all(n.mean is None for _, n in entries(section)) and not section.pictures
    lines = [line for panel in section.panels for line in panel.lines]
    assert all(line.paper or n.mean is None for line in lines for _, n in line.points)


def test_every_section_has_its_words_and_strong_attacks_their_place() -> None:
    assert list(WORDS) == list(EXPERIMENTS)
    for scale in EVERY.values():
        assert set(scale.hard_eps) <= set(scale.eps) and scale.paper_eps in scale.eps


@pytest.mark.parametrize("name", sorted(EXPERIMENTS.keys() - {"fig3", "fig7"}))
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
    printed = {round(100_000 * n.paper) for n in numbers(section) if n.paper is not None}
    assert drawn <= shown | printed


# --- the right cell in the right place --------------------------------------------------------


def attack(network: Network, name: str, pixels: int, **options: Any) -> Cell:
    return SMALL.trial(name, pixels / 255, **options).cell(network)


def networks(asks: list[Ask]) -> dict[str, Network]:
    return {ask.at["name"]: ask.networks[0] for ask in asks}


N_DQ, PGD, FS4 = "Normal + DQ", "Adversarial PGD", "Feature Squeezing + DQ (4-bit)"
TANH = "Tanh Quantized"
wrn4, vgg2 = SMALL.network(bits=4), SMALL.network(SMALL.vgg, bits=2)
row3 = {at["name"]: network for at, network in defended(SMALL, "table3")}
t5, t6 = networks(tables.table5(SMALL)), networks(tables.table6(SMALL))
BETA = SMALL.table1_betas[1]
dq3, DQ_NAME = SMALL.network(bits=3, beta=BETA), f"DQ (β = {BETA:g})"
RELU1 = SMALL.network(SMALL.resnet, bits=4, beta=SMALL.beta, high=1.0)

SUB = SMALL.substitute()
PLACES: list[tuple[str, Cell, tuple[str, ...]]] = [
    ("fig1", SMALL.trial().cell(wrn4), ("Wide ResNet", "clean", "4 bits")),
    ("fig1", attack(vgg2, "fgsm", 8), ("VGG-16", "FGSM 8/255", "2 bits")),
    ("table1", attack(wrn4, "fgsm", 2), ("vanilla", "FGSM 2/255", "4 bits")),
    ("table1", attack(dq3, SMALL.strong[0], 2), (DQ_NAME, "PGD-50x10 2/255", "3 bits")),
    ("fig5", attack(wrn4, "fgsm", 4, substitute=SUB), ("vanilla", "FGSM(B) 4/255", "4 bits")),
    ("table3", attack(row3[N_DQ], "pgd", 8), ("Accuracy at ε = 8/255", N_DQ, "PGD")),
    (
        "table3",
        attack(row3[PGD], "pgd", 2, substitute=SUB),
        ("Accuracy at ε = 2/255", PGD, "PGD(B)"),
    ),
    ("table3", attack(row3[FS4], "fgsm", 8, unaware=True), (FS4, "8/255", "FGSM (unaware)")),
    ("table4", SMALL.trial().cell(RELU1), ("DQ", "clean", "ReLU1")),
    ("table5", attack(t5[TANH], "pgd-20", 8), (TANH, "8/255", "White box PGD-20")),
    ("table6", attack(t6["Adversarial FGSM"], "pgd", 4), ("Adversarial FGSM", "4/255", "PGD")),
    ("fig6", attack(wrn4, "fgsm", 4), ("0", "FGSM 4/255")),
]


@pytest.mark.parametrize(("name", "cell", "place"), PLACES)
def test_one_cell_is_one_entry(name: str, cell: Cell, place: tuple[str, ...]) -> None:
    """All others have 50 %, the cell 12.34 %."""
    scale = replace(SMALL, seeds=SMALL.seeds[:1])
    assert cell in cells_of([name], scale)
    section = render(name, scale, scored(scale, name, lambda c: 0.1234 if c == cell else 0.5))
    found = [where for where, n in entries(section) if n.mean == 0.1234]
    assert len(found) == 1 and stands(found[0], place)


def test_seeds_are_averaged_and_the_first_comes_first() -> None:
    own = zip(SMALL.by_seed(None, 0.0), (0.6, 0.8), strict=True)
    shares = {SMALL.trial().cell(network): share for network, share in own}
    section = render("table1", SMALL, scored(SMALL, "table1", shares.get))
    (found,) = [n for _, n in entries(section) if n.mean is not None]
    assert found.mean == pytest.approx(0.7) and found.seeds == 2 and found.spread > 0.14
    seeds = [cell.network.train.seed for cell in cells_of(["table1"], SMALL)]
    assert seeds == sorted(seeds) and set(seeds) == set(SMALL.seeds)


# --- the paper's numbers ----------------------------------------------------------------------


def test_the_papers_numbers_do_not_change() -> None:
    """All were read twice, from the paper; this is their digest."""
    plain = json.dumps(NUMBERS, sort_keys=True)
    assert hashlib.sha256(plain.encode()).hexdigest()[:16] == "3f6b519e6b2f14d4"


def papers_own(cell: Cell) -> float:
    """The paper's number for a cell of Table 1 at its own scale."""
    row = NUMBERS["table1"].get(f"{cell.network.train.beta:g} {cell.mark}", {})
    return row.get(str(cell.network.model.bits or "full"), 0.5)


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
    two = name in ("table2", "table3")
    printed = {"2", "8", "16"} if two else {"8"}
    for where, n in entries(section):
        radii = set(re.findall(r"(\d+)/255", " ".join(where if two else where[1:])))
        if n.paper is not None and where[-1] not in ("Clean", "clean"):
            assert radii <= printed, where
        assert n.paper is None or not two or "4-bit" not in " ".join(where)
        assert n.paper is None or "Feature squeezing" not in where[0]  # it does not say which


def test_other_images_have_no_paper_beside_them() -> None:
    digits = SCALES["smoke"].placed(None, None, "cpu")
    for name in EXPERIMENTS:
        section = render(name, digits, fake_results(cells_of([name], digits)))
        assert all(n.paper is None for n in numbers(section))
        assert not any(line.paper for panel in section.panels for line in panel.lines)
        assert "not the paper's" in section.text[-1]


def test_the_papers_own_slips_are_those_of_its_numbers() -> None:
    """Black-box cells in which DQ has less than its technique alone, and white box above black."""
    rows, words = NUMBERS["table3"], " ".join(WORDS["table3"]["text"])

    def said(row: str, column: str) -> str:
        return f"{100 * rows[row][column]:.0f}"

    falls = [
        f"{row} {attack.upper()} at {eps} ({said(row, at)} to {said(f'{row} + DQ', at)})"
        for row, attack, eps in product(rows, ("fgsm(B)", "pgd(B)"), (2, 8, 16))
        if f"{row} + DQ" in rows and rows[f"{row} + DQ"][at := f"{attack}@{eps}"] < rows[row][at]
    ]
    masked = [
        f"{row} at {eps} ({said(row, f'fgsm@{eps}')} and {said(row, f'fgsm(B)@{eps}')})"
        for row, eps in product(rows, (2, 8, 16))
        if rows[row][f"fgsm@{eps}"] > rows[row][f"fgsm(B)@{eps}"]
    ]
    assert f"these fall: {listed(falls)}." in words
    assert f"for {listed(masked)}: by its own rule" in words


def test_rows_are_named_as_in_the_paper() -> None:
    assert [at["name"] for at, _ in defended(PAPER, "table3")] == list(NUMBERS["table3"])
    wide = replace(SMALL, defense_bits=(1, 4, None))
    names = [at["name"] for at, _ in defended(wide, "table2")][:4]
    assert names == ["Normal", "Normal + DQ", "Normal + DQ (4-bit)", "Normal + DQ (full precision)"]


# --- what is not an accuracy -------------------------------------------------------------------


def test_distances_that_are_not_finite_are_nothing() -> None:
    text = json.dumps(dict(fake_results(cells_of(["fig3"], SMALL)).values))
    gone = json.loads(re.sub(r'"(mean|whole)": [^,}]+', r'"\1": null', text))
    assert all(n.mean is None for n in numbers(render("fig3", SMALL, Results({}, gone))))


def test_only_the_blindness_of_attacks_that_see_the_gradient_counts() -> None:
    for trial, seen in (
        (SMALL.trial("fgsm", 0.1), 0.25), (SMALL.trial(), 0.0), (SMALL.trial("random", 0.1), 0.0),
        (SMALL.trial("fgsm", 0.1, substitute=wrn4), 0.0), (Trial("fgsm", 0.1, unaware=True), 0.0),
    ):  # fmt: skip
        cell = trial.cell(wrn4)
        results = Results({cell.key: fake_measurement(cell, vanishing=0.25)})
        ((_, found),) = ask_all([Ask({}, (wrn4,), trial)], results)
        assert found.vanishing == seen


def test_beta_is_chosen_on_validation_images() -> None:
    def chosen(best: float, missing: float | None = None) -> float | None:
        def rule(cell: Cell) -> float | None:
            own = cell.network.train.beta
            if cell.split == "test":
                return 0.9 if own == SMALL.betas[0] else 0.1  # the test images do not choose
            return None if own == missing else 0.6 if own == best else 0.5

        results = scored(SMALL, "fig6", rule)
        found = chosen_beta(ask_all(tables.fig6(SMALL), results))
        shown = "none yet" if found is None else f"{found:g}"
        assert f"choose: {shown}." in " ".join(render("fig6", SMALL, results).text)
        return found

    first, *_, last = SMALL.betas
    assert chosen(last) == last and chosen(first) == first
    assert chosen(0.0) == min(SMALL.betas), "vanilla is no choice"
    assert chosen(first, missing=last) is None
    whole = ask_all(tables.fig6(PAPER), fake_results(cells_of(["fig6"], PAPER)))
    assert chosen_beta(whole) is None, "no images are held out"


def test_fig7_counts() -> None:
    """A letter for each picture: y where the attacked one is classified rightly."""
    values = dict(fake_results(cells_of(["fig7"], SMALL)).values)
    for (key, value), letters in zip(values.items(), ("yynn", "nynn", "yyyn"), strict=True):
        pairs = zip(value["examples"], letters, strict=False)
        shown = [e | {"adversarial": {"prediction": e["label"] if y == "y" else -1}}
                 for e, y in pairs]  # fmt: skip
        values[key] = {**value, "examples": shown}
    section = render("fig7", SMALL, Results({}, values))
    assert [name for name, _ in section.pictures] == ["FP", "VQ", "DQ"]
    found = [(row[0], row[2]) for row in section.tables[0].rows]
    assert found == [("FP", "2 of 4"), ("VQ", "1 of 4"), ("DQ", "3 of 4")]


def test_what_is_overstated_is_the_usual_attack_minus_the_worst_case() -> None:
    two = SMALL.network(bits=2)
    left = {"pgd-50x10": 0.3, "adaptive": 0.1}

    def rule(cell: Cell) -> float:
        return left.get(cell.attack, 0.5) if cell.network == two else 0.25

    section = render("surrogates", SMALL, scored(SMALL, "surrogates", rule, 1000))
    gaps = {row[0]: row[1:] for row in section.tables[1].rows}
    at_2_bits = gaps["vanilla WRN-10-1"][2]
    assert isinstance(at_2_bits, Number) and at_2_bits.mean == pytest.approx(0.2)
    assert gaps["vanilla VGG-16 at 0.25 of its width"][6:] == (None,) * 3  # 6 to 8 bits
    titles = [str(name).removesuffix(" at 0.25 of its width") for name in gaps]  # would not fit
    assert [panel.title for panel in section.panels] == titles


def test_words() -> None:
    assert (listed([]), listed("a"), listed("abc")) == ("none", "a", "a, b and c")
    assert model_text("resnet-18x0.25") == "ResNet-18 at 0.25 of its width"
    assert model_text("wrn-10-1") == "WRN-10-1"
