"""Values onto a grid, and the straight-through gradient: what the quantisers compute."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from defquant.config import check_bits

__all__ = [
    "WHOLE", "Rounded", "affine_round", "as_given", "autocasts", "fake_quantize", "full_precision",
    "in_operations", "on_signed_grid", "quantize_signed", "quantize_tanh", "signed_grid",
    "whole_operation",
]  # fmt: skip


class _Whole:
    """Whether quantisers appear as one operation each (`torch.ops.defquant`): `capture` says so."""

    on = False


WHOLE = _Whole()


def whole_operation(function: Callable[..., Tensor]) -> Any:
    """`function` as `torch.ops.defquant`'s of its name; it gives a new tensor shaped as its first.

    A captured program shows it as one node.
    """
    name = f"defquant::{function.__name__.removeprefix('_')}"
    made = torch.library.custom_op(name, function, mutates_args=())
    made.register_fake(lambda x, *_: torch.empty_like(x))
    return made


def full_precision(x: Tensor) -> Tensor:
    """`x` in float32, or in float64 where it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def autocasts(x: Tensor) -> bool:
    """Whether `torch.autocast` is on where `x` lies: each operation then casts what it reads."""
    kind = x.device.type
    # a compiler runs where autocast is known; torch 2.11's breaks its graph at the question
    known = torch.compiler.is_compiling() or torch.amp.is_autocast_available(kind)
    return known and torch.is_autocast_enabled(kind)


def as_given(y: Tensor, x: Tensor) -> Tensor:
    """`y`, made of `x` in `full_precision`, in the type of `x` again; under autocast as it is."""
    return y if y.dtype == x.dtype or autocasts(x) else y.to(x.dtype)


def _inlined() -> bool:
    """Whether plain operations are wanted: a compiler fuses them, a tracer keeps their gradient."""
    return torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None


def _sloped(rounded: Tensor, slope: Tensor) -> Tensor:
    """`rounded` plus the zeros `slope`, for their gradient; an exported graph needs none."""
    wanted = torch.is_grad_enabled() and not torch.onnx.is_in_onnx_export()
    return rounded + slope if wanted else rounded


def _masked(ctx: Any, grad: Tensor) -> Tensor:
    """`grad` where the mask is set, laid out as `x` was: layers before it are fast so.

    As bytes and then as floats: a CPU is slow at reading bools, and at multiplying by them.
    """
    inside: Tensor = ctx.saved_tensors[0].view(torch.uint8)
    if grad.stride() != inside.stride():
        return inside.to(grad.dtype).mul(grad)
    return torch.empty_like(grad).copy_(inside).mul_(grad)


class _FakeQuantize(torch.autograd.Function):
    """Forward on the grid, backward of relu6; keeps one byte per element."""

    @staticmethod
    def forward(x: Tensor, levels: int, high: float) -> Tensor:
        step = high / levels
        return x.div(step).round_().clamp_(0, levels).mul_(step)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, _, high = inputs
        if ctx.needs_input_grad[0]:
            # hardtanh's backward zeroes x outside (0, high), faster than a CPU compares twice
            ctx.save_for_backward(torch.ops.aten.hardtanh_backward(x, x, 0.0, high).to(torch.bool))

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> tuple[Tensor, None, None]:
        return _masked(ctx, grad[0]), None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], x: Tensor, *how: float) -> tuple[Tensor, int]:
        return _FakeQuantize.apply(x, *how), in_dims[0]  # type: ignore[no-untyped-call]


class _Signed(torch.autograd.Function):
    """Forward on the grid of `signed_grid` (step 0: x itself), no gradient beyond its ends."""

    @staticmethod
    def forward(x: Tensor, peak: Tensor, bits: int, least: float | None) -> Tensor:
        step, n = signed_grid(peak.to(x.dtype), bits, least)
        codes: Tensor = x.div(step).round_().clamp_(-n, 2**bits - 1 - n)
        return torch.where(step > 0, codes.mul_(step), x)

    @staticmethod
    def inside(x: Tensor, peak: Tensor, bits: int, least: float | None) -> Tensor:
        """Where x / step rounds to a code, ties to even; everywhere at step 0."""
        step, n = signed_grid(peak.to(x.dtype), bits, least)
        codes = x.div(step)
        inside: Tensor = ((codes >= -n - 0.5) & (codes < 2**bits - 0.5 - n)) | (step == 0)
        return inside

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(_Signed.inside(*inputs))

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _masked(ctx, grad[0]), None, None, None

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], x: Tensor, peak: Tensor, *how: Any
    ) -> tuple[Tensor, int | None]:
        """Networks that are stacked have a range each."""
        dim = in_dims[0]
        if in_dims[1] is not None:
            x = x.expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0)
            dim, peak = 0, peak.view(-1, *[1] * (x.dim() - 1))
        return _Signed.apply(x, peak, *how), dim  # type: ignore[no-untyped-call]


@whole_operation
def _clip_round(x: Tensor, bits: int, high: float) -> Tensor:
    return _FakeQuantize.forward(x, 2**bits - 1, high)


@whole_operation
def _tanh_round(x: Tensor, bits: int) -> Tensor:
    levels = 2**bits - 1
    return torch.tanh(x).add_(1).mul_(levels / 2).round_().mul_(2 / levels).sub_(1)


@whole_operation
def _signed_round(x: Tensor, peak: Tensor, bits: int, least: float | None) -> Tensor:
    return _Signed.forward(x, peak, bits, least)


def signed_grid(peak: Tensor, bits: int, least: float | None) -> tuple[Tensor, Any]:
    """Of `QuantSigned`: its step, and n of its codes -n .. 2^bits - 1 - n, a number or a tensor."""
    top, n = 2**bits - 1, 2 ** (bits - 1)
    if least is None:
        return peak / (top - n), n
    share = least / (peak + least).clamp_min(torch.finfo(peak.dtype).tiny)
    few = share.mul(top).round_().clamp_(max=n)
    return peak / (top - few), few


@whole_operation
def affine_round(x: Tensor, scale: Tensor, zero: Tensor, low: int, high: int) -> Tensor:
    """scale · (clamp(round(x / scale) + zero, low, high) - zero), as torch's fake quantisers."""
    return x.div(scale).round_().add_(zero).clamp_(low, high).sub_(zero).mul_(scale)


def in_operations(x: Tensor, levels: int | Tensor, high: float) -> Tensor:
    r, step = nn.functional.hardtanh(x, 0.0, high), high / levels
    return _sloped(r.detach().div(step).round().mul(step), r - r.detach())


def fake_quantize(x: Tensor, bits: int | None, high: float = 6.0) -> Tensor:
    r"""Clamp `x` to [0, high] and round it to one of 2^bits values.

    Q(x) = Δ · round(clamp(x, 0, high) / Δ),  Δ = high / (2^bits - 1),  ties to even
    (as ONNX QuantizeLinear). The gradient is exactly that of clamp(x, 0, high) (ReLU6 for
    high = 6): y = r + stop_gradient(Q(r) - r), r = relu6(x) (section 2.1 of the paper).

    Args:
        x: any shape, floating point; half precisions are quantised in float32.
        bits: 1 to 8, or None for no rounding (the clamp alone).
        high: upper end of the range, positive.

    Returns:
        The shape and type of `x`; float32 for half precisions under `torch.autocast`. For the
        backward pass one byte per element is kept.

    Raises:
        UserError: `bits` is no whole number from 1 to 8.

    >>> fake_quantize(torch.tensor([-1.0, 2.9, 3.1, 7.0]), bits=1)
    tensor([0., 0., 6., 6.])
    """
    check_bits(bits)
    return as_given(_quantized(full_precision(x), bits, high), x)


def _quantized(x: Tensor, bits: int | None, high: float) -> Tensor:
    if bits is None:
        return nn.functional.hardtanh(x, 0.0, high)
    if WHOLE.on:
        return _clip_round(x, bits, high)  # type: ignore[no-any-return]
    levels = 2**bits - 1
    if _inlined():
        return in_operations(x, levels, high)
    return _FakeQuantize.apply(x, levels, high)  # type: ignore[no-untyped-call,no-any-return]


def quantize_signed(x: Tensor, peak: Tensor, bits: int, least: float | None) -> Tensor:
    """`x` on the grid of `signed_grid`, straight-through inside the range; see `QuantSigned`."""
    grid = peak, bits, least
    if WHOLE.on:
        return _signed_round(x, *grid)  # type: ignore[no-any-return]
    if _inlined():
        fixed = x.detach()
        slope = torch.where(_Signed.inside(fixed, *grid), x - fixed, 0.0)
        return _sloped(_Signed.forward(fixed, *grid), slope)
    return _Signed.apply(x, *grid)  # type: ignore[no-untyped-call,no-any-return]


def on_signed_grid(x: Tensor, peak: Tensor, bits: int, least: float | None) -> Tensor:
    """The values of `quantize_signed`, without a gradient; `peak` of any shape that x takes."""
    return _Signed.forward(x, peak, bits, least)


def quantize_tanh(x: Tensor, bits: int | None) -> Tensor:
    """2 round(n (tanh(x) + 1)/2) / n - 1, n = 2^bits - 1, and tanh's gradient; see `QuantTanh`."""
    if WHOLE.on and bits is not None:
        return _tanh_round(x, bits)  # type: ignore[no-any-return]
    t = torch.tanh(x)
    if bits is None:
        return t
    levels, fixed = 2**bits - 1, t.detach()
    error = (fixed + 1).mul_(levels / 2).round_().mul_(2 / levels).sub_(1).sub_(fixed)
    return t + error


class Rounded(torch.autograd.Function):
    """`rounded` forward; backward the gradient of clamp(x - shift, low, high)."""

    @staticmethod
    def forward(x: Tensor, rounded: Tensor, low: float, high: float, shift: float) -> Tensor:
        return rounded

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, _, low, high, shift = inputs
        ctx.save_for_backward(x)
        ctx.ends = low + shift, high + shift

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> tuple[Tensor | None, ...]:
        inside = torch.ops.aten.hardtanh_backward(grad[0], *ctx.saved_tensors, *ctx.ends)
        return inside, None, None, None, None
