"""Pictures and predictions: Figure 7."""

from collections.abc import Iterable, Mapping
from typing import Any

from defquant.experiments.cells import Cell, Network
from defquant.experiments.compose import section
from defquant.experiments.scales import Scale
from defquant.experiments.section import Section, Table
from defquant.experiments.standard import dq, vanilla
from defquant.experiments.store import Results
from defquant.experiments.words import data_text, eps_text, listed, model_text, training_text

__all__ = ["fig7", "fig7_cells", "fig7_networks"]

Answers = Mapping[int, tuple[bool, float]]
"""By picture: whether the prediction is right, and its confidence."""


def fig7_networks(scale: Scale) -> dict[str, Network]:
    """By the paper's names: full precision, vanilla and defensive quantisation at 4 bits."""
    return {"FP": vanilla(scale, None), "VQ": vanilla(scale, 4), "DQ": dq(scale, 4)}


def fig7_cells(scale: Scale) -> list[Cell]:
    """FGSM on each network; the paper does not name the attack of its figure."""
    eps = scale.hard_eps[0]
    return [Cell(n, "examples", "fgsm", eps) for n in fig7_networks(scale).values()]


def fig7(scale: Scale, results: Results) -> Section:
    """The pictures, and of ours what the paper's appendix C says of its own."""
    values = map(results.value, fig7_cells(scale))
    records = {
        name: value for name, value in zip(fig7_networks(scale), values, strict=True) if value
    }
    attacked = {name: _answers(record, "adversarial") for name, record in records.items()}
    names = {record["data"] for record in records.values()}
    return section(
        "fig7",
        "Figure 7: attacked pictures with predictions",
        [*_about(scale, names), _still_right(attacked), _compared(attacked)],
        fig7_cells(scale),
        results,
        images=(scale.data, "cifar10"),
        tables=[_table(records)] if records else [],
        pictures=list(records.items()),
    )


def _about(scale: Scale, names: Iterable[str]) -> list[str]:
    data = listed(sorted(names)) if names else data_text(scale.data)
    eps = eps_text(scale.hard_eps[0])
    return [
        f"{model_text(scale.wrn)} (the paper: WRN-28-10), trained for "
        f"{training_text(scale.train, scale.data, data)}: full precision (FP), vanilla (VQ) and "
        f"DQ with β = {scale.beta:g}, both at 4 bits. FGSM at {eps}, made on each network for "
        "itself; the paper names neither attack nor ε of its figure.",
        "The paper, of its eight pictures: VQ gets more of them wrong; DQ is right on two where FP "
        "fails; where both are right, DQ is surer of the true class; where all fail, DQ is the "
        "least sure of its wrong class. Eight pictures illustrate, they measure nothing.",
    ]


def _answers(record: Any, images: str) -> Answers:
    """On the `clean` or the `adversarial` pictures."""
    return {
        e["id"]: (e[images]["prediction"] == e["label"], e[images]["confidence"])
        for e in record["examples"]
    }


def _table(records: Mapping[str, Any]) -> Table:
    rows = tuple(
        (name, *(_right(_answers(record, kind)) for kind in ("clean", "adversarial")))
        for name, record in records.items()
    )
    return Table(("Network", "Clean pictures", "Attacked"), rows, "Pictures classified rightly.")


def _right(answers: Answers) -> str:
    return f"{sum(right for right, _ in answers.values())} of {len(answers)}"


def _still_right(attacked: Mapping[str, Answers]) -> str:
    counts = [f"{name} on {_right(answers)}" for name, answers in attacked.items()]
    return f"Ours, still right after the attack: {listed(counts)} pictures." if counts else ""


def _compared(attacked: Mapping[str, Answers]) -> str:
    """Appendix C's comparisons over the pictures that all three networks were shown."""
    if len(attacked) < 3:
        return ""
    fp, vq, own = (attacked[name] for name in ("FP", "VQ", "DQ"))
    shared = [i for i in own if i in fp and i in vq]
    saved = [i for i in shared if own[i][0] and not fp[i][0]]
    lost = [i for i in shared if fp[i][0] and not own[i][0]]
    kept = [i for i in shared if own[i][0] and fp[i][0]]
    fallen = [i for i in shared if not (own[i][0] or fp[i][0] or vq[i][0])]
    surer = sum(own[i][1] > fp[i][1] for i in kept)
    least = sum(own[i][1] < min(fp[i][1], vq[i][1]) for i in fallen)
    return (
        f"DQ is right on {len(saved)} where FP fails, FP on {len(lost)} where DQ fails. "
        + f"Both are right on {len(kept)}; DQ is surer of the true class on {surer} of them. "
        + f"All three fail on {len(fallen)}; DQ is the least sure on {least} of them."
    )
