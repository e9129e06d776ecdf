"""The paper's own numbers, in percent as it prints them, and as fractions where they are looked up.

Tables 1 to 6 and section 3 of Lin, Gan, Han, "Defensive Quantization", ICLR 2019. Only numbers
that are printed: what its figures draw is not read off. The constants hold what stands in print,
slips included; the functions give fractions in [0, 1], and None where the paper has no number.
"""

from collections.abc import Mapping
from typing import TypedDict

__all__ = [
    "BEST_BETA", "DEFENSE_EPS", "EPS", "LOSS_AT_5_BITS", "TABLE1", "TABLE2", "TABLE3", "TABLE4",
    "TABLE4_DIFFERENCE", "TABLE5", "TABLE6", "Bits", "Defense", "at_4_bits", "defended", "is_eps",
    "masking", "share", "table1", "table1_end",
]  # fmt: skip

EPS = 8  # of Tables 1, 5 and 6, in 255ths
DEFENSE_EPS = (2, 8, 16)  # of Tables 2 and 3
LOSS_AT_5_BITS = {"VGG-16": 25.3, "Wide ResNet": 9.2}  # section 3, FGSM at 8; Table 1 has 9.1
BEST_BETA = 0.002  # appendix B


class Bits(TypedDict):
    """Rows of Table 1: full precision, then 1 to 5 bits; FGSM at 8."""

    clean: tuple[float, ...]
    fgsm: tuple[float, ...]
    gain: float
    best: float


TABLE1: Mapping[float, Bits] = {  # by beta, 0 for vanilla
    0.0: {
        "clean": (94.8, 42.0, 84.9, 92.8, 93.9, 94.7),
        "fgsm": (39.3, 9.0, 8.5, 14.1, 19.0, 30.2),
        "gain": -9.1,
        "best": 39.3,
    },
    3e-4: {
        "clean": (95.3, 95.2, 95.3, 95.1, 95.1, 95.1),
        "fgsm": (41.8, 43.2, 41.1, 40.1, 39.8, 39.3),
        "gain": 1.4,
        "best": 43.2,
    },
    6e-4: {
        "clean": (95.6, 95.7, 95.2, 95.4, 95.6, 95.5),
        "fgsm": (45.7, 48.3, 47.9, 43.8, 43.9, 44.6),
        "gain": 2.6,
        "best": 48.3,
    },
    1e-3: {
        "clean": (95.9, 95.8, 95.6, 95.6, 95.8, 95.8),
        "fgsm": (49.1, 51.3, 50.4, 51.3, 49.8, 51.8),
        "gain": 2.7,
        "best": 51.8,
    },
}

# clean; then Random, FGSM, R+FGSM, PGD, FGSM(B), PGD(B) at eps 2, 8, 16
Defense = tuple[float, Mapping[str, tuple[int, int, int]]]
_COLUMNS = ("random", "fgsm", "rfgsm", "pgd", "fgsm(B)", "pgd(B)")


def _defense(clean: float, line: str) -> Defense:
    triples = [tuple(map(int, triple.split("/"))) for triple in line.split()]
    return clean, {name: (t[0], t[1], t[2]) for name, t in zip(_COLUMNS, triples, strict=True)}


TABLE2: Mapping[tuple[str, bool], Defense] = {  # by technique and whether DQ is with it
    ("Normal", False): _defense(96.8, "97/97/96 74/42/26 86/55/35 77/05/00 90/62/40 92/58/30"),
    ("Normal", True): _defense(96.7, "96/96/96 77/45/31 87/59/40 79/10/00 90/63/42 92/60/31"),
    ("Feature Squeezing", False): _defense(
        96.3, "96/96/95 69/34/20 84/48/28 72/03/00 89/61/38 91/56/27"
    ),
    ("Feature Squeezing", True): _defense(
        96.2, "96/96/96 75/42/28 86/56/36 77/06/00 90/63/40 92/59/30"
    ),
    ("Adversarial R+FGSM", False): _defense(
        96.6, "97/96/96 84/53/38 91/70/57 87/30/06 93/74/54 94/83/72"
    ),
    ("Adversarial R+FGSM", True): _defense(
        96.6, "97/96/95 88/59/40 93/77/61 91/47/17 94/80/61 95/89/84"
    ),
}
TABLE3: Mapping[tuple[str, bool], Defense] = {
    ("Normal", False): _defense(94.8, "95/91/77 59/39/29 72/37/17 56/01/00 88/63/36 90/64/42"),
    ("Normal", True): _defense(95.9, "96/94/84 68/53/42 77/50/30 62/04/00 84/59/40 87/50/27"),
    ("Feature Squeezing", False): _defense(
        94.1, "94/92/81 61/35/27 76/40/21 64/02/00 87/62/30 89/70/42"
    ),
    ("Feature Squeezing", True): _defense(
        94.9, "95/93/82 66/48/33 77/51/29 66/06/01 87/62/29 90/70/43"
    ),
    ("Adversarial R+FGSM", False): _defense(
        91.6, "92/91/91 81/52/38 87/69/48 84/43/11 92/89/85 92/91/89"
    ),
    ("Adversarial R+FGSM", True): _defense(
        94.0, "94/93/93 85/63/51 90/74/58 87/50/22 93/91/87 94/92/92"
    ),
    ("Adversarial PGD", False): _defense(
        86.6, "86/86/86 74/46/31 79/63/46 76/44/20 84/83/81 84/83/83"
    ),
    ("Adversarial PGD", True): _defense(
        87.5, "87/87/87 79/53/36 83/69/52 81/50/22 87/86/82 87/86/86"
    ),
}

TABLE4: Mapping[tuple[bool, float], float] = {  # by whether it is DQ and the upper end
    (False, 1.0): 93.49,
    (False, 6.0): 94.41,
    (True, 1.0): 95.14,
    (True, 6.0): 95.09,
}
TABLE4_DIFFERENCE = {False: -0.92, True: 0.05}

TABLE5: Mapping[str, tuple[float, float, float]] = {  # clean, white box, black box
    "Full-Precision": (83.47, 50.51, 65.58),
    "Tanh Quantized": (81.60, 71.03, 61.57),
    "ReLU6 Quantized": (78.97, 48.90, 59.44),
}
TABLE6: Mapping[str, tuple[float, float, float]] = {
    "Adversarial FGSM": (94.55, 94.18, 51.65),
    "Adversarial R+FGSM": (91.61, 51.65, 87.39),
}


def share(percent: float | None) -> float | None:
    """Percent as a fraction."""
    return None if percent is None else percent / 100


def is_eps(eps: float, pixels: float = EPS) -> bool:
    """Whether `eps` in [0, 1] is `pixels` / 255."""
    return abs(255 * eps - pixels) < 0.02


def table1(row: int, attack: str, eps: float, bits: int | None) -> float | None:
    """`row` 0 is vanilla, 1 to 3 are DQ in order of beta; clean, or FGSM at 8."""
    if row >= len(TABLE1) or (bits or 0) > 5:
        return None
    values = list(TABLE1.values())[row]
    if attack == "clean":
        return share(values["clean"][bits or 0])
    return share(values["fgsm"][bits or 0]) if attack == "fgsm" and is_eps(eps) else None


def table1_end(row: int, attack: str, eps: float, end: str) -> float | None:
    """Quantize Gain (`gain`) or Best Acc. (`best`) of a row of FGSM at 8."""
    if row >= len(TABLE1) or attack != "fgsm" or not is_eps(eps):
        return None
    values = list(TABLE1.values())[row]
    return share(values["gain"] if end == "gain" else values["best"])


def at_4_bits(beta: float, attack: str, eps: float) -> float | None:
    """Table 1's column of 4 bits, for the same beta; Figure 6 draws such networks."""
    row = next((i for i, own in enumerate(TABLE1) if abs(own - beta) < 1e-9), len(TABLE1))
    return table1(row, attack, eps, 4)


def defended(table: int, technique: str, dq: bool, attack: str, eps: float) -> float | None:
    """Tables 2 and 3; `attack` with `(B)` for a black box."""
    clean, attacks = (TABLE2 if table == 2 else TABLE3)[technique, dq]
    if attack == "clean":
        return share(clean)
    found = [i for i, pixels in enumerate(DEFENSE_EPS) if is_eps(eps, pixels)]
    return share(attacks[attack][found[0]]) if found and attack in attacks else None


def masking(table: int, name: str, column: str, eps: float) -> float | None:
    """Tables 5 and 6: `clean`, `white` or `black` of the row `name`; attacked at 8."""
    values = (TABLE5 if table == 5 else TABLE6)[name]
    if column == "clean":
        return share(values[0])
    return share(values[1 if column == "white" else 2]) if is_eps(eps) else None
