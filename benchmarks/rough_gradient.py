"""Does a gradient in TensorFloat-32 find what one in float32 finds? Emulated on a CPU.

`python benchmarks/rough_gradient.py --data-root DATA RUN ...` takes folders of trained runs. What a
convolution's backward pass reads is rounded to the 10 bits of TensorFloat-32, the forward pass is
left alone: so a GPU searches. Beside it, the same search in float32 with another seed.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import defquant as dq
from defquant.evaluate import correct, robust


def rounded(x: Tensor) -> Tensor:
    """To the nearest number of 10 bits behind the point."""
    return ((x.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


class Conv(torch.autograd.Function):
    """A convolution of images that need a gradient, of weights that need none."""

    rough = False

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, *how: Any) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.how = how
        return nn.functional.conv2d(x, weight, None, *how)

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> tuple[Tensor | None, ...]:
        (x, weight), (*how, groups) = ctx.saved_tensors, ctx.how
        given = [rounded(t) if Conv.rough else t for t in (grad[0], weight)]
        more = False, [0, 0], groups, [True, False, False]
        found = torch.ops.aten.convolution_backward(given[0], x, given[1], None, *how, *more)
        return found[0], *[None] * 5


def convolved(self: nn.Conv2d, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    how = self.stride, self.padding, self.dilation, self.groups
    y: Tensor = Conv.apply(x, weight, *how)  # type: ignore[no-untyped-call]
    return y if bias is None else y + bias[:, None, None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--data-root", required=True)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--eps", type=float, default=1 / 255)
    options = parser.parse_args()
    torch.set_num_threads(1)
    nn.Conv2d._conv_forward = convolved  # type: ignore[method-assign, assignment]
    print("run, attack: right; standing in float32, rough, by another seed; others in the last two")
    for run in options.runs:
        model, facts = dq.load_model(run)
        data = dq.load(facts.data.data, options.data_root, "test").first(options.images)
        clean = correct(model, data)
        for attack in (dq.PGD(options.eps, steps=20), dq.Adaptive(options.eps, steps=10)):
            stood = []
            for Conv.rough, seed in ((False, 0), (True, 0), (False, 1)):
                stood.append(robust(model, data, attack, standing=clean, seed=seed))
            counts = [int(some.sum()) for some in (clean, *stood)]
            others = [int((some != stood[0]).sum()) for some in stood[1:]]
            print(f"{run.name}, {attack.name}:", *counts, *others, flush=True)


if __name__ == "__main__":
    main()
