"""The zoo of `masking_zoo.py`: networks on digits whose gradients are masked, or are not."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import defquant as dq
from defquant.attacks import PGD, RFGSM, Attack
from defquant.config import TrainConfig
from defquant.quantize import QuantReLU, QuantTanh
from masking_fronts import (
    Dead,
    Fronted,
    Saturated,
    Scaled,
    coarse,
    jpeg,
    noise,
    replaced,
    ripple,
    scrambled,
    straight,
    thermometer,
)  # fmt: skip

CACHE = Path("build") / "masking-zoo"
EPS = 16 / 255
STEP = 80 / 255  # of the FGSM training that overfits
CONFIG = TrainConfig(epochs=4, batch_size=64, device="cpu", channels_last=False)


@dataclass(frozen=True)
class Kind:
    """One way to make a network.

    Attributes:
        masked: the truth: True must FAIL, False must not; None, overstated as quantised networks
            are: must not PASS.
        held_out: thresholds were chosen without any network of this kind; of the other kinds,
            without those of seed 1.
        eps: where it is examined.
    """

    name: str
    masked: bool | None
    make: Callable[[int], nn.Module]
    held_out: bool = False
    eps: float = EPS


def digits(split: Any, images: int | None = None) -> dq.Dataset:
    return dq.load("digits", None, split).first(images)


def trained(
    name: str, seed: int, model: nn.Module, *, attack: Attack | None = None, **changes: Any
) -> nn.Module:
    """`model` with the weights kept in the cache, trained first where there are none."""
    path = CACHE / f"{name}-{seed}.safetensors"
    if path.exists():
        model.load_state_dict(load_file(path))
        return model.eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = replace(CONFIG, seed=seed, **changes)
        dq.train(model, digits("train"), config, attack=attack)
    keep(model, path)
    return model.eval()


def keep(model: nn.Module, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, path)


def wrn(seed: int, bits: int | None = None, **options: Any) -> nn.Module:
    torch.manual_seed(seed)
    return dq.wide_resnet(10, 1, bits=bits, **{"in_channels": 1, **options})


# ---------------------------------------------------------------- masked


def deadened(seed: int) -> nn.Module:
    return replaced(plain(2)(seed), QuantReLU, Dead)


def tanh(seed: int) -> nn.Module:
    attack = PGD(EPS, steps=5).last
    return trained("tanh-pgd", seed, wrn(seed, 2, activation="tanh"), attack=attack)


def saturated(seed: int) -> nn.Module:
    model = replaced(wrn(seed, 2, activation="tanh"), QuantTanh, lambda q: Saturated(q, 20))
    return trained("saturated", seed, model, attack=PGD(EPS, steps=5).last)


def thin(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Flatten(), nn.Linear(16 * 16, 10),
    )  # fmt: skip


def overfitted(seed: int) -> nn.Module:
    """After the epoch in which FGSM fails where PGD succeeds the most."""
    path, model, widest = CACHE / f"overfitted-{seed}.safetensors", thin(seed), -1.0

    def watch(history: Any, momentum: Any) -> None:
        nonlocal widest
        gap = history[-1]["monitor_fgsm"] - history[-1]["monitor_pgd"]
        if gap > widest:
            widest = gap
            keep(model, path)

    if not path.exists():
        config = TrainConfig(
            epochs=25, batch_size=32, schedule="constant", weight_decay=0.0, augment=False,
            attack="fgsm", attack_eps=STEP, device="cpu", seed=seed,
        )  # fmt: skip
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dq.train(model, digits("train", 512), config, keep=watch)
    model.load_state_dict(load_file(path))
    return model.eval()


def fronted(name: str, front: Callable[[Tensor], Tensor], channels: int = 1) -> Any:
    def make(seed: int) -> nn.Module:
        return trained(name, seed, Fronted(front, wrn(seed, in_channels=channels)))

    return make


def distilled(temperature: float) -> Callable[[int], nn.Module]:
    def make(seed: int) -> nn.Module:
        model = Scaled(wrn(seed), 1 / temperature)
        trained(f"distilled-{temperature:g}", seed, model, epochs=10, lr=1.0)
        return model.model

    return make


# ---------------------------------------------------------------- honest


def plain(bits: int | None, name: str = "", **changes: Any) -> Callable[[int], nn.Module]:
    name = name or f"vanilla-{bits}"
    return lambda seed: trained(name, seed, wrn(seed, bits), **changes)


def defended(seed: int) -> nn.Module:
    return trained("dq-4", seed, wrn(seed, 4, convex=True), beta=2e-3)


def adversarial(name: str, attack: Attack, bits: int | None = None) -> Callable[[int], nn.Module]:
    return lambda seed: trained(name, seed, wrn(seed, bits), attack=attack)


def softmax_regression(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return trained("linear", seed, nn.Sequential(nn.Flatten(), nn.Linear(64, 10)))


def perceptron(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    layers = [nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10)]
    return trained("mlp", seed, nn.Sequential(*layers))


def squeezed(seed: int) -> nn.Module:
    return trained("squeezed", seed, dq.FeatureSqueezing(wrn(seed)))


ZOO = (
    Kind("tanh 2-bit, PGD-trained", None, tanh),
    Kind("rounding without gradient", True, deadened),
    Kind("logits x 100", True, lambda seed: Scaled(plain(None)(seed), 100)),
    Kind("random layer", True, fronted("noise", noise)),
    Kind("distilled at T = 100", True, distilled(100)),
    Kind("saturated tanh 2-bit, PGD-trained", True, saturated),
    Kind("FGSM-trained, overfitted", True, overfitted, eps=STEP),
    Kind("input rounded to 4 levels", True, fronted("coarse", coarse)),
    Kind("logits x 1000, 4-bit", True, lambda s: Scaled(plain(4)(s), 1000), held_out=True),
    Kind("JPEG-like rounding", True, fronted("jpeg", jpeg), held_out=True),
    Kind("thermometer", True, fronted("thermometer", thermometer, 10), held_out=True),
    Kind("ripple on the pixels", True, fronted("ripple", ripple), held_out=True),
    Kind("scrambled backward pass", True, fronted("scrambled", scrambled), held_out=True),
    Kind("float", False, plain(None)),
    Kind("vanilla 4-bit", False, plain(4)),
    Kind("vanilla 2-bit", False, plain(2)),
    Kind("DQ 4-bit", False, defended),
    Kind("PGD-trained", False, adversarial("pgd", PGD(EPS, steps=5).last)),
    Kind("R+FGSM-trained", False, adversarial("rfgsm", RFGSM(EPS).last)),
    Kind("no weight decay", False, plain(None, "decay-0", weight_decay=0.0)),
    Kind("weight decay 0.005", False, plain(None, "decay-5", weight_decay=5e-3), held_out=True),
    Kind("vanilla 1-bit", False, plain(1), held_out=True),
    Kind("vanilla 3-bit", False, plain(3), held_out=True),
    Kind("float at 80/255", False, plain(None), eps=STEP),
    Kind("PGD-trained, 4-bit", False,
         adversarial("pgd-4", PGD(EPS, steps=5).last, 4), held_out=True),
    Kind("softmax regression", False, softmax_regression),
    Kind("perceptron", False, perceptron, held_out=True),
    Kind("feature squeezing", False, squeezed, held_out=True),
    Kind("input rounded, straight through", False,
         fronted("straight", straight), held_out=True),
)  # fmt: skip
