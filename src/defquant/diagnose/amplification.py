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
from defquant.quantize import Quantizer, adjustable, set_bits

__all__ = [
    "BlockDistance", "Distance", "LayerDistance", "first_block_distances", "layer_distances",
    "normalized_distance",
]  # fmt: skip

_T = TypeVar("_T")


@dataclass(frozen=True)
class Distance:
    """Eq. 4 over `examples` examples, in both readings; a number that is not finite is None.

    `mean` and `spread` (standard deviation) of the examples' own distances, without those that
    are not finite (`left_out` counts them); and `whole`, the batch as one long vector.
    """

    mean: float | None
    spread: float
    whole: float | None
    left_out: int
    examples: int


@dataclass(frozen=True)
class LayerDistance:
    """A layer of Figure 3b, `index`-th of a network of `bits` (`mixed` where layers differ)."""

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
    batch_size: int = 256,
) -> list[LayerDistance]:
    """D at the input of each convolution and linear layer, in order of the forward pass.

    Figure 3b. Its caption speaks of full- against low-precision activations, section 3 of clean
    against adversarial ones at each bit width; this follows section 3. The first is the image.

    `x` (n, c, h, w) and `x_adv` lie on the model's device; the model is left as it was found.
    It sees `batch_size` rows at a time at most, and a pair of images at least. `bits` are set in
    turn, weights and batch norms as trained; without them the model's own are kept. Returns one
    record for each of `bits` and each call of a layer. Raises `UserError` for unequal shapes, no
    layer to look at, bits outside 1 to 8 or no quantiser to set.
    """
    _check_pair(x, x_adv)
    former = [(module, module.bits) for module in model.modules() if isinstance(module, Quantizer)]
    if bits is None:
        own = {quantizer.bits for quantizer in adjustable(model)}
        shown: int | Literal["mixed"] | None = "mixed" if len(own) > 1 else next(iter(own), None)
        return _layers(model, x, x_adv, shown, batch_size)
    try:
        return [d for b in bits for d in _layers(set_bits(model, b), x, x_adv, b, batch_size)]
    finally:
        for quantizer, width in former:
            quantizer.bits = width


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
    in [0, 1] with images attacked at it; the paper's run from 1/255 to 8/255. The model is left as
    it was found. Returns one record for each pair. Raises `UserError` for a model without
    quantiser, unequal shapes, eps or bits out of range.
    """
    check_bits(bits)

    def look(module: nn.Module, z: Tensor) -> list[Distance]:
        twin, both = copy.copy(module), []
        for width in (None, bits):
            set_bits(twin, width)
            both.append(_summary(_norms(*twin.forward(z).chunk(2))))  # not twin(): it has the hook
        return both

    found = []
    for eps, x_adv in attacked:
        _check_pair(x, x_adv)
        first, *_ = _look(model, torch.cat([x, x_adv]), (Quantizer,), look)
        found.append(BlockDistance(check_eps(eps), bits, *first))
    return found


def _layers(
    model: nn.Module,
    x: Tensor,
    x_adv: Tensor,
    bits: int | Literal["mixed"] | None,
    batch_size: int,
) -> list[LayerDistance]:
    names = {module: name for name, module in model.named_modules()}

    def look(module: nn.Module, z: Tensor) -> tuple[str, Tensor]:
        return names[module], _norms(*z.chunk(2))

    # both halves in one pass: their activations meet in the hook, and none has to be kept
    size = max(1, batch_size // 2)
    pairs = zip(x.split(size), x_adv.split(size), strict=True)
    passes = [_look(model, torch.cat(pair), (nn.Conv2d, nn.Linear), look) for pair in pairs]
    return [
        LayerDistance(call[0][0], index, bits, _summary(torch.cat([norms for _, norms in call], 1)))
        for index, call in enumerate(zip(*passes, strict=True))
    ]


def _look(
    model: nn.Module,
    x: Tensor,
    kinds: tuple[type[nn.Module], ...],
    look: Callable[[nn.Module, Tensor], _T],
) -> list[_T]:
    """What `look(module, input)` gives at each call of a module of `kinds`, in order."""
    found: list[_T] = []

    def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
        found.append(look(module, args[0]))

    layers = [m for m in model.modules() if isinstance(m, kinds) and not getattr(m, "fixed", None)]
    handles = [layer.register_forward_pre_hook(hook) for layer in layers]
    try:
        with untouched(model), torch.no_grad():
            model(x)
    finally:
        for handle in handles:
            handle.remove()
    if not found:
        wanted = " or ".join(kind.__name__ for kind in kinds)
        raise UserError(f"there must be a {wanted} to look at; {type(model).__name__} calls none")
    return found


def _norms(a: Tensor, b: Tensor) -> Tensor:
    """||a - b||_2 and ||a||_2 of each row, (2, n), in float32 or better."""
    a, b = (t if t.dtype == torch.float64 else t.float() for t in (a, b))
    norms: Tensor = torch.linalg.vector_norm(torch.stack([a - b, a]).flatten(2), dim=2)
    return norms


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
