"""PGD-20 against torchattacks and Foolbox: robust accuracy and throughput, side by side.

Three scenes: a float network at an eps where nearly all examples fall at once, at one where about
a fifth stands, and an adversarially trained network. All three attack the same images with the
same eps, step size and steps, each from its own random start; ours stops working on an example
when it has fallen. A ratio is the median over the repeats of the other's time over ours, CPU time
of one thread. The networks lie in memory as a user's do; with `--channels-last` in the order that
CPUs are faster in, which ours takes by itself.
"""

import argparse
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

import defquant as dq
from defquant.config import TrainConfig
from defquant.data import Dataset
from defquant.errors import DefquantWarning

STEPS, BATCH = 20, 128
Attack = Callable[[nn.Module, Tensor, Tensor, float], float]


def digits(split: str) -> Dataset:
    """scikit-learn's digits, enlarged to 32x32 so that the network's cost is CIFAR's."""
    small = dq.load("digits", None, "train" if split == "train" else "test")
    images = small.images.repeat_interleave(4, 2).repeat_interleave(4, 3)
    return Dataset(images, small.labels, small.classes, small.name, shift=2)


def ours(model: nn.Module, x: Tensor, y: Tensor, eps: float) -> float:
    attack = dq.PGD(eps, steps=STEPS, alpha=eps / 8)
    return dq.robust_accuracy(model, (x, y), attack, batch_size=BATCH).accuracy


def with_torchattacks(model: nn.Module, x: Tensor, y: Tensor, eps: float) -> float:
    import torchattacks

    attack = torchattacks.PGD(model, eps=eps, alpha=eps / 8, steps=STEPS, random_start=True)
    return _accuracy(model, x, y, lambda a, b: attack(a, b))


def with_foolbox(model: nn.Module, x: Tensor, y: Tensor, eps: float) -> float:
    import foolbox

    wrapped = foolbox.models.pytorch.PyTorchModel(model, bounds=(0, 1))
    attack = foolbox.attacks.LinfPGD(rel_stepsize=1 / 8, steps=STEPS)
    return _accuracy(model, x, y, lambda a, b: attack(wrapped, a, b, epsilons=eps)[1])


def _accuracy(
    model: nn.Module, x: Tensor, y: Tensor, attack: Callable[[Tensor, Tensor], Tensor]
) -> float:
    right = 0
    for images, labels in zip(x.split(BATCH), y.split(BATCH), strict=True):
        adversarial = attack(images, labels)
        with torch.no_grad():
            right += int((model(adversarial).argmax(1) == labels).sum())
    return right / len(x)


def eps_for(model: nn.Module, data: tuple[Tensor, Tensor], wanted: float) -> float:
    """The eps at which about `wanted` of the examples stand, by bisection."""
    low, high = 0.0, 0.5
    for _ in range(7):
        middle = (low + high) / 2
        standing = ours(model, *data, middle)
        low, high = (middle, high) if standing > wanted else (low, middle)
    return (low + high) / 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--images", type=int, default=450)
    parser.add_argument("--runs", nargs=2, type=Path, help="a float and a robust run to use")
    parser.add_argument("--data-root", default=None, help="of the runs' test images, if moved")
    parser.add_argument("--channels-last", action="store_true", help="the networks' weights")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    warnings.simplefilter("always", DefquantWarning)
    plain, robust, (x, y) = _networks(options.runs, options.data_root, options.images)
    order = torch.channels_last if options.channels_last else torch.contiguous_format
    for model in (plain, robust):
        model.to(memory_format=order)  # type: ignore[call-overload]
    scenes = [
        ("nearly all fall", plain, eps_for(plain, (x, y), 0.2) * 4, 10.0),
        ("a fifth stands", plain, eps_for(plain, (x, y), 0.2), 2.5),
        ("robust network, half stand", robust, eps_for(robust, (x, y), 0.5), 2.0),
    ]
    print(
        f"torch {torch.__version__}, one thread, {len(x)} images, PGD-{STEPS}, batch {BATCH}, "
        f"n = {options.repeats}, {order}"
    )
    clean = [dq.accuracy(model, (x, y)).accuracy for model in (plain, robust)]
    print(f"clean accuracy: float {clean[0]:.1%}, robust {clean[1]:.1%}\n")
    for name, model, eps, target in scenes:
        _compare(name, model, x, y, eps, target, options.repeats)


def _compare(
    name: str, model: nn.Module, x: Tensor, y: Tensor, eps: float, target: float, repeats: int
) -> None:
    tools: dict[str, Attack] = {
        "defquant": ours, "torchattacks": with_torchattacks, "foolbox": with_foolbox,
    }  # fmt: skip
    times: dict[str, list[float]] = {tool: [] for tool in tools}
    scores: dict[str, float] = {}
    for _ in range(repeats):
        for tool, attack in tools.items():
            start = time.process_time()
            scores[tool] = attack(model, x, y, eps)
            times[tool].append(time.process_time() - start)
    print(f"{name}, eps {eps * 255:.1f}/255 (target {target} x the better of the others)")
    for tool, mine in times.items():
        ratios = [a / b for a, b in zip(mine, times["defquant"], strict=True)]
        print(
            f"  {tool:14} robust {scores[tool]:6.1%}  {len(x) / statistics.median(mine):8.0f} "
            f"images/s  {statistics.median(ratios):5.2f} ({min(ratios):.2f} to {max(ratios):.2f}) "
            f"x our time"
        )


def _networks(
    runs: list[Path] | None, data_root: str | None, images: int
) -> tuple[nn.Module, nn.Module, tuple[Tensor, Tensor]]:
    if runs:
        from defquant.runs import test_images

        (plain, facts), (robust, _) = (dq.load_model(run) for run in runs)
        test = test_images(facts, data_root, images)
    else:
        train, test = digits("train"), digits("test").first(images)
        config = TrainConfig(epochs=10, batch_size=64, device="cpu")
        plain, robust = (dq.wide_resnet(10, 1, in_channels=1) for _ in range(2))
        dq.train(plain, train, config, show=True)
        attack = dq.PGD(32 / 255, steps=3, alpha=16 / 255).last
        dq.train(robust, train, config, attack=attack, show=True)
    return plain, robust, test.take(torch.arange(len(test)))


if __name__ == "__main__":
    main()
