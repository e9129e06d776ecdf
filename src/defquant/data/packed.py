"""A data set decoded beforehand into one file: read at the speed of the disk, checked by hash."""

import json
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
from safetensors import SafetensorError, safe_open

from defquant.data.dataset import Dataset
from defquant.errors import UserError, shown, visible
from defquant.files import write_bytes
from defquant.typed import from_mapping, parse_json

__all__ = ["SUFFIX", "pack", "read_packed"]

SUFFIX = ".safetensors"
_KEY, _FORMAT = "defquant-data", 1


@dataclass(frozen=True)
class _Facts:
    """What the header holds in one JSON text, so that equal data make equal files."""

    format: int
    data: str  # as `load` takes it
    classes: tuple[str, ...]
    flip: bool
    shift: int
    names: dict[str, str]  # of each split, as shown
    fingerprints: dict[str, str]


def pack(data: str, train: Dataset, test: Dataset, path: Path) -> Path:
    """Write both splits of the data set `data` to `path`: uint8 images, uncompressed, and labels.

    Raises `UserError` where the name does not end in `.safetensors`, or cannot be written.
    """
    if path.suffix != SUFFIX:
        raise UserError(f"a packed file is called NAME{SUFFIX}; found {path}")
    splits = {"train": train, "test": test}
    header = {
        "format": _FORMAT, "data": data, "classes": train.classes, "flip": train.flip,
        "shift": train.shift, "names": {split: d.name for split, d in splits.items()},
        "fingerprints": {split: d.fingerprint for split, d in splits.items()},
    }  # fmt: skip
    tensors = {f"{split}.images": d.images for split, d in splits.items()}
    tensors |= {f"{split}.labels": d.labels for split, d in splits.items()}
    metadata = {_KEY: json.dumps(header)}
    return write_bytes(path, safetensors.torch.save(tensors, metadata=metadata))


def read_packed(data: str, path: Path, split: str) -> Dataset:
    """One split of what `pack` wrote, its images mapped from the disk.

    Raises `UserError` where it is broken, holds another data set, or has another fingerprint than
    its header says.
    """
    try:
        with safe_open(path, framework="pt") as file:
            header = (file.metadata() or {}).get(_KEY)
            if header is None:
                raise UserError(f"{path} is no packed data: make one with `defquant data pack`")
            where = f"the header of {path}: "
            facts = from_mapping(_Facts, parse_json(header, f"the header of {path}"), where)
            images, labels = (file.get_tensor(f"{split}.{part}") for part in ("images", "labels"))
    except (SafetensorError, OSError, ValueError) as error:
        reason = shown(str(error), 200)
        raise UserError(f"{path} is not a whole packed file ({reason}): pack it again") from None
    if facts.format != _FORMAT or facts.data != data:
        raise UserError(
            f"{path} must hold {data} in format {_FORMAT}; found {shown(facts.data)} in format "
            f"{facts.format}: name another file or other data"
        )
    name = shown(visible(facts.names.get(split, "")), 100)
    found = Dataset(images, labels, facts.classes, name, facts.flip, facts.shift)
    if found.fingerprint != facts.fingerprints.get(split):
        raise UserError(f"{path} holds other images or labels than it says: pack it again")
    return found
