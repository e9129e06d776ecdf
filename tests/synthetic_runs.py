"""A folder of made-up runs that looks like a real one, for the report's tests and by eye:
`python tests/synthetic_runs.py FOLDER`.
"""

import base64
import io
import json
import math
import random
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from defquant import results as stored
from defquant.results import Measurement

NETWORKS: dict[str, tuple[str, int | None, float, float]] = {
    # name: method, bits, beta, how fast the accuracy falls
    "float": ("float", None, 0.0, 1.0),
    "vanilla-4bit": ("vanilla", 4, 0.0, 1.15),
    "vanilla-1bit": ("vanilla", 1, 0.0, 1.7),
    "dq-full": ("DQ", None, 0.05, 0.85),
    "dq-4bit": ("DQ", 4, 0.05, 0.75),
    "dq-1bit": ("DQ", 1, 0.05, 0.95),
}
STRENGTH = {"Random": 0.15, "FGSM": 0.7, "PGD": 1.0, "PGD(B)": 0.35}
RADII = (8, 16, 32, 48)
TOTAL = 360


def append(path: Path, m: Measurement) -> None:
    """`defquant.results.append` into a folder that need not be there yet."""
    path.parent.mkdir(parents=True, exist_ok=True)
    stored.append(path, m)


def measurement(**changes: Any) -> Measurement:
    plain = Measurement(
        run="run",
        method="float",
        model="wrn-10-1",
        bits=None,
        beta=0.0,
        seed=0,
        data="digits",
        fingerprint="5f1c" * 16,
        attack="clean",
        eps=0.0,
        settings="",
        correct=90,
        total=100,
    )
    return replace(plain, **changes)


def write_runs(folder: Path, *, seeds: int = 3, networks: tuple[str, ...] = ()) -> Path:
    """All networks under all attacks at all radii, with settings, logs and pictures."""
    for name in networks or tuple(NETWORKS):
        for seed in range(seeds):
            write_run(folder / f"{name}-s{seed}", name, seed)
    return folder


def write_run(place: Path, name: str, seed: int) -> None:
    method, bits, beta, falls = NETWORKS[name]
    chance = random.Random(f"{name} {seed}")
    base = measurement(
        run=place.name,
        method=method,
        bits=bits,
        beta=beta,
        seed=seed,
        total=TOTAL,
        seconds=4.2,
        evidence={
            "versions": {"python": "3.11.2", "torch": "2.13.0", "defquant": "0.1.0"},
            "machine": "2 x x86-64, 8 GB",
            "threads": 2,
            "command": f"defquant attack runs/{place.name} --attack random fgsm pgd "
            "--eps 8/255 16/255 32/255 48/255",
        },
    )
    results = place / "results.jsonl"
    clean = 0.965 - 0.04 * (name == "vanilla-1bit")
    append(results, replace(base, correct=_draw(chance, clean)))
    for attack, strength in STRENGTH.items():
        for radius in RADII:
            robust = clean * math.exp(-((falls * strength * radius / 36) ** 1.7))
            row = replace(
                base,
                attack=attack,
                eps=round(radius / 255, 4),
                correct=_draw(chance, robust),
                settings=f"{attack}(eps={radius}/255, steps=40, step=0.0098, restarts=3)",
            )
            append(results, row)
    _write_settings(place, name, seed)
    _write_log(place, chance, beta)
    _write_examples(place, chance, base)


def _draw(chance: random.Random, accuracy: float) -> int:
    shifted = min(max(accuracy + chance.gauss(0, 0.012), 0), 1)
    return sum(chance.random() < shifted for _ in range(TOTAL))


def _write_settings(place: Path, name: str, seed: int) -> None:
    method, bits, beta, _ = NETWORKS[name]
    config = {
        "model": {"model": "wrn-10-1", "bits": bits, "high": 6.0, "convex": method == "DQ"},
        "data": {"data": "digits", "train_images": None},
        "train": {"epochs": 40, "lr": 0.1, "beta": beta, "seed": seed, "attack": "none"},
    }
    (place / "config.json").write_text(json.dumps(config))


def _write_log(place: Path, chance: random.Random, beta: float) -> None:
    lines = []
    for epoch in range(1, 41):
        loss = 2.3 * math.exp(-epoch / 7) + 0.03 + 0.02 * chance.random()
        accuracy = 0.97 - 0.85 * math.exp(-epoch / 4) - 0.02 * chance.random()
        line = {"epoch": epoch, "lr": 0.1, "loss": loss, "accuracy": min(1, accuracy + 0.02)}
        line |= {"penalty": 40 * math.exp(-epoch / 5) + 2 if beta else 0.0}
        line |= {"test_accuracy": accuracy, "seconds": 1.4, "images_per_second": 1020.0}
        lines.append(json.dumps(line))
    (place / "log.jsonl").write_text("\n".join(lines) + "\n")


def _write_examples(place: Path, chance: random.Random, base: Measurement) -> None:
    from sklearn.datasets import load_digits

    digits = load_digits()
    noise = np.random.default_rng(base.seed)
    examples = []
    for number in range(6):
        pixels, label = digits.images[number * 7] / 16, int(digits.target[number * 7])
        shifted = np.clip(pixels + 0.1255 * noise.choice([-1, 1], pixels.shape), 0, 1)
        wrong = chance.random() < 0.5
        examples.append(
            {
                "id": 1437 + number * 7,
                "label": label,
                "clean_png": png(pixels),
                "adversarial_png": png(shifted),
                "clean": {"prediction": label, "confidence": 0.9 + 0.1 * chance.random()},
                "adversarial": {
                    "prediction": (label + 3) % 10 if wrong else label,
                    "confidence": 0.4 + 0.5 * chance.random(),
                },
            }
        )
    strip = {
        "run": base.run,
        "method": base.method,
        "model": base.model,
        "bits": base.bits,
        "beta": base.beta,
        "seed": base.seed,
        "data": base.data,
        "attack": "PGD",
        "eps": 0.1255,
        "classes": [str(digit) for digit in range(10)],
        "examples": examples,
    }
    (place / "examples.json").write_text(json.dumps(strip))


def png(pixels: "np.ndarray[Any, np.dtype[np.float64]]") -> str:
    """Base64 of a grey PNG."""
    buffer = io.BytesIO()
    Image.fromarray((pixels * 255).astype(np.uint8)).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


if __name__ == "__main__":
    write_runs(Path(sys.argv[1]))
