"""The same attacks by Foolbox and ART on one trained network: the same images, the same scores."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import defquant as dq
from defquant.attacks import APGD, BIM, FAB, FGSM, PGD, Attack, FirstOrder, Square
from defquant.config import TrainConfig
from defquant.evaluate import correct

pytestmark = pytest.mark.filterwarnings("ignore")
EPS = 16 / 255
Scene = tuple[nn.Module, Tensor, Tensor]
Options = dict[str, Any]
AUTO = "AutoProjectedGradientDescent"
WALK: Options = {"eps_step": 2 * EPS, "max_iter": 20, "nb_random_init": 2}


@pytest.fixture(scope="module")
def scene() -> Scene:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = dq.wide_resnet(10, 1, bits=4, in_channels=1)
    config = TrainConfig(epochs=4, batch_size=64, device="cpu", channels_last=False)
    dq.train(model, dq.load("digits", None, "train"), config)
    x, y = dq.load("digits", None, "test").take(torch.arange(200))
    return model.eval(), x, y


def foolbox_attack(name: str, model: nn.Module, x: Tensor, y: Tensor, **options: Any) -> Tensor:
    import foolbox

    wrapped = foolbox.models.pytorch.PyTorchModel(model, bounds=(0, 1))
    made: Tensor = getattr(foolbox.attacks, name)(**options)(wrapped, x, y, epsilons=EPS)[1]
    return made


def art_attack(name: str, model: nn.Module, x: Tensor, y: Tensor, **options: Any) -> Tensor:
    import art.attacks.evasion as evasion
    from art.estimators.classification import PyTorchClassifier

    wrapped = PyTorchClassifier(
        model, nn.CrossEntropyLoss(), (1, 8, 8), 10, clip_values=(0.0, 1.0), device_type="cpu"
    )
    made = getattr(evasion, name)(wrapped, eps=EPS, **options)
    return torch.from_numpy(np.asarray(made.generate(x.numpy(), y.numpy())))


@pytest.mark.parametrize(
    ("attack", "foolbox", "art", "unlike"),
    [
        (FGSM(EPS), ("FGSM", {}), ("FastGradientMethod", {}), 0.01),
        (
            BIM(EPS, steps=5, alpha=4 / 255),
            ("LinfBasicIterativeAttack",
             {"abs_stepsize": 4 / 255, "steps": 5, "random_start": False}),
            ("BasicIterativeMethod", {"eps_step": 4 / 255, "max_iter": 5}), 0.05,
        ),
    ],
    ids=["fgsm", "bim"],
)  # fmt: skip
def test_the_same_images(
    scene: Scene, attack: FirstOrder, foolbox: tuple[str, Options], art: tuple[str, Options],
    unlike: float,
) -> None:  # fmt: skip
    """Equal but for pixels whose gradient is zero up to rounding."""
    ours = attack.last(*scene)
    foolboxs = foolbox_attack(foolbox[0], *scene, **foolbox[1])
    for theirs in (foolboxs, art_attack(art[0], *scene, **art[1])):
        assert ((ours - theirs).abs() > 1e-5).float().mean() < unlike


def standing(model: nn.Module, images: Tensor, y: Tensor) -> float:
    with torch.no_grad():
        return float((model(images).argmax(1) == y).float().mean())


def test_pgd_scores_alike(scene: Scene) -> None:
    """The last iterates score alike; counting every iterate, as we do, may only be lower."""
    model, x, y = scene
    ours = dq.robust_accuracy(model, (x, y), PGD(EPS, steps=20, alpha=2 / 255)).accuracy
    last = PGD(EPS, steps=20, alpha=2 / 255).last(model, x, y)
    torch.manual_seed(0)  # Foolbox and ART draw from the global states
    np.random.seed(0)
    foolbox = foolbox_attack("LinfPGD", model, x, y, abs_stepsize=2 / 255, steps=20)
    art = art_attack(
        "ProjectedGradientDescent", model, x, y, eps_step=2 / 255, max_iter=20, num_random_init=1,
        verbose=False,
    )  # fmt: skip
    scores = [standing(model, z, y) for z in (last, foolbox, art)]
    assert 0.1 < scores[0] < 0.9
    assert max(scores) - min(scores) <= 0.06
    assert ours <= min(scores)


@pytest.mark.parametrize(
    ("attack", "art", "options", "noise"),
    [
        (APGD(EPS, 20, restarts=2), AUTO, {**WALK, "loss_type": "cross_entropy"}, 0.05),
        (APGD(EPS, 20, restarts=2, loss="dlr"), AUTO,
         {**WALK, "loss_type": "difference_logits_ratio"}, 0.05),
        (Square(EPS, queries=200), "SquareAttack", {"max_iter": 200, "nb_restarts": 1}, 0.02),
    ],
    ids=["ce", "dlr", "square"],
)  # fmt: skip
def test_as_strong_as_arts(
    scene: Scene, attack: Attack, art: str, options: Options, noise: float
) -> None:
    """At equal steps and restarts, within the noise of 100 images."""
    model, x, y = scene[0], scene[1][:100], scene[2][:100]
    ours = dq.robust_accuracy(model, (x, y), attack).accuracy
    np.random.seed(0)
    theirs = art_attack(art, model, x, y, **options, batch_size=100, verbose=False)
    assert 0.05 < ours < 0.9
    assert ours <= standing(model, theirs, y) + noise


def test_fab_finds_images_as_near_as_foolboxs(scene: Scene) -> None:
    """Foolbox has FAB's forerunner in L-infinity, DeepFool: ours must come nearer."""
    import foolbox

    model, x, y = scene
    right = correct(model, (x, y)).nonzero().flatten()[:25]
    x, y = x[right], y[right]
    wrapped = foolbox.models.pytorch.PyTorchModel(model, bounds=(0, 1))
    deepfool = foolbox.attacks.LinfDeepFoolAttack(steps=20)  # type: ignore[attr-defined]
    theirs = deepfool(wrapped, x, y, epsilons=None)[1]
    ours = FAB(1.0, 20, targets=3)(model, x, y)
    assert standing(model, ours, y) == 0
    mine, others = ((z - x).abs().amax((1, 2, 3)).median() for z in (ours, theirs))
    assert mine <= 1.02 * others
