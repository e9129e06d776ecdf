"""A folder of made-up runs and exported models that looks like a real one, for the report's tests
and by eye: `python tests/synthetic_runs.py FOLDER`.
"""

import base64
import io
import json
import math
import random
import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from defquant import records as stored
from defquant.records import Measurement
from defquant.report.cards import KIND

NETWORKS: dict[str, tuple[str, int | None, float, float]] = {
    # name: method, bits, beta, how fast the accuracy falls
    "float": ("float", None, 0.0, 1.0), "vanilla-4bit": ("vanilla", 4, 0.0, 1.15),
    "vanilla-1bit": ("vanilla", 1, 0.0, 1.7), "dq-full": ("DQ", None, 0.05, 0.85),
    "dq-4bit": ("DQ", 4, 0.05, 0.75), "dq-1bit": ("DQ", 1, 0.05, 0.95),
}  # fmt: skip
STRENGTH = {"Random": 0.15, "FGSM": 0.7, "PGD": 1.0, "PGD(B)": 0.35}
RADII = (8, 16, 32, 48)
TOTAL = 360
ROBUST = {  # of exported models, by attack: eps · 255, share of vanilla's right answers, of DQ's
    "FGSM": ((2, 0.42, 0.55), (8, 0.11, 0.21)),
    "PGD-20": ((2, 0.31, 0.49), (8, 0.01, 0.08)),
    "Square-500": ((8, 0.12, 0.24),),
}


def append(path: Path, m: Measurement) -> None:
    """`defquant.records.append` into a folder that need not be there yet."""
    path.parent.mkdir(parents=True, exist_ok=True)
    stored.append(path, m)


def measurement(run: str = "run", **changes: Any) -> Measurement:
    network = (run, "float", "wrn-10-1", None, 0.0, 0)
    plain = Measurement(*network, "digits", "5f1c" * 16, "clean", 0.0, "", 90, 100)
    return replace(plain, **changes)


def write_runs(folder: Path, *, seeds: int = 3, networks: Iterable[str] = NETWORKS) -> Path:
    """All networks under all attacks at all radii, with settings, logs and pictures."""
    for name in networks:
        for seed in range(seeds):
            write_run(folder / f"{name}-s{seed}", name, seed)
    return folder


def write_run(place: Path, name: str, seed: int) -> None:
    method, bits, beta, falls = NETWORKS[name]
    chance = random.Random(f"{name} {seed}")
    evidence = {
        "versions": {"python": "3.11.2", "torch": "2.13.0", "defquant": "0.1.0"}, "threads": 2,
        "command": f"defquant attack runs/{place.name} --attack random fgsm pgd --eps 8/255",
    }  # fmt: skip
    base = measurement(
        place.name, method=method, bits=bits, beta=beta, seed=seed, total=TOTAL, seconds=4.2,
        evidence=evidence,
    )  # fmt: skip
    clean = 0.965 - 0.04 * (name == "vanilla-1bit")
    append(place / "results.jsonl", replace(base, correct=_draw(chance, clean)))
    for attack, strength in STRENGTH.items():
        for radius in RADII:
            robust = clean * math.exp(-((falls * strength * radius / 36) ** 1.7))
            settings = f"{attack}(eps={radius}/255, steps=40, step=0.0098, restarts=3)"
            row = replace(base, attack=attack, eps=round(radius / 255, 4), settings=settings)
            append(place / "results.jsonl", replace(row, correct=_draw(chance, robust)))
    config = {
        "model": {"model": "wrn-10-1", "bits": bits, "high": 6.0, "convex": method == "DQ"},
        "data": {"data": "digits", "train_images": None},
        "train": {"epochs": 40, "lr": 0.1, "beta": beta, "seed": seed, "attack": "none"},
    }
    (place / "config.json").write_text(json.dumps(config))
    lines = (json.dumps(_epoch(i, chance, beta)) + "\n" for i in range(1, 41))
    (place / "log.jsonl").write_text("".join(lines))
    (place / "examples.json").write_text(json.dumps(_examples(base, chance)))


def _draw(chance: random.Random, accuracy: float) -> int:
    shifted = min(max(accuracy + chance.gauss(0, 0.012), 0), 1)
    return sum(chance.random() < shifted for _ in range(TOTAL))


def _epoch(epoch: int, chance: random.Random, beta: float) -> dict[str, float]:
    accuracy = 0.97 - 0.85 * math.exp(-epoch / 4) - 0.02 * chance.random()
    return {
        "epoch": epoch, "lr": 0.1, "loss": 2.3 * math.exp(-epoch / 7) + 0.02 * chance.random(),
        "accuracy": min(1, accuracy + 0.02), "test_accuracy": accuracy, "seconds": 1.4,
        "penalty": 40 * math.exp(-epoch / 5) + 2 if beta else 0.0,
    }  # fmt: skip


def _examples(base: Measurement, chance: random.Random) -> dict[str, Any]:
    noise = np.random.default_rng(base.seed)
    examples = []
    for label in range(6):
        pixels = np.indices((8, 8)).sum(0) * (label + 1) % 9 / 9
        shifted = np.clip(pixels + 0.1255 * noise.choice([-1, 1], pixels.shape), 0, 1)
        shown = (label + 3) % 10 if chance.random() < 0.5 else label
        examples.append({
            "id": 1437 + label * 7, "label": label, "clean_png": png(pixels),
            "adversarial_png": png(shifted), "clean": {"prediction": label, "confidence": 0.93},
            "adversarial": {"prediction": shown, "confidence": 0.4 + 0.5 * chance.random()},
        })  # fmt: skip
    about = {name: getattr(base, name) for name in ("method", "model", "bits", "beta", "data")}
    about |= {"run": base.run, "seed": base.seed, "attack": "PGD", "eps": 0.1255}
    return about | {"classes": list("0123456789"), "examples": examples}


def png(pixels: "np.ndarray[Any, np.dtype[np.float64]]") -> str:
    """Base64 of a grey PNG."""
    buffer = io.BytesIO()
    Image.fromarray((pixels * 255).astype(np.uint8)).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


# --- exported models ----------------------------------------------------------------------


def card(name: str, *, dq: bool, bits: int = 4, weight_bits: int = 8, **changes: Any) -> Any:
    """As `defquant export` writes it."""
    clean, file = 9012 + 31 * dq, 172_000 * weight_bits // 8 + 14_000
    scores = [_pair("clean", 0, [clean, 10_000], [clean - 12, 10_000])]
    for attack, rows in ROBUST.items():
        for eps, *shares in rows:
            right = round(1000 * shares[dq])
            trained = None if attack.startswith("Square") else [right, 1000]
            scores.append(_pair(attack, eps, trained, [max(0, right - 3), 1000]))
    engines = {"torch": 14.6, "onnxruntime": 6.02, "integer": 3.31}
    batches = {
        str(batch): {engine: _times(factor * time) for engine, time in engines.items()}
        for batch, factor in ((32, 33.0), (1, 1.0))
    }
    cost = {
        "file_bytes": file, "float_file_bytes": 702_000, "file_ratio": file / 702_000,
        "macs": 27_100_000, "float_macs": 640, "bops": 27_100_000 * bits * weight_bits,
        "float_bops": 27_100_000 * 1024, "peak_activation_bytes": 49_152, "layers": [],
        "uint8_peak_activation_bytes": 65_536, "float_peak_activation_bytes": 262_144,
        "latency": {"threads": 2, "repeats": 50, "batches": batches},
    }  # fmt: skip
    return {
        "format": 1, "kind": KIND, "run": name, "model": "wrn-16-1", "bits": bits,
        "method": f"{'DQ' if dq else 'vanilla'} + W{weight_bits} + deployable",
        "weight_bits": weight_bits, "beta": 0.3 * dq, "seed": 0, "data": "CIFAR-10 (JPEG)",
        "fingerprint": "5f1c" * 16, "file": f"{name}.onnx", "input": "float", "calibrated": None,
        "convolutions": [15, 15],
        "parity": {
            "images": 10000, "agreement": 0.9981, "flipped_codes": 3.1e-4, "logit_error": 0.05,
            "reference_mismatches": 0, "unoptimised_agreement": 0.999, "openvino_agreement": None,
        },
        "scores": scores, "cost": cost, "versions": {"onnxruntime": "1.32.0"},
        "command": f"defquant export runs/{name} {name}.onnx",
    } | changes  # fmt: skip


def _pair(attack: str, eps: int, trained: object, deployed: Sequence[int]) -> dict[str, Any]:
    settings = f"{attack}(eps={eps}/255)" if eps else attack
    scores = {"trained": trained, "deployed": deployed}
    return {"attack": attack, "eps": eps / 255, "settings": settings} | scores


def _times(middle: float) -> dict[str, float]:
    return {"median_ms": middle, "low_ms": 0.9 * middle, "high_ms": 1.2 * middle}


def write_card(folder: Path, content: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{content['run']}.json"
    path.write_text(json.dumps(content, indent=1))
    path.with_suffix(".onnx").write_bytes(b"onnx")
    return path


def write_cards(folder: Path) -> Path:
    """DQ and vanilla at 4 × 8 and 4 × 4 bits, named so that the files are out of order."""
    for weight_bits in (4, 8):
        for name, dq in (("a-dq", True), ("b-vanilla", False)):
            own = card(f"{name}4_w{weight_bits}", dq=dq, weight_bits=weight_bits)
            write_card(folder / name, own)
    return folder


if __name__ == "__main__":
    write_cards(write_runs(Path(sys.argv[1])))
