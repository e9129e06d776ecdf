"""Integer WRN-16-4 (or -1) of rounded sums against float32 in onnxruntime and PyTorch.

8-bit and 4-bit weights, Defensive Quantization (convex sums) and vanilla, all in turn in one run
on equally many threads. Weights are random and batch norms are scrambled: time and size do not
depend on training. On one thread times are those of the core, which another program on the machine
changes little. A ratio is the float network's median over the integer one's in the same run;
the table gives the median of the runs and their range. Exit status 1 when a target is missed.
"""

import argparse
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import onnx
import torch
from onnxruntime.quantization import (
    CalibrationDataReader,
    QuantFormat,
    QuantType,
    quantize_static,
)  # fmt: skip
from onnxruntime.quantization.preprocess import quant_pre_process
from torch import nn

import defquant as dq
from defquant.deploy.cost import as_float, latency, static_cost
from defquant.deploy.graph import graph
from defquant.deploy.lower import lower
from defquant.deploy.program import Program
from defquant.deploy.runtime import OnnxModel, integer_convolutions
from defquant.integers import snap_biases_

SHAPE = (3, 32, 32)
FILES = {8: 0.27, 4: 0.14}
STATIC = "quantize_static"
FASTER = {
    "onnxruntime": {1: 1.5, 32: 1.5},
    "PyTorch": {1: 3.5, 32: 2.0},
    STATIC: {1: 1.0, 32: 1.0},
}
METHODS = {"DQ": True, "vanilla": False}
Calls = dict[str, Callable[[], object]]


def network(weight_bits: int, width: int, bits: int, *, convex: bool) -> nn.Module:
    torch.manual_seed(0)
    options: Any = {"weight_bits": weight_bits, "deployable": True, "round_sums": True}
    model = dq.wide_resnet(16, width, bits=bits, convex=convex, **options).train()
    with torch.no_grad():
        model(torch.rand(8, *SHAPE))  # gives the branches their ranges
        for norm in model.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.running_mean.normal_(0, 0.1)  # type: ignore[union-attr]
                norm.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
                norm.weight.uniform_(0.5, 1.5)
                norm.bias.normal_(0, 0.3)
    snap_biases_(model.eval(), torch.rand(1, *SHAPE))  # as training ends
    return model


def machine() -> str:
    cpus = Path("/proc/cpuinfo")
    lines = cpus.read_text().splitlines() if cpus.exists() else []
    facts = {
        key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)
    }
    units = [unit for unit in ("avx2", "avx512_vnni", "avx_vnni") if unit in facts.get("flags", "")]
    return f"{facts.get('model name', platform.machine())} ({', '.join(units) or 'no AVX2'})"


def sizes(programs: dict[str, Program]) -> list[str]:
    """Prints what each network costs but time; returns the targets that are missed."""
    missed: list[str] = []
    cards: dict[str, dict[str, Any]] = {}
    print(f"\n{'':18}{'integer convs':>14}{'file MB':>9}{'x float':>9}{'target':>8}", end="")
    print(f"{'M MACs':>9}{'G BOPs':>8}{'peak kB':>9}")
    for name, program in programs.items():
        integer, single = graph(program), graph(program, integers=False)
        done, every = integer_convolutions(integer)
        card = static_cost(
            program, file_bytes=integer.ByteSize(), float_file_bytes=single.ByteSize()
        )
        cards[name] = card
        target = FILES[4 if name.endswith("4-bit") else 8]
        print(f"{name:18}{f'{done} of {every}':>14}{card['file_bytes'] / 1e6:9.3f}", end="")
        print(f"{card['file_ratio']:9.3f}{'<= ' + str(target):>8}", end="")
        print(f"{card['macs'] / 1e6:9.1f}{card['bops'] / 1e9:8.2f}", end="")
        print(f"{card['peak_activation_bytes'] / 1e3:9.1f}")
        if done < every:
            missed.append(f"{name}: {every - done} convolutions in floats")
        if card["file_ratio"] > target:
            missed.append(f"{name}: file {card['file_ratio']:.3f}")
    return missed + [f"{bits}-bit weights: DQ costs more" for bits in FILES if unequal(cards, bits)]


def unequal(cards: dict[str, dict[str, Any]], bits: int) -> bool:
    """Whether DQ and vanilla differ in any count, or by 0.1 % in their files."""
    dq_card, vanilla = (cards[f"{method}, {bits}-bit"] for method in METHODS)
    files = {"file_bytes", "float_file_bytes", "file_ratio"}
    near = abs(dq_card["file_bytes"] / vanilla["file_bytes"] - 1) < 1e-3
    return not near or any(dq_card[key] != vanilla[key] for key in dq_card.keys() - files)


class _Images(CalibrationDataReader):  # type: ignore[misc]
    """Four batches of noise: what is timed does not depend on the ranges."""

    def __init__(self) -> None:
        self.left = [{"image": torch.rand(32, *SHAPE).numpy()} for _ in range(4)]

    def get_next(self) -> Any:
        return self.left.pop() if self.left else None


def static(single: onnx.ModelProto) -> onnx.ModelProto:
    """onnxruntime's own: U8S8, QuantizeLinear and DequantizeLinear, per channel.

    Each convolution has a bias of its own: one that several share, as our files do zeros, gets the
    scale of one of them, and onnxruntime leaves the others in float.
    """
    single = _own_biases(single)
    with tempfile.TemporaryDirectory() as folder:
        given, before, after = (Path(folder) / f"{name}.onnx" for name in ("a", "b", "c"))
        onnx.save(single, given)
        quant_pre_process(given, before)  # as its guide asks: shapes, folded and fused nodes
        quantize_static(
            before, after, _Images(), quant_format=QuantFormat.QDQ, per_channel=True,
            activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
        )  # fmt: skip
        return onnx.load(after)


def _own_biases(file: onnx.ModelProto) -> onnx.ModelProto:
    found = onnx.ModelProto()
    found.CopyFrom(file)
    constants = {constant.name: constant for constant in found.graph.initializer}
    for node in found.graph.node:
        if node.op_type == "Conv":
            own = found.graph.initializer.add()
            own.CopyFrom(constants[node.input[2]])
            own.name = node.input[2] = f"{node.output[0]}/bias"
    return found


def calls_for(batch: int, programs: dict[str, Program], single: nn.Module, threads: int) -> Calls:
    """The integer networks, and vanilla's in float32, which has the least to compute."""
    x = torch.rand(batch, *SHAPE)
    graphs = {name: graph(program) for name, program in programs.items()}
    graphs["onnxruntime"] = graph(programs["vanilla, 8-bit"], integers=False)
    graphs[STATIC] = static(graphs["onnxruntime"])
    models = {name: OnnxModel(file, threads=threads) for name, file in graphs.items()}
    calls: Calls = {
        name: partial(model.session.run, None, {model.input.name: model.fed(x)})
        for name, model in models.items()
    }
    eager = torch.inference_mode()(as_float(single).forward)
    return calls | {"PyTorch": partial(eager, x.contiguous(memory_format=torch.channels_last))}


def speeds(batch: int, runs: list[dict[str, dict[str, float]]], about: str) -> list[str]:
    """Prints the times of all; returns the targets that are missed."""
    missed: list[str] = []
    heads = (f"{other} over it" for other in FASTER)
    print(f"\n{f'batch {batch}':18}{'median ms':>10}{'quartiles':>18}", end="")
    print("".join(f"{head:>28}{'target':>8}" for head in heads), f"  {about}")
    for name in runs[0]:
        middle, low, high = (
            statistics.median(run[name][key] for run in runs)
            for key in ("median_ms", "low_ms", "high_ms")
        )
        print(f"{name:18}{middle:10.2f}{f'{low:.1f} to {high:.1f}':>18}", end="")
        for other, targets in FASTER.items():
            ratios = [run[other]["median_ms"] / run[name]["median_ms"] for run in runs]
            ratio = statistics.median(ratios)
            target = targets[batch] if name not in FASTER else None
            shown = f"{ratio:.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
            print(f"{shown:>28}{f'>= {target}' if target else '':>8}", end="")
            if target is not None and ratio < target:
                missed.append(f"{name}, batch {batch}: {ratio:.2f} of {other}")
        print(flush=True)
    return missed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=40, help="rounds a run; a quarter at 32")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--width", type=int, default=4, help="k of WRN-16-k")
    parser.add_argument("--bits", type=int, default=4, help="of activations")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    tools = ", ".join(f"{name} {version(name)}" for name in ("torch", "onnxruntime", "onnx"))
    load = os.getloadavg()[0]
    print(f"{machine()}; {tools}; {options.threads} threads; load before {load:.1f}")
    if load > 1:
        print(
            "the machine is busy: threads that wait for each other, PyTorch's above all, lose most"
        )
    programs = {
        f"{method}, {kept}-bit": lower(
            network(kept, options.width, options.bits, convex=convex), SHAPE
        )
        for kept in FILES
        for method, convex in METHODS.items()
    }
    single = network(8, options.width, options.bits, convex=False)
    missed = sizes(programs)
    for batch in (1, 32):
        rounds = options.repeats if batch == 1 else max(1, options.repeats // 4)
        calls = calls_for(batch, programs, single, options.threads)
        clock = time.thread_time if options.threads == 1 else time.perf_counter
        runs = [latency(calls, repeats=rounds, clock=clock) for _ in range(options.runs)]
        missed += speeds(batch, runs, f"n = {rounds} in turn x {options.runs}")
    print("\nmissed: " + "; ".join(missed) if missed else "\nall targets met")
    return int(bool(missed))


if __name__ == "__main__":
    sys.exit(main())
