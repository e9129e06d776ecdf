"""Square attack: random squares, judged by the logits alone (Andriushchenko et al. 2020)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from defquant.attacks.base import uniform
from defquant.attacks.kernel import Kernel, Look, Loss, State, column, draws, into_ball
from defquant.attacks.losses import margin
from defquant.attacks.single import Single, pixels, positive
from defquant.errors import UserError

__all__ = ["Square", "Squares"]

HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)  # of 10,000 queries


@dataclass(frozen=True)
class Squares:
    """The kernel of `Square`: `at` is the image asked about, `best` the one kept."""

    restarts: ClassVar[int] = 1
    targets: ClassVar[int] = 0
    climbs: ClassVar[int] = 0
    bounded: ClassVar[bool] = True
    surrogate: ClassVar[None] = None

    steps: int
    p: float
    after: int = 0  # steps of another kernel before the first

    @property
    def looks(self) -> int:
        return self.steps

    @property
    def loss(self) -> Loss:
        return margin

    def begin(self, rows: State, eps: float | Tensor, seed: int) -> State:
        x, stripe = rows["x"], torch.Size([rows["x"].shape[1], 1, rows["x"].shape[3]])
        stripes = _signs(uniform(seed, rows["id"], rows["start"], stripe))
        at = (x + stripes * eps).clamp_(0, 1)
        return rows | {
            "at": at,
            "best": at,
            "best_loss": torch.full_like(at[:, 0, 0, 0], -torch.inf),
        }

    def advance(self, rows: State, look: Look, eps: float | Tensor, seed: int) -> State:
        better = look.loss > rows["best_loss"]
        best = torch.where(column(better), rows["at"], rows["best"])
        at = _with_square(best, rows, self._side(rows), eps, seed)
        best_loss = torch.where(better, look.loss, rows["best_loss"])
        return rows | {"at": at, "best": best, "best_loss": best_loss, "step": rows["step"] + 1}

    def _side(self, rows: State) -> Tensor:
        """Side of each row's square, (n,): round(sqrt(p h w)), p halved as the queries pass."""
        height, width = rows["x"].shape[2:]
        passed = (rows["step"] - self.after) * 10_000 // self.steps
        halved = (passed[:, None] > passed.new_tensor(HALVINGS)).sum(1)
        side = (self.p * 0.5**halved * height * width).sqrt().round()
        return side.clamp_(1, min(height, width)).long()


def _with_square(best: Tensor, rows: State, side: Tensor, eps: float | Tensor, seed: int) -> Tensor:
    """`best` with a square anywhere in it moved to x ± eps, one sign for each channel.

    Where that changes nothing the signs are turned, so that the query is not wasted.
    """
    _, channels, height, width = best.shape
    u = draws(rows, seed, torch.Size([2 + channels]))
    top = (u[:, 0] * (height - side + 1)).long()
    left = (u[:, 1] * (width - side + 1)).long()
    square = (
        _within(height, top, side)[:, None, :, None] & _within(width, left, side)[:, None, None]
    )
    signs = _signs(u[:, 2:])[:, :, None, None]
    once = torch.where(square, into_ball(rows["x"] + signs * eps, rows["x"], eps), best)
    idle = (once == best).flatten(1).all(1)
    if not bool(idle.any()):
        return once
    turned = torch.where(square, into_ball(rows["x"] - signs * eps, rows["x"], eps), best)
    return torch.where(column(idle), turned, once)


def _within(length: int, start: Tensor, side: Tensor) -> Tensor:
    """Which of 0..length-1 lie in [start, start + side): (n, length)."""
    place = torch.arange(length, device=start.device)
    return (place >= start[:, None]) & (place < (start + side)[:, None])


def _signs(u: Tensor) -> Tensor:
    return torch.where(u < 0.5, -1.0, 1.0)


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
        positive("queries", self.queries)
        if not 0 < self.p <= 1:
            raise UserError(f"p is a share of the image, in (0, 1]; found {self.p:g}")

    @property
    def kernel(self) -> Kernel:
        return Squares(self.queries, self.p)

    @property
    def name(self) -> str:
        return "Square" if self.queries == 5000 else f"Square-{self.queries}"

    def __repr__(self) -> str:
        return f"Square(eps={pixels(self.eps)}, queries={self.queries}, p={self.p:g})"
