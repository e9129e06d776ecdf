"""How far each layer, and the whole network, carries a small change of the image.

Measured, as error amplification (section 3, Figure 3), and bounded, as the Lipschitz audit.
"""

import copy
import math
from collections.abc import Collection, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn

from defquant.attacks import untouched
from defquant.attacks.access import differentiable, gradient, leaf
from defquant.attacks.losses import margin
from defquant.captured import Captured, capture, operation
from defquant.config import check_bits, check_eps
from defquant.data import to_unit
from defquant.diagnose.bound import BatchNormCall, LayerAudit, layer_input, reach
from defquant.diagnose.masking import Connected
from defquant.errors import UserError
from defquant.evaluate import Images, linted
from defquant.models.squeezing import median_2x2
from defquant.quantize import Quantizer, adjustable
from defquant.rounding import signed_grid

__all__ = [
    "Audit", "BlockDistance", "Distance", "LayerAudit", "LayerDistance", "Radius", "audit",
    "first_block_distances", "jacobian_norms", "layer_distances", "normalized_distance",
    "surrogate",
]  # fmt: skip


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
    model: nn.Module, x: Tensor, x_adv: Tensor, *, batch_size: int = 256
) -> list[LayerDistance]:
    """D at the input of each convolution and linear layer, in order of the forward pass.

    Figure 3b. Its caption speaks of full- against low-precision activations, section 3 of clean
    against adversarial ones at each bit width; this follows section 3. The first is the image.

    `x` and `x_adv` are images (n, c, h, w) in [0, 1]. Layers are what `defquant.captured.capture`
    sees, functional calls too; the model is left as it was found, and `batch_size` rows are shown
    at a time at most, and a pair of images at least. Returns one record for each call of a layer.
    Raises `UserError` for unequal shapes, no layer to look at, or what cannot be captured.
    """
    _check_pair(x, x_adv)
    widths = {quantizer.bits for quantizer in adjustable(model)}
    bits: int | Literal["mixed"] | None = "mixed" if len(widths) > 1 else next(iter(widths), None)
    program = capture(model, x)
    layers = [(node, source) for node in program.calls if (source := layer_input(program, node))]
    if not layers:
        raise UserError(
            f"there must be a convolution or linear layer to look at; {type(model).__name__} "
            "calls none"
        )
    size, passes = max(1, batch_size // 2), list[dict[fx.Node, Tensor]]()
    for pair in zip(x.split(size), x_adv.split(size), strict=True):
        passes.append(_inputs(program, torch.cat(pair).float().cpu(), {s for _, s in layers}))
    return [
        LayerDistance(
            node.meta["layer"], index, bits, _summary(torch.cat([p[s] for p in passes], 1))
        )
        for index, (node, s) in enumerate(layers)
    ]


def _inputs(program: Captured, both: Tensor, wanted: Collection[fx.Node]) -> dict[fx.Node, Tensor]:
    """`_norms` of what each of `wanted` gives; `both` is clean images and then attacked ones."""
    found = {}

    def keep(node: fx.Node, value: Any) -> None:
        if node in wanted:  # the images may be counted in another dimension than the first
            shape = node.meta["val"].shape
            dim = next(i for i, side in enumerate(shape) if isinstance(side, torch.SymInt))
            found[node] = _norms(*value.movedim(dim, 0).reshape(len(both), -1).chunk(2))

    program.values(both, keep)
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
    in [0, 1] with images attacked at it; the paper's run from 1/255 to 8/255. The model is left as
    it was found. Returns one record for each pair. Raises `UserError` for a model without
    quantiser, unequal shapes, eps or bits out of range.
    """
    check_bits(bits)
    found = []
    for eps, x_adv in attacked:
        _check_pair(x, x_adv)
        module, z = _first_quantizer(model, torch.cat([x, x_adv]))
        twin, both = copy.copy(module).eval(), []
        for width in (None, bits):
            twin.bits = width
            both.append(_summary(_norms(*twin.forward(z).chunk(2))))
        found.append(BlockDistance(check_eps(eps), bits, *both))
    return found


def _first_quantizer(model: nn.Module, x: Tensor) -> tuple[Quantizer, Tensor]:
    """The first that is called, and what it is given."""
    found: list[tuple[Quantizer, Tensor]] = []

    def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
        assert isinstance(module, Quantizer)
        if not found:
            found.append((module, args[0]))

    with ExitStack() as stack, untouched(model), torch.no_grad():
        for module in model.modules():
            if isinstance(module, Quantizer):
                stack.enter_context(module.register_forward_pre_hook(hook))
        model(x)
    if not found:
        raise UserError(f"there must be a Quantizer to look at; {type(model).__name__} calls none")
    return found[0]


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


@dataclass(frozen=True)
class Radius:
    """What the bound proves of one image for the straight-through surrogate, never for the net.

    No change below `l2` in the L2 norm, or below `linf` in every pixel, alters the surrogate's
    answer. `margin` is z_y - max z_j; where it is not positive both radii are 0.
    """

    margin: float
    l2: float
    linf: float


@dataclass(frozen=True)
class Audit:
    """What `audit` found.

    Attributes:
        layers: every call of a layer, in the order of the forward pass.
        batch_norms: every batch norm's own gain, max |gamma / sqrt(var + eps)|.
        bound: Lipschitz constant of the straight-through surrogate, from above; None without one.
        lower: the same from below: the largest of `jacobians`.
        jacobians: ||J(x)||_2 of the surrogate's logits at each image.
        surrogate_radii: certified for the surrogate, image by image; 0 without a bound.
        unbounded: why there is no bound, in one line; empty where there is one.
    """

    layers: tuple[LayerAudit, ...]
    batch_norms: tuple[BatchNormCall, ...]
    bound: float | None
    lower: float
    jacobians: tuple[float, ...]
    surrogate_radii: tuple[Radius, ...]
    unbounded: str = ""


def audit(model: nn.Module, data: Images, *, batch_size: int = 64) -> Audit:
    """Audit every layer of `model`, and bound the whole from both sides (L2 to L2).

    It reads what `model` computes (`defquant.captured.capture`), whatever its layers are called.
    All of it is about the straight-through surrogate: the same weights with every quantiser
    replaced by its clamp. A quantised network has no Lipschitz constant, as its quantisers have
    none (|Q(a) - Q(b)| <= |a - b| + step), and nothing here certifies it. The bound is the one of
    `defquant.diagnose.bound.reach`; its norms hold with probability 1 - 1e-9 each. The radius
    is margin / (sqrt(2) bound) (Tsuzuku et al. 2018), and over sqrt(c h w) of it per pixel.

    Args:
        model: any that can be captured; it is left as it was found.
        data: images and labels; every layer is audited at their size.
        batch_size: images at a time for the Jacobians, one backward pass a class.

    Raises:
        UserError: bad images, a model that cannot be captured, weights that are not finite.
    """
    x, y = linted(model, data, batch_size)
    x, y = to_unit(x).float().cpu(), y.cpu()
    program = capture(model, x)
    found, twin = reach(program, x[:1]), surrogate(program)
    parts = [jacobian_norms(Connected(twin), some) for some in x.split(batch_size)]
    jacobians = torch.cat(parts).tolist()
    some = zip(x.split(batch_size), y.split(batch_size), strict=True)
    with untouched(twin), torch.no_grad():
        margins = torch.cat([-margin(twin(images).double(), y, y) for images, y in some])
    bound = math.inf if found.bound is None else found.bound
    radii = tuple(_radius(margin, bound, x[0].numel()) for margin in margins.tolist())
    return Audit(
        found.layers, found.batch_norms, found.bound, max(jacobians), tuple(jacobians), radii,
        found.unbounded,
    )  # fmt: skip


def surrogate(program: Captured) -> nn.Module:
    """The straight-through surrogate of `capture(model, images)`: its quantisers only clamp.

    The depth of a `FeatureSqueezing`, and every other rounding, is left out; its median stays.
    """
    twin = copy.deepcopy(program.module)
    aten = torch.ops.aten
    for node in list(twin.graph.nodes):
        source, name = (*node.all_input_nodes, None)[0], operation(node)
        peak = program.constant(node.args[1]) if name == "defquant.signed_round.default" else None
        if name == "defquant.clip_round.default":
            node.target, node.args = aten.hardtanh.default, (source, 0.0, node.args[2])
        elif name == "defquant.tanh_round.default":
            node.target, node.args = aten.tanh.default, (source,)
        elif name == "defquant.median_2x2.default":
            node.target = median_2x2
        elif peak is not None and peak > 0:
            step, n = signed_grid(peak, *node.args[2:])
            ends = -float(step * n), float(peak)
            node.target, node.args = aten.hardtanh.default, (source, *ends)
        elif peak is not None or name.startswith("aten.round."):
            node.replace_all_uses_with(source)
    twin.recompile()
    return twin


def jacobian_norms(model: nn.Module, x: Tensor) -> Tensor:
    """||J(x)||_2 of the logits at each image, (n,): exact, by one backward pass a class.

    Where `model` is differentiable it bounds its Lipschitz constant from below. The Jacobian has
    few rows, so that no power iteration is needed.
    """
    with untouched(model), differentiable():
        x = leaf(x).requires_grad_()
        rows = [gradient(column, x, keep=True).flatten(1) for column in model(x).unbind(1)]
    norms: Tensor = torch.linalg.matrix_norm(torch.stack(rows, 1).double(), 2)
    return norms


def _radius(margin: float, bound: float, pixels: int) -> Radius:
    l2 = max(margin, 0.0) / (math.sqrt(2) * bound) if bound else math.inf
    return Radius(margin, l2, l2 / math.sqrt(pixels))
