"""What a deployed network costs: bytes, multiplications, bit operations, memory and time."""

import copy
import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import onnx
import torch
from torch import nn

from defquant.deploy.program import Affine, Call, Conv, Linear, Name, Op, Program, run, sources
from defquant.deploy.runtime import OnnxModel
from defquant.errors import UserError
from defquant.quantize import QuantBranch, Quantizer
from defquant.weights import QuantConv2d, QuantLinear

__all__ = ["as_float", "latencies", "latency", "rows", "shapes", "static_cost"]

FLOAT = 32
_MULTIPLIES = {
    "bmm", "conv2d", "conv_transpose2d", "linear", "matmul", "scaled_dot_product_attention",
}  # fmt: skip
WARM_UP, REST = 3, 0.005  # rounds; seconds
NOTE = "Fewer than 8 bits run at the speed of 8 on CPUs: they save bytes, not time."
WAYS = {"torch": "PyTorch float32", "onnxruntime": "onnxruntime float32", "integer": "integer"}


def static_cost(program: Program, *, file_bytes: int, float_file_bytes: int) -> dict[str, Any]:
    r"""Sizes and counts of `program` for one image, ready for JSON.

    BOPs = Σ MACs · (weight bits) · (bits of the activations that enter), 32 · 32 in floats: the
    multiplications of Baskin et al. 2018 (UNIQ), without their additions.

    Args:
        program: the network in integers.
        file_bytes: of its ONNX file.
        float_file_bytes: of the same network's in float32.

    Returns:
        weights: how many, of convolutions, linear layers and matrix products, without biases and
            scales; of what stays in floats they have 32 bits.
        weight_bytes: packed, Σ bits · count / 8.
        macs, float_macs: multiply-adds of what runs in integers, convolutions and batch norms of
            codes, and of what stays in floats: linear layers, other convolutions, matrix products
            (attention), and batch norms that could not be folded, with one for each element.
        peak_activation_bytes: the largest sum of tensors alive at once, packed: codes at their
            bits, floats at 32. A tensor lives from the operation that makes it to the last that
            reads it, both included; the caller's image is not counted.
        uint8_peak_activation_bytes: with codes of 8 bits each, as runtimes keep them.
        layers: {layer, macs, weight_bits, activation_bits, bops} of each, in order.
        file_bytes, float_file_bytes, file_ratio, bops, and all at 32 bits as float_weight_bytes,
        float_bops and float_peak_activation_bytes.
    """
    sizes = shapes(program)
    layers, grids = _layers(program, sizes), program.grids
    weights = [held for op in program.ops for held in _weights(op)]
    count = sum(size for size, _ in weights)
    macs = sum(layer["macs"] for layer in layers)
    floats = sum(layer["macs"] for layer in layers if layer["weight_bits"] == FLOAT)
    return {
        "file_bytes": file_bytes,
        "float_file_bytes": float_file_bytes,
        "file_ratio": file_bytes / float_file_bytes,
        "weights": count,
        "weight_bytes": sum(_bytes(*held) for held in weights),
        "float_weight_bytes": _bytes(count, FLOAT),
        "macs": macs - floats,
        "float_macs": floats,
        "bops": sum(layer["bops"] for layer in layers),
        "float_bops": macs * FLOAT * FLOAT,
        "peak_activation_bytes": _peak(program, sizes, {name: grids[name].bits for name in grids}),
        "uint8_peak_activation_bytes": _peak(program, sizes, dict.fromkeys(grids, 8)),
        "float_peak_activation_bytes": _peak(program, sizes, {}),
        "layers": layers,
    }


def shapes(program: Program) -> dict[str, tuple[int, ...]]:
    """Of every tensor for a batch of one image: (1, c, h, w), (1, c) or as it is laid out."""
    tensors = run(program, torch.zeros(1, *program.shape))
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


_Sizes: TypeAlias = Mapping[str, tuple[int, ...]]


def _layers(program: Program, sizes: _Sizes) -> list[dict[str, Any]]:
    found = []
    for op in program.ops:
        if isinstance(op, Conv):
            macs = op.weight.integers.size * math.prod(sizes[op.name][2:])
            found.append((op.layer, macs, op.weight.bits, program.grids[op.source].bits))
        elif isinstance(op, Linear):
            rows = math.prod(sizes[op.name][:-1])
            found.append((op.layer, op.weight.integers.size * rows, FLOAT, FLOAT))
        elif isinstance(op, Affine):
            found.append((op.name, math.prod(sizes[op.name]), FLOAT, FLOAT))
        elif isinstance(op, Call) and (count := _products(op, sizes)):
            found.append((op.layer, count, FLOAT, FLOAT))
    keys = ("layer", "macs", "weight_bits", "activation_bits")
    return [dict(zip(keys, a, strict=True)) | {"bops": math.prod(a[1:])} for a in found]


def _weights(op: Op) -> list[tuple[int, int]]:
    """How many it multiplies with, and their bits."""
    if isinstance(op, Conv | Linear):
        return [(op.weight.integers.size, op.weight.bits)]
    held = op.args[:2] if isinstance(op, Call) and op.kind in _MULTIPLIES else ()
    return [(value.size, FLOAT) for value in held if isinstance(value, np.ndarray)]


def _products(op: Call, sizes: _Sizes) -> int:
    """Multiply-adds of what stays in floats: layers and matrix products; others count as 0."""
    if op.kind not in _MULTIPLIES:
        return 0
    first, second = (sizes[a.value] if isinstance(a, Name) else a.shape for a in op.args[:2])
    results = math.prod(sizes[op.name])
    if op.kind == "scaled_dot_product_attention":  # of queries and keys, of shares and values
        return second[-2] * (math.prod(first) + results)
    if op.kind == "conv_transpose2d":
        return math.prod(first) * math.prod(second[1:])
    return results * (math.prod(second[1:]) if op.kind in ("conv2d", "linear") else first[-1])


def _peak(program: Program, sizes: _Sizes, bits: Mapping[str, int]) -> int:
    """The most bytes alive at once; tensors that are not in `bits` are floats."""
    last = {name: i for i, op in enumerate(program.ops) for name in sources(op)}
    live, peak = dict[str, int](), 0
    for i, op in enumerate(program.ops):
        live[op.name] = _bytes(math.prod(sizes[op.name]), bits.get(op.name, FLOAT))
        peak = max(peak, sum(live.values()))
        live = {name: size for name, size in live.items() if last.get(name, -1) > i}
    return peak


def _bytes(count: int, bits: int) -> int:
    return -(-count * bits // 8)


def latency(
    calls: Mapping[str, Callable[[], object]],
    *,
    repeats: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, dict[str, float]]:
    """Median and quartiles of the milliseconds of each call: `median_ms`, `low_ms`, `high_ms`.

    Each of the `repeats` rounds, after some that warm up, makes every call once, in an order drawn
    anew: what else the machine does falls on all alike, and so do the caches that a call leaves
    behind (a fixed neighbour cost 20 %). A rest before each call lets the threads of the one before
    fall asleep, which spin on cores that the next needs.
    """
    if repeats < 1:
        raise UserError(f"repeats must be 1 or more; found {repeats}")
    draw, times = random.Random(1), {name: list[float]() for name in calls}
    for _ in range(WARM_UP + repeats):
        for name in draw.sample(list(calls), len(calls)):
            time.sleep(REST)
            start = clock()
            calls[name]()
            times[name].append((clock() - start) * 1e3)
    keys, at = ("median_ms", "low_ms", "high_ms"), (0.5, 0.25, 0.75)
    values = {name: np.quantile(mine[WARM_UP:], at).tolist() for name, mine in times.items()}
    return {name: dict(zip(keys, mine, strict=True)) for name, mine in values.items()}


def latencies(
    model: nn.Module,
    integer: onnx.ModelProto | Path,
    single: onnx.ModelProto | Path,
    shape: tuple[int, int, int],
    *,
    batches: Sequence[int] = (1, 32),
    repeats: int = 30,
    threads: int | None = None,
) -> dict[str, Any]:
    """`latency` of three ways to run one network on the CPU, in turn, in one run.

    `model` is left as it is; its float copy (`as_float`) is timed, eager. `integer` and `single`
    are its ONNX files, the second from `graph(program, integers=False)`, for onnxruntime; `shape`
    is (c, h, w). Each has `threads` threads, torch's number without it.

    Returns `threads`, `repeats`, and in `batches`, by size (as text, for JSON) and by name
    (`torch`, `onnxruntime`, `integer`), what `latency` returns.
    """
    before = torch.get_num_threads()
    threads = threads or before
    eager = torch.inference_mode()(as_float(model).forward)
    files = {"onnxruntime": single, "integer": integer}
    runs = {name: OnnxModel(file, threads=threads) for name, file in files.items()}
    found = {}
    try:
        torch.set_num_threads(threads)
        for batch in batches:
            x = torch.rand(batch, *shape, generator=torch.Generator().manual_seed(0))
            calls = {
                name: partial(run.session.run, None, {run.input.name: run.fed(x)})
                for name, run in runs.items()
            }
            calls["torch"] = partial(eager, x.contiguous(memory_format=torch.channels_last))
            found[str(batch)] = latency(calls, repeats=repeats)
    finally:
        torch.set_num_threads(before)
    return {"threads": threads, "repeats": repeats, "batches": found}


def as_float(model: nn.Module) -> nn.Module:
    """A copy of `model` without quantisers, as float32 would be run: eval, CPU, channels last."""
    network = copy.deepcopy(model).cpu().eval()
    for module in list(network.modules()):
        if isinstance(module, Quantizer):
            module.bits = None
        if isinstance(module, QuantConv2d | QuantLinear):
            module.weight_bits = None
        for name, child in list(module.named_children()):
            if isinstance(child, QuantBranch):
                setattr(module, name, nn.Identity())
    return network.to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]


def rows(card: Mapping[str, Any]) -> list[str]:
    """The card of `static_cost`, with `latencies` under `latency`, as aligned lines for people."""
    lines = [f"{'':20}{'integer':>10}{'float32':>12}{'ratio':>8}"]
    for name, key, against in (
        ("file", "file_bytes", "float_file_bytes"),
        ("weights, packed", "weight_bytes", "float_weight_bytes"),
        ("activations, packed", "peak_activation_bytes", "float_peak_activation_bytes"),
        ("  codes as bytes", "uint8_peak_activation_bytes", "float_peak_activation_bytes"),
    ):
        a, b = card[key], card[against]
        lines.append(f"{name:20}{_size(a):>10}{_size(b):>12}{a / b:8.3f}")
    a, b = card["bops"] / 1e9, card["float_bops"] / 1e9
    lines.append(f"{'bit operations':20}{a:8.2f} G{b:10.2f} G{a / b:8.3f}")
    macs, floats = card["macs"] / 1e6, card["float_macs"] / 1e6
    lines.append(f"{'multiply-adds':20}{macs:8.2f} M in integers, {floats:.2f} M in floats")
    return [*lines, *(_latency_rows(card["latency"]) if "latency" in card else ()), NOTE]


def _latency_rows(found: Mapping[str, Any]) -> list[str]:
    lines = [f"{'ms, median':20}"] + [f"{words:20}" for words in WAYS.values()]
    for batch, times in found["batches"].items():
        lines[0] += f"{'batch ' + batch:>10}  {'quartiles':13}{'/ integer':>9}"
        for i, name in enumerate(WAYS):
            middle, low, high = (times[name][key] for key in ("median_ms", "low_ms", "high_ms"))
            ratio = middle / times["integer"]["median_ms"]
            lines[i + 1] += f"{middle:10.1f}  {f'{low:.1f} to {high:.1f}':13}{ratio:9.2f}"
    return [*lines, f"{found['threads']} threads, n = {found['repeats']} in turn"]


def _size(count: int) -> str:
    return f"{count / 1e6:.2f} MB" if count >= 1e6 else f"{count / 1e3:.1f} kB"
