"""Square attack: random squares, judged by the logits alone (Andriushchenko et al. 2020)."""

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from defquant.attacks.contract import uniform
from defquant.attacks.engine import Look, Plan, Radius, Single, State, column
from defquant.attacks.losses import margin
from defquant.config import positive
from defquant.errors import UserError

__all__ = ["Square", "searched"]

HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)  # of 10,000 queries


@dataclass(frozen=True, repr=False)
class Square(Single):
    """Random search for an image that fools, by squares of ±eps (Andriushchenko et al. 2020).

    From vertical stripes on; a square is kept where the margin max_{i≠y} z_i - z_y grows. It asks
    for logits only: the model may be a module without parameters or gradients, such as a wrapper
    of another runtime.

    Attributes:
        queries: squares tried on each example (after the stripes).
        p: share of the image that the first squares cover, in (0, 1]; halved after 0.1, 0.5, 2, 5,
            10, 20, 40, 60 and 80 % of the queries.
    """

    queries: int = 5000
    p: float = 0.8

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(queries=self.queries)
        if not 0 < self.p <= 1:
            raise UserError(f"p is a share of the image, in (0, 1]; found {self.p:g}")

    @property
    def plan(self) -> Plan:
        return Plan(0, self.queries, margin, ahead=True)

    def begin(self, rows: State, eps: Radius, seed: int) -> State:
        x, stripe = rows["x"], torch.Size([rows["x"].shape[1], 1, rows["x"].shape[3]])
        stripes = _signs(uniform(seed, rows["id"], rows["start"], stripe))
        at = (x + stripes * eps).clamp_(0, 1)
        low = torch.full_like(at[:, 0, 0, 0], -torch.inf)
        return rows | {"at": at, "best": at, "best_loss": low}

    def advance(self, rows: State, look: Look, eps: Radius, seed: int) -> State:
        return searched(rows, look, eps, seed, self.queries, self.p)

    @property
    def name(self) -> str:
        return "Square" if self.queries == 5000 else f"Square-{self.queries}"


def searched(
    rows: State,
    look: Look,
    eps: Radius,
    seed: int,
    queries: int,
    p: float,
    *,
    after: int = 0,
) -> State:
    """The rows after a query: `at` is the next image to ask about, `best` the one kept.

    `after`: steps of another attack before the first of the `queries`.
    """
    better = look.loss > rows["best_loss"]
    best = torch.where(column(better), rows["at"], rows["best"])
    at = _with_square(best, rows, side_of(rows, queries, p, after), eps, seed)
    best_loss = torch.where(better, look.loss, rows["best_loss"])
    return rows | {"at": at, "best": best, "best_loss": best_loss, "step": rows["step"] + 1}


def side_of(rows: State, queries: int, p: float, after: int = 0) -> Tensor:
    """Side of each row's square, (n,): round(sqrt(p h w)), p halved as the queries pass."""
    height, width = rows["x"].shape[2:]
    return _sides(queries, p, height, width, rows["step"].device)[rows["step"] - after]


@cache
def _sides(queries: int, p: float, height: int, width: int, device: torch.device) -> Tensor:
    """By the queries that passed, (queries + 1,)."""
    passed = torch.arange(queries + 1, device=device) * 10_000 // queries
    halved = (passed[:, None] > passed.new_tensor(HALVINGS)).sum(1)
    side = (p * 0.5**halved * height * width).sqrt().round()
    return side.clamp_(1, min(height, width)).long()


def _with_square(best: Tensor, rows: State, side: Tensor, eps: Radius, seed: int) -> Tensor:
    """`best` with a square anywhere in it moved to x ± eps, one sign for each channel.

    Where that changes nothing the signs are turned, so that the query is not wasted. Draws depend
    on (seed, example id, start, step) alone.
    """
    _, channels, height, width = best.shape
    draw = rows["start"] + ((rows["step"] + 1) << 32)
    u = uniform(seed, rows["id"], draw, torch.Size([2 + channels]))
    top = (u[:, 0] * (height - side + 1)).long()
    left = (u[:, 1] * (width - side + 1)).long()
    square = (
        _within(height, top, side)[:, None, :, None] & _within(width, left, side)[:, None, None]
    )
    signs = _signs(u[:, 2:])[:, :, None, None]
    once = torch.where(square, (rows["x"] + signs * eps).clamp_(0, 1), best)
    idle = (once - best).abs_().amax((1, 2, 3)) == 0
    if not idle.is_cuda and not bool(idle.any()):  # a GPU is not waited for
        return once
    turned = torch.where(square, (rows["x"] - signs * eps).clamp_(0, 1), best)
    return torch.where(column(idle), turned, once)


def _within(length: int, start: Tensor, side: Tensor) -> Tensor:
    """Which of 0..length-1 lie in [start, start + side): (n, length)."""
    place = torch.arange(length, device=start.device)
    return (place >= start[:, None]) & (place < (start + side)[:, None])


def _signs(u: Tensor) -> Tensor:
    return torch.where(u < 0.5, -1.0, 1.0)
