"""The steps of a file that hang on the image, and whether they can be borne.

Sizes are known before anything is computed: each node runs first on torch's meta device, which has
shapes and no values. What hangs on constants alone is then computed, once.
"""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from onnx import TensorProto
from torch import Tensor

from defquant.errors import shown
from defquant.judging.nodes import FLOATS, LARGEST, TABLE, Nodes, blamed
from defquant.judging.operators import NUMBERS
from defquant.judging.quantized import ZERO
from defquant.judging.shapes import MOST, Step, bounded
from defquant.quantize import Staircase

__all__ = ["BLIND", "Steps", "call"]

_PRODUCTS = 1 << 38
"""Of numbers, for an image."""
_SPARE = 1 << 22
"""Numbers that constants may become beyond 16 times those in the file."""
_LISTED = 1 << 16
BLIND = {
    "And", "ArgMax", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Not", "Or",
}  # fmt: skip
"""These pass no gradient on."""
_ABOVE = {"Greater", "GreaterOrEqual"}
_TURNED = _ABOVE | {"Less", "LessOrEqual"}
_CODES = {"ConvInteger", "DynamicQuantizeLinear", "MatMulInteger", *ZERO} | BLIND
_REALS = {"DequantizeLinear", "DynamicQuantizeMatMul", "MatMulIntegerToFloat"}
_RANGES = {
    torch.uint8: (0, 255), torch.int8: (-128, 127), torch.int16: (-32768, 32767),
    torch.uint16: (0, 65535),
}  # fmt: skip
_LISTS = NUMBERS | {kind: (place,) for kind, place in ZERO.items()}
_COMMUTE = {"Add", "Max", "Min", "Mul"}
_MONOTONE = {"Clip", "Div", "Identity", "Relu", "Sub"} | _COMMUTE


def call(step: Step, values: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    """What the step makes of `values`; those that it takes as numbers become lists."""
    given: list[Any] = list(values)
    for place in _LISTS.get(step.kind, ()):
        if place < len(given) and given[place] is not None:
            known = step.known.get(place)
            given[place] = given[place].reshape(-1).tolist() if known is None else known
    made = TABLE[step.kind](step, *given)
    return made if isinstance(made, tuple) else (made,)


class Steps:
    """The steps that hang on the image, and the values of all names: those are on `meta`."""

    ends = torch.tensor([-math.inf, math.inf])

    def __init__(
        self, nodes: Nodes, name: str, kind: torch.dtype, sizes: Sequence[int], batch: int | None
    ) -> None:
        self.path, self.small = nodes.path, nodes.small
        self.values: dict[str, Tensor] = dict(nodes.constants)
        self.constants = set(nodes.constants)
        self.whole: set[str] = set()
        self.images, self.numbers, self.products = sizes[0], nodes.size, 0
        self.stored, self.computed = nodes.size, 0
        self.kept: list[Step] = []
        floats = torch.float64 if kind == torch.float64 else torch.float32
        bounded(math.prod(sizes[1:]))
        self.values[name] = torch.empty(*sizes, dtype=floats, device="meta")
        if not kind.is_floating_point:
            self.whole.add(name)
        for step in nodes.steps:
            with blamed(f"{self.path}: node {shown(step.name)!r} ({step.kind})"):
                self.add(step, batch)
        self.kept = self.needed(nodes.outputs)
        self.uses = Counter([*nodes.outputs, *(n for step in self.kept for n in step.inputs)])
        self.makers = {name: step for step in self.kept for name in step.outputs}
        for step in self.kept:
            if step.kind in ("Cast", "Ceil", "Floor", "QuantizeLinear", "Round"):
                self.narrow(step)
                self.join(step)

    def add(self, step: Step, batch: int | None) -> None:
        if step.kind in _COMMUTE and step.inputs[0] in self.constants:
            step.inputs = step.inputs[::-1]
        if step.kind == "Where":
            self.as_clip(step)
        values = [self.find(name) for name in step.inputs]
        images = [
            n for n, v in zip(step.inputs, values, strict=True) if v is not None and v.is_meta
        ]
        step.image = bool(images) and step.kind not in ("Shape", "Size")
        step.whole = bool(images) and self.whole.issuperset(images)
        if step.kind in ZERO:
            step.range = self.range(step, ZERO[step.kind])
        if step.image and step.kind == "Reshape" and values[0] is not None and values[0].is_meta:
            step.batch = batch
        self.list_numbers(step, values)
        shapes = call(step, [v if v is None else v.to("meta") for v in values])
        self.count(step, values, shapes)
        outputs = shapes if step.image else call(step, values)
        needed = [name for name in step.outputs if name]
        if len(outputs) < len(needed):
            raise ValueError(f"only its first output is read; it has {len(needed)}")
        self.values.update(zip(step.outputs, outputs, strict=False))
        to = step.get("to", TensorProto.FLOAT)
        codes = step.kind in _CODES or (step.kind == "Cast" and to not in FLOATS)
        if codes or (step.whole and step.kind not in _REALS and step.kind != "Cast"):
            self.whole.update(step.outputs)
        if self.constants.issuperset(name for name in step.inputs if name):
            self.constants.update(step.outputs)
        else:
            kept = {p: v for p, v in step.known.items() if step.inputs[p] in self.constants}
            step.known = kept  # other sizes hang on the batch
            self.kept.append(step)

    def as_clip(self, step: Step) -> None:
        """where(x > t, t, x) is a clip, as Brevitas writes it, through which a gradient passes."""
        maker = next((s for s in reversed(self.kept) if step.inputs[0] in s.outputs), None)
        if maker is None or maker.kind not in _TURNED or step.inputs[2] != maker.inputs[0]:
            return
        ends = {maker.inputs[1], step.inputs[1]}
        if self.constants.issuperset(ends) and all(self.size(name) == 1 for name in ends):
            first, second = (float(self.values[name]) for name in (maker.inputs[1], step.inputs[1]))
            if first == second:
                low, high = ("", step.inputs[1])[:: 1 if maker.kind in _ABOVE else -1]
                step.kind, step.inputs = "Clip", (maker.inputs[0], low, high)

    def needed(self, outputs: Sequence[str]) -> list[Step]:
        """The steps on which an output hangs."""
        names, found = set(outputs), list[Step]()
        for step in reversed(self.kept):
            if names.intersection(step.outputs):
                names.update(step.inputs)
                found.append(step)
        return found[::-1]

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
        for place in _LISTS.get(step.kind, ()):
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
        size, images = sum(tensor.numel() for tensor in made), self.images if step.image else 1
        self.numbers += -(-size // images)
        self.computed += 0 if step.image else size
        tensors = [v for v in values if v is not None]
        inner = math.prod(step.get("kernel_shape", [1]))
        if "Conv" in step.kind:
            inner = max((v[0].numel() for v in tensors[1:] if v.ndim == tensors[0].ndim), default=1)
        elif "MatMul" in step.kind or "Gemm" in step.kind:
            inner = tensors[0].shape[0 if step.get("transA", 0) else -1]
        elif step.kind == "Einsum":
            inner = max(tensors[0].shape, default=1)
        self.products += made[0].numel() * inner // images
        most = size > MOST * images or self.computed > _SPARE + 16 * self.stored
        if most or self.numbers > LARGEST or self.products > _PRODUCTS:
            sizes = [list(tensor.shape) for tensor in made][:4]
            raise ValueError(
                f"the file needs too much: {sizes} here after {self.numbers:,} numbers"
            )

    def narrow(self, step: Step) -> None:
        """Give a rounding the range that clips before and after it leave, and so its true bits.

        Clips before it that serve nothing else are then its own: they and monotone steps commute.
        """
        stairs = step.stairs
        if stairs is None:
            return
        ends = self.ends
        for before in reversed(list(self.before(step))):
            ends = call(before, [ends, *map(self.values.get, before.inputs[1:])])[0]
        zero = 0.0
        if step.kind == "QuantizeLinear":
            if any(self.size(name) > 1 for name in step.inputs[1:]):
                return
            ends = ends / self.values[step.inputs[1]]
            zero = float(step.known.get(2, [0])[0])
        ends = stairs.rounding(ends.flatten())
        low, high, clips = self.after(step, zero)
        low, high = max(low, float(ends[0]), stairs.low), min(high, float(ends[1]), stairs.high)
        if low < high:
            step.stairs = Staircase(low, high, stairs.rounding)
            for other in (*self.own(step), *clips):
                other.kind, other.inputs, other.known = "Identity", other.inputs[:1], {}

    def join(self, step: Step) -> None:
        """A QuantizeLinear that only its inverses follow rounds in the reals: fewer passes."""
        if step.kind != "QuantizeLinear" or step.stairs is None:
            return
        name = step.outputs[0]
        users = self.users(name)
        while len(users) == self.uses[name] == 1 and users[0].kind == "Identity":
            name = users[0].outputs[0]
            users = self.users(name)
        grid = self.grid(step)
        same = [u for u in users if u.kind == "DequantizeLinear" and self.grid(u) == grid]
        if max(map(len, grid)) > 1 or not users or len(same) < self.uses[name]:
            return
        old, unit = step.stairs, float(self.values[step.inputs[1]])
        step.stairs = Staircase(old.low, old.high, old.rounding, unit)
        for each in (step, *same):
            each.attributes["joined"] = True

    def grid(self, step: Step) -> list[list[float]]:
        """Its scales and its zero points."""
        found = [self.values[name].flatten().tolist() for name in step.inputs[1:3] if name]
        return [*found, [0]][:2]

    def own(self, step: Step) -> Iterator[Step]:
        for before in self.before(step):
            if self.uses[before.outputs[0]] > 1:
                break
            if before.kind in ("Clip", "Max", "Min", "Relu"):
                yield before

    def before(self, step: Step) -> Iterator[Step]:
        """The steps that lead to this one, last first, as long as they rise with their input."""
        while step.inputs[0] in self.makers and self.rises(self.makers[step.inputs[0]]):
            step = self.makers[step.inputs[0]]
            yield step

    def after(self, step: Step, zero: float) -> tuple[float, float, list[Step]]:
        """What clips of the codes, less `zero`, leave of all numbers, and those clips."""
        low, high, clips = -math.inf, math.inf, list[Step]()
        while self.uses[step.outputs[0]] == 1:
            users = self.users(step.outputs[0])
            if not users:  # it is the output
                break
            (step,) = users
            if step.kind == "Cast" and step.stairs is None:
                continue
            if not self.rises(step):
                break
            if step.kind == "Clip":
                first, last = call(step, [self.ends, *map(self.values.get, step.inputs[1:])])[0]
                low, high = max(low, float(first) - zero), min(high, float(last) - zero)
                clips.append(step)
            elif step.kind in ("Add", "Sub"):
                zero += float(self.values[step.inputs[1]]) * (1 if step.kind == "Add" else -1)
            else:
                break
        return low, high, clips

    def users(self, name: str) -> list[Step]:
        return [step for step in self.kept if name in step.inputs[:1]]

    def rises(self, step: Step) -> bool:
        """Whether a step is a rising function of its first input, the same for all numbers."""
        others = [name for name in step.inputs[1:] if name]
        plain = step.kind in _MONOTONE and all(
            n in self.constants and self.size(n) == 1 for n in others
        )
        if not plain or step.inputs[0] in self.constants:
            return False
        return step.kind not in ("Mul", "Div") or float(self.values[others[0]]) > 0
