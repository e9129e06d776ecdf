"""What feature squeezing detects of a run's adversarial images (Xu et al. 2017)."""

import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from defquant.attacks import FirstOrder, untouched
from defquant.attacks.contract import Target, attacked
from defquant.checkpoint import Facts, stamp
from defquant.data import Dataset
from defquant.defenses import Detection, Detector, Squeezer
from defquant.evaluate import correct
from defquant.files import write_json
from defquant.models.squeezing import FeatureSqueezing, median_2x2, reduce_depth
from defquant.results import Score

__all__ = ["CALIBRATION", "detect", "detection"]

CALIBRATION = 1000  # training images on which the threshold is fitted
RATE = 0.05  # of them, flagged at most
SQUEEZERS: dict[str, Squeezer] = {"depth of 5 bits": reduce_depth, "2x2 median": median_2x2}


def detection(
    model: nn.Module,
    data: Dataset,
    calibration: Dataset,
    attack: FirstOrder,
    *,
    seed: int = 0,
    batch_size: int = 256,
) -> Detection:
    """What a `Detector` flags of the images that `attack` makes of `data`, and of `data` itself.

    The detector is Xu et al.'s: the larger of the two distances ||p(x) - p(s(x))||_1, s the depth
    of 5 bits and the 2x2 median, above the lowest threshold that flags at most 5 % of the clean
    images of `calibration`. The attack does not know of it: an adaptive one may evade it.

    Args:
        model: returns logits; left as it was found. Of a `FeatureSqueezing` the network inside is
            attacked and watched: the detector squeezes the images itself.
        data: images to attack and to count false positives on; all of them.
        calibration: clean images, others than those of `data`.
        attack: its best iterates are taken.
        seed: of the attack's draws, which belong to an image's place in `data`.
        batch_size: rows at a time; the counts do not depend on it.

    Returns:
        `detected` of the images that the network had right and the attack got wrong (Xu et al.
        count so), `false_positives` of all clean images.
    """
    network = _bare(model)
    device = next(network.parameters(), data.images).device
    data = data.to(device)
    detector = Detector("distance", tuple(SQUEEZERS.values()))
    detector = detector.fit(network, calibration.to(device).images, RATE, batch_size)
    target = Target(network, data.images, data.labels, seed, batch_size)
    made = partial(attack.made, network, seed=seed)  # the draws of `evaluate.robust`
    images = torch.cat([part for _, part in attacked(made, target)])
    with untouched(network):
        right = correct(network, data, batch_size=batch_size)
    if not right.any():
        flagged = detector.flags(network, data.images, batch_size)
        return Detection(None, Score(int(flagged.sum()), len(flagged)))
    return detector.rates(network, data.images, images[right], data.labels[right], batch_size)


def detect(
    run: Path,
    model: nn.Module,
    facts: Facts,
    images: Dataset,
    calibration: Dataset,
    attacks: Sequence[FirstOrder],
    *,
    seed: int = 0,
    batch_size: int = 256,
) -> Iterator[dict[str, Any]]:
    """`detection` for each attack: a record of counts and settings, in the run's `detector.json`.

    The file is made anew, and holds what is finished after every attack.
    """
    records: list[dict[str, Any]] = []
    for attack in attacks:
        start = time.perf_counter()
        found = detection(model, images, calibration, attack, seed=seed, batch_size=batch_size)
        record = _about(run, facts, images, calibration) | _counts(found) | {
            "attack": attack.name, "eps": attack.eps, "settings": repr(attack),
            "attack_seed": seed, "seconds": round(time.perf_counter() - start, 3),
            "evidence": stamp(next(model.parameters()).device),
        }  # fmt: skip
        records.append(record)
        write_json(run / "detector.json", records)
        yield record


def _about(run: Path, facts: Facts, images: Dataset, calibration: Dataset) -> dict[str, Any]:
    return {
        "run": run.name, "method": facts.method, "model": facts.model.model,
        "bits": facts.model.bits, "beta": facts.train.beta, "seed": facts.train.seed,
        "data": images.name, "fingerprint": images.fingerprint,
        "rule": "distance", "squeezers": list(SQUEEZERS), "false_positive_rate": RATE,
        "calibration": {"fingerprint": calibration.fingerprint, "images": len(calibration)},
    }  # fmt: skip


def _counts(found: Detection) -> dict[str, int]:
    """`detected` of `fooling` adversarial images, `false_positives` of `clean` ones."""
    caught, false = found.detected, found.false_positives
    return {
        "detected": caught.correct if caught else 0,
        "fooling": caught.total if caught else 0,
        "false_positives": false.correct,
        "clean": false.total,
    }


def _bare(model: nn.Module) -> nn.Module:
    return model.model if isinstance(model, FeatureSqueezing) else model
