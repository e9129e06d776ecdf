"""What `Adaptive` leaves standing, and its time, beside PGD and AutoAttack; the slope's sweep.

On networks of which none took part in its plan, trained here: on scikit-learn's digits, of 8x8, and
with `--data-root` on CIFAR-10, ours at their bits and plain modules quantised after their training;
or on trained `--runs` at `--eps`. A cell: the images that stand, by attack seed, in brackets those
of them that the first attack fells; then its time over the first one's, by CPU time of one thread
(`standard` and `every` run once). `every` is the worst case over all surrogates and losses at full
steps, without a limit of cost. `--slopes` prints what stands by the slope of the staircase.
"""

import argparse
import statistics
import time
import warnings
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn

import defquant as dq
from defquant.attacks.surrogates import ClipFree, FloatTwin, SoftRound, staircase_slope
from defquant.config import TrainConfig
from defquant.evaluate import correct, robust
from defquant.judging.opening import open_staircases
from trained_runs import add_flags, trained

SURROGATES = (None, SoftRound(), FloatTwin(), ClipFree())
SLOPES = (3, 5, 7, 9, 11, 14, 18, 24)
ONCE = ("standard", "every")

Scene = tuple[str, int, nn.Module, tuple[Tensor, Tensor], float]
"""Name, bits, network, images with labels, eps."""


class Plain(nn.Module):
    """A small residual network without batch norm; `bits` of torch's fake quantisers after relu."""

    def __init__(self, channels: int, bits: int | None = None) -> None:
        super().__init__()
        self.stem, self.one, self.two = (
            nn.Conv2d(width, 16, 3, padding=1) for width in (channels, 16, 16)
        )
        self.down, self.fc, self.bits = nn.Conv2d(16, 32, 3, 2, 1), nn.Linear(32, 10), bits

    def few(self, x: Tensor) -> Tensor:
        if self.bits is None:
            return x.relu()
        most = 2**self.bits - 1
        return torch.fake_quantize_per_tensor_affine(x.relu(), 6 / most, 0, 0, most)

    def forward(self, x: Tensor) -> Tensor:
        x = self.few(self.stem(x))
        x = self.few(x + self.two(self.few(self.one(x))))
        return self.fc(self.few(self.down(x)).mean((2, 3)))  # type: ignore[no-any-return]


def ours(data: dq.Dataset, bits: int | None, *, dq_: bool = False, fgsm: float = 0) -> nn.Module:
    """WRN-10-1, with DQ or trained on FGSM."""
    torch.manual_seed(SEED)
    model = dq.wide_resnet(10, 1, bits=bits, convex=dq_, in_channels=data.images.shape[1])
    config = TrainConfig(
        epochs=20 if bits == 1 else 6, batch_size=64, lr=0.05, clip=1.0, seed=SEED,
        beta=0.05 * dq_, device="cpu", channels_last=False,
    )  # fmt: skip
    dq.train(model, data, config, attack=dq.FGSM(fgsm / 255) if fgsm else None)
    return model.eval()


def plain(data: dq.Dataset, bits: int, *, fake: bool = False) -> nn.Module:
    """Trained in floats by Adam, then quantised: by `dq.prepare` or by torch."""
    x, y = data.take(torch.arange(len(data)))
    torch.manual_seed(SEED)
    model = Plain(x.shape[1])
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for rows in (rows for _ in range(20) for rows in torch.randperm(len(x)).split(64)):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
        optimizer.step()
    if not fake:
        return dq.prepare(model, data, bits).eval()
    model.bits = bits
    return open_staircases(model.eval(), x[:64]).twin


SEED = 8  # those of seed 7 were seen when the end towards targets was chosen
HELD_OUT: dict[str, tuple[str, float, partial[nn.Module]]] = {
    "float": ("digits", 20, partial(ours, bits=None)),
    "float, FGSM-trained": ("digits", 36, partial(ours, bits=None, fgsm=24)),
    "vanilla, 4 bits": ("digits", 26, partial(ours, bits=4)),
    "vanilla, 2 bits": ("digits", 16, partial(ours, bits=2)),
    "vanilla, 1 bit": ("digits", 8, partial(ours, bits=1)),
    "DQ, 4 bits": ("digits", 26, partial(ours, bits=4, dq_=True)),
    "DQ, 2 bits": ("digits", 18, partial(ours, bits=2, dq_=True)),
    "plain, prepared, 4 bits": ("digits", 24, partial(plain, bits=4)),
    "plain, prepared, 2 bits": ("digits", 20, partial(plain, bits=2)),
    "plain, torch's, 3 bits": ("digits", 20, partial(plain, bits=3, fake=True)),
    "vanilla, 2 bits, CIFAR": ("cifar10", 1, partial(ours, bits=2)),
    "plain, prepared, 2 bits, CIFAR": ("cifar10", 2, partial(plain, bits=2)),
}  # fmt: skip
"""Data, eps of 255, and how it is made; plain ones are residual and have no batch norm."""


def scenes(options: argparse.Namespace) -> Iterator[Scene]:
    """The held-out networks, each trained here; the runs where some are given."""
    for name, bits, model, images in trained(options):
        yield name, bits or 8, model, images, options.eps / 255
    for name, (data, eps, make) in {} if options.runs else HELD_OUT.items():
        if options.only in name and (data == "digits" or options.data_root):
            train, test = (dq.load(data, options.data_root, split) for split in ("train", "test"))
            model = make(train.first(min(2000, len(train))))
            yield (
                f"{name}, {eps:g}/255",
                0,
                model,
                test.take(torch.arange(options.images)),
                eps / 255,
            )


def attacks(eps: float, steps: int) -> dict[str, dq.Attack]:
    every = [
        dq.APGD(eps, steps, loss=loss, surrogate=surrogate)
        for surrogate in SURROGATES
        for loss in ("ce", "margin", "dlr")
    ]
    return {
        "standard": dq.Standard(eps), "pgd": dq.PGD(eps, steps=steps),
        "adaptive": dq.Adaptive(eps, steps), "adaptive-t": dq.Adaptive(eps, steps, targets=5),
        "every": dq.Worst(tuple(every)),
    }  # fmt: skip


def row(
    model: nn.Module, data: tuple[Tensor, Tensor], eps: float, options: argparse.Namespace
) -> str:
    """The cells of one network; times and images are those of the first attack's."""
    clean = correct(model, data)
    cells, first = [f"{int(clean.sum())} of {len(clean)}"], (torch.ones_like(clean), 0.0)
    for place, name in enumerate(options.attacks):
        stand, times = [], []
        for seed in range(1 if name in ONCE else options.seeds):
            start = time.process_time()
            attack = attacks(eps, options.steps)[name]
            stand.append(robust(model, data, attack, standing=clean, seed=seed))
            times.append(time.process_time() - start)
        if not place:
            first = stand[0], statistics.median(times)
        counts = ", ".join(f"{int(s.sum())} ({int((s & ~first[0]).sum())})" for s in stand)
        cells.append(f"{counts}; {statistics.median(times) / first[1]:.3f}")
    return " | ".join(cells)


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
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--images", type=int, default=60)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--only", default="", help="networks whose name has this")
    parser.add_argument(
        "--attacks", nargs="+", default=["standard", "pgd", "adaptive", "adaptive-t"]
    )
    parser.add_argument("--slopes", action="store_true")
    add_flags(parser)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    print(
        f"torch {torch.__version__}, 1 thread, {options.steps} steps, n = {options.seeds}\n"
        f"| network | right | {' | '.join(options.attacks)} |", flush=True,
    )  # fmt: skip
    for name, bits, model, data, eps in scenes(options):
        if options.slopes:
            line = f"(default {staircase_slope(bits):.1f})  "
            line += slopes(model, data, eps, options.steps)
        else:
            line = row(model, data, eps, options)
        print(f"| {name} | {line} |", flush=True)


if __name__ == "__main__":
    main()
