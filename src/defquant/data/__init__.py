"""Image data sets as uint8 tensors: read, split, fetch, and cut into augmented batches."""

from defquant.data.dataset import (
    Dataset,
    as_labels,
    augment,
    batches,
    in_unit,
    num_batches,
    to_unit,
)
from defquant.data.fetch import fetch
from defquant.data.packed import pack
from defquant.data.readers import DATASETS, load

__all__ = [
    "DATASETS", "Dataset", "as_labels", "augment", "batches", "fetch", "in_unit", "load",
    "num_batches", "pack", "to_unit",
]  # fmt: skip
