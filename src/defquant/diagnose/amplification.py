"""Error amplification: how adversarial noise grows from layer to layer (section 3, Figure 3)."""

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from defquant.attacks import untouched
from defquant.config import check_bits, check_eps
from defquant.errors import UserError
from defquant.quantize import Quantizer, set_bits

__all__ = [
    "BlockDistance", "Distance", "LayerDistance", "first_block_distances", "layer_distances",
    "normalized_distance",
]  # fmt: skip

_T = TypeVar("_T")


@dataclass(frozen=True)
class Distance:
    """Eq. 4 over `examples` examples, in both readings: the `mean` of the examples' own distances
    and their standard deviation, `spread`; and `whole`, the batch as one long vector.

    The mean leaves out `left_out` examples whose distance is infinite or NaN. What is not finite
    is None.
    """

    mean: float | None
    spread: float
    whole: float | None
    left_out: int
    examples: int


@dataclass(frozen=True)
class LayerDistance:
    """A point of Figure 3b; `index` counts the calls of the forward pass, `bits` are the network's
    (None for full precision, `mixed` where quantisers differ)."""

    layer: str
    index: int
    bits: int | Literal["mixed"] | None
    distance: Distance


@dataclass(frozen=True)
class BlockDistance:
    """An eps of Figure 3a: D(A, A_adv) as `plain`, D(Q(A), Q(A_adv)) at `bits` as `quantized`."""

    eps: float
    bits: int
    plain: Distance
    quantized: Distance


def normalized_distance(a: Tensor, b: Tensor) -> Tensor:
    """D(a, b) = ||a - b||_2 / ||a||_2 of each example (Eq. 4 of the paper).

    The paper does not say whether A is one example or the whole batch: here each row is one
    example, and `a[None], b[None]` gives the batch's distance. `a` (clean) and `b` (perturbed)
    have one shape (n, ...), else `UserError`. Returns (n,), not negative; where a row of `a` is
    zero it is 0 if that of `b` is too, else inf.

    >>> normalized_distance(torch.tensor([[3.0, 4.0]]), torch.tensor([[3.0, 5.0]]))
    tensor([0.2000])
    """
    _check_pair(a, b)
    return _ratio(_norms(a, b))


def layer_distances(
    model: nn.Module,
    x: Tensor,
    x_adv: Tensor,
    *,
    bits: Sequence[int | None] | None = None,
    at: Literal["inputs", "activations"] = "inputs",
    batch_size: int = 128,
) -> list[LayerDistance]:
    """D between clean and adversarial images at each layer, in order of the forward pass.

    Figure 3b. Its caption speaks of full- against low-precision activations, section 3 of clean
    against adversarial ones at each bit width; this follows section 3.

    `x` (n, c, h, w) and `x_adv` lie on the model's device; the model is left as it was found.
    `bits` are set one after the other, weights and batch norms as trained; without them the
    model's own. `at` is the `inputs` of each convolution and linear layer (the first is the image
    itself) or the `activations` that each quantiser returns. Memory grows with `batch_size`, in
    pairs; the answer does not change.

    Returns one record for each of `bits` and each call of a layer. Raises `UserError` for unequal
    shapes, no layer to look at, bits outside 1 to 8 or no quantiser to set.
    """
    _check_pair(x, x_adv)
    former = [(module, module.bits) for module in model.modules() if isinstance(module, Quantizer)]
    found: list[LayerDistance] = []
    try:
        for width in [_own_bits(model)] if bits is None else bits:
            if bits is not None:
                set_bits(model, width)  # type: ignore[arg-type]
            layers = enumerate(_layers(model, x, x_adv, at, batch_size))
            found += [LayerDistance(name, i, width, distance) for i, (name, distance) in layers]
    finally:
        for quantizer, own in former:
            quantizer.bits = own
    return found


def first_block_distances(
    model: nn.Module, x: Tensor, attacked: Iterable[tuple[float, Tensor]], bits: int = 3
) -> list[BlockDistance]:
    """D at the first activation, as it is and quantised after the fact (Figure 3a).

    A is what the model's first activation function returns at full precision, Q(A) what it
    returns at `bits`, of the same features, whatever the model's own bits. Rounding erases
    noise δ that stays within a cell of width Δ and widens all other to Δ. Activations spread
    evenly over the cells gain sqrt(Δ/δ) in the norm, most where δ is small; only those that keep
    away from the edges of their cells, as zeros do, let D fall as the paper reports.

    `x` (n, c, h, w) lies on the model's device; the paper takes 128 images. `attacked` pairs eps
    in [0, 1] with images attacked at it; the paper's run from 1/255 to 8/255. One record for each
    pair, in order. The model is left as it was found.
    Raises `UserError` for no quantiser, unequal shapes, eps or bits out of range.
    """
    check_bits(bits)

    def look(module: nn.Module, z: Tensor, output: Tensor) -> list[Distance]:
        activations = (_at_bits(module, b)(z) for b in (None, bits))
        return [_summary(_norms(*a.chunk(2))) for a in activations]

    found = []
    for eps, x_adv in attacked:
        _check_pair(x, x_adv)
        first, *_ = _look(model, torch.cat([x, x_adv]), (Quantizer,), look)
        found.append(BlockDistance(check_eps(eps), bits, *first))
    return found


def _layers(
    model: nn.Module, x: Tensor, x_adv: Tensor, at: str, batch_size: int
) -> list[tuple[str, Distance]]:
    names = {module: name for name, module in model.named_modules()}

    def look(module: nn.Module, z: Tensor, output: Tensor) -> tuple[str, Tensor]:
        return names[module], _norms(*(z if at == "inputs" else output).chunk(2))

    kinds = (nn.Conv2d, nn.Linear) if at == "inputs" else (Quantizer,)
    # both halves in one pass: their activations meet in the hook, and none has to be kept
    pairs = zip(x.split(batch_size), x_adv.split(batch_size), strict=True)
    calls = zip(*(_look(model, torch.cat(pair), kinds, look) for pair in pairs), strict=True)
    return [(call[0][0], _summary(torch.cat([n for _, n in call], 1))) for call in calls]


def _look(
    model: nn.Module,
    x: Tensor,
    kinds: tuple[type[nn.Module], ...],
    look: Callable[[nn.Module, Tensor, Tensor], _T],
) -> list[_T]:
    """What `look(module, input, output)` gives at each call of a module of `kinds`, in order."""
    found: list[_T] = []

    def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        found.append(look(module, args[0], output))

    handles = [m.register_forward_hook(hook) for m in model.modules() if isinstance(m, kinds)]
    try:
        with untouched(model), torch.no_grad():
            model(x)
    finally:
        for handle in handles:
            handle.remove()
    if not found:
        wanted = " or ".join(kind.__name__ for kind in kinds)
        raise UserError(f"{type(model).__name__} calls no {wanted}: there is nothing to look at")
    return found


def _at_bits(quantizer: nn.Module, bits: int | None) -> Callable[[Tensor], Tensor]:
    twin = copy.copy(quantizer)
    twin.bits = bits  # type: ignore[assignment]
    return twin.forward  # without the hooks, which the twin shares


def _own_bits(model: nn.Module) -> int | Literal["mixed"] | None:
    own = {module.bits for module in model.modules() if isinstance(module, Quantizer)}
    return "mixed" if len(own) > 1 else next(iter(own), None)


def _norms(a: Tensor, b: Tensor) -> Tensor:
    """||a - b||_2 and ||a||_2 of each row, (2, n), in float32 or better."""
    a, b = (t if t.dtype == torch.float64 else t.float() for t in (a, b))
    return torch.stack([a - b, a]).flatten(2).norm(dim=2)


def _ratio(norms: Tensor) -> Tensor:
    noise, size = norms
    return torch.where((noise == 0) & (size == 0), 0.0, noise / size)


def _summary(norms: Tensor) -> Distance:
    each = _ratio(norms)
    finite = each[each.isfinite()]
    mean = float(finite.mean()) if len(finite) else None
    spread = float(finite.std()) if len(finite) > 1 else 0.0
    whole = float(_ratio(norms.norm(dim=1)))
    left_out = len(each) - len(finite)
    return Distance(mean, spread, whole if math.isfinite(whole) else None, left_out, len(each))


def _check_pair(a: Tensor, b: Tensor) -> None:
    if a.shape != b.shape or a.ndim < 2 or len(a) == 0:
        raise UserError(f"tensors must share a shape (n, ...); found {[*a.shape]} and {[*b.shape]}")
