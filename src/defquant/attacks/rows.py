"""The rows in play: made from the queue, filtered, joined, filled up."""

from collections.abc import Sequence

import torch
from torch import Tensor

from defquant.attacks.kernel import Forward, State
from defquant.data import to_unit

__all__ = ["both", "count", "cut", "padded", "refill", "rivals_of", "round_up", "rows_of", "where"]


def rows_of(row: Tensor, images: Tensor, labels: Tensor, ids: Tensor, rivals: Tensor) -> State:
    """The starts numbered `row` = start * n + example, not yet begun."""
    example, start, targets = row % len(images), row // len(images), rivals.shape[1]
    return {
        "row": row, "step": torch.zeros_like(row), "start": start, "restart": start // targets,
        "id": ids[example], "x": to_unit(images[example]), "y": labels[example],
        "target": rivals[example, start % targets],
    }  # fmt: skip


def rivals_of(
    forwards: Sequence[Forward], images: Tensor, labels: Tensor, targets: int, batch_size: int
) -> Tensor:
    """The `targets` classes (all, where there are fewer) that the model prefers after the label.

    int64 (n, targets); the labels themselves, (n, 1), where the attack has no targets.
    """
    if not targets:
        return labels[:, None]
    with torch.no_grad():
        parts = [forwards[0](to_unit(part)).float() for part in images.split(batch_size)]
    logits = torch.cat(parts).nan_to_num().scatter(1, labels[:, None], -torch.inf)
    return logits.topk(min(targets, logits.shape[1] - 1), dim=1).indices


def count(rows: State) -> int:
    return len(rows["row"])


def where(rows: State, mask: Tensor) -> State:
    return rows if bool(mask.all()) else {name: part[mask] for name, part in rows.items()}


def both(a: State, b: State) -> State:
    if not count(a) or not count(b):
        return a if count(a) else b
    return {name: torch.cat([part, b[name]]) for name, part in a.items()}


def cut(rows: State, n: int) -> tuple[State, State]:
    """The first `n` rows, and the others."""
    first, others = ({k: part[s] for k, part in rows.items()} for s in (slice(n), slice(n, None)))
    return first, others


def refill(position: int, total: int, room: int, standing: Tensor) -> tuple[int, Tensor]:
    """The next `room` unbroken rows from `position` on, fewer at the end, and where they end."""
    found, taken = torch.empty(0, dtype=torch.int64, device=standing.device), position
    while taken < total and (missing := room - len(found)) > 0:
        rows = torch.arange(taken, min(taken + missing, total), device=standing.device)
        found = torch.cat([found, rows[standing[rows % len(standing)]]])
        taken += len(rows)
    return taken, found


def padded(x: Tensor, rows: int) -> Tensor:
    """`x` with rows of zeros added, up to `rows` of them."""
    missing = rows - len(x)
    return x if missing <= 0 else torch.cat([x, x.new_zeros(missing, *x.shape[1:])])


def round_up(n: int) -> int:
    """`n` up to the next of 1, 2, 4, 8, 16, 32, 48, 64, ...

    A batch that shrinks row by row would have convolution kernels made for every size it has.
    """
    return 1 << (n - 1).bit_length() if n < 16 else -(-n // 16) * 16
