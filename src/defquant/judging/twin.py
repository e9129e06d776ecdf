"""An ONNX file read into a torch module with gradients, in bounded memory and time.

Sizes are known before anything is computed: each node runs first on torch's meta device, which has
shapes and no values. What hangs on constants alone is then computed, once.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from onnx import TensorProto
from torch import Tensor, nn

from defquant.errors import UserError, shown
from defquant.judging.nodes import LARGEST, TABLE, Nodes, blamed, read_nodes
from defquant.judging.operators import NUMBERS
from defquant.judging.quantized import ZERO
from defquant.judging.shapes import Step

__all__ = ["Layout", "Port", "Twin", "laid", "read_onnx"]

Layout = Literal["NCHW", "NHWC"]
_PRODUCTS = 1 << 38
"""Of numbers, for an image."""
_LISTED = 1 << 16
_ENDINGS = {
    "ArgMax", "Cast", "DequantizeLinear", "Dropout", "Flatten", "HardSigmoid", "Identity",
    "LogSoftmax", "QLinearSigmoid", "QLinearSoftmax", "QuantizeLinear", "Reshape", "Sigmoid",
    "Softmax", "Squeeze",
}  # fmt: skip
"""At a file's end these keep the order of the classes, or lose it: losses are taken before."""
_BLIND = {
    "And", "ArgMax", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Not", "Or",
}  # fmt: skip
_CODES = {"ConvInteger", "DynamicQuantizeLinear", "MatMulInteger", *ZERO} | _BLIND
_REALS = {"DequantizeLinear", "DynamicQuantizeMatMul", "MatMulIntegerToFloat"}
_TYPES: dict[int, torch.dtype] = {
    TensorProto.FLOAT: torch.float32, TensorProto.DOUBLE: torch.float64,
    TensorProto.FLOAT16: torch.float16, TensorProto.UINT8: torch.uint8,
    TensorProto.INT8: torch.int8,
}  # fmt: skip
_RANGES = {
    torch.uint8: (0, 255), torch.int8: (-128, 127), torch.int16: (-32768, 32767),
    torch.uint16: (0, 65535),
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
        """Whether images of (c, h, w) can lie so; a row of c·h·w numbers may have either layout."""
        wanted = self.shape[1:]
        if len(wanted) == 1:
            return wanted[0] in (None, math.prod(image))
        sizes = laid(image, layout)
        return len(wanted) == 3 and all(a in (None, b) for a, b in zip(wanted, sizes, strict=True))


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
        blind: nodes that an image reaches and a gradient does not pass, as a comparison.
        grid: scale and zero point of a file that takes whole numbers, where one is told.
        staircases: names of the nodes whose roundings hang on the image, as in `stairs`.
    """

    def __init__(self, port: Port, sizes: Sequence[int], program: "_Program", output: str) -> None:
        super().__init__()
        self.port, self.sizes, self.steps = port, tuple(sizes), program.steps
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
        self.blind = tuple(s.name for s in before if s.image and s.kind in _BLIND)
        rounding = [step for step in self.steps if step.stairs is not None]
        self.staircases = tuple(step.name for step in rounding)
        self.stairs = nn.ModuleList([step.stairs for step in rounding if step.stairs is not None])
        self.grid = self._grid(program)
        self._hold(program)
        self.eval()

    def _to_logits(self, makers: dict[str, Step], program: "_Program") -> None:
        """Walk back from the output to what a loss should see."""
        name, n = self.output, len(program.values[self.output])
        passed: list[str] = []
        step = makers[name]
        while step.kind in _ENDINGS and step.inputs[0] in makers:
            one = all(program.size(name) == 1 for name in step.inputs[1:2])
            if step.kind in ("QuantizeLinear", "DequantizeLinear") and not one:
                break  # a scale for each class changes their order
            before = program.values[step.inputs[0]]
            if before.ndim < 2 or len(before) != n:
                break
            name, passed = step.inputs[0], [*passed, step.kind]
            step = makers[name]
        if program.values[name].flatten(1).shape[1] < 2:
            return
        self.source, self.ending, self.logit = name, tuple(passed), step
        scale = ZERO.get(step.kind, 0) - 1
        if 0 <= scale < len(step.inputs) and step.inputs[scale]:
            self.unit, self.logit = step.inputs[scale], replace(step, raw=True)
            self.ending += (step.kind,)

    def _grid(self, program: "_Program") -> tuple[float, float] | None:
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

    def _hold(self, program: "_Program") -> None:
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
        if self.rows is None or len(x) == self.rows:
            return self._run(x, last)
        parts = []
        for part in x.split(self.rows):
            filled = torch.cat([part, part[-1:].expand(self.rows - len(part), *part.shape[1:])])
            parts.append(self._run(filled, last)[: len(part)])
        return torch.cat(parts)

    def _run(self, x: Tensor, last: Step) -> Tensor:
        values = {self.port.name: x, **self.indices}
        values |= {name: getattr(self, held) for name, held in self.held.items()}
        for step, dead in zip(self.steps, self.dead, strict=True):
            final = step.outputs == last.outputs
            step = last if final else step
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


def call(step: Step, values: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    """What the step makes of `values`; those that it takes as numbers become lists."""
    given: list[Any] = list(values)
    for place in NUMBERS.get(step.kind, ()) + ((ZERO[step.kind],) if step.kind in ZERO else ()):
        if place < len(given) and given[place] is not None:
            known = step.known.get(place)
            given[place] = given[place].reshape(-1).tolist() if known is None else known
    made = TABLE[step.kind](step, *given)
    return made if isinstance(made, tuple) else (made,)


class _Program:
    """The steps that hang on the image, and the values of all names: those are on `meta`."""

    def __init__(self, nodes: Nodes, port: Port, sizes: Sequence[int]) -> None:
        self.path, self.small = nodes.path, nodes.small
        self.values: dict[str, Tensor] = dict(nodes.constants)
        self.constants = set(nodes.constants)
        self.whole: set[str] = set()
        self.images, self.numbers, self.products = sizes[0], nodes.size, 0
        self.steps: list[Step] = []
        kind = torch.float64 if port.dtype == torch.float64 else torch.float32
        self.values[port.name] = torch.empty(*sizes, dtype=kind, device="meta")
        if not port.dtype.is_floating_point:
            self.whole.add(port.name)
        for step in nodes.steps:
            with blamed(f"{self.path}: node {shown(step.name)!r} ({step.kind})"):
                self.add(step, port)

    def add(self, step: Step, port: Port) -> None:
        values = [self.find(name) for name in step.inputs]
        images = [
            n for n, v in zip(step.inputs, values, strict=True) if v is not None and v.is_meta
        ]
        step.image = bool(images) and step.kind not in ("Shape", "Size")
        step.whole = bool(images) and self.whole.issuperset(images)
        if step.kind in ZERO:
            step.range = self.range(step, ZERO[step.kind])
        if step.image and step.kind == "Reshape" and values[0] is not None and values[0].is_meta:
            step.batch = port.batch
        self.list_numbers(step, values)
        shapes = call(step, [v if v is None else v.to("meta") for v in values])
        self.count(step, values, shapes)
        outputs = shapes if step.image else call(step, values)
        needed = [name for name in step.outputs if name]
        if len(outputs) < len(needed):
            raise ValueError(f"only its first output is read; it has {len(needed)}")
        self.values.update(zip(step.outputs, outputs, strict=False))
        codes = step.kind in _CODES or self.casts_to_codes(step)
        if codes or (step.whole and step.kind not in _REALS and step.kind != "Cast"):
            self.whole.update(step.outputs)
        if self.constants.issuperset(name for name in step.inputs if name):
            self.constants.update(step.outputs)
        else:
            kept = {p: v for p, v in step.known.items() if step.inputs[p] in self.constants}
            step.known = kept  # other sizes hang on the batch
            self.steps.append(step)

    def find(self, name: str) -> Tensor | None:
        if name and name not in self.values:
            raise ValueError(f"it needs {shown(name)!r}, which nothing before it makes")
        return self.values[name] if name else None

    def size(self, name: str) -> int:
        return self.values[name].numel() if name else 0

    def range(self, step: Step, place: int) -> tuple[int, int]:
        """Of the type of the output, which is that of its zero point."""
        name = step.inputs[place] if place < len(step.inputs) else ""
        if name in self.small:
            return self.small[name]
        if not name and step.get("output_dtype", TensorProto.UINT8) != TensorProto.UINT8:
            raise ValueError("output_dtype is not read: give a zero point")
        kind = self.values[name].dtype if name else torch.uint8
        if kind not in _RANGES:
            raise ValueError(f"a zero point of type {kind} is not read")
        return _RANGES[kind]

    def list_numbers(self, step: Step, values: Sequence[Tensor | None]) -> None:
        places = NUMBERS.get(step.kind, ()) + ((ZERO[step.kind],) if step.kind in ZERO else ())
        for place in places:
            value = values[place] if place < len(values) else None
            if value is None:
                continue
            if value.is_meta:
                raise ValueError(f"its input {place} hangs on the image")
            if value.numel() > _LISTED:
                raise ValueError(f"its input {place} has {value.numel():,} numbers")
            step.known[place] = value.reshape(-1).tolist()

    def count(self, step: Step, values: Sequence[Tensor | None], made: Sequence[Tensor]) -> None:
        """Raise `ValueError` where all of them would be more than a machine can bear."""
        size = sum(tensor.numel() for tensor in made)
        images = self.images if step.image else 1
        self.numbers += -(-size // images)
        tensors = [v for v in values if v is not None]
        inner = math.prod(step.get("kernel_shape", [1]))
        if "Conv" in step.kind:
            inner = max((v[0].numel() for v in tensors[1:] if v.ndim == tensors[0].ndim), default=1)
        elif "MatMul" in step.kind or "Gemm" in step.kind:
            inner = tensors[0].shape[0 if step.get("transA", 0) else -1]
        self.products += made[0].numel() * inner // images
        if self.numbers > LARGEST or self.products > _PRODUCTS:
            sizes = [list(tensor.shape) for tensor in made][:4]
            raise ValueError(
                f"the file needs too much: {sizes} here after {self.numbers:,} numbers"
            )

    @staticmethod
    def casts_to_codes(step: Step) -> bool:
        to = step.get("to", TensorProto.FLOAT)
        floats = (TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.FLOAT16, TensorProto.BFLOAT16)
        return step.kind == "Cast" and to not in floats


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
        program = _Program(nodes, port, sizes)
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
    if len(dims) not in (2, 4):
        raise ValueError(f"it must take a batch of images; found {len(dims)} axes")
    port = Port(value.name, _TYPES[found.elem_type], tuple(dims))
    sizes = dims[1:]
    if None in sizes:
        if image is None:
            raise ValueError(f"it leaves sizes free, {dims}: give those of your images")
        last = len(sizes) == 3 and not port.fits(image, "NCHW") and port.fits(image, "NHWC")
        whole = list(laid(image, "NHWC" if last else "NCHW"))
        sizes = [math.prod(image)] if len(sizes) == 1 else list(whole)
    return port, [port.batch or 2, *(size for size in sizes if size is not None)]


def _output(names: Sequence[str], program: _Program) -> str:
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
    with torch.no_grad():
        twin.rows = twin.port.batch or 1
        single = twin(x)
        twin.rows = None
        try:
            together = twin(x)
        except UserError:  # it has its batch in other places than a Reshape
            twin.rows = twin.port.batch
            return
    slack = 0.05 * float(single.max() - single.min()) + 1e-5
    if together.shape != single.shape or not float((together - single).abs().max()) <= slack:
        twin.rows, twin.alone = twin.port.batch or 1, twin.port.batch is None
