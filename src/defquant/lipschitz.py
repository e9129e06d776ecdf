"""Keep layers non-expansive: the orthogonality penalty, convex sums, and norms that check them."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias, final, get_args

import torch
from torch import Tensor, nn

from defquant.errors import UserError
from defquant.rounding import full_precision
from defquant.weights import effective_weight

__all__ = [
    "ROUNDING", "ConvexSum", "KernelMatrix", "Norm", "OrthogonalPenalty", "average_norm",
    "conv_spectral_norm", "kernel_matrix", "matrix_norm", "max_pool_norm", "operator_norm",
    "project_simplex", "project_simplex_", "spectral_norm",
]  # fmt: skip

STEPS = 100
FAILURE = 1e-9
ROUNDING = 1e-5  # of float32 sums, far above what a hundred steps gather

Target = Literal["identity", "parseval"]


class Gradients(NamedTuple):
    """Of an `OrthogonalPenalty`: its value, and (weight, product, factor) of each to be added."""

    value: Tensor
    parts: list[tuple[Tensor, Tensor, float]]


@final
class OrthogonalPenalty:
    """(beta/2) sum_l ||W_l'W_l - I||_F^2 over all convolution and linear weights (Eq. 8).

    A `Conv2d` weight is read as c_out x (c_in/groups k k); batch norms, biases and convex
    coefficients are left out. Each group of a grouped convolution is a matrix of its own, so that a
    depthwise one is penalised channel by channel; so are q, k and v of `nn.MultiheadAttention`. A
    weight that layers share counts once. Of a
    layer with `weight_bits` it is the quantised weight, straight-through.

    W (n x m) with n < m cannot satisfy W'W = I. As ||W'W - I||^2 = ||WW' - I||^2 + (m - n), with
    the same gradient 2 beta (WW' - I) W, the smaller Gram is used, and this reduced value, whose
    minimum is 0, is returned. Weight decay lambda moves the minimum to sigma^2 = 1 - lambda/2beta.

    `target="parseval"` penalises c W instead of W, where c^2 is the number of patches that share an
    input pixel: the kernel's area at stride 1. As ||unfold(x)|| <= c ||x||, a solution c ||W|| = 1
    bounds the true convolution by 1, for zero and circular padding (the rescaling of Cisse et al.
    2017, section 4). Eq. 8, `target="identity"`, bounds it by c alone: 3 for a 3x3 kernel.

    Args:
        model: any module; it may be moved or loaded later. Frozen weights count, unchanged.
        beta: weight of the penalty; 2e-3 in most of the paper.
        target: `identity` (this paper) or `parseval`.

    Raises:
        UserError: beta is negative, the model has no such layer, or a weight is parametrised.

    >>> penalty = OrthogonalPenalty(nn.Linear(8, 4), beta=2e-3)
    >>> penalty.penalty().backward()  # or, cheaper: loss.backward(); penalty.add_grad_()
    """

    def __init__(self, model: nn.Module, beta: float, *, target: Target = "identity") -> None:
        if not 0 <= beta < math.inf:
            raise UserError(f"beta must be finite and not negative; found {beta:g}")
        if target not in get_args(Target):
            raise UserError(f"target must be one of {get_args(Target)}; found {target!r}")
        self.beta = beta
        layers: dict[int, _Layer] = {}
        for name, module in model.named_modules():
            for layer in _layers(module):
                if not isinstance(layer.weight, nn.Parameter):
                    raise UserError(f"weights must be plain; {name!r} has a parametrised one")
                layers.setdefault(id(layer.weight), layer)
        if not layers:
            raise UserError(
                f"the penalty needs Conv2d or Linear layers; {type(model).__name__} has none"
            )
        self._layers = [(x, _overlap(x) if target == "parseval" else 1) for x in layers.values()]

    def penalty(self) -> Tensor:
        """(beta/2) sum ||Gram - I||_F^2 on the smaller Gram, for the loss; in float32 or better."""
        with _no_autocast(self._layers[0][0].weight):
            squares = [_residual(_matrices(layer), c2).square().sum() for layer, c2 in self._layers]
            return self.beta / 2 * torch.stack(squares).sum()

    @torch.no_grad()
    def gradients(self) -> Gradients:
        """What `add_grad_` adds, from the weights alone: two small products each, no graph."""
        squares, parts = [], []
        with _no_autocast(self._layers[0][0].weight):
            for layer, c2 in self._layers:
                weight, W = layer.weight, _matrices(layer)
                residual = _residual(W, c2)
                squares.append(residual.flatten().dot(residual.flatten()))
                if weight.requires_grad:
                    parts.append((weight, _times(residual, W, weight), 2 * self.beta * c2))
            return Gradients(self.beta / 2 * torch.stack(squares).sum(), parts)

    @torch.no_grad()
    def add_grad_(self, made: Gradients | None = None) -> Tensor:
        """Add the penalty's gradient, 2 beta (WW' - I) W, to every trainable weight's `.grad`.

        Call it once a step, between `backward()` (unscaled) and the optimiser's step. Returns
        `penalty()`'s value, detached. `made`: `gradients()` of these weights, if they are there.
        """
        made = made or self.gradients()
        for weight, product, alpha in made.parts:
            if weight.grad is None:
                weight.grad = torch.zeros_like(weight)
            weight.grad.add_(product, alpha=alpha)
        return made.value

    @torch.no_grad()
    def retract_(self, beta: float | None = None) -> None:
        """Parseval's retraction W <- (1 + beta) W - beta WW'W (Cisse et al. 2017, Algorithm 1).

        It is a step of size 1/2 along the gradient of (beta/2) ||W'W - I||^2, outside the
        optimiser: call it after the optimiser's step, instead of `add_grad_`. A singular value
        moves to sigma + beta sigma (1 - sigma^2), and on to 1 if beta < 1 and sigma^2 < 1 + 2/beta.
        With `target="parseval"` it retracts c W. Frozen weights stay as they are.

        Raises:
            UserError: beta (the penalty's own when None) lies outside [0, 1].
        """
        beta = self.beta if beta is None else beta
        if not 0 <= beta <= 1:
            raise UserError(f"the retraction's beta must lie in [0, 1]; found {beta:g}")
        with _no_autocast(self._layers[0][0].weight):
            for layer, c2 in self._layers:
                if layer.weight.requires_grad:
                    W = _matrices(layer)
                    layer.weight.sub_(_times(_residual(W, c2), W, layer.weight), alpha=beta)


@final
class ConvexSum(nn.Module):
    """sum_i alpha_i x_i; as residual sum: Parseval networks (Cisse et al. 2017, section 4).

    Non-expansive where alpha is on the probability simplex: call `project_simplex_` after each
    optimiser step, and keep weight decay off `alpha`, whose start is 1/branches each.
    """

    def __init__(self, branches: int = 2) -> None:
        super().__init__()
        self.branches = branches
        self.alpha = nn.Parameter(torch.full((branches,), 1 / branches))

    def forward(self, *xs: Tensor) -> Tensor:
        """The combination of `branches` tensors of one shape."""
        if len(xs) != self.branches:
            raise UserError(f"ConvexSum has {self.branches} branches; found {len(xs)} tensors")
        if torch.compiler.is_dynamo_compiling() and xs[0].dim() == 4:  # not in a plain export
            return _by_channel(self.alpha, xs)
        total = self.alpha[0] * xs[0]
        for i, x in enumerate(xs[1:], 1):
            # In place: the product's own gradient needs xs[0], never the product.
            total.addcmul_(self.alpha[i], x)
        return total


def _by_channel(alpha: Tensor, xs: Sequence[Tensor]) -> Tensor:
    """For a compiler: the gradient of alpha is summed by channels first, a reduction it shares with
    the batch norms beside; a sum over everything at once took as long as six convolutions.
    """
    each = alpha[:, None].expand(-1, xs[0].shape[1])[:, None, :, None, None]
    parts = [a * full_precision(x) for a, x in zip(each.unbind(), xs, strict=True)]
    return sum(parts[1:], parts[0]).to(xs[0].dtype)


def project_simplex(v: Tensor) -> Tensor:
    """The point of {a : a >= 0, sum a = 1} nearest to v (Held et al. 1974), a vector or rows of it.

    a = max(v - tau, 0), tau = max_k (u_1 + ... + u_k - 1)/k, u = v sorted downwards: the maximum is
    at Duchi et al. (2008)'s rho, and finding it needs no index, so no synchronisation.

    >>> project_simplex(torch.tensor([0.8, 0.6]))
    tensor([0.6000, 0.4000])
    """
    u = v.sort(dim=-1, descending=True).values
    counts = torch.arange(1, v.shape[-1] + 1, device=v.device, dtype=v.dtype)
    tau = ((u.cumsum(-1) - 1) / counts).amax(-1, keepdim=True)
    return (v - tau).clamp(min=0)


@torch.no_grad()
def project_simplex_(model: nn.Module) -> None:
    """Project the `alpha` of every `ConvexSum` in the model onto the simplex, in place."""
    alike: dict[object, list[Tensor]] = {}
    for module in model.modules():
        if isinstance(module, ConvexSum):
            alpha = module.alpha
            alike.setdefault((module.branches, alpha.device, alpha.dtype), []).append(alpha)
    for alphas in alike.values():
        torch._foreach_copy_(alphas, project_simplex(torch.stack(alphas)).unbind())


def spectral_norm(weight: Tensor) -> float:
    """The largest singular value of `weight` reshaped to (c_out, -1)."""
    return matrix_norm(weight.detach().flatten(1)).value


@torch.inference_mode(False)
def conv_spectral_norm(conv: nn.Conv2d, input_size: tuple[int, int]) -> float:
    """The largest singular value of the map x -> conv(x) - bias on images of `input_size`.

    Stride, padding (any mode), dilation and groups are the layer's: this is its true Lipschitz
    constant, up to 3 for an orthonormal 3x3 kernel matrix. See `operator_norm`.
    """
    W, size = full_precision(effective_weight(conv).detach()), (1, conv.in_channels, *input_size)
    return operator_norm(lambda x: conv._conv_forward(x, W, None), size, W).value


@dataclass(frozen=True)
class Norm:
    """||A||_2 of a linear map: `value` approaches it from below, `upper` bounds it from above.

    After k Lanczos steps on A'A from a Gaussian start in n dimensions, the largest Ritz value is
    below (1 - e) ||A||^2 with probability at most 1.648 sqrt(n) exp(-(2k - 1) sqrt(e)) (Kuczyński
    and Woźniakowski 1992, theorem 3.2). `upper` takes the e for which that is 1e-9. Where the
    steps exhaust the space, and for linear layers, `upper` is `value` up to rounding.
    """

    value: float
    upper: float


class KernelMatrix(NamedTuple):
    """Singular values of a weight read as (c_out, c_in/groups k k), all groups together.

    `residual` is the smaller of ||W'W - I||_F and ||WW' - I||_F (Eq. 8, reduced): 0 where the
    rows, or the columns, are orthonormal.
    """

    largest: float
    smallest: float
    residual: float


@torch.no_grad()
def kernel_matrix(weight: Tensor, groups: int = 1) -> KernelMatrix:
    """The weight's extreme singular values and its distance from orthonormal, in float64."""
    W = weight.double().reshape(groups, len(weight) // groups, -1)
    gram = W @ W.mT if W.shape[1] <= W.shape[2] else W.mT @ W
    squares = torch.linalg.eigvalsh(gram).clamp(min=0)
    largest, smallest = math.sqrt(squares.max().item()), math.sqrt(squares.min().item())
    return KernelMatrix(largest, smallest, (squares - 1).norm().item())


def matrix_norm(W: Tensor) -> Norm:
    """||W||_2 of a linear layer's weight, exact."""
    norm = torch.linalg.matrix_norm(W.double(), 2).item()
    return Norm(norm, norm)


@torch.inference_mode(False)
def average_norm(pool: Callable[[Tensor], Tensor], size: tuple[int, ...]) -> float:
    """||A|| <= sqrt(max row sum * max column sum) of a map with no negative entry (Schur's test).

    Exact, 1/sqrt(h w), for windows of h w pixels that do not overlap, and for a global mean.
    """
    with torch.enable_grad():
        ones = torch.ones(*size, dtype=torch.float64, requires_grad=True)
        rows = pool(ones)
        (columns,) = torch.autograd.grad(rows.sum(), ones)
    return math.sqrt(rows.max().item() * columns.max().item())


def max_pool_norm(kernel: list[int], stride: list[int], dilation: list[int] | int) -> float:
    """sqrt of how many windows share a pixel at most: no window's maximum moves more than it."""
    return math.sqrt(_shared(*(_pair(v) for v in (kernel, stride or kernel, dilation))))


def _pair(value: list[int] | int) -> list[int]:
    value = [value] if isinstance(value, int) else value
    return list(value) * 2 if len(value) == 1 else list(value)


def operator_norm(A: Callable[[Tensor], Tensor], size: tuple[int, ...], like: Tensor) -> Norm:
    """`Norm` of a linear map on tensors of `size`: Lanczos on v -> A'Av.

    Every new vector is made orthogonal to all before it.
    """
    n = math.prod(size)
    steps = min(STEPS, n)
    start = torch.randn(n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    v, basis = (start / start.norm()).to(like), like.new_empty(steps, n)
    diagonal, beside = [], []
    with _no_autocast(like):
        for k in range(steps):
            basis[k] = v
            w = _normal(A, v.view(size)).flatten()
            diagonal.append(float(w @ v))
            for _ in range(2):  # once leaves what rounding puts back
                w = w - (basis[: k + 1] @ w) @ basis[: k + 1]
            rest = float(w.norm())
            if rest <= ROUNDING * max(diagonal):
                break
            beside.append(rest)
            v = w / rest
    done = len(diagonal)
    T = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
    for k, value in enumerate(beside[: done - 1]):
        T[k, k + 1] = T[k + 1, k] = value
    value = math.sqrt(max(0.0, torch.linalg.eigvalsh(T)[-1].item()))
    exhausted = done == n or len(beside) < done
    # the e of `Norm` for which the probability is `FAILURE`
    short = 0.0 if exhausted else (math.log(1.648 * math.sqrt(n) / FAILURE) / (2 * done - 1)) ** 2
    return Norm(value, value / math.sqrt(1 - short) * (1 + ROUNDING))


@torch.inference_mode(False)
def _normal(A: Callable[[Tensor], Tensor], v: Tensor) -> Tensor:
    """A'A v, by the gradient of ||Av||^2/2."""
    with torch.enable_grad():
        v = v.detach().requires_grad_()
        image = A(v)
        (back,) = torch.autograd.grad(image, v, image.detach())
    return back


@dataclass(frozen=True)
class _Projection:
    """What attention multiplies its inputs by: q, k and v, a matrix each, stacked or alone."""

    attention: nn.MultiheadAttention
    name: str
    groups: int = 1

    @property
    def weight(self) -> Tensor:
        found: Tensor = getattr(self.attention, self.name)
        return found


_Layer: TypeAlias = nn.Conv2d | nn.Linear | _Projection


def _layers(module: nn.Module) -> list[_Layer]:
    """The linear maps of a module itself, not of its children."""
    if isinstance(module, nn.MultiheadAttention):
        if module._qkv_same_embed_dim:
            return [_Projection(module, "in_proj_weight", 3)]
        return [_Projection(module, f"{of}_proj_weight") for of in "qkv"]
    return [module] if isinstance(module, nn.Conv2d | nn.Linear) else []


def _matrices(layer: _Layer) -> Tensor:
    """The layer's weight as (groups, rows, columns), a view where it can be."""
    weight = layer.weight if isinstance(layer, _Projection) else effective_weight(layer)
    groups = getattr(layer, "groups", 1)
    if _channels_last(weight):  # no Gram knows the order of the columns, and this one is a view
        weight = weight.permute(0, 2, 3, 1)
    return full_precision(weight.reshape(groups, len(weight) // groups, -1))


def _residual(W: Tensor, c2: int) -> Tensor:
    """c^2 WW' - I or c^2 W'W - I, whichever is smaller."""
    gram = W @ W.mT if W.shape[1] <= W.shape[2] else W.mT @ W
    gram = gram if c2 == 1 else gram * c2
    gram.diagonal(dim1=-2, dim2=-1).sub_(1)
    return gram


def _times(residual: Tensor, W: Tensor, weight: Tensor) -> Tensor:
    """(c^2 WW' - I) W in the shape of `weight`."""
    product = residual @ W if W.shape[1] <= W.shape[2] else W @ residual
    if _channels_last(weight):
        rows, channels, height, width = weight.shape
        return product.reshape(rows, height, width, channels).permute(0, 3, 1, 2)
    return product.reshape(weight.shape)


def _channels_last(weight: Tensor) -> bool:
    return weight.dim() == 4 and weight.is_contiguous(memory_format=torch.channels_last)


def _no_autocast(like: Tensor) -> torch.autocast:
    return torch.autocast(like.device.type, enabled=False)


def _overlap(layer: _Layer) -> int:
    """c^2: in how many patches a pixel takes part at most (kernel k, stride s, dilation d)."""
    if not isinstance(layer, nn.Conv2d):
        return 1
    return _shared(layer.kernel_size, layer.stride, layer.dilation)


def _shared(*windows: Sequence[int]) -> int:
    """How many windows (kernel, stride, dilation; height and width each) share a pixel at most."""
    return math.prod(math.ceil(k * math.gcd(s, d) / s) for k, s, d in zip(*windows, strict=True))
