"""One network, N quantisers: what `defquant judge` says of each tool's work.

A small network is trained on scikit-learn's digits; each tool that is installed puts it into few
bits. A row: accuracy on the images judged, what the usual attack (straight-through PGD of 40 steps)
and the strongest leave at `--eps`, as 8-bit pixels on the thing itself, the verdict, and what it
has less than the float network on the same images, with the sequence's 95 % interval; or, in one
line, why it cannot be read.
"""

import argparse
import importlib.util
import logging
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import defquant as dq

Maker = Callable[[nn.Module, dq.Dataset, Path], nn.Module | Path]


class Small(nn.Module):
    """Two convolutions and a linear layer: torch's, or those of a tool."""

    def __init__(
        self, conv: Any = nn.Conv2d, activation: Any = nn.ReLU, linear: Any = nn.Linear
    ) -> None:
        super().__init__()
        self.conv1, self.norm1 = conv(1, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.conv2, self.norm2 = conv(16, 32, 3, stride=2, padding=1), nn.BatchNorm2d(32)
        self.act1, self.act2, self.fc = activation(), activation(), linear(512, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act1(self.norm1(self.conv1(x)))
        x = self.act2(self.norm2(self.conv2(x)))
        return self.fc(x.flatten(1))  # type: ignore[no-any-return]


def trained(model: nn.Module, data: dq.Dataset, epochs: int, lr: float = 3e-3) -> nn.Module:
    x, y = data.take(torch.arange(len(data)))
    torch.manual_seed(0)
    optimizer = torch.optim.Adam(model.train().parameters(), lr)
    for rows in (rows for _ in range(epochs) for rows in torch.randperm(len(x)).split(64)):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
        optimizer.step()
    return model.eval()


def shown(data: dq.Dataset, images: int = 128) -> Tensor:
    return data.take(torch.arange(images))[0]


def as_onnx(model: nn.Module, data: dq.Dataset, folder: Path) -> Path:
    x, path = shown(data, 2), folder / "float.onnx"
    torch.onnx.export(model, (x,), path, dynamo=False, input_names=["x"],
                      dynamic_axes={"x": {0: "n"}})  # fmt: skip
    return path


def static(model: nn.Module, data: dq.Dataset, folder: Path) -> Path:
    from onnxruntime.quantization import CalibrationDataReader, quantize_static

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        left = iter([{"x": shown(data).numpy()}])

        def get_next(self) -> Any:
            return next(self.left, None)

    quantize_static(as_onnx(model, data, folder), folder / "static.onnx", Reader())
    return folder / "static.onnx"


def dynamic(model: nn.Module, data: dq.Dataset, folder: Path) -> Path:
    from onnxruntime.quantization import quantize_dynamic

    quantize_dynamic(as_onnx(model, data, folder), folder / "dynamic.onnx")
    return folder / "dynamic.onnx"


def pt2e(model: nn.Module, data: dq.Dataset, folder: Path) -> Path:
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    how = x86.get_default_x86_inductor_quantization_config()
    quantizer = x86.X86InductorQuantizer().set_global(how)
    x, sizes = shown(data), ({0: torch.export.Dim("n", min=2)},)
    seen = prepare_pt2e(torch.export.export(model, (x,), dynamic_shapes=sizes).module(), quantizer)
    seen(x)
    made = torch.export.export(convert_pt2e(seen), (x,), dynamic_shapes=sizes)
    torch.export.save(made, folder / "pt2e.pt2")
    return folder / "pt2e.pt2"


def brevitas(model: nn.Module, data: dq.Dataset, folder: Path, bits: int = 8) -> nn.Module:
    from brevitas import nn as qnn

    made = Small(
        partial(qnn.QuantConv2d, weight_bit_width=bits), partial(qnn.QuantReLU, bit_width=bits),
        partial(qnn.QuantLinear, bias=True, weight_bit_width=bits),
    )  # fmt: skip
    made.load_state_dict(model.state_dict(), strict=False)
    return trained(made, data, 1)


def nncf(model: nn.Module, data: dq.Dataset, folder: Path) -> Path:
    import onnx
    from nncf import Dataset, quantize

    source = onnx.load(as_onnx(model, data, folder))
    each = Dataset(list(shown(data).split(1)), lambda x: {"x": x.numpy()})
    onnx.save(quantize(source, each), folder / "nncf.onnx")
    return folder / "nncf.onnx"


def ours(model: nn.Module, data: dq.Dataset, folder: Path, bits: int = 8) -> nn.Module:
    return trained(dq.prepare(model, data, bits, weight_bits=8), data, 1)


def our_file(model: nn.Module, data: dq.Dataset, folder: Path, bits: int = 8) -> Path:
    dq.export_onnx(ours(model, data, folder, bits), folder / "ours.onnx", shown(data))
    return folder / "ours.onnx"


QUANTISERS: dict[str, tuple[str, Maker]] = {
    "float": ("torch", lambda model, data, folder: model),
    "onnxruntime, static": ("onnxruntime", static),
    "onnxruntime, dynamic": ("onnxruntime", dynamic),
    "PT2E (torchao, x86)": ("torchao", pt2e),
    "NNCF": ("nncf", nncf),
    "Brevitas": ("brevitas", brevitas),
    "Brevitas, 4-bit": ("brevitas", partial(brevitas, bits=4)),
    "ours": ("torch", ours),
    "ours, 4-bit": ("torch", partial(ours, bits=4)),
    "ours, 4-bit, its file": ("onnxruntime", partial(our_file, bits=4)),
}
"""The package that each needs, and the way; 8 bits where none are named."""


def row(made: nn.Module | Path, model: nn.Module, test: dq.Dataset, eps: float) -> list[str]:
    found = dq.judge(made, test, reference=model, eps=[eps], margin=0, budget=3600).record
    (row,), seen = found["rows"], found["model"]
    pair = [f"{100 * row['paired'][name]:+.1f}" for name in ("rate", "low", "high")]
    stairs = f"{seen['staircases']}" + f", {len(seen['closed'])} not" * bool(seen["closed"])
    shares = [seen["clean"], row["usual"], row["strongest"]]
    return [
        stairs, *(f"{share['rate']:.1%}" for share in shares), found["verdict"],
        f"{pair[0]} [{pair[1]}, {pair[2]}]", str(found["images"]),
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--eps", type=float, default=16 / 255)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--images", type=int, default=256)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable()
    train, test = (
        dq.load("digits", split="train"),
        dq.load("digits", split="test").first(options.images),
    )
    torch.manual_seed(0)
    model = trained(Small(), train, options.epochs)
    head = (
        "quantiser", "staircases opened", "clean", "usual PGD", "adaptive", "verdict",
        "less float's adaptive, points", "images",
    )  # fmt: skip
    print(f"| {' | '.join(head)} |\n|{' --- |' * len(head)}")
    for name, (package, make) in QUANTISERS.items():
        begun = time.monotonic()
        if importlib.util.find_spec(package) is None:
            cells = [f"{package} is not installed"]
        else:
            try:
                with tempfile.TemporaryDirectory() as folder, redirect_stdout(sys.stderr):
                    made = make(model, train, Path(folder))
                    cells = row(made, model, test, options.eps)
            except dq.UserError as error:
                cells = [str(error)]
        print(f"| {' | '.join([name, *cells])} |", flush=True)
        print(f"{name}: {time.monotonic() - begun:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
