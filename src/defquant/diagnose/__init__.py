"""Why a quantised network is easy to fool, or only seems hard to fool: measured, layer by layer."""

from defquant.diagnose.amplification import (
    BlockDistance,
    Distance,
    LayerDistance,
    first_block_distances,
    layer_distances,
    normalized_distance,
)
from defquant.diagnose.audit import Audit, LayerAudit, Radius, audit, jacobian_norms, surrogate
from defquant.diagnose.crossing import Crossing, crossing, smallest_broken
from defquant.diagnose.precision import (
    Cosine,
    TransferMatrix,
    at_bits,
    evasive,
    gradient_cosine,
    gradient_cosines,
    transfer_matrix,
)

__all__ = [
    "Audit",
    "BlockDistance",
    "Cosine",
    "Crossing",
    "Distance",
    "LayerAudit",
    "LayerDistance",
    "Radius",
    "TransferMatrix",
    "at_bits",
    "audit",
    "crossing",
    "evasive",
    "first_block_distances",
    "gradient_cosine",
    "gradient_cosines",
    "jacobian_norms",
    "layer_distances",
    "normalized_distance",
    "smallest_broken",
    "surrogate",
    "transfer_matrix",
]
