"""What a run's folder keeps of its diagnosis, and a folder of the transfer between several runs."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import nn

from defquant.attacks import PGD, Attack
from defquant.checkpoint import Facts, load_on, stamp
from defquant.data import Dataset, to_unit
from defquant.diagnose.layers import Audit, audit, layer_distances
from defquant.diagnose.masking import Effort, Verdict, masking_verdict
from defquant.diagnose.precision import at_bits, finite, last_made, transfer_matrix
from defquant.errors import UserError
from defquant.evaluate import Images, on_device
from defquant.foreign import warn_of_chance
from defquant.measure import Subject, subject_of
from defquant.records import Score
from defquant.runs import test_images

__all__ = [
    "AMPLIFIED", "diagnose_foreign", "diagnose_run", "diagnosis", "transfer_foreign",
    "transfer_runs",
]  # fmt: skip

_CPU = torch.device("cpu")
AMPLIFIED = 128  # images of Figure 3, at most


def diagnosis(
    model: nn.Module,
    data: Images,
    eps: float,
    *,
    against: Mapping[str, nn.Module] | None = None,
    substitute: nn.Module | None = None,
    audited: int = 8,
    effort: Effort | None = None,
) -> dict[str, Any]:
    """The three parts of a diagnosis of any `model` on `data`, as plain columns.

    `amplification`: Eq. 4 at the input of each layer of the model and of the networks `against`,
    each under PGD of 20 steps on itself, on the first 128 images. `audit`: of the first `audited`
    images; None for 0. `masking`: the verdict's signs, on all images. `verdict` is its overall
    one; `left_out` says why the audit or an amplification could not be made. Raises `UserError` as
    `masking_verdict` does.
    """
    effort = effort or Effort()
    if audited < 0:
        raise UserError(f"the audit takes 0 images (none) or more; found {audited}")
    verdict = masking_verdict(model, data, eps, substitute=substitute, effort=effort)
    left_out, amplified, found = dict[str, str](), [], None
    for name, network in {"": model, **(against or {})}.items():
        try:
            layers = _layers(network, _first(data, AMPLIFIED), eps, effort)
        except UserError as why:
            layers, left_out[f"amplification {name}".strip()] = [], str(why)
        amplified.append({"name": name, "layers": layers})
    try:
        if audited:
            found = _audited(audit(model, _first(data, audited), batch_size=effort.batch_size))
    except UserError as why:
        left_out["audit"] = str(why)
    return {
        "verdict": verdict.overall, "amplification": amplified, "audit": found,
        "masking": _masking(verdict), "left_out": left_out,
    }  # fmt: skip


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
    device: torch.device = _CPU,
) -> dict[str, Any]:
    """The `diagnosis` of `run` on its test images, as `diagnosis.json` holds it.

    Raises `UserError` for unknown runs, runs of other data, and as `diagnosis` does.
    """
    loaded = _loaded([run, *against, *([substitute] if substitute else [])], device)
    box = loaded.pop()[0] if substitute else None
    names, (model, facts) = _names_of([run, *against]), loaded[0]
    others = dict(zip(names[1:], (m for m, _ in loaded[1:]), strict=True))
    shown = test_images(facts, data_root, images)
    found = diagnosis(
        model, shown, eps, against=others, substitute=box, audited=audited, effort=effort
    )
    subjects = dict(zip(names, (subject_of(facts) for _, facts in loaded), strict=True))
    source = str(substitute) if substitute else None
    return _told(subjects, shown, eps, effort, found, substitute=source, evidence=stamp(device))


def diagnose_foreign(
    place: Path,
    model: nn.Module,
    subject: Subject,
    images: Dataset,
    eps: float,
    *,
    audited: int = 8,
    effort: Effort | None = None,
) -> dict[str, Any]:
    """The same of a model that is no run, for the folder `place`."""
    found = diagnosis(model, images, eps, audited=audited, effort=effort)
    right = next((sign["total"] for sign in found["masking"]["signs"]), 0)
    warn_of_chance(Score(right, len(images)), images.num_classes)
    evidence = stamp(images.images.device) | dict(subject.evidence or {})
    return _told({place.name: subject}, images, eps, effort, found, evidence=evidence)


def _told(
    subjects: Mapping[str, Subject], images: Dataset, eps: float, effort: Effort | None,
    found: dict[str, Any], **known: Any,
) -> dict[str, Any]:  # fmt: skip
    """A diagnosis with what it is of; the first of `subjects`, by name, was diagnosed."""
    about = [{"name": n, "method": s.method, "bits": s.bits} for n, s in subjects.items()]
    amplified = [one | of for one, of in zip(found["amplification"], about, strict=True)]
    return {
        "format": 1, "kind": "defquant diagnosis", "run": about[0]["name"],
        "method": about[0]["method"], "bits": about[0]["bits"], "data": images.name,
        "fingerprint": images.fingerprint, "images": len(images), "eps": eps,
        "effort": asdict(effort or Effort()), "substitute": None, **found,
        "amplification": amplified, **known,
    }  # fmt: skip


def _first(data: Images, count: int) -> Images:
    if isinstance(data, Dataset):
        return data.first(min(count, len(data)))
    return data[0][:count], data[1][:count]


def _layers(model: nn.Module, data: Images, eps: float, effort: Effort) -> list[dict[str, Any]]:
    x, y = on_device(model, data)
    x, size = to_unit(x), effort.batch_size
    moved = last_made(model, x, y, PGD(eps, steps=20), size, effort.seed)
    return [
        {"layer": found.layer, "mean": found.distance.mean, "spread": found.distance.spread}
        for found in layer_distances(model, x, moved, batch_size=size)
    ]


def _audited(found: Audit) -> dict[str, Any]:
    radii = (radius.linf for radius in found.surrogate_radii)
    return {
        "images": len(found.jacobians), "bound": found.bound, "unbounded": found.unbounded,
        "lower": finite(found.lower), "surrogate_radius_linf": max(finite(r) or 0.0 for r in radii),
        "layers": [
            {name: finite(value) if isinstance(value, float) else value
             for name, value in asdict(layer).items()}
            for layer in found.layers
        ],
    }  # fmt: skip


def _masking(verdict: Verdict) -> dict[str, Any]:
    scores = {name: getattr(verdict, name) for name in ("usual", "strongest", "overstated")}
    return {
        "verdict": str(verdict), "quantized": verdict.quantized,
        **{name: _counted(score) for name, score in scores.items()},
        "signs": [
            {"name": sign.name, "verdict": sign.verdict, **_counted(sign.finding),
             "means": sign.means, "do": sign.do}
            for sign in verdict.signs
        ],
    }  # fmt: skip


def _counted(score: Score | None, what: str = "count") -> dict[str, Any]:
    if score is None:
        return {what: 0, "total": 0, "rate": None, "low": None, "high": None}
    low, high = score.interval
    return {what: score.correct, "total": score.total, "rate": score.accuracy, "low": low,
            "high": high}  # fmt: skip


def transfer_runs(
    runs: Sequence[Path],
    attack: Attack,
    *,
    bits: Sequence[int | None] = (),
    images: int | None = None,
    data_root: str | None = None,
    device: torch.device = _CPU,
    batch_size: int = 256,
    seed: int = 0,
) -> dict[str, Any]:
    """The `transfer_matrix` of `runs` on the first run's test images, as `transfer.json` holds it.

    With `bits` every run stands there once at each of them (its weights as trained), without at its
    own. `networks` lists name, run, bits and trained bits, `cells` source, target, fooled, total,
    rate, low and high (None where no image is right for both); attack, data, seed and versions are
    the evidence. Raises `UserError` for unknown or unfinished runs and for runs of other data.
    """
    loaded = _loaded(runs, device)
    networks: dict[str, nn.Module] = {}
    listed: list[dict[str, Any]] = []
    for name, (model, facts) in zip(_names_of(runs), loaded, strict=True):
        for width in dict.fromkeys(bits) if bits else (facts.model.bits,):
            shown = f"{name} {'float' if width is None else f'{width}-bit'}"
            networks[shown] = at_bits(model, width)
            listed.append(
                {"name": shown, "run": name, "bits": width, "trained_bits": facts.model.bits}
            )
    tested = test_images(loaded[0][1], data_root, images).to(device)
    return _transferred(networks, listed, tested, attack, batch_size=batch_size, seed=seed)


def transfer_foreign(
    models: Mapping[Path, nn.Module], images: Dataset, attack: Attack, **how: int
) -> dict[str, Any]:
    """The same between networks that need not be runs, by what names each; at their own bits.

    `how`: batch_size and seed.
    """
    networks = dict(zip(_names_of(list(models)), models.values(), strict=True))
    listed = [{"name": name, "run": name, "bits": None, "trained_bits": None} for name in networks]
    return _transferred(networks, listed, images, attack, **how)


def _transferred(
    networks: Mapping[str, nn.Module], listed: Sequence[Mapping[str, Any]], images: Dataset,
    attack: Attack, *, batch_size: int = 256, seed: int = 0,
) -> dict[str, Any]:  # fmt: skip
    found = transfer_matrix(networks, images, attack, batch_size=batch_size, seed=seed)
    scores = [score for row in found.cells for score in row]
    return {
        "attack": found.attack, "eps": float(getattr(attack, "eps", 0.0)), "data": images.name,
        "fingerprint": images.fingerprint, "images": len(images), "seed": seed,
        "networks": list(listed),
        "cells": [
            {"source": source, "target": target} | _counted(score, "fooled")
            for (source, target), score in zip(product(found.names, repeat=2), scores, strict=True)
        ],
        "evidence": stamp(images.images.device),
    }  # fmt: skip


def _names_of(runs: Sequence[Path]) -> list[str]:
    """The runs' folder names; where two folders share one, their paths below a common folder."""
    places = [run.resolve() for run in runs]
    if len(set(places)) < len(places):
        raise UserError(f"each run is named once; found {', '.join(map(str, runs))}")
    names = [place.name for place in places]
    if len(set(names)) == len(names):
        return names
    common = Path(os.path.commonpath(places))
    return [str(place.relative_to(common)) for place in places]


def _loaded(runs: Sequence[Path], device: torch.device) -> list[tuple[nn.Module, Facts]]:
    """Runs that take the same images and know the same classes; `UserError` for others."""
    loaded = [load_on(run, device) for run in runs]
    for (_, mine), run in zip(loaded, runs, strict=True):
        one = loaded[0][1]
        shape, first = ((f.in_channels, f.num_classes) for f in (mine, one))
        if shape != first:
            raise UserError(
                f"runs must take the same images; {runs[0]} takes {first[0]} channels and knows "
                f"{first[1]} classes, {run} {shape[0]} and {shape[1]}: name runs of one data set"
            )
        if (mine.data.data, mine.classes) != (one.data.data, one.classes):
            raise UserError(
                f"runs must be of one data set; {runs[0]} is of {one.data_name}, {run} of "
                f"{mine.data_name}: name runs of one data set"
            )
    return loaded
