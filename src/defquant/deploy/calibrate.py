"""What a network needs before it is lowered: ranges of its branches, biases on their grid."""

from typing import Any

import torch
from torch import Tensor, fx, nn

from defquant.attacks.access import untouched
from defquant.deploy.lower import follow
from defquant.deploy.tracing import trace
from defquant.errors import UserError

__all__ = ["calibrate", "snap_biases_"]


def calibrate(model: nn.Module, images: Tensor, *, batch_size: int = 256) -> dict[str, float]:
    """max|output| over `images`, float in [0, 1], of each convolution that needs a range.

    Empty for a deployable network, which has learnt its ranges.
    """
    wanted = _Wanted()
    follow(model, wanted, 8)
    if not wanted:
        return {}
    watch = _Watch(fx.GraphModule(model, trace(model)), wanted)
    with untouched(model), torch.no_grad():
        for part in images.split(batch_size):
            watch.run(part)
    return dict(wanted)


@torch.no_grad()
def snap_biases_(model: nn.Module) -> None:
    """Move biases to whole numbers of the units in which the deployed network keeps them, in place.

    A unit is (scale of the codes) · (scale of the weight): a few thousandths of a step, so the move
    costs no accuracy, and the deployed network then rounds as `model` does. Networks whose weights
    are float, or that have no integer form, are left alone.
    """
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    if not convolutions or any(getattr(c, "weight_bits", None) is None for c in convolutions):
        return
    try:
        rounded = follow(model, _Wanted(), 8).missing
    except UserError:
        return
    layers = [layer for layer, _ in rounded]
    for layer, missing in rounded:
        if layers.count(layer) == 1 and layer.bias is not None:  # a shared one has several units
            layer.bias.add_(missing.to(layer.bias))


class _Wanted(dict[str, float]):
    """Collects the names that it is asked for."""

    def __missing__(self, name: str) -> float:
        self[name] = 0.0
        return 1.0

    def __contains__(self, name: object) -> bool:
        return True


class _Watch(fx.Interpreter):
    """Runs a graph and keeps the largest magnitude of some of its nodes."""

    def __init__(self, module: fx.GraphModule, peaks: dict[str, float]) -> None:
        super().__init__(module)
        self.peaks = peaks

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if dict.__contains__(self.peaks, n.name):
            self.peaks[n.name] = max(self.peaks[n.name], float(result.abs().max()))
        return result
