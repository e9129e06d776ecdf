"""Training throughput of WRN-10-1 on 32x32 images: our loop against a bare PyTorch loop.

All loops take turns in one run; a ratio is the median over the repeats of the throughput over the
bare loop's (or, for what quantiser and penalty cost, our float loop's) in the same repeat.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

import defquant as dq
from defquant.config import TrainConfig
from defquant.data import Dataset, batches

BATCH = 128


def bare(data: Dataset, layout: torch.memory_format) -> None:
    """What one writes without a library: same network, same images, torch's SGD."""
    model = dq.wide_resnet(10, 1).to(memory_format=layout)  # type: ignore[call-overload]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    for x, y in batches(data, BATCH, seed=0, epoch=0):
        loss = nn.functional.cross_entropy(model(x.contiguous(memory_format=layout)), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def ours(
    data: Dataset, *, bits: int | None = None, beta: float = 0.0, convex: bool = False
) -> None:
    config = TrainConfig(epochs=1, batch_size=BATCH, lr=0.1, beta=beta, device="cpu")
    dq.train(dq.wide_resnet(10, 1, bits=bits, convex=convex), data, config)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--steps", type=int, default=12)
    options = parser.parse_args()
    n = options.steps * BATCH
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (n, 3, 32, 32), dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, 10, (n,), generator=generator)
    data = Dataset(images, labels, tuple("0123456789"), "noise", flip=True, shift=4)
    loops: dict[str, Callable[[], None]] = {
        "bare loop, contiguous": lambda: bare(data, torch.contiguous_format),
        "bare loop, channels_last": lambda: bare(data, torch.channels_last),
        "ours, float": lambda: ours(data),
        "ours, 4-bit": lambda: ours(data, bits=4),
        "ours, float + penalty": lambda: ours(data, beta=0.02),
        "ours, 4-bit + penalty": lambda: ours(data, bits=4, beta=0.02),
        "ours, DQ 4-bit (convex too)": lambda: ours(data, bits=4, beta=0.02, convex=True),
    }
    times: dict[str, list[float]] = {name: [] for name in loops}
    for repeat in range(options.repeats + 1):  # the first warms up
        for name, loop in loops.items():
            start = time.perf_counter()
            loop()
            if repeat:
                times[name].append(time.perf_counter() - start)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, n = {options.repeats}")
    print(f"\n{'':30}{'images/s':>9} {'x bare':>8} {'x float':>8}")
    best = min(list(loops)[:2], key=lambda name: statistics.median(times[name]))
    for name, mine in times.items():
        against = [
            statistics.median(b / a for a, b in zip(mine, times[other], strict=True))
            for other in (best, "ours, float")
        ]
        speed = n / statistics.median(mine)
        print(f"{name:30}{speed:9.0f} {against[0]:8.2f} {against[1]:8.2f}")
    print(f"\nbare is the faster of the two: {best}")
    print("targets: ours, float at least 0.97 x bare; 4-bit + penalty at least 0.87 x float (15 %)")


if __name__ == "__main__":
    main()
