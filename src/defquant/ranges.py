"""Ranges of quantisers, measured on images."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm

from defquant.errors import UserError
from defquant.quantize import Quantizer, QuantReLU, QuantSigned, fake_quantize

__all__ = ["MeasuredReLU", "calibrate"]


class MeasuredReLU(QuantReLU):
    """One whose range `calibrate` measures, so that it belongs to the state dict."""

    def __init__(self, bits: int | None = None) -> None:
        super().__init__(bits, high=1e30)

    def get_extra_state(self) -> Tensor:
        return torch.tensor(self.high, dtype=torch.float64)

    def set_extra_state(self, state: Tensor) -> None:
        self.high = float(state)


@torch.no_grad()
def calibrate(model: nn.Module, images: Tensor, bits: int | None) -> dict[str, str]:
    """Measure each `MeasuredReLU`, and `QuantSigned` without a peak, of `model` on `images`.

    Of a range for `bits` the end is that of least squared error. The model is then in eval mode,
    its quantisers as they were (all off for `bits` None). Returns what each is now, in words, by
    path. Raises `UserError` for values that are not finite.
    """
    quantisers = {name: m for name, m in model.named_modules() if isinstance(m, Quantizer)}
    own = {m: m.bits for m in quantisers.values()}
    found: dict[nn.Module, float] = {}

    def measure(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if isinstance(module, QuantSigned) and float(module.peak) == 0:
            grid = module if module.fixed else QuantSigned(bits, least=module.least)
            found[module] = float(grid.best_peak(args[0]))
        elif isinstance(module, MeasuredReLU):
            found[module] = _range(args[0].clamp_min(0), bits)

    handles = [m.register_forward_pre_hook(measure) for m in own]
    for quantiser in own:
        quantiser.bits = None
    with _untrained_by_the_batch(model.eval()):
        model(images if len(images) > 1 else torch.cat([images, images]))
    for handle in handles:
        handle.remove()
    for quantiser, width in own.items():
        quantiser.bits = None if bits is None else width
    return {name: _ranged(name, m, found.get(m)) for name, m in quantisers.items()}


def _ranged(name: str, module: Quantizer, found: float | None) -> str:
    """Give a quantiser the range that was found; says what it is now."""
    if found is not None and not math.isfinite(found):
        raise UserError(f"cannot prepare a network whose values are not finite at {name!r}")
    said = "full precision" if module.bits is None else f"{module.bits} bits"
    how = "" if found is None else "calibrated" if found else "nothing above 0 was seen"
    if isinstance(module, QuantSigned):
        if found is not None:
            module.peak.fill_(found)
        return f"{said}, peak {float(module.peak):.3g} {how}".rstrip()
    if isinstance(module, QuantReLU):
        if found is not None:
            module.high = found or 6.0
        return f"{said}, [0, {module.high:.3g}] {how}".rstrip()
    return said


def _range(x: Tensor, bits: int | None) -> float:
    """The end of the range of least squared error at `bits`: the largest value, or less."""
    most = float(x.max())
    if bits is None or most == 0 or not math.isfinite(most):
        return most
    sample = x.flatten()[:: max(1, x.numel() // 10_000)]

    def error(end: float) -> float:
        return float((fake_quantize(sample, bits, end) - sample).square().sum())

    return min((most * part / 16 for part in range(16, 3, -1)), key=error)


@contextmanager
def _untrained_by_the_batch(model: nn.Module) -> Iterator[None]:
    """Batch norms that have seen nothing normalise by the batch, as they will in training."""
    norms: list[Any] = [m for m in model.modules() if isinstance(m, BatchNorm)]
    fresh = [m for m in norms if m.running_var is not None and _untouched(m)]
    kept = [(m.momentum, m.num_batches_tracked) for m in fresh]
    for norm in fresh:
        norm.train().momentum, norm.num_batches_tracked = 0.0, None
    yield
    for norm, (norm.momentum, norm.num_batches_tracked) in zip(fresh, kept, strict=True):
        norm.eval()


def _untouched(norm: Any) -> bool:
    return not bool(norm.running_mean.any()) and bool((norm.running_var == 1).all())
