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
from defquant.diagnose.masking import Sign, Verdict, judged, masking_verdict
from defquant.diagnose.precision import (
    Cosine,
    TransferMatrix,
    at_bits,
    evasive,
    gradient_cosine,
    gradient_cosines,
    transfer_matrix,
)
from defquant.diagnose.signs import Effort

__all__ = [
    "Audit",
    "BlockDistance",
    "Cosine",
    "Crossing",
    "Distance",
    "Effort",
    "LayerAudit",
    "LayerDistance",
    "Radius",
    "Sign",
    "TransferMatrix",
    "Verdict",
    "at_bits",
    "audit",
    "crossing",
    "evasive",
    "first_block_distances",
    "gradient_cosine",
    "gradient_cosines",
    "jacobian_norms",
    "judged",
    "layer_distances",
    "masking_verdict",
    "normalized_distance",
    "smallest_broken",
    "surrogate",
    "transfer_matrix",
]
