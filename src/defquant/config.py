"""What a run is: the network, its data and its training, as three frozen dataclasses.

They import no torch, so that the command line can read and explain them at once. The command
line's flags are these fields, and a run's folder keeps them whole in `config.json`.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Annotated, Any, Literal

from defquant.errors import UserError, shown
from defquant.typed import NOT_NEGATIVE, POSITIVE, UNIT, Rule, check_fields

__all__ = [
    "PRESETS", "DataConfig", "ModelConfig", "TrainConfig", "check_bits", "check_eps", "digest",
    "plain", "positive",
]  # fmt: skip

Activation = Literal["relu", "tanh"]
PenaltyMode = Literal["fused", "loss", "parseval"]
Schedule = Literal["step", "one-cycle", "constant"]
TrainingAttack = Literal["none", "fgsm", "rfgsm", "pgd"]

_WEIGHTS = Rule("must be 8, 4 or 2, or none for float weights", lambda bits: bits in (2, 4, 8))
_BATCH = Rule("must be 2 or more", lambda n: n > 1)
_MOMENTUM = Rule("must lie in [0, 1)", lambda x: 0 <= x < 1)
_ELSEWHERE = ("data_root", "device")


def check_bits(bits: object, name: str = "bits", off: str = "full precision") -> int | None:
    """`bits` as it was given, where it is None or a whole number from 1 to 8; else `UserError`."""
    if bits is None or (isinstance(bits, int) and not isinstance(bits, bool) and 1 <= bits <= 8):
        return bits
    found = f"'{shown(bits)}'" if isinstance(bits, str) else shown(bits)
    raise UserError(f"{name} must be a whole number from 1 to 8, or none for {off}; found {found}")


def check_eps(eps: float) -> float:
    """`eps` as it was given, where it lies in [0, 1]; else `UserError`."""
    if not 0 <= eps <= 1:
        over = 255 * eps % 1  # 300/255, which nobody took for pixels, needs no word on them
        if eps > 1 and (eps % 1 == 0 or 1e-6 < over < 1 - 1e-6):
            raise UserError(
                f"eps is a distance between images in [0, 1]; found {eps:g}: write {eps:g}/255"
            )
        raise UserError(f"eps must lie in [0, 1]; found {eps:g}")
    return eps


def positive(**values: int) -> None:
    """Raise `UserError` for the first of `values` that is below 1, by its name."""
    for name, value in values.items():
        if value < 1:
            raise UserError(f"{name} must be 1 or more; found {value}")


@dataclass(frozen=True)
class ModelConfig:
    """A network and its activation quantiser.

    Attributes:
        model: `wrn-DEPTH-WIDTH` (depth = 6n + 4), `vgg-16` or `resnet-18`.
        bits: activation bits, 1 to 8; none for full precision.
        high: upper end of the activation range [0, high] (ReLU6: 6, ReLU1: 1).
        convex: residual sums as learned convex combinations (Parseval, section 4 of the paper).
        activation: `relu` (ReLU6 and its linear quantiser) or `tanh` (Rakin et al. 2018).
        weight_bits: weights of 8, 4 or 2 bits, per channel and symmetric (ours; the paper's are
            float, none). The first layer has 7, and so have all with 8 at 8 activation bits, lest
            products of codes saturate; the last layer has 8.
        deployable: round to 8 bits, in training too, what convolutions add to the residual stream,
            so that every convolution can run in integers.
        round_sums: round the sums of a deployable Wide ResNet to 8 bits, too: then its residual
            stream and batch norms run in integers. The other networks quantise theirs anyway.
        squeeze: feature squeezing in front of the network, in training and in test: colours of
            so many bits, then a 2x2 median (the paper takes 5 bits); none for no squeezing.
    """

    model: str = "wrn-10-1"
    bits: int | None = None
    high: Annotated[float, POSITIVE] = 6.0
    convex: bool = False
    activation: Activation = "relu"
    weight_bits: Annotated[int, _WEIGHTS] | None = None
    deployable: bool = False
    round_sums: bool = False
    squeeze: int | None = None

    def __post_init__(self) -> None:
        check_bits(self.bits)
        check_bits(self.squeeze, "squeeze", "no squeezing")
        check_fields(self)
        if self.round_sums and not self.deployable:
            raise UserError("round_sums needs deployable: sums of rounded parts alone are rounded")


@dataclass(frozen=True)
class DataConfig:
    """The images.

    Attributes:
        data: `digits` (ships with scikit-learn), `cifar10`, `svhn`, `folder` or `npz`.
        data_root: where the files lie; not needed for digits.
        train_images: use only the first so many training images; all when none.
        validation_images: the last so many training images are held out: no run trains on them,
            and `--split validation` measures there what is to be chosen, a beta say.
    """

    data: str = "digits"
    data_root: str | None = None
    train_images: Annotated[int, POSITIVE] | None = None
    validation_images: Annotated[int, NOT_NEGATIVE] = 0

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True)
class TrainConfig:
    """SGD as in section 5 of the paper, with its penalty and, if asked, its adversarial training.

    Attributes:
        epochs: passes over the training images.
        batch_size: images a step, over all processes together.
        lr: learning rate at its highest.
        schedule: `step` (times `gamma` at each milestone), `one-cycle` or `constant`.
        milestones: epochs at which the step schedule acts.
        gamma: factor of the step schedule.
        momentum: of SGD.
        nesterov: Nesterov's momentum instead of the classical one.
        weight_decay: L2 decay of all parameters but the convex coefficients.
        clip: longest gradient, as a norm over all parameters; 0 for any length (the paper).
        beta: weight of the orthogonality penalty (Eq. 8); 0 for none.
        penalty: `fused` (closed-form gradient), `loss` (through autograd) or `parseval`
            (retraction after the step).
        attack: train on adversarial examples made by `fgsm`, `rfgsm` or `pgd`.
        attack_eps: their eps in [0, 1]; when none it is drawn as clip(|N(0, sigma)|, 0, 2 sigma).
        attack_sigma: that sigma, in [0, 1]; the paper's is 8/255.
        mix: share of each batch that is attacked.
        augment: random flips and shifted crops where the data set allows them.
        test_every: epochs between tests on the test images; the last epoch is always tested.
        seed: of the weights, the order of the images and every random draw.
        amp: bfloat16 autocast.
        tf32: on a GPU, TensorFloat-32 (10 bits of a factor) in the network of the training step.
        deterministic: on a GPU, a resumed run ends with the same weights bit for bit; slower.
        channels_last: memory format of images and weights; faster on CPUs and GPUs alike. A model
            that reshapes by `view` is trained without.
        device: `cpu`, `cuda`, `cuda:1`, ...; `auto` takes a GPU where there is one.
    """

    epochs: Annotated[int, POSITIVE] = 15
    batch_size: Annotated[int, _BATCH] = 128
    lr: Annotated[float, POSITIVE] = 0.1
    schedule: Schedule = "one-cycle"
    milestones: tuple[int, ...] = ()
    gamma: Annotated[float, POSITIVE] = 0.2
    momentum: Annotated[float, _MOMENTUM] = 0.9
    nesterov: bool = False
    weight_decay: Annotated[float, NOT_NEGATIVE] = 5e-4
    clip: Annotated[float, NOT_NEGATIVE] = 0.0
    beta: Annotated[float, NOT_NEGATIVE] = 0.0
    penalty: PenaltyMode = "fused"
    attack: TrainingAttack = "none"
    attack_eps: float | None = None
    attack_sigma: float = 8 / 255
    mix: Annotated[float, UNIT] = 1.0
    augment: bool = True
    test_every: int = 0
    seed: int = 0
    amp: bool = False
    tf32: bool = False
    deterministic: bool = False
    channels_last: bool = True
    device: str = "auto"

    def __post_init__(self) -> None:
        check_fields(self)
        if self.nesterov and not self.momentum:
            raise UserError("nesterov needs a momentum above 0; found 0")
        if self.penalty == "parseval" and self.beta > 1:
            raise UserError(f"beta of a Parseval retraction must be at most 1; found {self.beta:g}")
        for eps in (self.attack_sigma, self.attack_eps):
            check_eps(eps or 0.0)


_CIFAR = {"lr": 0.1, "gamma": 0.2, "milestones": (60, 120, 160), "epochs": 200}
_SVHN = {"lr": 0.01, "gamma": 0.1, "milestones": (80, 120), "epochs": 160}
_DQ = {"bits": 1, "beta": 2e-3}  # and convex sums, which the command line adds where beta > 0
PRESETS: Mapping[str, Mapping[str, Any]] = {
    "cifar10-paper": {
        "model": "wrn-28-10", "data": "cifar10", "schedule": "step", "batch_size": 128,
        **_CIFAR, **_DQ,
    },
    "svhn-paper": {
        "model": "wrn-16-4", "data": "svhn", "schedule": "step", "batch_size": 128,
        **_SVHN, **_DQ,
    },
    "cifar10-short": {
        "model": "wrn-10-1", "data": "cifar10", "schedule": "one-cycle", "batch_size": 128,
        "lr": 0.1, "epochs": 8, "train_images": 20_000,
    },
    "digits-short": {
        "model": "wrn-10-1", "data": "digits", "schedule": "one-cycle", "batch_size": 64,
        "lr": 0.1, "epochs": 15,
    },
}  # fmt: skip
"""Named settings: `--preset NAME` sets these fields, and flags after it override them."""


def digest(item: object) -> str:
    """SHA-256 of a configuration; where it is made (`data_root`, `device`) does not change it."""
    return hashlib.sha256(json.dumps(plain(item), sort_keys=True).encode()).hexdigest()


def plain(item: Any) -> Any:
    """Fields that are not at their defaults: new fields leave the keys of old results alone."""
    if not is_dataclass(item):
        return item
    values = {f.name: getattr(item, f.name) for f in fields(item) if f.name not in _ELSEWHERE}
    defaults = {f.name: f.default for f in fields(item)}
    return {name: plain(v) for name, v in values.items() if v != defaults[name]}
