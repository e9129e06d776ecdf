"""How large an experiment is: the presets `smoke`, `small`, `gpu` and `paper`, as plain data."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from defquant.config import DataConfig, ModelConfig, TrainConfig
from defquant.experiments.cells import Network

__all__ = ["SCALES", "Scale", "pixels"]


def pixels(*values: float) -> tuple[float, ...]:
    """Radii of pixel units as numbers in [0, 1]."""
    return tuple(value / 255 for value in values)


@dataclass(frozen=True)
class Scale:
    """What a preset fixes for every experiment.

    Attributes:
        name: of the preset.
        about: one line for people.
        data, train: images and training of all but Table 2.
        svhn, svhn_train: those of Table 2.
        wrn, vgg, resnet, svhn_wrn: networks, as in `ModelConfig`.
        table1_betas: the three weights of Table 1's DQ rows.
        betas: those of Figure 6, without 0.
        beta: the weight everywhere else, chosen on validation images.
        defense_bits: activation bits of the DQ rows of Tables 2 and 3; the paper's are 1.
        seeds: of the trainings of Table 1; all else has the first.
        eps: radii of the tables and curves; 8/255, the paper's, among them.
        hard_eps: radii of the strong attacks.
        strong: the attacks reported beside the paper's: its own many times over, and the worst case
            over losses and backward passes.
        adversarial: what adversarial training changes in `train`.
        madry: what the PGD training of Table 5 changes in `train`, with its fixed `attack_eps`.
        many, few: test images of one-step and of long attacks; all when None.
        surrogate_steps: of APGD through each backward pass.
        standard_images: test images on which AutoAttack's worst case is measured.
        standard_bits: of the Wide ResNets that it is measured on.
    """

    name: str
    about: str
    data: DataConfig
    train: TrainConfig
    svhn: DataConfig
    svhn_train: TrainConfig
    wrn: str
    vgg: str
    resnet: str
    svhn_wrn: str
    table1_betas: tuple[float, ...]
    betas: tuple[float, ...]
    beta: float
    defense_bits: tuple[int | None, ...]
    seeds: tuple[int, ...]
    eps: tuple[float, ...]
    hard_eps: tuple[float, ...]
    adversarial: Mapping[str, float | int | str]
    madry: Mapping[str, float | int | str]
    many: int | None = None
    few: int | None = 1000
    strong: tuple[str, ...] = ("pgd-50x10", "adaptive")
    bits: tuple[int | None, ...] = (None, 1, 2, 3, 4, 5)
    surrogate_steps: int = 50
    standard_images: int | None = 250
    standard_bits: tuple[int | None, ...] = (None, 1, 2, 4)

    @property
    def paper_eps(self) -> float:
        return 8 / 255

    def network(
        self,
        model: str | None = None,
        *,
        bits: int | None = None,
        beta: float = 0.0,
        seed: int | None = None,
        train: TrainConfig | None = None,
        data: DataConfig | None = None,
        high: float = 6.0,
        tanh: bool = False,
        squeeze: int | None = None,
    ) -> Network:
        """The `model`, `wrn` when None; DQ, with penalty and convex sums, where `beta` > 0."""
        chosen = ModelConfig(
            model or self.wrn, bits=bits, high=high, convex=beta > 0,
            activation="tanh" if tanh else "relu", squeeze=squeeze,
        )  # fmt: skip
        first = self.seeds[0] if seed is None else seed
        training = replace(train or self.train, beta=beta, seed=first)
        return Network(chosen, data or self.data, training)

    def placed(self, data_root: str | None, svhn_root: str | None, device: str) -> "Scale":
        """The same with its data sets at these places and its trainings on `device`.

        On digits, Table 2 without `svhn_root` is made on the images of Table 3.
        """
        data = replace(self.data, data_root=data_root)
        svhn = replace(self.svhn, data_root=svhn_root)
        if data.data == "digits" and svhn_root is None:
            svhn = data
        trainings = [replace(train, device=device) for train in (self.train, self.svhn_train)]
        return replace(self, data=data, svhn=svhn, train=trainings[0], svhn_train=trainings[1])


_SMOKE = Scale(
    name="smoke",
    about="everything once on handwritten digits, minutes on two cores; the numbers mean nothing",
    data=DataConfig("digits", train_images=320, validation_images=100),
    train=TrainConfig(epochs=1, batch_size=32, clip=1.0),
    svhn=DataConfig("svhn", validation_images=100),
    svhn_train=TrainConfig(epochs=30, batch_size=32, clip=1.0),
    wrn="wrn-10-1", vgg="vgg-16x0.125", resnet="resnet-18x0.125", svhn_wrn="wrn-10-1",
    table1_betas=(0.03, 0.1, 0.3), betas=(0.03, 0.1, 0.3), beta=0.1, defense_bits=(1, 4),
    seeds=(0,), eps=pixels(2, 8, 24), hard_eps=pixels(2, 24), strong=("pgd-20x2", "adaptive-10"),
    surrogate_steps=10, standard_images=4, standard_bits=(4,),
    adversarial={"attack_sigma": 8 / 255}, madry={"attack_eps": 8 / 255}, many=100, few=40,
)  # fmt: skip

_SMALL = Scale(
    name="small",
    about="WRN-10-1, narrow VGG-16 and ResNet-18 on 20,000 CIFAR-10 images; a night on two cores",
    data=DataConfig("cifar10", train_images=20_000, validation_images=5_000),
    train=TrainConfig(epochs=5, batch_size=64, clip=1.0),
    svhn=DataConfig("svhn", train_images=20_000, validation_images=5_000),
    svhn_train=TrainConfig(epochs=5, batch_size=64, clip=1.0),
    wrn="wrn-10-1", vgg="vgg-16x0.25", resnet="resnet-18x0.25", svhn_wrn="wrn-10-1",
    table1_betas=(0.03, 0.1, 0.3), betas=(0.003, 0.01, 0.03, 0.1, 0.3, 1.0), beta=0.3,
    defense_bits=(1, 4), seeds=(0, 1), eps=pixels(1, 2, 4, 8), hard_eps=pixels(2),
    adversarial={"attack_sigma": 4 / 255}, madry={"attack_eps": 4 / 255, "epochs": 3},
)  # fmt: skip

_GPU_TRAINING = TrainConfig(epochs=30, batch_size=256, lr=0.2, clip=1.0, amp=True)
_GPU = Scale(
    name="gpu",
    about="WRN-16-4, VGG-16 and ResNet-18 on CIFAR-10, 30 epochs in bfloat16; hours on one GPU",
    data=DataConfig("cifar10", validation_images=5_000),
    train=_GPU_TRAINING,
    svhn=DataConfig("svhn", validation_images=5_000),
    svhn_train=replace(_GPU_TRAINING, lr=0.05),
    wrn="wrn-16-4", vgg="vgg-16", resnet="resnet-18", svhn_wrn="wrn-16-4",
    table1_betas=(3e-3, 1e-2, 3e-2), betas=(1e-3, 3e-3, 1e-2, 3e-2, 1e-1), beta=1e-2,
    defense_bits=(1, 4), seeds=(0,), eps=pixels(1, 2, 4, 8, 16), hard_eps=pixels(2, 8),
    adversarial={"attack_sigma": 8 / 255}, madry={"attack_eps": 8 / 255},
)  # fmt: skip

_PAPER_TRAINING = TrainConfig(
    epochs=200, schedule="step", milestones=(60, 120, 160), gamma=0.2, lr=0.1, batch_size=128
)
_PAPER = Scale(
    name="paper",
    about="the paper's protocol to the letter: WRN-28-10, 200 epochs; weeks on one GPU",
    data=DataConfig("cifar10"),
    train=_PAPER_TRAINING,
    svhn=DataConfig("svhn"),
    svhn_train=replace(_PAPER_TRAINING, epochs=160, milestones=(80, 120), gamma=0.1, lr=0.01),
    wrn="wrn-28-10", vgg="vgg-16", resnet="resnet-18", svhn_wrn="wrn-16-4",
    table1_betas=(3e-4, 6e-4, 1e-3), betas=(3e-4, 6e-4, 1e-3, 2e-3, 3e-3, 5e-3), beta=2e-3,
    defense_bits=(1,), seeds=(0,), eps=pixels(2, 8, 16), hard_eps=pixels(2, 8),
    adversarial={"attack_sigma": 8 / 255}, madry={"attack_eps": 8 / 255}, few=None,
)  # fmt: skip

SCALES: Mapping[str, Scale] = {scale.name: scale for scale in (_SMOKE, _SMALL, _GPU, _PAPER)}
