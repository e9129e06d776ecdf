"""A transfer matrix over trained runs, each at its own bits or at several."""

import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from defquant.attacks import Attack
from defquant.checkpoint import Facts, load_on, versions
from defquant.diagnose import TransferMatrix, at_bits, transfer_matrix
from defquant.errors import UserError
from defquant.runs import test_images

__all__ = ["check_alike", "names_of", "transfer_runs"]


def transfer_runs(
    runs: Sequence[Path],
    attack: Attack,
    *,
    bits: Sequence[int | None] = (),
    images: int | None = None,
    data_root: str | None = None,
    device: torch.device | None = None,
    batch_size: int = 256,
    seed: int = 0,
) -> dict[str, Any]:
    """The `transfer_matrix` of `runs` on the first run's test images, as `transfer.json` holds it.

    With `bits` every run stands there once at each of them (its weights as trained), without at its
    own. `networks` lists name, run, bits and trained bits, `cells` source, target, fooled, total,
    rate, low and high (None where no image is right for both); attack, data, seed and versions are
    the evidence. Raises `UserError` for unknown or unfinished runs and for runs of other data.
    """
    device = torch.device("cpu") if device is None else device
    loaded = [load_on(run, device) for run in runs]
    check_alike([facts for _, facts in loaded], runs)
    networks: dict[str, nn.Module] = {}
    listed: list[dict[str, Any]] = []
    for name, (model, facts) in zip(names_of(runs), loaded, strict=True):
        for width in dict.fromkeys(bits) if bits else (facts.model.bits,):
            shown = f"{name} {'float' if width is None else f'{width}-bit'}"
            networks[shown] = at_bits(model, width)
            listed.append(
                {"name": shown, "run": name, "bits": width, "trained_bits": facts.model.bits}
            )
    shown_images = test_images(loaded[0][1], data_root, images)
    found = transfer_matrix(networks, shown_images, attack, batch_size=batch_size, seed=seed)
    return {
        "attack": found.attack, "eps": float(getattr(attack, "eps", 0.0)),
        "data": shown_images.name, "fingerprint": shown_images.fingerprint,
        "images": len(shown_images), "seed": seed, "networks": listed,
        "cells": _cells(found),
        "evidence": {
            "versions": versions(device), "command": shlex.join(["defquant", *sys.argv[1:]]),
        },
    }  # fmt: skip


def _cells(matrix: TransferMatrix) -> list[dict[str, Any]]:
    cells = []
    for source, row in zip(matrix.names, matrix.cells, strict=True):
        for target, score in zip(matrix.names, row, strict=True):
            fooled, total = (score.correct, score.total) if score else (0, 0)
            low, high = score.interval if score else (None, None)
            cells.append(
                {
                    "source": source, "target": target, "fooled": fooled, "total": total,
                    "rate": score.accuracy if score else None, "low": low, "high": high,
                }
            )  # fmt: skip
    return cells


def names_of(runs: Sequence[Path]) -> list[str]:
    """The runs' folder names; where two folders share one, their paths below a common folder."""
    places = [run.resolve() for run in runs]
    if len(set(places)) < len(places):
        raise UserError(f"each run is named once; found {', '.join(map(str, runs))}")
    names = [place.name for place in places]
    if len(set(names)) == len(names):
        return names
    common = Path(os.path.commonpath(places))
    return [str(place.relative_to(common)) for place in places]


def check_alike(facts: Sequence[Facts], runs: Sequence[Path]) -> None:
    """Raise `UserError` unless all runs take the same images and know the same classes."""
    for mine, run in zip(facts, runs, strict=True):
        shape, first = ((f.in_channels, f.num_classes) for f in (mine, facts[0]))
        if shape != first:
            raise UserError(
                f"runs must take the same images; {runs[0]} takes {first[0]} channels and knows "
                f"{first[1]} classes, {run} {shape[0]} and {shape[1]}: name runs of one data set"
            )
        if (mine.data.data, mine.classes) != (facts[0].data.data, facts[0].classes):
            raise UserError(
                f"runs must be of one data set; {runs[0]} is of {facts[0].data_name}, {run} of "
                f"{mine.data_name}: name runs of one data set"
            )
