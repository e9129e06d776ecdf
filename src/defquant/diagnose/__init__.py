"""Why a quantised network is easy to fool, or only seems hard to fool: measured, layer by layer."""

from defquant.diagnose.layers import (
    Audit,
    BlockDistance,
    Distance,
    LayerAudit,
    LayerDistance,
    Radius,
    audit,
    first_block_distances,
    jacobian_norms,
    layer_distances,
    normalized_distance,
    surrogate,
)
from defquant.diagnose.masking import Effort, Sign, Verdict, judged, masking_verdict
from defquant.diagnose.precision import (
    Cosine,
    Crossing,
    TransferMatrix,
    at_bits,
    crossing,
    evasive,
    gradient_cosine,
    gradient_cosines,
    smallest_broken,
    transfer_matrix,
)

__all__ = [
    "Audit", "BlockDistance", "Cosine", "Crossing", "Distance", "Effort", "LayerAudit",
    "LayerDistance", "Radius", "Sign", "TransferMatrix", "Verdict", "at_bits", "audit", "crossing",
    "evasive", "first_block_distances", "gradient_cosine", "gradient_cosines", "jacobian_norms",
    "judged", "layer_distances", "masking_verdict", "normalized_distance", "smallest_broken",
    "surrogate", "transfer_matrix",
]  # fmt: skip
