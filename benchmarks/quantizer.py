"""The quantiser's forward and backward pass against clamp + detach, 32x64x32x32 float32."""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from defquant.rounding import fake_quantize

HIGH, LEVELS = 6.0, 15


def clamp_detach(x: Tensor) -> Tensor:
    r = x.clamp(0, HIGH)
    quantized: Tensor = r + (torch.round(r * (LEVELS / HIGH)) * (HIGH / LEVELS) - r).detach()
    return quantized


FORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "fake_quantize": lambda x: fake_quantize(x, 4, HIGH),
    "clamp + detach": clamp_detach,
    "relu6 alone": nn.functional.relu6,
}


def saved_bytes(form: Callable[[Tensor], Tensor], x: Tensor) -> float:
    """Bytes per element that autograd keeps for the backward pass."""
    kept = {}

    def keep(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        form(x)
    return sum(kept.values()) / x.numel()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=60)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    x = (torch.randn(32, 64, 32, 32, device=options.device) * 3).requires_grad_()
    grad = torch.randn_like(x)
    times: dict[str, list[float]] = {name: [] for name in FORMS}

    def clock() -> float:
        if options.device != "cpu":
            torch.cuda.synchronize()
        return time.perf_counter()

    for repeat in range(options.repeats + 5):
        for name, form in FORMS.items():
            start = clock()
            torch.autograd.grad(form(x), x, grad)
            if repeat >= 5:
                times[name].append(clock() - start)
    threads = torch.get_num_threads()
    print(f"torch {torch.__version__}, {options.device}, {threads} threads, n = {options.repeats}")
    heads = ("median ms", "best ms", "bytes saved", "ratio*")
    print(f"\n{'forward + backward':20}{heads[0]:>10}{heads[1]:>9}{heads[2]:>13}{heads[3]:>8}")
    for name, mine in times.items():
        pairs = zip(mine, times["fake_quantize"], strict=True)
        ratio = statistics.median(a / b for a, b in pairs)
        median, best = statistics.median(mine) * 1e3, min(mine) * 1e3
        print(f"{name:20}{median:10.2f}{best:9.2f}{saved_bytes(FORMS[name], x):13.1f}{ratio:8.2f}")
    print("* median of the time over fake_quantize's in the same repeat; target: 1.8, 1 byte")


if __name__ == "__main__":
    main()
