"""Image data sets as uint8 tensors: read, split, fetch, and cut into augmented batches."""

from defquant.data.dataset import Dataset, augment, batches, num_batches, to_unit
from defquant.data.fetch import fetch
from defquant.data.formats import DATASETS, load

__all__ = ["DATASETS", "Dataset", "augment", "batches", "fetch", "load", "num_batches", "to_unit"]
