"""Image data sets as uint8 tensors: read, split, fetch, and cut into augmented batches."""

from defquant.data.dataset import (
    Dataset,
    Images,
    as_labels,
    augment,
    batches,
    images_of,
    in_unit,
    num_batches,
    to_unit,
)
from defquant.data.fetch import fetch
from defquant.data.readers import DATASETS, load, pack

__all__ = [
    "DATASETS", "Dataset", "Images", "as_labels", "augment", "batches", "fetch", "images_of",
    "in_unit", "load", "num_batches", "pack", "to_unit",
]  # fmt: skip
