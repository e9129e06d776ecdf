"""`Standard` against ART's AutoAttack and the original: side by side.

Robust accuracy and time on the same images and networks at equal steps, restarts, targets and
queries. ART's ensemble is another one (untargeted DLR, DeepFool instead of FAB), so it stands
beside a `Worst` of the same kinds, wall time. The original, where it is installed (pip install
git+https://github.com/fra31/auto-attack), stands beside `Standard` part by part, each on what its
own parts before left, CPU time of one thread; it finds the network as it was loaded.
On networks trained here on scikit-learn's digits, or on trained `--runs` at `--eps`.
A ratio is of times in the same repeat, the median over the repeats.
"""

import argparse
import math
import multiprocessing
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
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

Images = tuple[Tensor, Tensor]
Part = Callable[[Tensor, Tensor], Tensor]
PARTS = ("APGD-CE", "APGD-T", "FAB-T", "Square")

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


def original(eps: float, steps: int, queries: int, model: nn.Module) -> dict[str, Part]:
    from autoattack import AutoAttack

    whole = AutoAttack(model, eps=eps, seed=0, verbose=False, device="cpu", version="standard")
    whole.apgd.loss, whole.fab.targeted, whole.square.n_queries = "ce", True, queries
    for part in (whole.apgd, whole.apgd_targeted):
        part.n_iter, part.n_iter_2 = steps, max(int(0.22 * steps), 1)
        part.n_iter_min, part.size_decr = max(int(0.06 * steps), 1), max(int(0.03 * steps), 1)
    for part in (whole.apgd, whole.apgd_targeted, whole.fab, whole.square):
        part.seed, part.logger = 0, whole.logger
    whole.logger.log, whole.fab.n_iter = lambda _: None, steps

    def asked(attack: Any, x: Tensor, y: Tensor) -> Tensor:
        made = [attack.perturb(*part) for part in zip(x.split(BATCH), y.split(BATCH), strict=True)]
        with torch.no_grad():
            return torch.cat([model(some).argmax(1) for some in made]) == y

    attacks = (whole.apgd, whole.apgd_targeted, whole.fab, whole.square)
    return dict(zip(PARTS, (partial(asked, attack) for attack in attacks), strict=True))


def own(eps: float, steps: int, queries: int, model: nn.Module) -> dict[str, Part]:
    def asked(attack: dq.Attack, x: Tensor, y: Tensor) -> Tensor:
        return robust(model, (x, y), attack, standing=torch.ones_like(y).bool(), batch_size=BATCH)

    attacks = like_standard(eps, steps, queries).attacks
    return dict(zip(PARTS, (partial(asked, attack) for attack in attacks), strict=True))


def by_part(title: str, sides: list[dict[str, Part]], data: Images, repeats: int) -> None:
    """Print, for each part and the whole, our CPU time over the original's, and who stands."""
    ratios: dict[str, list[float]] = {}
    for _ in range(repeats):
        times, stand = [], []
        for side in sides:
            left, taken = torch.arange(len(data[1])), {}
            for name, part in side.items():
                start = time.process_time()
                left = left[part(data[0][left], data[1][left])] if len(left) else left
                taken[name] = time.process_time() - start
            times.append(taken | {"whole": sum(taken.values())})
            stand.append(set(left.tolist()))
        for name, other in times[0].items():
            ratios.setdefault(name, []).append(times[1][name] / other if other else math.nan)
    counts = f"stand {len(stand[1])} of {len(data[1])}, the original's {len(stand[0])}"
    print(f"{title}; right {counts}, in both {len(stand[0] & stand[1])}; ours over its time")
    for name, r in ratios.items():
        print(f"  {name:8} {statistics.median(r):.2f} ({min(r):.2f} to {max(r):.2f})")


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
        if find_spec("art"):
            compare(title, art, model, data, options.repeats)
        if find_spec("autoattack"):
            clean, threads = correct(model, data), torch.get_num_threads()
            torch.set_num_threads(1)
            sides = [side(*budget, model) for side in (original, own)]
            by_part(title, sides, (data[0][clean], data[1][clean]), options.repeats)
            torch.set_num_threads(threads)


if __name__ == "__main__":
    main()
