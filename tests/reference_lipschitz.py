"""Slow, obvious versions of what `defquant.lipschitz` computes fast."""

from itertools import combinations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn


def literal_penalty(model: nn.Module, beta: float, scale: float = 1.0) -> Tensor:
    """Eq. 8 as printed: (beta/2) sum ||W'W - I||_F^2 on the Gram of the columns, per group."""
    total = torch.zeros((), dtype=torch.float64)
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            groups = layer.groups if isinstance(layer, nn.Conv2d) else 1
            for rows in layer.weight.chunk(groups):
                W = scale * rows.flatten(1)
                total = total + (W.T @ W - torch.eye(W.shape[1]).to(W)).square().sum()
    return beta / 2 * total


def reduced_penalty(model: nn.Module, beta: float, scale: float = 1.0) -> float:
    """Without what no n x m matrix can reach: beta/2 sum of max(m - n, 0)."""
    missing = 0
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            groups = layer.groups if isinstance(layer, nn.Conv2d) else 1
            rows = len(layer.weight) // groups
            missing += groups * max(layer.weight[0].numel() - rows, 0)
    return literal_penalty(model, beta, scale).item() - beta / 2 * missing


def nearest_on_simplex(v: NDArray[np.float64]) -> NDArray[np.float64]:
    """The nearest of the projections of v onto the hyperplanes of all faces of the simplex."""
    candidates = []
    for size in range(1, len(v) + 1):
        for face in map(list, combinations(range(len(v)), size)):
            a = np.zeros_like(v)
            a[face] = v[face] - (v[face].sum() - 1) / size
            if (a >= 0).all():
                candidates.append(a)
    return min(candidates, key=lambda a: float(((a - v) ** 2).sum()))


@torch.no_grad()
def dense_convolution(conv: nn.Conv2d, input_size: tuple[int, int]) -> NDArray[np.float64]:
    """The convolution without its bias as a matrix, column by column."""
    size = (1, conv.in_channels, *input_size)
    zero = conv(torch.zeros(size).to(conv.weight)).flatten()
    columns = torch.eye(conv.in_channels * input_size[0] * input_size[1]).to(conv.weight)
    outputs = [conv(column.reshape(size)).flatten() - zero for column in columns]
    return torch.stack(outputs, dim=1).double().numpy()
