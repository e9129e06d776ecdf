"""Made-up cards of exported models, for the report's tests and by eye:
`python tests/synthetic_deployed.py FOLDER`.
"""

import json
import sys
from pathlib import Path
from typing import Any

from defquant.report.cards import KIND

ROBUST = {  # attack: eps · 255, share of vanilla's right answers, of DQ's
    "FGSM": ((2, 0.42, 0.55), (8, 0.11, 0.21)),
    "PGD-20": ((2, 0.31, 0.49), (8, 0.01, 0.08)),
    "Square-500": ((8, 0.12, 0.24),),
}


def record(name: str, *, dq: bool, bits: int = 4, weight_bits: int = 8, **changes: Any) -> Any:
    """As `defquant export` writes it."""
    scores: list[dict[str, Any]] = []
    clean = 9012 + 31 * dq
    scores.append(
        {"attack": "clean", "eps": 0.0, "settings": "clean", "trained": [clean, 10000],
         "deployed": [clean - 12, 10000]}
    )  # fmt: skip
    for attack, rows in ROBUST.items():
        for eps, vanilla, own in rows:
            right = round(1000 * (own if dq else vanilla))
            trained = None if attack.startswith("Square") else [right, 1000]
            settings = f"{attack}(eps={eps}/255)"
            new = {"attack": attack, "eps": eps / 255, "settings": settings, "trained": trained}
            scores.append(new | {"deployed": [max(0, right - 3), 1000]})
    engines = {"torch": 14.6, "onnxruntime": 6.02, "integer": 3.31}
    batches = {
        str(batch): {
            engine: {
                "median_ms": factor * time, "low_ms": 0.9 * factor * time,
                "high_ms": 1.2 * factor * time,
            }
            for engine, time in engines.items()
        }
        for batch, factor in ((32, 33.0), (1, 1.0))
    }  # fmt: skip
    file = 172_000 * weight_bits // 8 + 14_000
    cost = {
        "file_bytes": file, "float_file_bytes": 702_000, "file_ratio": file / 702_000,
        "weights": 174_000, "weight_bytes": 174_000, "float_weight_bytes": 696_000,
        "macs": 27_100_000, "float_macs": 640, "bops": 27_100_000 * bits * weight_bits,
        "float_bops": 27_100_000 * 1024, "peak_activation_bytes": 49_152,
        "uint8_peak_activation_bytes": 65_536, "float_peak_activation_bytes": 262_144,
        "layers": [], "latency": {"threads": 2, "repeats": 50, "batches": batches},
    }  # fmt: skip
    method = f"{'DQ' if dq else 'vanilla'} + W{weight_bits} + deployable"
    return {
        "format": 1, "kind": KIND, "run": name, "method": method, "model": "wrn-16-1",
        "bits": bits, "weight_bits": weight_bits, "beta": 0.3 * dq, "seed": 0,
        "data": "CIFAR-10 (JPEG)", "fingerprint": "5f1c" * 16, "file": f"{name}.onnx",
        "input": "float", "calibrated": None, "convolutions": [15, 15],
        "parity": {
            "images": 10000, "agreement": 0.9981, "flipped_codes": 3.1e-4, "logit_error": 0.05,
            "reference_mismatches": 0, "unoptimised_agreement": 0.999, "openvino_agreement": None,
        },
        "scores": scores, "cost": cost, "versions": {"onnxruntime": "1.32.0"},
        "command": f"defquant export runs/{name} {name}.onnx",
    } | changes  # fmt: skip


def write(folder: Path, content: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{content['run']}.json"
    path.write_text(json.dumps(content, indent=1))
    path.with_suffix(".onnx").write_bytes(b"onnx")
    return path


def write_models(folder: Path) -> Path:
    """DQ and vanilla at 4 × 8 and 4 × 4 bits, named so that the files are out of order."""
    for weight_bits in (4, 8):
        for name, dq in (("a-dq", True), ("b-vanilla", False)):
            own = record(f"{name}4_w{weight_bits}", dq=dq, weight_bits=weight_bits)
            write(folder / name, own)
    return folder


if __name__ == "__main__":
    write_models(Path(sys.argv[1]))
