"""Everything that is wrong with a run, as one record: amplification, Lipschitz audit, masking."""

import math
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from defquant.attacks import PGD
from defquant.checkpoint import load_on, versions
from defquant.config import check_eps
from defquant.data import Dataset
from defquant.diagnose import Audit, Effort, Verdict, audit, layer_distances, masking_verdict
from defquant.errors import UserError
from defquant.results import Score
from defquant.runs import test_images
from defquant.transfers import check_alike, names_of

__all__ = ["AMPLIFIED", "diagnose_run"]

AMPLIFIED = 128  # images of Figure 3, at most


def diagnose_run(
    run: Path,
    eps: float,
    *,
    against: Sequence[Path] = (),
    substitute: Path | None = None,
    images: int | None = None,
    audited: int = 8,
    effort: Effort | None = None,
    data_root: str | None = None,
    device: torch.device | None = None,
) -> dict[str, Any]:
    """The diagnosis of `run` on its test images, as `diagnosis.json` holds it.

    `amplification`: Eq. 4 at the input of each layer of the run and of the runs `against`, each
    under PGD of 20 steps on itself, on the first 128 images. `audit`: of the first `audited`
    images; None for 0. `masking`: the verdict's signs, on all `images`. `verdict` is its overall
    one. Raises `UserError` for unknown runs, runs of other data, and as its three parts do.
    """
    if not check_eps(eps):
        raise UserError("the masking verdict needs an eps above 0; found 0: write 8/255")
    if audited < 0:
        raise UserError(f"the audit takes 0 images (none) or more; found {audited}")
    device = torch.device("cpu") if device is None else device
    paths = [run, *against]
    loaded = [load_on(path, device) for path in paths]
    other = None if substitute is None else load_on(substitute, device)
    others = [] if substitute is None or other is None else [(substitute, other[1])]
    check_alike([f for _, f in loaded] + [f for _, f in others], paths + [p for p, _ in others])
    (model, facts), effort = loaded[0], effort or Effort()
    shown = test_images(facts, data_root, images)
    names = names_of(paths)
    verdict = masking_verdict(
        model, shown, eps, substitute=None if other is None else other[0], effort=effort
    )
    return {
        "format": 1, "kind": "defquant diagnosis", "run": names[0], "method": facts.method,
        "bits": facts.model.bits, "data": shown.name, "fingerprint": shown.fingerprint,
        "images": len(shown), "eps": eps, "effort": asdict(effort),
        "substitute": None if substitute is None else str(substitute),
        "verdict": verdict.overall,
        "amplification": [
            {"name": name, "method": f.method, "bits": f.model.bits,
             "layers": _layers(m, shown.first(min(AMPLIFIED, len(shown))), eps, effort)}
            for name, (m, f) in zip(names, loaded, strict=True)
        ],
        "audit": _audited(
            audit(model, shown.first(min(audited, len(shown))), batch_size=effort.batch_size)
        ) if audited else None,
        "masking": _masking(verdict),
        "evidence": {
            "versions": versions(device), "command": shlex.join(["defquant", *sys.argv[1:]]),
        },
    }  # fmt: skip


def _layers(model: nn.Module, data: Dataset, eps: float, effort: Effort) -> list[dict[str, Any]]:
    device = next(model.parameters()).device
    x, y = data.to(device).take(torch.arange(len(data)))
    moved = torch.cat([
        PGD(eps, steps=20).last(
            model, x[ids], y[ids], ids=ids, generator=torch.Generator().manual_seed(effort.seed)
        )
        for ids in torch.arange(len(x), device=device).split(effort.batch_size)
    ])  # fmt: skip
    return [
        {"layer": found.layer, "mean": found.distance.mean, "spread": found.distance.spread}
        for found in layer_distances(model, x, moved, batch_size=effort.batch_size)
    ]


def _audited(found: Audit) -> dict[str, Any]:
    return {
        "images": len(found.jacobians),
        "bound": _finite(found.bound),
        "lower": _finite(found.lower),
        "surrogate_radius_linf": max(_finite(r.linf) or 0.0 for r in found.surrogate_radii),
        "layers": [
            {name: _finite(value) if isinstance(value, float) else value
             for name, value in asdict(layer).items()}
            for layer in found.layers
        ],
    }  # fmt: skip


def _masking(verdict: Verdict) -> dict[str, Any]:
    return {
        "verdict": verdict.overall,
        "quantized": verdict.quantized,
        "usual": _counted(verdict.usual),
        "strongest": _counted(verdict.strongest),
        "signs": [
            {"name": sign.name, "verdict": sign.verdict, **_counted(sign.finding),
             "means": sign.means, "do": sign.do}
            for sign in verdict.signs
        ],
    }  # fmt: skip


def _counted(score: Score) -> dict[str, Any]:
    low, high = score.interval
    return {
        "count": score.correct, "total": score.total, "rate": score.accuracy, "low": low,
        "high": high,
    }  # fmt: skip


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
