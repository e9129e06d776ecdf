"""Claims on DQ with other defences and ranges: sections 5.2 and 5.3, Tables 2 to 4. No torch."""

from collections.abc import Iterator, Sequence

from defquant.experiments.cells import Network
from defquant.experiments.claims.questions import MARGIN, Asked, Claim, Contrast, Question, versus
from defquant.experiments.claims.rows import white_box
from defquant.experiments.compose import Trial, strong_trials
from defquant.experiments.defended_cells import Defended, table_rows, table_substitute
from defquant.experiments.ranges import table4_networks
from defquant.experiments.scales import Scale
from defquant.experiments.words import bits_text, eps_text

__all__ = ["CLAIMS"]

TABLES = {3: "", 2: ", SVHN"}


def _contrast(name: str, trial: Trial, plus: Network, minus: Network) -> Contrast:
    return versus(name, [(trial.cell(plus),)], [(trial.cell(minus),)])


def _plain(scale: Scale, table: int) -> dict[str, Network]:
    """By technique, without DQ."""
    return {row.technique: row.network for row in table_rows(scale, table) if not row.dq}


def _defensive(scale: Scale, table: int, bits: int | None) -> list[Defended]:
    return [row for row in table_rows(scale, table) if row.dq and row.bits == bits]


def _helps(scale: Scale, table: int, bits: int | None, trials: Sequence[Trial]) -> Iterator[Asked]:
    """DQ minus the same technique in full precision without DQ, for each technique."""
    plain = _plain(scale, table)
    what = f"DQ at {bits_text(bits)} minus full precision without DQ, for each technique"
    for trial in trials:
        contrasts = [
            _contrast(row.technique, trial, row.network, plain[row.technique])
            for row in _defensive(scale, table, bits)
        ]
        name = f"{trial.name}, {bits_text(bits)}{TABLES[table]}"
        yield Question(name, what, tuple(contrasts))


def _helps_every_defence(scale: Scale) -> Iterator[Asked]:
    """All white-box attacks at the paper's bits; fewer at the others."""
    one_step, *others = white_box(scale)
    trials = [Trial(scale, attack, scale.paper_eps) for attack in ("rfgsm", "pgd")]
    first, *rest = scale.defense_bits
    for table in TABLES:
        yield from _helps(scale, table, first, [one_step, *trials, *others])
        for bits in rest:
            yield from _helps(scale, table, bits, [one_step, *others])


def _helps_black_box(scale: Scale) -> Iterator[Asked]:
    for table in TABLES:
        through = table_substitute(scale, table)
        radii = dict.fromkeys((scale.paper_eps, scale.hard_eps[0]))
        trials = [Trial(scale, a, eps, through) for eps in radii for a in ("fgsm", "pgd")]
        yield from _helps(scale, table, scale.defense_bits[0], trials)


def _adversarial_best(scale: Scale) -> Iterator[Asked]:
    what = "adversarial training minus other defences, in full precision without DQ"
    for table, suffix in TABLES.items():
        plain = _plain(scale, table)
        trained = [name for name in plain if name.startswith("Adversarial")]
        pairs = [(a, b) for a in trained for b in plain if b not in trained]
        for trial in white_box(scale):
            contrasts = [_contrast(f"{a} minus {b}", trial, plain[a], plain[b]) for a, b in pairs]
            yield Question(trial.name + suffix, what, tuple(contrasts))


def _pgd_strongest(scale: Scale) -> Iterator[Asked]:
    """PGD against each other attack at its eps, means over all networks of a table."""
    radii = dict.fromkeys((scale.paper_eps, scale.hard_eps[0]))
    trials = [Trial(scale, "pgd", eps) for eps in radii]
    trials += strong_trials(scale)
    for table, suffix in TABLES.items():
        networks = [row.network for row in table_rows(scale, table)]
        for pgd in trials:
            hard = [(pgd.cell(n),) for n in networks]
            others = _weaker(scale, table, pgd.eps)
            contrasts = [versus(t.name, [(t.cell(n),) for n in networks], hard) for t in others]
            what = f"other attacks at {eps_text(pgd.eps)} minus {pgd.column}, means over the table"
            yield Question(pgd.name + suffix, what, tuple(contrasts))


def _weaker(scale: Scale, table: int, eps: float) -> list[Trial]:
    through = table_substitute(scale, table)
    direct = [Trial(scale, attack, eps) for attack in ("random", "fgsm", "rfgsm")]
    return direct + [Trial(scale, attack, eps, through) for attack in ("fgsm", "pgd")]


def _relu1_worse(scale: Scale) -> Iterator[Asked]:
    networks, clean = table4_networks(scale), Trial(scale)
    contrast = _contrast("ReLU6", clean, networks[False, 6.0], networks[False, 1.0])
    yield Question("clean", "vanilla ResNet-18 at 4 bits, ReLU6 minus ReLU1", (contrast,))


def _gap_closed(scale: Scale) -> Iterator[Asked]:
    networks = table4_networks(scale)
    one, six = ((Trial(scale).cell(networks[True, high]),) for high in (1.0, 6.0))
    contrasts = (
        versus("ReLU1 minus ReLU6", [one], [six], margin=MARGIN),
        versus("ReLU6 minus ReLU1", [six], [one], margin=MARGIN),
    )
    yield Question("clean", "DQ ResNet-18 at 4 bits, both ways", contrasts)


CLAIMS = (
    Claim(
        "helps-every-defence",
        "section 5.2, Tables 2 and 3",
        "For normal training, feature squeezing and adversarial training, DQ further improves the "
        "robustness.",
        "FGSM at 8, CIFAR-10: 39 to 53%, 35 to 48, 52 to 63, 46 to 53; "
        "SVHN: 42 to 45, 34 to 42, 53 to 59",
        "table3 table2",
        _helps_every_defence,
        "The rows without DQ are full precision, those with DQ have 1 bit: two things change at "
        "once.",
    ),
    Claim(
        "helps-black-box",
        "section 5.2, Tables 2 and 3",
        "DQ consistently improves the black-box robustness.",
        "normal training on CIFAR-10, eps 2/8/16: FGSM(B) 88/63/36 to 84/59/40%, "
        "PGD(B) 90/64/42 to 87/50/27",
        "table3 table2",
        _helps_black_box,
        "Table 3 says the contrary in five of six cells of normal training, Table 2 in none.",
    ),
    Claim(
        "adversarial-training-best",
        "section 5.2, Tables 2 and 3",
        "Among all the defenses, adversarial training performs best.",
        "FGSM at 8 on CIFAR-10: normal 39%, squeezing 35, R+FGSM training 52, PGD training 46",
        "table3 table2",
        _adversarial_best,
    ),
    Claim(
        "pgd-strongest",
        "section 5.2, Tables 2 and 3",
        "White-box PGD is generally the strongest attack.",
        "means of the rows of Table 3 at eps 8: FGSM 48.6%, PGD 25.0; at eps 2: 71.6 and 72.0",
        "table3 table2",
        _pgd_strongest,
        "With its 2 steps at eps 2, PGD is weaker than FGSM in five of the eight rows of Table 3, "
        "and in all six of Table 2.",
    ),
    Claim(
        "relu1-worse",
        "section 5.3, Table 4",
        "With vanilla quantization, ReLU1 is about 1% worse than ReLU6.",
        "93.49% against 94.41",
        "table4",
        _relu1_worse,
    ),
    Claim(
        "relu1-gap-closed",
        "section 5.3, Table 4",
        "With DQ, the gap is filled: ReLU1 and ReLU6 achieve similar accuracy.",
        "95.14% against 95.09",
        "table4",
        _gap_closed,
    ),
)
