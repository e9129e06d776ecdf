"""A substitute's adversarial images, made once and kept beside it for every network attacked."""

import hashlib
import json
import warnings
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from defquant.attacks import FirstOrder, Replay
from defquant.attacks.contract import Target, attacked, called
from defquant.checkpoint import find, load_on
from defquant.data import Dataset
from defquant.errors import DefquantWarning, UserError
from defquant.files import write_whole

__all__ = ["replay"]

FORMAT = 1
FOLDER = "transfer"


def replay(
    attack: FirstOrder,
    run: Path,
    data: Dataset,
    *,
    seed: int = 0,
    device: torch.device,
    batch_size: int = 256,
    source: str = "",
) -> Replay:
    """The black box of `attack` on the network of `run`, over all images of `data`.

    Scores are those of `Transfer(attack, substitute, source)`, but each network attacked costs a
    forward pass alone: the images lie in `run/transfer/HASH.safetensors` and are read from there,
    memory-mapped. A file that is missing, cut or not what its name says is made again. HASH is of
    the attack, the seed, the fingerprint of `data` and the substitute's checkpoint. Images are
    kept as float32, 4 bytes a value: 10,000 of CIFAR-10 take 123 MB for each attack. FGSM leaves
    the 8-bit grid, too, by the rounding of x + eps. The folder can be deleted at any time.

    Args:
        attack: made on the substitute; its last iterates are kept.
        run: the substitute's folder, or its checkpoint file.
        data: all images that the networks meet, in that order.
        seed: of the draws; the same as in `sweep`.
        device: where images are made; a file made on another one is taken as it is.
        batch_size: rows at a time while they are made.
        source: names the substitute in the results; `run`, when not given.

    Raises `UserError` where there is no finished run. Warns where the folder cannot be written.
    """
    checkpoint = find(run)
    with checkpoint.open("rb") as file:
        substitute = hashlib.file_digest(file, "sha256").hexdigest()
    header = json.dumps({  # all that decides the images; the attack whole, as its repr rounds
        "format": FORMAT, "attack": repr(attack), "eps": attack.eps, "walk": asdict(attack.walk),
        "seed": seed, "data": data.fingerprint, "substitute": substitute,
    })  # fmt: skip
    name = hashlib.sha256(header.encode()).hexdigest()[:16]
    path = checkpoint.parent / FOLDER / f"{name}.safetensors"
    images = _read(path, header, data.images.shape)
    if images is None:
        images, there = torch.empty(data.images.shape), data.to(device)
        target = Target(load_on(run, device)[0], there.images, there.labels, seed, batch_size)
        for ids, made in attacked(called(attack, target, last=True), target):
            images[ids.cpu()] = made.cpu()
        try:
            write_whole(path, partial(_write, images, header))
        except UserError:
            warnings.warn(
                "a substitute's folder cannot be written: its images are made again each time",
                DefquantWarning, stacklevel=2,
            )  # fmt: skip
        kept = _read(path, header, images.shape)  # so that memory holds no second copy
        images = images if kept is None else kept
    return Replay(attack, images, source or str(run))


def _read(path: Path, header: str, shape: torch.Size) -> Tensor | None:
    """The images of a whole file with this header, memory-mapped; None for any other file."""
    try:
        with safe_open(path, framework="pt") as file:
            if (file.metadata() or {}).get("defquant") != header:
                return None
            images: Tensor = file.get_tensor("images")
    except (SafetensorError, OSError):
        return None
    return images if images.shape == shape and images.dtype == torch.float32 else None


def _write(images: Tensor, header: str, path: Path) -> None:
    try:
        save_file({"images": images}, path, metadata={"defquant": header})
    except SafetensorError as error:  # a full disk, for one
        raise OSError(str(error)) from None
