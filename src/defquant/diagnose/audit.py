"""The Lipschitz audit: how far each layer, and the whole network, can carry a small change."""

import copy
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from defquant.attacks import untouched
from defquant.attacks.access import differentiable, gradient, leaf
from defquant.captured import Captured, capture, operation
from defquant.data import to_unit
from defquant.diagnose.bound import BatchNormCall, LayerAudit, reach
from defquant.diagnose.masking import Connected
from defquant.evaluate import Images, linted
from defquant.models.squeezing import median_2x2
from defquant.quantize import signed_grid

__all__ = ["Audit", "LayerAudit", "Radius", "audit", "jacobian_norms", "surrogate"]


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
    margins = torch.cat([_margins(twin, *pair) for pair in some])
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


def _margins(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """z_y - max_{j != y} z_j of each image, (n,)."""
    with untouched(model), torch.no_grad():
        logits = model(x).double()
    right = logits.gather(1, y[:, None])
    others = logits.scatter(1, y[:, None], -torch.inf)
    margins: Tensor = right[:, 0] - others.max(1).values
    return margins


def _radius(margin: float, bound: float, pixels: int) -> Radius:
    l2 = max(margin, 0.0) / (math.sqrt(2) * bound) if bound else math.inf
    return Radius(margin, l2, l2 / math.sqrt(pixels))
