from pathlib import Path

import pytest

from defquant.errors import UserError
from defquant.report import plot_curves
from defquant.results import Measurement


def measured(method: str, attack: str, eps: float, correct: int, seed: int = 0) -> Measurement:
    bits = None if method == "float" else 4
    return Measurement(
        f"{method}-{seed}", method, "wrn-10-1", bits, 0.0, seed, "digits", "f0", attack, eps,
        attack, correct, 100,
    )  # fmt: skip


DATA = [
    measured(method, attack, eps, correct, seed)
    for method in ("float", "vanilla")
    for seed in (0, 1)
    for attack, eps, correct in (("clean", 0.0, 95), ("FGSM", 8 / 255, 50), ("PGD", 8 / 255, 20))
]


def test_figures_are_drawn_the_same_every_time(tmp_path: Path) -> None:
    first = plot_curves(DATA, tmp_path / "a.png").read_bytes()
    assert first.startswith(b"\x89PNG")
    assert plot_curves(DATA, tmp_path / "b.png").read_bytes() == first
    svg = plot_curves(DATA, tmp_path / "c.svg").read_text()
    assert "<svg" in svg
    assert plot_curves(DATA, tmp_path / "d.pdf").read_bytes().startswith(b"%PDF")


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="ends in"):
        plot_curves(DATA, tmp_path / "a.txt")
    with pytest.raises(UserError, match="no attacks"):
        plot_curves([m for m in DATA if m.attack == "clean"], tmp_path / "a.png")
