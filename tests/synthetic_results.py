"""Made-up results for the cells of experiments, of every kind, for tests and by eye. No torch."""

import base64
import io
import random
from collections.abc import Iterable
from typing import Any

from PIL import Image

from defquant.paper.grid import Cell, Network, Results
from defquant.records import Measurement

NAMES = {"digits": "digits", "cifar10": "CIFAR-10 (JPEG)", "svhn": "SVHN"}
TEST_IMAGES = {"digits": 450, "cifar10": 10_000, "svhn": 26_032}
STRENGTH = {
    "clean": 0.0, "random": 0.05, "fgsm": 0.7, "rfgsm": 0.5, "pgd": 1.0, "apgd": 1.0,
    "adaptive": 1.1, "standard": 1.1,
}  # fmt: skip
SHOWN = {
    "clean": "clean", "random": "Random", "fgsm": "FGSM", "rfgsm": "R+FGSM", "pgd": "PGD",
    "apgd": "APGD", "adaptive": "Adaptive", "standard": "Standard",
}  # fmt: skip
CLASSES = tuple("0123456789")


def fake_results(cells: Iterable[Cell], seed: int = 0) -> Results:
    """A result for each of `cells`, the same for the same cell and `seed` whatever else is asked.

    Accuracies fall with eps and with the strength of the attack, less for DQ, for adversarial
    training and through a substitute, more for few bits.
    """
    every = list(dict.fromkeys(cells))
    scores = {c.key: fake_measurement(c, seed) for c in every if c.kind == "accuracy"}
    values = {c.key: _PROBES[c.kind](c, _chance(c, seed)) for c in every if c.kind != "accuracy"}
    return Results(scores, values)


def fake_measurement(
    cell: Cell, seed: int = 0, accuracy: float | None = None, vanishing: float = 0.0
) -> Measurement:
    """The line that measuring `cell` would leave; `accuracy` takes the place of a made-up one."""
    network, total = cell.network, _total(cell)
    share = _accuracy(cell, _chance(cell, seed)) if accuracy is None else accuracy
    evidence = {"epochs": network.train.epochs, "train_images": network.data.train_images}
    return Measurement(
        network.name, _method(network), network.model.model, network.model.bits,
        network.train.beta, network.train.seed, NAMES[network.data.data], "5f1c" * 16, _shown(cell),
        cell.eps, cell.attack, round(share * total), total, vanishing, evidence=evidence,
        cell=cell.key,
    )  # fmt: skip


def _chance(cell: Cell, seed: int) -> random.Random:
    return random.Random(f"{seed} {cell.key}")


def _total(cell: Cell) -> int:
    data = cell.network.data
    there = data.validation_images if cell.split == "validation" else TEST_IMAGES[data.data]
    return min(there, cell.images or there)


def _accuracy(cell: Cell, chance: random.Random) -> float:
    model, train = cell.network.model, cell.network.train
    strength = STRENGTH[cell.attack.partition("-")[0]] * (1.3 if "x" in cell.attack else 1.0)
    strength *= 0.3 if cell.substitute else 0.6 if cell.unaware else 1.0
    strength *= (0.6 if train.beta else 1.0) * (0.3 if train.attack != "none" else 1.0)
    strength *= 1 + (0.0 if model.bits is None else 0.4 / model.bits)
    clean = 0.9 - (0.06 if train.attack != "none" else 0.0)
    fallen = min(1.0, strength * 255 * cell.eps / 9)
    return max(0.0, min(1.0, clean * (1 - fallen) + chance.uniform(-0.02, 0.02)))


def _method(network: Network) -> str:
    model, train = network.model, network.train
    plain = "float" if model.bits is None else "vanilla"
    parts = [("DQ" if train.beta else plain) + " tanh" * (model.activation == "tanh")]
    parts[0] += f" ReLU{model.high:g}" * (model.high != 6)
    parts += ["squeezing"] * bool(model.squeeze)
    parts += [train.attack.upper()] * (train.attack != "none")
    return " + ".join(parts)


def _shown(cell: Cell) -> str:
    kind, dash, pace = cell.attack.partition("-")
    black_box = "(B)" * (cell.substitute is not None)
    return SHOWN[kind] + dash + pace + black_box + " (unaware)" * cell.unaware


def _distance(mean: float) -> dict[str, Any]:
    spread, whole = mean / 10, mean * 0.98
    return {"mean": mean, "spread": spread, "whole": whole, "left_out": 0, "examples": 128}


def _layers(cell: Cell, chance: random.Random) -> list[dict[str, Any]]:
    model = cell.network.model
    depth = 14 if model.model.startswith("vgg") else 10
    growth = 1.1 + (0.0 if model.bits is None else 0.05 / model.bits)
    growth -= 0.05 * (cell.network.train.beta > 0)
    noise = [0.06 * growth**i * chance.uniform(0.95, 1.05) for i in range(depth)]
    return [
        {"layer": f"layer{i}", "index": i, "bits": model.bits, "distance": _distance(d)}
        for i, d in enumerate(noise)
    ]


def _first_block(cell: Cell, chance: random.Random) -> dict[str, Any]:
    """As in the paper: rounding to 3 bits lowers the distance up to eps 3."""
    plain = 0.02 * 255 * cell.eps * chance.uniform(0.99, 1.01)
    rounded = plain * (0.7 + 0.09 * 255 * cell.eps)
    both = {"plain": _distance(plain), "quantized": _distance(rounded)}
    return {"eps": cell.eps, "bits": 3, **both}


def _detector(cell: Cell, chance: random.Random) -> dict[str, Any]:
    total = _total(cell)
    fooling = round(total * chance.uniform(0.4, 0.9))
    detected = [round(fooling * chance.uniform(0.2, 0.8)), fooling]
    return {"detected": detected, "false_positives": [round(total * 0.05), total]}


def _examples(cell: Cell, chance: random.Random) -> dict[str, Any]:
    model, train = cell.network.model, cell.network.train
    about = {
        "method": _method(cell.network), "model": model.model, "bits": model.bits,
        "beta": train.beta, "seed": train.seed, "data": NAMES[cell.network.data.data],
        "attack": _shown(cell), "eps": cell.eps, "classes": list(CLASSES),
    }  # fmt: skip
    return {**about, "examples": [_example(i, chance) for i in range(8)]}


def _example(label: int, chance: random.Random) -> dict[str, Any]:
    wrong = (label + chance.randint(1, 9)) % 10
    prediction = label if chance.random() < 0.5 else wrong
    answer = {"prediction": prediction, "confidence": round(chance.uniform(0.4, 1.0), 4)}
    clean = {"prediction": label, "confidence": round(chance.uniform(0.8, 1.0), 4)}
    return {
        "id": 10 * label, "label": label, "clean": clean, "adversarial": answer,
        "clean_png": _png(20 * label), "adversarial_png": _png(20 * label + 5),
    }  # fmt: skip


def _png(level: int) -> str:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (level, 128, 255 - level)).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


_PROBES = {
    "layers": _layers, "first-block": _first_block, "detector": _detector, "examples": _examples,
}  # fmt: skip
