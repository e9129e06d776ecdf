"""A data set is one uint8 tensor on one device; batches of it are gathered there, augmented."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from defquant.errors import UserError

__all__ = [
    "Dataset", "Images", "as_labels", "augment", "batches", "cut", "drawn", "from_arrays",
    "images_of", "in_unit", "num_batches", "to_unit",
]  # fmt: skip

_SLACK = 1e-6  # beyond [0, 1]: a last digit of float32, lost on the way from pixels


@dataclass(frozen=True, eq=False, repr=False)
class Dataset:
    """Labelled images of one size, whole in memory.

    Attributes:
        images: uint8 (n, c, h, w), 0..255.
        labels: int64 (n,), each an index into `classes`; see `as_labels` for what is taken.
        classes: names of the classes.
        name: what is shown beside numbers measured on it, such as `CIFAR-10 (JPEG)`.
        flip: mirrored images keep their meaning.
        shift: pixels of the random reflect-padded crop in training; 0 for none.
        whole: what these are the `first` images of, where they are not all.

    Raises `UserError` where types or shapes are others than these.
    """

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    name: str
    flip: bool = False
    shift: int = 0
    whole: "Dataset | None" = field(default=None, repr=False)

    def __post_init__(self) -> None:
        images = self.images
        if images.dtype != torch.uint8 or images.ndim != 4:
            raise UserError(
                "images must be uint8 of shape (n, c, h, w); "
                f"found {images.dtype} {tuple(images.shape)}"
                + (f": {_remedy(images)}" if images.dtype != torch.uint8 else "")
            )
        object.__setattr__(self, "images", images.contiguous())
        object.__setattr__(self, "labels", as_labels(self.labels, len(images), len(self.classes)))

    def __len__(self) -> int:
        return len(self.images)

    def __repr__(self) -> str:
        size = " x ".join(map(str, self.shape))
        return f"Dataset({self.name!r}, {len(self):,} images {size}, {self.num_classes} classes)"

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    @property
    def in_channels(self) -> int:
        return self.images.shape[1]

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of one image, (c, h, w)."""
        return self.images.shape[1], self.images.shape[2], self.images.shape[3]

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits of SHA-256 over shape, images and labels; the same on every device."""
        digest = hashlib.sha256(repr(tuple(self.images.shape)).encode())
        digest.update(self.images.cpu().numpy().data)
        digest.update(self.labels.cpu().numpy().astype("<i8").data)
        return digest.hexdigest()[:16]

    @property
    def source(self) -> str:
        """Fingerprint of the `whole`."""
        return (self.whole or self).fingerprint

    def to(self, device: torch.device | str) -> "Dataset":
        """The same data set on `device`; itself where it already lies there."""
        images, labels = self.images.to(device), self.labels.to(device)
        if images is self.images and labels is self.labels:
            return self
        return replace(self, images=images, labels=labels)

    def first(self, n: int | None) -> "Dataset":
        """The first `n` images, or all for None. Raises `UserError` unless 1 <= n <= len."""
        if n is None or n == len(self):
            return self
        if not 1 <= n <= len(self):
            raise UserError(
                f"{self.name} has {len(self):,} images here; found a request for the first {n:,}: "
                "ask for fewer, or for all"
            )
        whole = self.whole or self
        return replace(self, images=self.images[:n], labels=self.labels[:n], whole=whole)

    def take(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Float32 images in [0, 1] of shape (k, c, h, w) and labels (k,) at `index` (k,)."""
        index = index.to(self.images.device)
        return to_unit(self.images[index]), self.labels[index]


def from_arrays(
    images: NDArray[np.uint8],
    labels: NDArray[np.integer],
    classes: tuple[str, ...],
    *,
    name: str,
    where: str,
    flip: bool = False,
    shift: int = 0,
) -> Dataset:
    """A `Dataset` of what a reader found at `where`, images (n, c, h, w) and labels (n,).

    Raises `UserError` where there is no image, the counts differ or a label names no class.
    """
    if len(images) == 0 or images.shape[:1] != labels.shape:
        raise UserError(
            f"{where} must hold images and one label for each; "
            f"found {len(images)} images and labels of shape {labels.shape}"
        )
    pixels = torch.from_numpy(np.require(images, requirements=["C", "W"]))
    known = as_labels(labels, len(images), len(classes), f"{where}: ")
    return Dataset(pixels, known, classes, name, flip, shift)


def num_batches(data: Dataset, batch_size: int, world: int = 1) -> int:
    """Steps of one epoch: what `batches` yields to each of `world` processes.

    Raises `UserError` where not even one batch has two images for each process.
    """
    least = 2 * world
    if world < 1 or min(batch_size, len(data)) < least:
        raise UserError(
            f"each of {world} processes needs 2 images a step (batch normalisation); found batch "
            f"size {batch_size} and {len(data)} images: raise them or use fewer processes"
        )
    return len(data) // batch_size + (len(data) % batch_size >= least)


def batches(
    data: Dataset,
    batch_size: int,
    *,
    seed: int,
    epoch: int,
    augment: bool = True,
    rank: int = 0,
    world: int = 1,
) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch of training batches: float32 images in [0, 1] and labels, on the data's device.

    The order depends on `seed` and `epoch` only. `batch_size` counts the images of all `world`
    processes together; this process gets images `rank::world` of each such batch, augmented alike
    whatever `world` is. A short last batch is left out where it has fewer than two images for
    each process. Raises `UserError` as `num_batches` does, and where `rank` is not below `world`.
    """
    draws = drawn(data, batch_size, seed, epoch, augment, rank, world)
    return (cut(data, mine, augment) for mine in draws)


def drawn(
    data: Dataset, batch_size: int, seed: int, epoch: int, augment: bool, rank: int, world: int
) -> list[Tensor]:
    """What `batches` draws, on the data's device: of each batch (4, k), for `cut`."""
    steps = num_batches(data, batch_size, world)
    if not 0 <= rank < world:
        raise UserError(f"rank must lie in 0..{world - 1}; found {rank}")
    flip, shift = (data.flip, data.shift) if augment else (False, 0)
    _check_shift(data.images, shift)
    # a hash: adding the two would make seed 0's epoch 1 seed 1's epoch 0
    mixed = hashlib.sha256(f"batches {seed} {epoch}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(mixed[:8], "little") >> 1)
    order = torch.randperm(len(data), generator=generator)[None]
    draws = torch.cat([order, _draw(len(data), flip, shift, generator)]).to(data.images.device)
    starts = range(0, steps * batch_size, batch_size)
    return [draws[:, start : start + batch_size][:, rank::world] for start in starts]


def cut(data: Dataset, draws: Tensor, augment: bool) -> tuple[Tensor, Tensor]:
    """The batch that `draws` (4, k) names: nothing waits for the device, nothing is drawn."""
    flip, shift = (data.flip, data.shift) if augment else (False, 0)
    return to_unit(_moved(data.images, draws, flip, shift)), data.labels[draws[0]]


def augment(images: Tensor, *, flip: bool, shift: int, generator: torch.Generator) -> Tensor:
    """Each image cropped at random from its reflect-padded self and, if `flip`, mirrored by chance.

    Images are uint8 (n, c, h, w), on any device; `shift` is the padding in pixels, below h and w.
    Draws come from `generator` on the CPU, so that every device sees the same ones.
    Raises `UserError` where `shift` is too large for the images.
    """
    _check_shift(images, shift)
    n = len(images)
    draws = torch.cat([torch.arange(n)[None], _draw(n, flip, shift, generator)])
    return _moved(images.contiguous(), draws.to(images.device), flip, shift)


def _draw(n: int, flip: bool, shift: int, generator: torch.Generator) -> Tensor:
    """(3, n): mirrored or not, and the offsets down and right, each in -shift..shift."""
    mirror = torch.randint(2 if flip else 1, (1, n), generator=generator)
    offset = torch.randint(2 * shift + 1, (2, n), generator=generator) - shift
    return torch.cat([mirror, offset])


def _moved(images: Tensor, draws: Tensor, flip: bool, shift: int) -> Tensor:
    """The images that `draws` (4, k) picks, mirrored and shifted, in one gather."""
    index, mirror, down, right = draws[:, :, None].unbind()
    if not flip and not shift:
        return images.index_select(0, index[:, 0])
    _, c, h, w = images.shape
    row, column, plane = (torch.arange(size, device=images.device) for size in (h, w, c))
    column = torch.where(mirror.bool(), w - 1 - column, column)
    y, x = _reflect(row + down, h), _reflect(column + right, w)
    rows = (index * c + plane)[:, :, None] * h + y[:, None, :]
    source = rows[..., None] * w + x[:, None, None, :]
    # index_select of flat positions: five times as fast on a CPU as indexing with four tensors
    return images.view(-1).index_select(0, source.view(-1)).view(source.shape)


def _reflect(position: Tensor, size: int) -> Tensor:
    """Positions in -size < i < 2 size - 1, mirrored at the first and last pixel into 0..size-1."""
    return size - 1 - (size - 1 - position.abs()).abs()


def _check_shift(images: Tensor, shift: int) -> None:
    if not 0 <= shift < min(images.shape[2:]):
        raise UserError(
            f"the crop's shift must lie in 0..{min(images.shape[2:]) - 1} for images of "
            f"{images.shape[2]} x {images.shape[3]}; found {shift}"
        )


def as_labels(labels: Any, n: int, classes: int | None = None, where: str = "") -> Tensor:
    """`labels` as int64 (n,): a tensor, an array or a list of n whole numbers of any width.

    Raises `UserError` for other types and shapes, a label below 0, or one of `classes` or more.
    """
    copy = labels.copy() if isinstance(labels, np.ndarray) else labels
    found = _tensor(copy, f"{where}labels must be whole numbers, one for each image")
    shape, whole = tuple(found.shape), _is_whole(found)
    if not whole or shape != (n,):
        remedy = ": use labels.long(), if they are class numbers" if shape == (n,) else ""
        if len(shape) == 2 and shape[0] == n:
            one_hot = ": use labels.argmax(1), if they are one-hot"
            remedy = ": use labels[:, 0]" if shape[1] == 1 else one_hot
        raise UserError(
            f"{where}labels must be whole numbers of shape ({n},), one for each image; found "
            f"{found.dtype} of shape {shape}, first {str(found.flatten()[:1].tolist())[:40]}"
            + remedy
        )
    known = found.long()
    bad = known[(known < 0) | (known >= (2**31 if classes is None else classes))]
    if len(bad):
        to = "up" if classes is None else f"to {classes - 1}"
        raise UserError(
            f"{where}labels must be whole numbers from 0 {to}; found {bad[0]} among {found.dtype} "
            f"of shape {shape}: number the classes from 0"
        )
    return known


_Array = Tensor | NDArray[Any]
Images = Dataset | tuple[_Array, _Array | Sequence[int]]
"""A `Dataset`, or (images, labels): (n, c, h, w) uint8 or float in [0, 1], and whole (n,)."""


def images_of(given: _Array | Images, most: int | None = None) -> Tensor:
    """`given`, or the images, `most` of them, of a `Dataset` or a pair; checked by `in_unit`."""
    if isinstance(given, Dataset):
        given = given.images[:most]
    elif isinstance(given, tuple | list) and len(given) == 2:
        given = given[0][:most]
    return in_unit(given)


def in_unit(images: Any, where: str = "") -> Tensor:
    """A tensor or array that is uint8, or float in [0, 1]; what rounding put beyond, 1e-6, is cut.

    Raises `UserError`, which names a remedy for the type and range found, for all others.
    """
    x = _tensor(images, f"{where}images are float in [0, 1] or uint8")
    if x.dtype == torch.uint8 or not x.numel():
        return x
    if not x.is_floating_point():
        raise UserError(
            f"{where}images are float in [0, 1] or uint8; found {x.dtype}: {_remedy(x)}"
        )
    low, high = x.aminmax()
    if (low >= 0) & (high <= 1):  # one answer from the GPU to wait for, not two
        return x
    if (low >= -_SLACK) & (high <= 1 + _SLACK):
        return x.clamp(0, 1)
    if not low.isfinite() & high.isfinite():
        remedy = "some are no numbers"
    elif low < 0:
        remedy = "put the normalisation into the model"
    elif high < 16:
        remedy = "scale them"
    else:
        remedy = f"divide by {255 if high <= 255 else 65535}, if these are pixels"
    found = f"[{low:.8g}, {high:.8g}]"
    raise UserError(f"{where}images must lie in [0, 1]; found {found}: {remedy}")


def _tensor(values: Any, rule: str) -> Tensor:
    """A tensor, an array, or a list of numbers as a tensor; `rule` is what an error begins with."""
    if isinstance(values, Tensor):
        return values
    try:
        array = np.asarray(values)
        return torch.from_numpy(np.require(array, array.dtype.newbyteorder("="), ["C", "W"]))
    except (TypeError, ValueError):  # objects, texts, 128 bits, a ragged list, tensors of a GPU
        found = getattr(values, "dtype", f"a {type(values).__name__}")
        raise UserError(
            f"{rule}; found {found} that is no plain array: give plain numbers"
        ) from None


def _is_whole(x: Tensor) -> bool:
    return str(x.dtype).startswith(("torch.int", "torch.uint"))


def _remedy(images: Tensor) -> str:
    """How to get to uint8, or to floats in [0, 1]."""
    if images.is_floating_point():
        return "use images.mul(255).round().to(torch.uint8), if they lie in [0, 1]"
    if images.dtype == torch.bool:
        return "use images.float()"
    if images.dtype == torch.uint16:
        return "use images.float() / 65535, if they fill their 16 bits"
    if _is_whole(images) and not (images.long() >> 8).any():
        return "use images.to(torch.uint8), if these are pixels of 0..255"
    return "scale them to floats in [0, 1]"


def to_unit(images: Tensor) -> Tensor:
    """Float32 images in [0, 1] from uint8 ones; float ones as float32."""
    unit = images.float()
    if images.is_floating_point():
        return unit
    # by a tensor: CUDA multiplies by the reciprocal of a plain 255, which rounds otherwise
    return unit.div_(unit.new_full((), 255))
