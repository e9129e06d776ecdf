"""An ONNX file read into a torch module with gradients, in bounded memory and time."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from onnx import TensorProto
from torch import Tensor, nn

from defquant.errors import UserError, shown
from defquant.judging.nodes import Nodes, blamed, read_nodes
from defquant.judging.quantized import ZERO
from defquant.judging.shapes import Step
from defquant.judging.steps import BLIND, Steps, call

__all__ = ["Layout", "Port", "Twin", "in_batches", "laid", "read_onnx"]

Layout = Literal["NCHW", "NHWC"]
_BATCH = 1024
_ENDINGS = {
    "ArgMax", "Cast", "DequantizeLinear", "Dropout", "Flatten", "HardSigmoid", "Identity",
    "LogSoftmax", "QLinearSigmoid", "QLinearSoftmax", "QuantizeLinear", "Reshape", "Sigmoid",
    "Softmax", "Squeeze",
}  # fmt: skip
"""At a file's end these keep the order of the classes, or lose it: losses are taken before."""
_TYPES: dict[int, torch.dtype] = {
    TensorProto.FLOAT: torch.float32, TensorProto.DOUBLE: torch.float64,
    TensorProto.FLOAT16: torch.float16, TensorProto.UINT8: torch.uint8,
    TensorProto.INT8: torch.int8,
}  # fmt: skip


@dataclass(frozen=True)
class Port:
    """What a file takes: the tensor's name, its type, its sizes; None where one is free."""

    name: str
    dtype: torch.dtype
    shape: tuple[int | None, ...]

    @property
    def batch(self) -> int | None:
        """Images of each call; None where the file takes any number."""
        return self.shape[0]

    def fits(self, image: tuple[int, int, int], layout: Layout) -> bool:
        """Whether images of (c, h, w) can lie so; a row of c·h·w numbers may have either layout.

        Images of one channel may come without it, as (h, w).
        """
        wanted = self.shape[1:]
        if len(wanted) == 1:
            return wanted[0] in (None, math.prod(image))
        sizes = image[1:] if image[0] == 1 and len(wanted) == 2 else laid(image, layout)
        return len(wanted) == len(sizes) and all(
            a in (None, b) for a, b in zip(wanted, sizes, strict=True)
        )


def laid(image: tuple[int, int, int], layout: Layout) -> tuple[int, int, int]:
    """The sizes (c, h, w) in the order of `layout`."""
    c, h, w = image
    return (c, h, w) if layout == "NCHW" else (h, w, c)


class Twin(nn.Module):
    """What an ONNX file computes, with gradients: `forward` gives logits, `answers` its output.

    Both take (n, ...) floats as the file takes them (`port`), for any n, whole numbers as floats,
    and give (n, classes). Roundings are `defquant.quantize.Staircase` modules, which the surrogates
    of `defquant.attacks.surrogates` reach. Answers are the file's but for ties of roundings and the
    last digits of sums in float32.

    Attributes:
        port: what the file takes; `sizes` of one image there.
        classes: columns of the logits.
        ending: operators between the logits and the output, the last one first.
        alone: an answer hangs on the other images of its batch (ranges are measured on it): the
            file is to be asked for one image at a time; the twin answers each as if alone.
        rows: how many images the twin takes at once, None for any number; it splits larger batches.
        blind: nodes that an image reaches and its gradient does not pass, as a comparison.
        grid: scale and zero point of a file that takes whole numbers, where one is told.
        staircases: names of the nodes whose roundings hang on the image, as in `stairs`.
    """

    def __init__(self, port: Port, sizes: Sequence[int], program: Steps, output: str) -> None:
        super().__init__()
        self.port, self.sizes, self.steps = port, tuple(sizes), program.kept
        self.rows: int | None = port.batch
        self.alone = any(step.kind.startswith("Dynamic") for step in self.steps)
        makers = {name: step for step in self.steps for name in step.outputs}
        if output not in makers:
            raise ValueError(f"its output {shown(output)!r} does not hang on its input")
        self.output = self.source = output
        self.ending: tuple[str, ...] = ()
        self.answer = self.logit = makers[output]
        self.unit: str | None = None
        self._to_logits(makers, program)
        self.classes = program.values[self.source].flatten(1).shape[1]
        before = self.steps[: self.steps.index(makers[self.source]) + 1]
        self.blind = tuple(s.name for s in before if s.image and self._blind(s, program))
        rounding = [step for step in self.steps if step.stairs is not None]
        self.staircases = tuple(step.name for step in rounding)
        self.stairs = nn.ModuleList([step.stairs for step in rounding if step.stairs is not None])
        self.grid = self._grid(program)
        self._hold(program)
        self.eval()

    @staticmethod
    def _blind(step: Step, program: Steps) -> bool:
        """Whether it passes no gradient on, or one of its input alone: a table, `x - x mod 1`."""
        looked_up = step.kind == "Gather" and step.inputs[1] not in program.constants
        asked = step.kind == "Cast" and step.get("to") == TensorProto.BOOL
        return step.kind in BLIND or step.kind == "Mod" or looked_up or asked

    def _to_logits(self, makers: dict[str, Step], program: Steps) -> None:
        """Walk back from the output to what a loss should see."""
        name, n = self.output, len(program.values[self.output])
        passed: list[str] = []
        step = makers[name]
        while step.kind in _ENDINGS and step.inputs[0] in makers:
            one = all(program.size(name) == 1 for name in step.inputs[1:2])
            if step.kind in ("QuantizeLinear", "DequantizeLinear") and not one:
                break  # a scale for each class changes their order
            before = program.values[step.inputs[0]]
            if before.ndim < 1 or len(before) != n:
                break
            name, passed = step.inputs[0], [*passed, step.kind]
            step = makers[name]
        if program.values[name].ndim < 2:
            raise ValueError("it returns one number for an image: a column for each class is read")
        if program.values[name].flatten(1).shape[1] < 2:
            return
        self.source, self.ending, self.logit = name, tuple(passed), step
        scale = ZERO.get(step.kind, 0) - 1
        if (
            not step.get("joined")
            and 0 <= scale < len(step.inputs)
            and program.size(step.inputs[scale]) == 1
        ):
            self.unit, self.logit = step.inputs[scale], replace(step, raw=True)
            self.ending += (step.kind,)

    def _grid(self, program: Steps) -> tuple[float, float] | None:
        name = self.port.name
        for step in self.steps:
            if name in step.inputs[:1] and step.kind in ("Identity", "Reshape", "Transpose"):
                name = step.outputs[0]
            elif name in step.inputs[:1] and (step.kind in ZERO or step.kind == "DequantizeLinear"):
                if (
                    step.kind in ("QLinearConcat", "QuantizeLinear")
                    or program.size(step.inputs[1]) > 1
                ):
                    return None
                zero = step.inputs[2] if len(step.inputs) > 2 else ""
                shift = program.values[zero].item() if zero else 0
                return program.values[step.inputs[1]].item(), shift
        return None

    def _hold(self, program: Steps) -> None:
        """Constants become buffers, but for sizes and indices, which stay where they are."""
        wanted = {name for step in self.steps for name in step.inputs} | {self.unit or ""}
        self.held: dict[str, str] = {}
        self.indices: dict[str, Tensor] = {}
        for name in sorted(wanted & program.constants):
            value = program.values[name]
            if value.dtype == torch.int64 and value.ndim < 2:
                self.indices[name] = value
            else:
                self.held[name] = f"constant{len(self.held)}"
                self.register_buffer(self.held[name], value)
        last = {name: i for i, step in enumerate(self.steps) for name in step.inputs}
        self.dead: list[list[str]] = [[] for _ in self.steps]
        for name, i in last.items():
            self.dead[i].append(name)

    def forward(self, x: Tensor) -> Tensor:
        """Logits, before a softmax or a quantiser at the file's end."""
        return self._split(x, self.logit)

    def answers(self, x: Tensor) -> Tensor:
        """What the file itself returns, flat."""
        return self._split(x, self.answer)

    def _split(self, x: Tensor, last: Step) -> Tensor:
        x = x.to(torch.float64 if self.port.dtype == torch.float64 else torch.float32)
        if self.port.dtype == torch.float16:
            x = x.half().float()
        if self.rows is None:
            return self._run(x, last)
        return in_batches(x, self.rows, lambda part: self._run(part, last))

    def _run(self, x: Tensor, last: Step) -> Tensor:
        values = {self.port.name: x, **self.indices}
        values |= {name: getattr(self, held) for name, held in self.held.items()}
        for step, dead in zip(self.steps, self.dead, strict=True):
            final = step.outputs == last.outputs
            step = last if final else step
            step.images = len(x)
            with blamed(f"node {shown(step.name)!r} ({step.kind})"):
                outputs = call(step, [values[name] if name else None for name in step.inputs])
            if final:
                name = self.output if last is self.answer else self.source
                found = outputs[step.outputs.index(name)]
                if last is self.logit and self.unit is not None:
                    found = found * values[self.unit]
                return found.flatten(1)
            values.update(zip(step.outputs, outputs, strict=False))
            for name in dead:
                values.pop(name, None)
        raise AssertionError("the last step is one of the steps")


def in_batches(
    x: Tensor, rows: int, run: Callable[[Tensor], Tensor], *, filled: bool = True
) -> Tensor:
    """What `run` makes of `x`, `rows` at a time; the last ones are `filled` up with the last."""
    parts = []
    for part in x.split(rows):
        more = part[-1:].expand(rows - len(part) if filled else 0, *part.shape[1:])
        parts.append(run(torch.cat([part, more]) if len(more) else part)[: len(part)])
    return torch.cat(parts)


def read_onnx(path: Path | str, image: tuple[int, int, int] | None = None) -> Twin:
    """The file at `path` as a twin with gradients; nothing in it is run, and it may be hostile.

    Args:
        image: (c, h, w) of the images, needed where the file leaves its sizes free.

    Raises:
        UserError: no whole ONNX file; more than one input; an operator, a type or a form that is
            not read, by its name; sizes beyond 2^28 numbers or 2^38 products for an image.
    """
    path = Path(path)
    nodes = read_nodes(path)
    with blamed(str(path)):
        port, sizes = _port(nodes, image)
        program = Steps(nodes, port.name, port.dtype, sizes, port.batch)
        output = _output(nodes.outputs, program)
        twin = Twin(port, sizes[1:], program, output)
        _as_one(twin)
    return twin


def _port(nodes: Nodes, image: tuple[int, int, int] | None) -> tuple[Port, list[int]]:
    """The one input, and the sizes to try it with."""
    if len(nodes.inputs) != 1:
        names = ", ".join(shown(value.name, 20) for value in nodes.inputs[:8])
        raise ValueError(f"it must take one tensor of images; found {len(nodes.inputs)}: {names}")
    (value,) = nodes.inputs
    found = value.type.tensor_type
    if found.elem_type not in _TYPES:
        raise ValueError(f"images as float or 8-bit numbers are read; found type {found.elem_type}")
    dims = [d.dim_value if d.dim_value > 0 else None for d in found.shape.dim]
    if len(dims) < 2 or (dims[0] or 1) > _BATCH:
        raise ValueError(f"it must take a batch of images; found {dims}")
    port = Port(value.name, _TYPES[found.elem_type], tuple(dims))
    sizes = dims[1:]
    if None in sizes:
        if image is None:
            raise ValueError(f"it leaves sizes free, {dims}: give those of your images")
        last = len(sizes) == 3 and not port.fits(image, "NCHW") and port.fits(image, "NHWC")
        whole = list(laid(image, "NHWC" if last else "NCHW"))
        sizes = [math.prod(image)] if len(sizes) == 1 else [*whole[-len(sizes) :]]
    return port, [port.batch or 2, *(size for size in sizes if size is not None)]


def _output(names: Sequence[str], program: Steps) -> str:
    """The first output that hangs on the image and has a column for each class."""
    for name in names:
        value = program.values.get(name)
        if value is None:
            raise ValueError(f"no node makes its output {shown(name)!r}")
        if value.is_meta and value.ndim > 1 and value[0].numel() > 1:
            return name
    return names[0]


def _as_one(twin: Twin) -> None:
    """See whether the twin can take any number of images at once, and whether they mix."""
    draw = torch.rand(2, *twin.sizes, generator=torch.Generator().manual_seed(0))
    kind = twin.port.dtype
    x = draw if kind.is_floating_point else (draw * 255).round() - 128 * (kind == torch.int8)
    twin.rows = twin.port.batch or 1
    try:
        with torch.no_grad():
            single = twin(x)
            twin.rows = None
            together = twin(x)
    except UserError:  # a batch of another size has no place in it
        twin.rows = twin.port.batch or (1 if twin.alone else None)
        return
    slack = 0.05 * float(single.max() - single.min()) + 1e-5
    if together.shape != single.shape or not float((together - single).abs().max()) <= slack:
        twin.rows, twin.alone = twin.port.batch or 1, twin.port.batch is None
