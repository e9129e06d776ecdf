"""`Standard` against ART's AutoAttack, and the original by torchattacks' port: side by side.

Robust accuracy and time on the same images and networks at equal steps, restarts, targets and
queries. ART's ensemble is another one (untargeted DLR, DeepFool instead of FAB), so it stands
beside a `Worst` of the same kinds; the port, where torchattacks is installed, beside `Standard`.
On networks trained here on scikit-learn's digits, or on trained `--runs` at `--eps`.
A ratio is the other's time over ours in the same repeat, the median over the repeats.
"""

import argparse
import multiprocessing
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import defquant as dq
from defquant.attacks import Composition
from defquant.config import TrainConfig
from defquant.evaluate import correct, robust
from trained_runs import add_flags, trained

Tool = Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]
BATCH = 256

Scene = tuple[str, nn.Module, tuple[Tensor, Tensor], float]
"""Name, network, images with labels, eps."""


def ours(attack: Composition, model: nn.Module, x: Tensor, y: Tensor, clean: Tensor) -> Tensor:
    return robust(model, (x, y), attack, standing=clean, batch_size=BATCH)


def like_standard(eps: float, steps: int, queries: int) -> Composition:
    return dq.Worst(
        (
            dq.APGD(eps, steps), dq.APGD(eps, steps, loss="dlr-targeted"),
            dq.FAB(eps, steps, targets=9), dq.Square(eps, queries),
        )
    )  # fmt: skip


def like_art(eps: float, steps: int, queries: int) -> Composition:
    return dq.Worst(
        (
            dq.APGD(eps, steps), dq.APGD(eps, steps, loss="dlr"), dq.FAB(eps, steps),
            dq.Square(eps, queries),
        )
    )  # fmt: skip


def with_art(
    eps: float, steps: int, queries: int, model: nn.Module, x: Tensor, y: Tensor, clean: Tensor
) -> Tensor:
    sys.modules.setdefault("multiprocess", multiprocessing)  # imported, not used, by ART
    import art.attacks.evasion as evasion
    from art.estimators.classification import PyTorchClassifier

    shape, classes = tuple(x.shape[1:]), int(y.max()) + 1
    net = PyTorchClassifier(
        model, nn.CrossEntropyLoss(), shape, classes, clip_values=(0.0, 1.0), device_type="cpu"
    )
    apgd = partial(
        evasion.AutoProjectedGradientDescent, net, eps=eps, eps_step=2 * eps, max_iter=steps,
        nb_random_init=1, batch_size=BATCH, verbose=False,
    )  # fmt: skip
    attacks: list[Any] = [
        apgd(loss_type="cross_entropy"),
        apgd(loss_type="difference_logits_ratio"),
        evasion.DeepFool(net, max_iter=steps, epsilon=1e-3, batch_size=BATCH, verbose=False),
        evasion.SquareAttack(
            net, eps=eps, max_iter=queries, nb_restarts=1, batch_size=BATCH, verbose=False
        ),
    ]
    whole = evasion.AutoAttack(net, eps=eps, eps_step=2 * eps, attacks=attacks, batch_size=BATCH)
    made = torch.from_numpy(np.asarray(whole.generate(x.numpy(), y.numpy())))
    near = (made - x).abs().amax((1, 2, 3)) <= eps + 1e-5
    with torch.no_grad():
        standing: Tensor = clean & ~(near & (model(made).argmax(1) != y))
    return standing


def with_torchattacks(
    eps: float, steps: int, queries: int, model: nn.Module, x: Tensor, y: Tensor, clean: Tensor
) -> Tensor:
    import torchattacks as other

    attacks = (
        other.APGD(model, eps=eps, steps=steps, n_restarts=1),
        other.APGDT(model, eps=eps, steps=steps, n_restarts=1, n_classes=10),
        other.FAB(model, eps=eps, steps=steps, n_restarts=1, multi_targeted=True, n_classes=10),
        other.Square(model, eps=eps, n_queries=queries, n_restarts=1),
    )
    standing = clean.clone()
    for attack in attacks:
        left = standing.nonzero().flatten()
        if len(left):
            made = attack(x[left], y[left])
            near = (made - x[left]).abs().amax((1, 2, 3)) <= eps + 1e-5
            with torch.no_grad():
                standing[left] = ~(near & (model(made).argmax(1) != y[left]))
    return standing


def compare(
    title: str, tools: dict[str, Tool], model: nn.Module, data: tuple[Tensor, Tensor], repeats: int
) -> None:
    """Print each tool's robust accuracy, images per second, and time over the first one's."""
    clean = correct(model, data)
    times: dict[str, list[float]] = {name: [] for name in tools}
    standing = {}
    for _ in range(repeats):
        for name, tool in tools.items():
            start = time.perf_counter()
            standing[name] = int(tool(model, *data, clean).sum())
            times[name].append(time.perf_counter() - start)
    print(f"{title}; clean {int(clean.sum())} of {len(clean)}")
    first = next(iter(times.values()))
    for name, taken in times.items():
        ratio = statistics.median(a / b for a, b in zip(taken, first, strict=True))
        pace = len(clean) / statistics.median(taken)
        print(
            f"  {name:26} stands {standing[name]:4d}  {pace:7.2f} images/s  {ratio:5.2f} x our time"
        )


def network(bits: int, robustly: bool) -> nn.Module:
    torch.manual_seed(0)
    model = dq.wide_resnet(10, 1, bits=bits, in_channels=1)
    config = TrainConfig(epochs=4, batch_size=64, device="cpu", channels_last=False)
    attack = dq.PGD(32 / 255, steps=3, alpha=16 / 255).last if robustly else None
    dq.train(model, dq.load("digits", None, "train"), config, attack=attack)
    return model.eval()


def scenes(options: argparse.Namespace) -> Iterator[Scene]:
    for name, _, model, data in trained(options):
        yield name, model, data, options.eps / 255
    if not options.runs:
        data = dq.load("digits", None, "test").take(torch.arange(options.images))
        for bits, robustly, eps in ((4, False, 20), (2, False, 6), (4, True, 30)):
            how = "adversarially trained" if robustly else "plain"
            yield f"{bits} bits, {how}", network(bits, robustly), data, eps / 255


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--images", type=int, default=40)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--queries", type=int, default=300)
    add_flags(parser)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, {options.images} images, "
        f"{options.steps} steps, {options.queries} queries, n = {options.repeats}"
    )
    for name, model, data, eps in scenes(options):
        budget = (eps, options.steps, options.queries)
        title = f"{name}, eps {eps * 255:.0f}/255"
        art: dict[str, Tool] = {
            "defquant, ART's ensemble": partial(ours, like_art(*budget)),
            "ART AutoAttack": partial(with_art, *budget),
        }
        compare(title, art, model, data, options.repeats)
        original: dict[str, Tool] = {"defquant, Standard": partial(ours, like_standard(*budget))}
        try:
            import torchattacks  # noqa: F401

            original["torchattacks, the original"] = partial(with_torchattacks, *budget)
        except ImportError:
            pass
        compare(title, original, model, data, options.repeats)


if __name__ == "__main__":
    main()
