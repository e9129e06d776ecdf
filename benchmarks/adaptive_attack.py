"""What `Adaptive` costs beside plain PGD at equal steps, and what it finds; the slope's sweep.

Networks of 2, 3 and 4 bits on scikit-learn's digits, or trained `--runs` at `--eps`. The time is
the median over the repeats, the two side by side in each; `every` is the worst case over all
surrogates and losses at full steps, without a limit of cost. `--slopes` prints robust accuracy by
the slope of the staircase.
"""

import argparse
import statistics
import time
import warnings
from collections.abc import Iterator

import torch
from torch import Tensor, nn

import defquant as dq
from defquant.attacks.surrogates import ClipFree, FloatTwin, SoftRound, staircase_slope
from defquant.config import TrainConfig
from defquant.evaluate import correct, robust
from trained_runs import add_flags, trained

SCENES = {2: (4 / 255, 8 / 255), 3: (10 / 255, 16 / 255), 4: (14 / 255, 22 / 255)}
SURROGATES = (None, SoftRound(), FloatTwin(), ClipFree())
SLOPES = (3, 5, 7, 9, 11, 14, 18, 24)

Scene = tuple[str, int, nn.Module, tuple[Tensor, Tensor], tuple[float, ...]]
"""Name, bits, network, images with labels, radii."""


def network(bits: int) -> nn.Module:
    torch.manual_seed(0)
    model = dq.wide_resnet(10, 1, bits=bits, in_channels=1)
    config = TrainConfig(epochs=4, batch_size=64, device="cpu", channels_last=False)
    dq.train(model, dq.load("digits", None, "train"), config)
    return model.eval()


def scenes(options: argparse.Namespace) -> Iterator[Scene]:
    """Those on digits, each trained here; the runs where some are given."""
    for name, bits, model, images in trained(options):
        yield name, bits or 8, model, images, (options.eps / 255,)
    if not options.runs:
        data = dq.load("digits", None, "test").take(torch.arange(options.images))
        for bits, radii in SCENES.items():
            yield f"{bits} bits", bits, network(bits), data, radii


def cost(
    model: nn.Module, data: tuple[Tensor, Tensor], eps: float, options: argparse.Namespace
) -> str:
    clean = correct(model, data)
    tools: dict[str, dq.Attack] = {
        "pgd": dq.PGD(eps, steps=options.steps), "adaptive": dq.Adaptive(eps, options.steps),
    }  # fmt: skip
    times: dict[str, list[float]] = {name: [] for name in tools}
    found = {}
    for _ in range(options.repeats):
        for name, attack in tools.items():
            start = time.perf_counter()
            found[name] = int(robust(model, data, attack, standing=clean).sum())
            times[name].append(time.perf_counter() - start)
    pairs = zip(times["adaptive"], times["pgd"], strict=True)
    ratio = statistics.median(mine / plain for mine, plain in pairs)
    every = dq.Worst(
        tuple(
            dq.APGD(eps, options.steps, loss=loss, surrogate=surrogate)
            for surrogate in SURROGATES
            for loss in ("ce", "margin", "dlr")
        )
    )
    start = time.perf_counter()
    all_of_them = int(robust(model, data, every, standing=clean).sum())
    long = (time.perf_counter() - start) / statistics.median(times["pgd"])
    return (
        f"clean {int(clean.sum())}  pgd {found['pgd']}  adaptive {found['adaptive']} at "
        f"{ratio:.2f} x the time of pgd  every {all_of_them} at {long:.1f} x"
    )


def slopes(model: nn.Module, data: tuple[Tensor, Tensor], eps: float, steps: int) -> str:
    clean = correct(model, data)
    row = []
    for slope in (None, *SLOPES):
        surrogate = None if slope is None else SoftRound(slope)
        attack = dq.APGD(eps, steps, loss="margin", surrogate=surrogate)
        stands = int(robust(model, data, attack, standing=clean).sum())
        row.append(f"{'straight' if slope is None else slope}: {stands}")
    return "  ".join(row)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--images", type=int, default=150)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--slopes", action="store_true")
    add_flags(parser)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, {options.images} images, "
        f"{options.steps} steps, n = {options.repeats}"
    )
    for name, bits, model, data, radii in scenes(options):
        for eps in radii:
            if options.slopes:
                line = f"(default {staircase_slope(bits):.1f})  "
                line += slopes(model, data, eps, options.steps)
            else:
                line = cost(model, data, eps, options)
            print(f"{name}, eps {eps * 255:.0f}/255  {line}", flush=True)


if __name__ == "__main__":
    main()
