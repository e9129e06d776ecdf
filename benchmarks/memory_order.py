"""What an attack gains from running a network's convolutions channels last, on a CPU.

`make bench`, then `python benchmarks/memory_order.py`: networks with random weights, labels that
they answer themselves, PGD-10 at a radius at which nearly all stand. With `--data-root DATA RUN
...`: trained runs, test images of their data, PGD-20 at `--eps`. CPU time of one thread as the
network came over that channels last, in turn in one process; how many images stand in either, and
how many of these are others.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

import defquant as dq
from defquant.attacks import access
from defquant.evaluate import correct, robust

sys.path.insert(0, str(Path(__file__).parent))
from any_network import timm_model

NAMES = ("resnet18", "vgg11_bn", "mobilenetv2_050", "efficientnet_lite0", "convnext_atto")


def untrained(count: int) -> Iterator[tuple[str, nn.Module, tuple[Tensor, Tensor], dq.PGD]]:
    own = {
        f"WRN-{depth}-{width}, {bits or 'float'}": dq.wide_resnet(depth, width, bits=bits)
        for depth, width, bits in ((10, 1, None), (10, 1, 4), (16, 4, None))
    }
    for name, model in (own | {name: timm_model(name, 3) for name in NAMES}).items():
        images = torch.rand(count, 3, *([32, 32] if name in own else [64, 64]))
        with torch.no_grad():
            labels = model.eval()(images).argmax(1)
        yield name, model, (images, labels), dq.PGD(0.1 / 255, steps=10)


def trained(
    runs: list[Path], root: str, count: int, eps: float
) -> Iterator[tuple[str, nn.Module, dq.Dataset, dq.PGD]]:
    for run in runs:
        model, facts = dq.load_model(run)
        model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
        data = dq.load(facts.data.data, root, "test").first(count)
        yield run.name, model, data, dq.PGD(eps / 255, steps=20)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="*", type=Path)
    parser.add_argument("--data-root", default="data")
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--eps", type=float, default=1.0, help="in steps of a pixel, of 255")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    given = options.runs, options.data_root, options.images, options.eps
    print("network: time as it came over channels last (lowest to highest); stand; others")
    for name, model, data, attack in trained(*given) if options.runs else untrained(options.images):
        clean, ratios = correct(model, data), []
        for _ in range(options.repeats):
            seconds, stand = [], []
            for access.SMALL in (1 << 30, 256):
                began = time.process_time()
                stand.append(robust(model, data, attack, standing=clean))
                seconds.append(time.process_time() - began)
            ratios.append(seconds[0] / seconds[1])
        low, high = min(ratios), max(ratios)
        counts = int(stand[0].sum()), int(stand[1].sum()), int((stand[0] != stand[1]).sum())
        print(f"{name}: {statistics.median(ratios):.2f} ({low:.2f} to {high:.2f});", *counts)
        sys.stdout.flush()


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
