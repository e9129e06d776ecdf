"""Norms of single layers: of the map, with a bound from above, and of the kernel's matrix."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "ROUNDING", "KernelMatrix", "Norm", "average_norm", "kernel_matrix", "matrix_norm",
    "max_pool_norm", "operator_norm",
]  # fmt: skip

STEPS = 100
FAILURE = 1e-9
ROUNDING = 1e-5  # of float32 sums, far above what a hundred steps gather


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
    sides = zip(*(_pair(v) for v in (kernel, stride or kernel, dilation)), strict=True)
    return math.sqrt(math.prod(math.ceil(k * math.gcd(s, d) / s) for k, s, d in sides))


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
    short = 0.0 if exhausted else _shortfall(n, done)
    return Norm(value, value / math.sqrt(1 - short) * (1 + ROUNDING))


def _shortfall(n: int, steps: int) -> float:
    """The e of `Norm` for which the probability is `FAILURE`."""
    return (math.log(1.648 * math.sqrt(n) / FAILURE) / (2 * steps - 1)) ** 2


@torch.inference_mode(False)
def _normal(A: Callable[[Tensor], Tensor], v: Tensor) -> Tensor:
    """A'A v, by the gradient of ||Av||^2/2."""
    with torch.enable_grad(), torch.autocast(v.device.type, enabled=False):
        v = v.detach().requires_grad_()
        image = A(v)
        (back,) = torch.autograd.grad(image, v, image.detach())
    return back
