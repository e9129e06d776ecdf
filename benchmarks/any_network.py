"""Networks not written for this library: prepared, trained, attacked, diagnosed, exported.

A plain network with `nn.ReLU`, the same with `relu()`, and networks of timm, on a first part of
CIFAR-10, or on digits without `--data-root`. A cell is what a step gave, or in one line why it
could not. timm is installed without what it depends on (`make bench`): it imports torchvision,
of which its models need nothing, so that a stand-in is enough.
"""

import argparse
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import tempfile
import time
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import defquant as dq
from defquant.diagnose.masking import Effort

TIMM = {
    "resnet18": {}, "mobilenetv2_100": {}, "efficientnet_lite0": {}, "convnext_atto": {},
    "vit_tiny_patch16_224": {"img_size": 32, "patch_size": 4},
}  # fmt: skip


class StandIn(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """`import torchvision`: modules in which every name is a class without content."""

    class _Anything(type):
        def __getattr__(cls, name: str) -> str:
            if name.startswith("_"):
                raise AttributeError(name)
            return name

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: object = None
    ) -> importlib.machinery.ModuleSpec | None:
        mine = name.split(".")[0] == "torchvision"
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if mine else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        def made(name: str) -> type:
            if name.startswith("_"):
                raise AttributeError(name)
            return self._Anything(name, (nn.Module,), {})

        module: Any = types.ModuleType(spec.name)
        module.__getattr__ = made
        return module  # type: ignore[no-any-return]

    def exec_module(self, module: types.ModuleType) -> None:
        pass


def timm_model(name: str, channels: int, **options: Any) -> nn.Module:
    if importlib.util.find_spec("torchvision") is None:
        sys.meta_path.append(StandIn())
    import timm

    model: nn.Module = timm.create_model(name, num_classes=10, in_chans=channels, **options)
    return model


class Functional(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 32, 3, padding=1)
        self.conv2 = nn.Conv2d(32, 64, 3, padding=1)
        self.fc = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.max_pool2d(nn.functional.relu(self.conv1(x)), 2)
        return self.fc(self.conv2(x).relu().mean((2, 3)))  # type: ignore[no-any-return]


def plain(channels: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(channels, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(64, 10),
    )  # fmt: skip


def networks(channels: int) -> dict[str, Callable[[], nn.Module]]:
    found: dict[str, Callable[[], nn.Module]] = {
        "CNN, `nn.ReLU`": lambda: plain(channels),
        "CNN, `relu()`": lambda: Functional(channels),
    }
    for name, options in TIMM.items():
        found[f"timm `{name}`"] = lambda n=name, o=options: timm_model(n, channels, **o)  # type: ignore[misc]
    return found


def digits(split: str) -> dq.Dataset:
    """scikit-learn's digits, enlarged to 32x32."""
    small = dq.load("digits", None, "train" if split == "train" else "test")
    images = small.images.repeat_interleave(4, 2).repeat_interleave(4, 3)
    return dq.Dataset(images, small.labels, small.classes, small.name)


class Way:
    """The steps on one network; each gives the text of its cell."""

    def __init__(
        self, model: nn.Module, train: dq.Dataset, test: dq.Dataset, options: argparse.Namespace
    ) -> None:
        self.model, self.train_data, self.test, self.options = model, train, test, options

    def prepare(self) -> str:
        bits, weight_bits = self.options.bits, self.options.weight_bits
        self.net = dq.prepare(self.model, self.train_data, bits, weight_bits)
        return str(self.net.account).splitlines()[-1].split(" conv")[0]

    def train(self) -> str:
        config = dq.TrainConfig(
            epochs=self.options.epochs, batch_size=64, lr=self.options.lr, schedule="one-cycle",
            clip=1.0,
        )  # fmt: skip
        dq.train(self.net, self.train_data, config)
        return f"{dq.accuracy(self.net, self.test).accuracy:.0%}"

    def attack(self) -> str:
        attack = dq.Adaptive(self.options.eps, steps=self.options.steps)
        return f"{dq.robust_accuracy(self.net, self.test, attack).accuracy:.0%}"

    def diagnose(self) -> str:
        effort = Effort(steps=self.options.steps, restarts=1, queries=50, draws=4)
        verdict = dq.masking_verdict(self.net, self.test, self.options.eps, effort=effort)
        audit = dq.audit(self.net, self.test.first(2))
        bound = f"bound {audit.bound:.2g}" if audit.bound is not None else audit.unbounded
        return f"{verdict.overall}; {bound}"

    def export(self) -> str:
        self.path = Path(tempfile.mkdtemp()) / "model.onnx"
        self.exported = dq.export_onnx(self.net, self.path, self.train_data.images[:64] / 255)
        return f"{self.path.stat().st_size / 1e6:.2f} MB"

    def verify(self) -> str:
        found = dq.parity(self.net, *self.exported, self.test)
        second = "none" if found.openvino is None else f"{found.openvino.accuracy:.1%}"
        whole, all_ = found.convolutions
        return f"{found.agreement.accuracy:.1%} / {second}; {whole} of {all_}"


STEPS = ("prepare", "train", "attack", "diagnose", "export", "verify")


def row(name: str, way: Way) -> str:
    cells, stopped = [], ""
    for step in STEPS:
        start = time.perf_counter()
        try:
            cells.append("" if stopped else getattr(way, step)())
        except dq.UserError as error:
            cells.append(f"no: {error}")
            stopped = step if step in ("prepare", "export") else ""
        print(f"{name}: {step} {time.perf_counter() - start:.0f} s: {cells[-1]}", file=sys.stderr)
    return f"| {name} | {' | '.join(cell.replace('|', '/') for cell in cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-root", type=Path, default=None)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--attacked", type=int, default=100)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--lr", type=float, default=0.05)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--weight-bits", type=int, default=8)
    parser.add_argument("--eps", type=float, default=2 / 255)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--only", default="", help="networks whose name has this")
    options = parser.parse_args()

    def data(split: str, count: int) -> dq.Dataset:
        root = options.data_root
        whole = digits(split) if root is None else dq.load("cifar10", root, split)  # type: ignore[arg-type]
        return whole.first(count)

    train, test = data("train", options.images), data("test", options.attacked)
    print(f"{train.name}, {len(train)} training images, {len(test)} attacked\n")
    print(f"| network | {' | '.join(STEPS)} |\n| --- {'| --- ' * len(STEPS)}|")
    for name, make in networks(train.images.shape[1]).items():
        if options.only in name:
            torch.manual_seed(0)
            print(row(name, Way(make(), train, test, options)), flush=True)


if __name__ == "__main__":
    main()
