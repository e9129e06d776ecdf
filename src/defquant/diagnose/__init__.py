"""Why a quantised network is easy to fool, or only seems hard to fool: measured, layer by layer."""

from defquant.diagnose.amplification import (
    BlockDistance,
    Distance,
    LayerDistance,
    first_block_distances,
    layer_distances,
    normalized_distance,
)

__all__ = [
    "BlockDistance",
    "Distance",
    "LayerDistance",
    "first_block_distances",
    "layer_distances",
    "normalized_distance",
]
