"""The quantised activation functions: `rounding` as modules, of bits that can be set."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from defquant.config import Activation, check_bits
from defquant.errors import UserError
from defquant.rounding import (
    WHOLE,
    Rounded,
    as_given,
    fake_quantize,
    full_precision,
    in_operations,
    on_signed_grid,
    quantize_signed,
    quantize_tanh,
    signed_grid,
)

__all__ = [
    "Cells", "QuantBranch", "QuantReLU", "QuantSigned", "QuantTanh", "Quantizer", "Staircase",
    "activation", "adjustable", "set_bits", "shared_by_all_bits",
]  # fmt: skip


class Cells(NamedTuple):
    """Where a quantiser's input lies: `scaled`, a threshold half way between whole numbers.

    It rises in cells `first` to `last`; `rate` is d scaled / dx where that is no constant that the
    steps of the output undo.
    """

    scaled: Tensor
    first: float
    last: float
    rate: Tensor | None = None


class Quantizer(nn.Module):
    """An activation function whose output is rounded to `bits` bits, or not at all (None).

    What it holds does not depend on its bits, so neither does the state dict of a network.
    """

    fixed: int | None = None
    """The bits of one that `set_bits` only turns off and on."""
    levels: Tensor | None = None
    """2^bits - 1 inside of `shared_by_all_bits`."""

    def __init__(self, bits: int | None = None) -> None:
        super().__init__()
        self.bits = check_bits(bits)

    def forward(self, x: Tensor) -> Tensor:
        """`on_grid`, in float32 or float64 inside; of the type of `x` (`as_given`)."""
        return as_given(self.on_grid(full_precision(x)), x)

    def on_grid(self, x: Tensor) -> Tensor:
        """What the activation function makes of `x`."""
        raise NotImplementedError

    def cells(self, x: Tensor) -> Cells | None:
        """The staircase at `x`, for a backward pass that smooths it; None at full precision."""
        return None


class QuantReLU(Quantizer):
    """`fake_quantize` as a module: BN -> QuantReLU -> conv (Figure 2 of the paper)."""

    def __init__(self, bits: int | None = None, high: float = 6.0) -> None:
        super().__init__(bits)
        if not (math.isfinite(high) and high > 0):
            raise UserError(f"high, the end of the range [0, high], must be positive; found {high}")
        self.high = float(high)

    def on_grid(self, x: Tensor) -> Tensor:
        if self.levels is not None and torch.compiler.is_compiling():
            return in_operations(x, self.levels, self.high)
        return fake_quantize(x, self.bits, self.high)

    def cells(self, x: Tensor) -> Cells | None:
        if self.bits is None:
            return None
        levels = 2**self.bits - 1
        return Cells(x * (levels / self.high), 0, levels - 1)

    def extra_repr(self) -> str:
        return f"bits={self.bits}, high={self.high:g}"


class QuantTanh(Quantizer):
    r"""Tanh-based quantiser of Rakin et al. 2018 (Appendix A.1), which masks gradients.

    t = tanh(x),  Q(x) = 2 · round(n (t + 1)/2) / n - 1,  n = 2^bits - 1; straight-through, so
    that the gradient is that of tanh. Output in [-1, 1]; `bits=None` is tanh.
    """

    def on_grid(self, x: Tensor) -> Tensor:
        return quantize_tanh(x, self.bits)

    def cells(self, x: Tensor) -> Cells | None:
        if self.bits is None:
            return None
        t, levels = torch.tanh(x), 2**self.bits - 1
        return Cells((t + 1) * (levels / 2), 0, levels - 1, 1 - t * t)

    def extra_repr(self) -> str:
        return f"bits={self.bits}"


class Staircase(Quantizer):
    r"""unit · clamp(rounding(x / unit), low, high): someone else's quantiser, zero point at zero.

    Ties to even, as ONNX; straight-through inside the range, no gradient outside it, as
    `fake_quantize`. `bits` are at first those that number the range, at most 8; others spread
    2^bits values over a bounded range, None clamps alone.

    Args:
        low, high: whole numbers, or infinite.
        rounding: `torch.round`, or `torch.floor`, `torch.ceil`, `torch.trunc`.
        unit: how far the values lie apart.
    """

    def __init__(
        self,
        low: float = -math.inf,
        high: float = math.inf,
        rounding: Callable[[Tensor], Tensor] = torch.round,
        unit: float = 1.0,
    ) -> None:
        bounded = math.isfinite(high - low)
        super().__init__(min(8, math.ceil(math.log2(high - low + 1))) if bounded else 8)
        self.low, self.high, self.unit, self.own = low, high, unit, self.bits
        self.rounding = rounding
        self.shift = 0.5 * (rounding in (torch.floor, torch.trunc)) - 0.5 * (rounding == torch.ceil)

    def on_grid(self, x: Tensor) -> Tensor:
        ends = [unit * self.unit for unit in (self.low, self.high, self.shift)]
        if self.bits is None:
            return (x - ends[2]).clamp(*ends[:2])
        step, low = self.step()
        with torch.no_grad():
            u = x / self.unit if self.unit != 1 else x
            if self.bits == self.own:
                rounded = self.rounding(u)
            else:
                rounded = u.sub(low + self.shift).div_(step).round_().mul_(step).add_(low)
            rounded.clamp_(self.low, self.high).mul_(self.unit)
        slack = 1e-3 * self.unit  # the ends are inside: a black pixel keeps its gradient
        ends = [ends[0] - slack, ends[1] + slack, ends[2]]
        return Rounded.apply(x, rounded, *ends)  # type: ignore[no-untyped-call,no-any-return]

    def step(self) -> tuple[float, float]:
        """How far its values lie apart, in units, and where they begin."""
        low = self.low if math.isfinite(self.low) else 0.0
        if self.bits is None or self.bits == self.own or not math.isfinite(self.high - self.low):
            return 1.0, low
        return (self.high - self.low) / (2**self.bits - 1), low

    def cells(self, x: Tensor) -> Cells | None:
        if self.bits is None:
            return None
        step, low = self.step()
        first, last = (self.low - low) / step, (self.high - low) / step - 1
        return Cells((x / self.unit).sub_(low + self.shift).div_(step), first, last)

    def extra_repr(self) -> str:
        return f"bits={self.bits}, low={self.low:g}, high={self.high:g}, unit={self.unit:g}"


def _largest(x: Tensor) -> Tensor:
    largest: Tensor = torch.linalg.vector_norm(x, math.inf)
    return largest


class QuantSigned(Quantizer):
    r"""A signed grid whose range follows what it sees: for values that no ReLU bounds.

    Q(x) = s · clamp(round(x / s), -n, 2^bits - 1 - n),  s = peak / (2^bits - 1 - n), ties to even;
    straight-through inside the range, no gradient outside it. n = 2^(bits-1), so that the range is
    the same on both sides of 0; or, where x is never below -`least` (GELU, SiLU), of all codes the
    share least / (peak + least), to the nearest: few, and at few bits none.

    `peak`, a buffer, is a moving average of the batches' `best_peak` at these bits, taken in
    training mode (a batch with an infinite or NaN x is passed over); 0 before the first batch, when
    x passes unrounded, as it does at bits None. Deployed it is uint8 codes with zero point n.

    Raises `UserError` for bits other than 2 to 8, and a `peak` that is negative or not finite.
    """

    MOMENTUM = 0.1

    def __init__(
        self, bits: int | None = None, *, peak: float = 0.0, least: float | None = None
    ) -> None:
        super().__init__(bits)
        if bits == 1:
            raise UserError("a signed quantiser has 2 bits at least; found 1")
        if not (math.isfinite(peak) and peak >= 0):
            raise UserError(f"peak, the largest magnitude, must not be negative; found {peak}")
        self.least = least
        self.peak: Tensor
        self.register_buffer("peak", torch.tensor(float(peak)))

    def on_grid(self, x: Tensor) -> Tensor:
        if self.training and not WHOLE.on:
            self._watch(x.detach())
        if self.bits is None:
            return x
        return quantize_signed(x, self.peak, self.bits, self.least)

    def cells(self, x: Tensor) -> Cells | None:
        if self.bits is None:
            return None
        step, n = signed_grid(self.peak.to(x.dtype), self.bits, self.least)
        return Cells(x.div(step.where(step > 0, 1.0)).add_(n), 0, 2**self.bits - 2)

    def best_peak(self, x: Tensor) -> Tensor:
        """Of 13 ends from max|x| / 4 to max|x|, the one of least squared error on some of x."""
        most = _largest(x).to(self.peak)
        if self.bits is None:
            return most
        some = x[:: max(1, len(x) // 16)].flatten()
        some = some[:: max(1, len(some) // 8192)]
        ends = most * torch.linspace(0.25, 1, 13, device=x.device)
        rounded = on_signed_grid(some, ends[:, None], self.bits, self.least)
        return ends.gather(0, (rounded - some).square().sum(1).argmin(keepdim=True))[0]

    @torch.no_grad()
    def _watch(self, x: Tensor) -> None:
        now = self.best_peak(x).to(self.peak)
        mean = torch.lerp(self.peak, now, self.MOMENTUM).where(self.peak > 0, now)
        self.peak.copy_(mean.where(now.isfinite(), self.peak))

    def extra_repr(self) -> str:
        return f"bits={self.bits}" + (f", least={self.least:g}" if self.least else "")


class QuantBranch(QuantSigned):
    """One of 8 bits whatever those of the activations: between layers, not of an activation.

    Behind a convolution that enters a residual stream it lets that convolution end in integers.
    Its range ends at max|x|.
    """

    fixed = 8

    def __init__(self, *, peak: float = 0.0, least: float | None = None) -> None:
        super().__init__(self.fixed, peak=peak, least=least)

    def best_peak(self, x: Tensor) -> Tensor:
        return _largest(x).to(self.peak)


def activation(kind: Activation, bits: int | None, high: float) -> Quantizer:
    """The quantised activation function that `ModelConfig.activation` names."""
    return QuantReLU(bits, high) if kind == "relu" else QuantTanh(bits)


@contextmanager
def shared_by_all_bits(model: nn.Module) -> Iterator[list[Tensor]]:
    """What is compiled inside reads each `QuantReLU`'s bits from a tensor, those that it gives."""
    device = next((parameter.device for parameter in model.parameters()), None)
    found = [m for m in model.modules() if isinstance(m, QuantReLU) and m.bits is not None]
    for module in found:
        module.levels = torch.tensor(2.0 ** (module.bits or 0) - 1, device=device)
    try:
        yield [module.levels for module in found if module.levels is not None]
    finally:
        for module in found:
            module.levels = None


def adjustable(model: nn.Module) -> list[Quantizer]:
    """The quantisers of `model` whose bits `set_bits` sets."""
    found = [module for module in model.modules() if isinstance(module, Quantizer)]
    return [quantizer for quantizer in found if quantizer.fixed is None]


def set_bits(model: nn.Module, bits: int | None) -> nn.Module:
    """Change every activation quantiser of `model` to `bits` (None: full precision), in place.

    One of `fixed` bits is turned off by None and else on. Returns `model`. Raises `UserError` for
    bits outside 1 to 8, 1 for a `QuantSigned`, or a model without quantisers.
    """
    check_bits(bits)
    quantizers = adjustable(model)
    if not quantizers:
        raise UserError(f"{type(model).__name__} has no activation quantiser to set")
    if bits == 1 and any(isinstance(quantizer, QuantSigned) for quantizer in quantizers):
        raise UserError(
            f"{type(model).__name__} has signed quantisers, of 2 bits at least; found 1"
        )
    for module in model.modules():
        if isinstance(module, Quantizer):
            module.bits = bits if bits is None else module.fixed or bits
    return model
