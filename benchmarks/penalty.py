"""What the orthogonality penalty costs on WRN-28-10: fused gradient against the literal W'W.

python benchmarks/penalty.py

Layers of one shape cost the same, so each shape is timed once a repeat and counted as often as the
network has it; a step through the literal form of the whole network would take half a minute.
"""

import statistics
import time
from collections import Counter
from collections.abc import Callable

import torch
from torch import nn

from defquant.lipschitz import OrthogonalPenalty

BETA, BATCH, REPEATS, BUDGET_S = 2e-3, 128, 7, 40.0
Shape = tuple[int, int, int, int]  # c_out, c_in, kernel side, side of the output


def wide_resnet_28_10() -> Counter[Shape]:
    """How often each shape of a weight matrix occurs in WRN-28-10."""
    shapes: Counter[Shape] = Counter({(16, 3, 3, 32): 1, (10, 640, 1, 1): 1})
    before = 16
    for width, side in ((160, 32), (320, 16), (640, 8)):
        shapes[width, before, 1, side] += 1
        shapes[width, before, 3, side] += 1
        shapes[width, width, 3, side] += 7
        before = width
    return shapes


def layer_of(shape: Shape) -> nn.Conv2d | nn.Linear:
    c_out, c_in, kernel, side = shape
    layer = nn.Linear(c_in, c_out) if side == 1 else nn.Conv2d(c_in, c_out, kernel)
    layer.weight.grad = torch.zeros_like(layer.weight)
    return layer


def through_autograd(layer: nn.Conv2d | nn.Linear) -> None:
    torch.autograd.backward(OrthogonalPenalty(layer, BETA).penalty())


def literal_through_autograd(layer: nn.Conv2d | nn.Linear) -> None:
    """Eq. 8 as printed."""
    W = layer.weight.flatten(1)
    penalty = BETA / 2 * (W.T @ W - torch.eye(W.shape[1])).square().sum()
    torch.autograd.backward(penalty)


CONTENDERS: dict[str, Callable[[nn.Conv2d | nn.Linear], object]] = {
    "add_grad_()": lambda layer: OrthogonalPenalty(layer, BETA).add_grad_(),
    "penalty() through autograd": through_autograd,
    "literal W'W through autograd": literal_through_autograd,
}


def measure(shapes: Counter[Shape]) -> dict[str, list[float]]:
    """Seconds for the whole network, each contender in turn, shape by shape."""
    layers = {shape: layer_of(shape) for shape in shapes}
    repeats: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    end = time.perf_counter() + BUDGET_S
    for repeat in range(REPEATS + 1):
        totals = dict.fromkeys(CONTENDERS, 0.0)
        started = time.perf_counter()
        for shape, layer in layers.items():
            for name, contender in CONTENDERS.items():
                start = time.perf_counter()
                contender(layer)
                totals[name] += shapes[shape] * (time.perf_counter() - start)
        if repeat > 0:  # the first warms up
            for name, total in totals.items():
                repeats[name].append(total)
        now = time.perf_counter()
        if repeat > 0 and now + (now - started) > end:
            break
    return repeats


def main() -> None:
    torch.manual_seed(0)
    shapes = wide_resnet_28_10()
    repeats = measure(shapes)
    fused = repeats["add_grad_()"]

    step = work = plain = weights = 0
    for (c_out, c_in, kernel, side), count in shapes.items():
        rows, columns = c_out, c_in * kernel**2
        weights += count * rows * columns
        step += count * 3 * 2 * BATCH * rows * columns * side**2
        work += count * 2 * 2 * min(rows, columns) * rows * columns
        plain += count * 3 * 2 * columns * rows * columns

    print(f"WRN-28-10: {shapes.total()} weights, {weights / 1e6:.1f} M numbers, float32, cpu")
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, n = {len(fused)} repeats")
    print(f"\n{'':30}{'median':>10}{'lowest':>10}{'highest':>10}{'ratio*':>8}")
    ratios = {
        name: statistics.median(b / a for a, b in zip(fused, values, strict=True))
        for name, values in repeats.items()
    }
    for name, values in repeats.items():
        print(
            f"{name:30}{statistics.median(values):8.2f} s{min(values):8.2f} s{max(values):8.2f} s"
            f"{ratios[name]:8.2f}"
        )
    print("* median over the repeats of the time divided by add_grad_()'s in the same repeat")
    print(f"\n{'':30}{'GFLOP':>10}{'of a step':>12}")
    print(f"{f'training step, batch {BATCH}':30}{step / 1e9:10.1f}{1:12.1%}")
    print(f"{'add_grad_()':30}{work / 1e9:10.1f}{work / step:12.1%}")
    print(f"{'literal through autograd':30}{plain / 1e9:10.1f}{plain / step:12.1%}")
    speedup = ratios["literal W'W through autograd"]
    print(f"\nspeed-up over the literal form {speedup:.1f}, target 5: {verdict(speedup >= 5)}")
    print(f"share of a training step {work / step:.1%}, target 3 %: {verdict(work / step < 0.03)}")


def verdict(met: bool) -> str:
    return "met" if met else "MISSED"


if __name__ == "__main__":
    main()
