"""How 8-bit images are given to a file, and what its columns mean: found on labelled images."""

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from scipy.stats import binomtest
from torch import Tensor, nn

from defquant.attacks.contract import told
from defquant.attacks.lint import NORMS
from defquant.deploy.runtime import session
from defquant.errors import UserError, shown
from defquant.judging.nodes import blamed
from defquant.judging.twin import Layout, Twin, in_batches, read_onnx
from defquant.records import Score
from defquant.rounding import Rounded

__all__ = [
    "RANGES", "Contract", "File", "Found", "Front", "find_contract", "given_contract", "normalised",
]  # fmt: skip

_AT_ONCE = 64
_FIRST = 64
"""Images that each way is tried on before the best are tried on all."""
_CHANCE = 1e-3
_OWN = re.compile(r"mean((?: [\d.]+)+) std((?: [\d.]+)+)")
Affine = tuple[tuple[float, ...], tuple[float, ...]]


def normalised(mean: Sequence[float], std: Sequence[float]) -> Affine:
    """(x - mean) / std of images x in [0, 1], of pixels."""
    return tuple(255 * m for m in mean), tuple(255 * s for s in std)


RANGES: dict[str, Affine] = {
    "0..1": ((0.0,), (255.0,)),
    "0..255": ((0.0,), (1.0,)),
    "-1..1": ((127.5,), (127.5,)),
    "-128..127": ((128.0,), (1.0,)),
    **{f"{whose} mean and std": normalised(*norm) for whose, norm in NORMS.items()},
}
"""By name: what is subtracted from a pixel of 0..255, and what it is then divided by."""


@dataclass(frozen=True)
class Contract:
    """What a file takes for an image, and which of its columns stands for each class.

    Attributes:
        range: its name; the value of a pixel is (pixel - shift) / divide, for each channel or all.
        layout: of the axes.
        bgr: the channels in reverse.
        whole: the least and the greatest whole number of a file that takes such; None for floats.
        order: columns by class, those of others are left out; None for one of each, in order.
    """

    range: str
    shift: tuple[float, ...]
    divide: tuple[float, ...]
    layout: Layout = "NCHW"
    bgr: bool = False
    whole: tuple[int, int] | None = None
    order: tuple[int, ...] | None = None

    def __str__(self) -> str:
        channels = ", BGR" if self.bgr else ""
        kind = "" if self.whole is None else ", uint8" if self.whole[0] == 0 else ", int8"
        ordered = self.order in (None, tuple(range(len(self.order or ()))))
        return f"{self.range}{kind}, {self.layout}{channels}" + ("" if ordered else ", own order")

    def fed(self, pixels: Tensor, sizes: Sequence[int]) -> Tensor:
        """What the file gets for `pixels`, floats of 0..255 (n, c, h, w), as (n, *sizes)."""
        shift, divide = (pixels.new_tensor(v)[:, None, None] for v in (self.shift, self.divide))
        x = (pixels.flip(1) if self.bgr else pixels).sub(shift).div(divide)
        if self.whole is not None:
            x = Rounded.apply(x, x.detach().round().clamp(*self.whole), -math.inf, math.inf, 0.0)  # type: ignore[no-untyped-call]
        x = x.permute(0, 2, 3, 1) if self.layout == "NHWC" else x
        return x.reshape(len(x), *sizes)

    def chosen(self, columns: Tensor) -> Tensor:
        """(n, columns) of the file as (n, classes) of the data."""
        return columns if self.order is None else columns[:, list(self.order)]


class Front(nn.Module):
    """A twin behind its contract: images in [0, 1] (n, c, h, w) to logits in the data's order."""

    def __init__(self, twin: Twin, contract: Contract) -> None:
        super().__init__()
        self.twin, self.contract = twin, contract
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.contract.chosen(self.twin(self.contract.fed(x * 255, self.twin.sizes)))


class File:
    """An ONNX file in onnxruntime, on one thread, and its twin.

    Attributes:
        twin: with gradients; nothing is run before it was read.

    Raises:
        UserError: as `read_onnx`, or onnxruntime does not take the file.
    """

    def __init__(self, path: Path | str, image: tuple[int, int, int] | None = None) -> None:
        self.path = Path(path)
        self.twin = read_onnx(self.path, image)
        self.session = session(self.path, threads=1)

    def answers(self, values: Tensor) -> Tensor:
        """The file's output (n, columns) in float32 for `values` (n, ...) as it takes them.

        One image at a time where they would mix; a batch that the file fixes is filled up. Where
        it returns a class for each image, that class's column is 1 and the others are 0.
        """
        port, rows = self.twin.port, self.twin.port.batch or (1 if self.twin.alone else _AT_ONCE)

        def run(part: Tensor) -> Tensor:
            with blamed(f"onnxruntime cannot run {self.path}"):
                (made,) = self.session.run([self.twin.output], {port.name: part.numpy()})
            return torch.from_numpy(np.asarray(made, np.float32))

        found = in_batches(values.to(port.dtype), rows, run, filled=port.batch is not None)
        if "ArgMax" in self.twin.ending:
            return nn.functional.one_hot(found.long().flatten(), self.twin.classes).float()
        return found.flatten(1)

    def predict(self, pixels: Tensor, contract: Contract) -> Tensor:
        """Classes (n,) that the file itself gives to `pixels`, uint8 (n, c, h, w); -1 for a NaN."""
        values = contract.fed(pixels.float(), self.twin.sizes)
        return told(contract.chosen(self.answers(values)))

    def model(self, contract: Contract) -> Front:
        """What attacks take: images in [0, 1] to logits, with gradients."""
        return Front(self.twin, contract)


@dataclass(frozen=True)
class Found:
    """The contract that the labelled images speak for, and the next best.

    `alike`: chance may be all that the answers tell these two apart by.
    """

    contract: Contract
    score: Score
    second: Contract | None
    second_score: Score | None
    alike: bool = False

    def __str__(self) -> str:
        line = f"input: {self.contract}: {self.score}"
        if self.second is None or self.second_score is None:
            return line
        told = ", up to chance as good: --input decides" * self.alike
        return f"{line}; next best {self.second}: {self.second_score.accuracy:.1%}{told}"


def given_contract(text: str) -> dict[str, Any]:
    """What `find_contract` need not try, of a contract as it is printed: `0..1, NHWC, BGR`.

    A range is a name of `RANGES`, or `mean 0.5 0.5 0.4 std 0.2 0.2 0.2`, of images in [0, 1].
    Raises `UserError` for other words.
    """
    given: dict[str, Any] = {}
    for word in map(str.strip, text.split(",")):
        if word in ("NCHW", "NHWC"):
            given["layout"] = word
        elif word in ("RGB", "BGR"):
            given["bgr"] = word == "BGR"
        elif word in RANGES:
            given["ranges"] = {word: RANGES[word]}
        elif own := _OWN.fullmatch(word):
            given["ranges"] = {word: _own_range(word, *own.groups())}
        elif word not in ("uint8", "int8", "own order"):  # those a file tells
            raise UserError(
                f"an input is one of {', '.join(RANGES)} or mean ... std ..., NCHW or NHWC, RGB or "
                f"BGR, between commas; found {shown(word)!r}"
            )
    return given


def _own_range(word: str, *parts: str) -> Affine:
    try:
        mean, std = ([float(v) for v in part.split()] for part in parts)
    except ValueError:
        raise UserError(f"means and stds are numbers; found {shown(word)!r}") from None
    if len(mean) != len(std) or not min(std) > 0:
        raise UserError(f"as many means as stds, which are above 0; found {shown(word)!r}")
    return normalised(mean, std)


def find_contract(
    file: File,
    images: Tensor,
    labels: Tensor,
    *,
    classes: int | None = None,
    ranges: Mapping[str, Affine] | None = None,
    layout: Layout | None = None,
    bgr: bool | None = None,
) -> Found:
    """Try ways to feed the file on labelled images; the one that is right most often.

    One under which the labels are far less likely than under another that is right as often, up to
    chance, is passed over: a network may answer alike on images 255 times too bright, but its
    losses, and their gradients, are others. The order of the classes is the file's own unless
    another, matched on every other image (Hungarian method), is right more often on the rest,
    beyond their intervals, and on half of them. A way that the file cannot run is none.

    Args:
        images: uint8 (n, c, h, w); a few hundred are enough.
        labels: whole numbers (n,).
        classes: of the data; one more than the greatest label, when None.
        ranges, layout, bgr: what is known and need not be tried; `ranges` as `RANGES`.

    Raises:
        UserError: the images do not fit the file, it has fewer columns than there are classes, or
            the best way is right no more often than chance.
    """
    count = int(labels.max()) + 1 if classes is None else classes
    if file.twin.classes < count:
        raise UserError(
            f"{file.path} has {file.twin.classes} outputs and the data {count} classes: use the "
            "data that it was trained for"
        )
    ways = _ways(file.twin, images.shape[1:], ranges, layout, bgr)
    if not ways:
        raise UserError(f"{file.path} takes no {' or '.join(ranges or RANGES)} of these images")
    first = _Trial(file, images[:_FIRST], labels[:_FIRST], count)
    best = _best(ways, first.matched)
    trial = _Trial(file, images, labels, count)
    scored = [(way, trial.right(way.chosen(trial.columns(way)), slice(None)))
              for way in map(trial.ordered, best)]  # fmt: skip
    scored.sort(key=lambda pair: pair[1].correct, reverse=True)
    near = [pair for pair in scored if pair[1].accuracy >= scored[0][1].interval[0]]
    losses = [trial.surprise(way) for way, _ in near]
    chosen = next(i for i, loss in enumerate(losses) if loss <= 2 * min(losses) + 0.1)
    scored.insert(0, scored.pop(chosen))
    contract, score = scored[0]
    luck = binomtest(score.correct, score.total, 1 / count, alternative="greater").pvalue
    if not luck * len(ways) < _CHANCE:
        raise UserError(
            f"{file.path} guesses, however it is fed: at best {score} with {contract}, of "
            f"{count} classes: say how its images were prepared, or give the data it was made for"
        )
    if len(scored) == 1:
        return Found(contract, score, None, None)
    return Found(contract, score, *scored[1], alike=any(pair is scored[1] for pair in near))


def _ways(
    twin: Twin,
    image: Sequence[int],
    ranges: Mapping[str, Affine] | None,
    layout: Layout | None,
    bgr: bool | None,
) -> list[Contract]:
    """Contracts that fit the file, the plain ones first, each function once."""
    c, h, w = image
    layouts: list[Layout] = [layout] if layout else ["NCHW", "NHWC"]
    fitting = [way for way in layouts if twin.port.fits((c, h, w), way)]
    if not fitting:
        raise UserError(
            f"the file takes {list(twin.port.shape)} and the images are {c} x {h} x {w}: use the "
            "data that it was trained for"
        )
    kind = twin.port.dtype
    whole = {torch.uint8: (0, 255), torch.int8: (-128, 127)}.get(kind)
    colours = [bgr] if bgr is not None else [False, True] if c == 3 else [False]
    found: dict[Any, Contract] = {}
    each = product(_affines(twin, whole, ranges), fitting, colours)
    for (name, (shift, divide)), way, reverse in each:
        key = tuple(round(v, 6) for v in (*shift, *divide)), way, reverse
        if len(shift) in (1, c):
            found.setdefault(key, Contract(name, shift, divide, way, reverse, whole))
    return list(found.values())


def _affines(
    twin: Twin, whole: tuple[int, int] | None, ranges: Mapping[str, Affine] | None
) -> Iterator[tuple[str, Affine]]:
    named = RANGES if ranges is None else ranges
    if whole is None:
        yield from named.items()
        return
    plain = "0..255" if whole[0] == 0 else "-128..127"
    if plain in named:
        yield plain, RANGES[plain]
    if twin.grid is not None:
        scale, zero = twin.grid
        for name, (shift, divide) in named.items():
            moved = tuple(s - zero * d * scale for s, d in zip(shift, divide, strict=True))
            yield name, (moved, tuple(d * scale for d in divide))


def _best(ways: Sequence[Contract], matched: Callable[[Contract], int]) -> list[Contract]:
    """The six that are right most often, of those that the file can run."""
    found, refused = [], []
    for way in ways:
        try:
            found.append((way, matched(way)))
        except UserError as error:  # a table of 256 values has no place for others
            refused.append(error)
    if not found:
        raise refused[0]
    found.sort(key=lambda pair: pair[1], reverse=True)
    return [way for way, _ in found[:6]]


class _Trial:
    """Labelled images and what the file says of them."""

    def __init__(self, file: File, images: Tensor, labels: Tensor, classes: int) -> None:
        self.file, self.labels, self.classes = file, labels, classes
        self.pixels = images.float()

    def columns(self, way: Contract) -> Tensor:
        return self.file.answers(way.fed(self.pixels, self.file.twin.sizes))

    def matched(self, way: Contract) -> int:
        """Images right under the best order of the classes."""
        table = self.table(self.columns(way).argmax(1), slice(None))
        rows, columns = linear_sum_assignment(-table)
        return int(table[rows, columns].sum())

    def table(self, said: Tensor, part: slice) -> NDArray[Any]:
        table = np.zeros((self.classes, self.file.twin.classes), np.int64)
        np.add.at(table, (self.labels[part].numpy(), said[part].numpy()), 1)
        return table

    def ordered(self, way: Contract) -> Contract:
        """`way` with the order of the classes that holds for images it was not found on."""
        columns = self.columns(way)
        said, odd = columns.argmax(1), slice(1, None, 2)
        plain = tuple(range(self.classes)) if self.file.twin.classes > self.classes else None
        order = tuple(linear_sum_assignment(-self.table(said, slice(0, None, 2)))[1].tolist())
        right = [self.right(replace(way, order=o).chosen(columns), odd) for o in (plain, order)]
        if right[1].interval[0] <= right[0].interval[1] or right[1].accuracy < 0.5:
            return replace(way, order=plain)  # any network, of any data, fits some order a little
        whole = linear_sum_assignment(-self.table(said, slice(None)))[1]
        return replace(way, order=tuple(whole.tolist()))

    def surprise(self, way: Contract) -> float:
        """Mean cross-entropy of the labels, smoothed: no network is sure beyond all bounds."""
        with torch.no_grad():
            logits = self.file.model(way)(self.pixels / 255).float()
        loss = nn.functional.cross_entropy(logits, self.labels, label_smoothing=0.01)
        return float(loss.nan_to_num(math.inf))

    def right(self, columns: Tensor, part: slice) -> Score:
        return Score.of((told(columns) == self.labels)[part])
