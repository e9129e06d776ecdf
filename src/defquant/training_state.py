"""What one training holds on to: the network, its optimiser, penalty and attack, its process."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from defquant.attacks import Attack, untouched
from defquant.config import TrainConfig
from defquant.data import Dataset, to_unit
from defquant.distributed import Workers
from defquant.lipschitz import ConvexSum, OrthogonalPenalty

__all__ = ["TrainingState", "layout_kept"]


@dataclass
class TrainingState:
    """What one training holds on to; `start` makes it.

    Attributes:
        model: on the device, in the memory format `layout`.
        network: the model, wrapped where several processes train it.
        data: the training images, on the device.
        config: the settings.
        attack: makes adversarial examples in training; None for none.
        penalty: None where beta is 0.
        optimizer: SGD; weight decay spares the coefficients of the convex sums.
        device: where all of it lies.
        me: this process among those that train together.
        names: of the parameters.
        coefficients: whether there are convex sums to project.
        layout: channels last where `config` says so and the model takes it.
    """

    model: nn.Module
    network: nn.Module
    data: Dataset
    config: TrainConfig
    attack: Attack | None
    penalty: OrthogonalPenalty | None
    optimizer: torch.optim.SGD
    device: torch.device
    me: Workers
    names: dict[nn.Parameter, str]
    coefficients: bool
    layout: torch.memory_format
    top: int  # the highest label

    @classmethod
    def start(
        cls,
        model: nn.Module,
        data: Dataset,
        config: TrainConfig,
        attack: Attack | None,
        device: torch.device,
        me: Workers,
    ) -> Self:
        """Move `model` to `device` in place and make its optimiser and penalty."""
        layout = torch.channels_last if config.channels_last else torch.contiguous_format
        model.to(device=device, memory_format=layout)  # type: ignore[call-overload]
        if config.channels_last and not _runs_channels_last(model, data.images[:1].to(device)):
            layout = torch.contiguous_format
            model.to(memory_format=layout)  # type: ignore[call-overload]
        network: nn.Module = model
        if me.world > 1:
            ids = [device.index] if device.type == "cuda" else None
            network = DistributedDataParallel(model, device_ids=ids)
        penalty = OrthogonalPenalty(model, config.beta) if config.beta else None
        names = {parameter: name for name, parameter in model.named_parameters()}
        coefficients = [m.alpha for m in model.modules() if isinstance(m, ConvexSum)]
        optimizer = _optimizer(names, coefficients, config)
        return cls(
            model, network, data, config, attack, penalty, optimizer, device, me, names,
            bool(coefficients), layout, int(data.labels.max()) if len(data) else -1,
        )  # fmt: skip

    def momentum(self) -> dict[str, Tensor]:
        """The optimiser's momentum by parameter name; empty before the first step."""
        buffers = ((p, self.optimizer.state[p].get("momentum_buffer")) for p in self.names)
        return {self.names[p]: buffer for p, buffer in buffers if buffer is not None}

    def load_momentum(self, saved: Mapping[str, Tensor]) -> None:
        """Go on from what `momentum` returned."""
        for parameter, name in self.names.items():
            if name in saved:
                buffer = torch.empty_like(parameter).copy_(saved[name])
                self.optimizer.state[parameter]["momentum_buffer"] = buffer.detach()


@contextmanager
def layout_kept(model: nn.Module) -> Iterator[None]:
    """At the end, also of an exception, weights and buffers lie in memory as they did before."""
    before = {name: tensor.stride() for name, tensor in _tensors(model)}
    try:
        yield
    finally:
        for name, tensor in _tensors(model):
            stride = before.get(name, ())
            if tensor.stride() != stride and tensor.ndim == len(stride) and 0 not in stride:
                moved = torch.empty_strided(
                    tensor.shape, stride, dtype=tensor.dtype, device=tensor.device
                )
                tensor.data = moved.copy_(tensor.data)


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The tensors that a memory format is of."""
    named = chain(model.named_parameters(), model.named_buffers())
    return ((name, tensor) for name, tensor in named if tensor.ndim in (4, 5))


def _runs_channels_last(model: nn.Module, images: Tensor) -> bool:
    """False for a model that reshapes by `view`, which knows the usual order of memory alone."""
    with untouched(model), torch.no_grad():
        try:
            model(to_unit(images).contiguous(memory_format=torch.channels_last))
        except RuntimeError as error:
            return "view size is not compatible" not in str(error)
    return True


def _optimizer(
    parameters: Iterable[nn.Parameter], coefficients: Sequence[nn.Parameter], config: TrainConfig
) -> torch.optim.SGD:
    """SGD whose weight decay spares the coefficients of the convex sums."""
    convex = set(coefficients)
    weights = [parameter for parameter in parameters if parameter not in convex]
    groups = [{"params": weights}]
    if coefficients:
        groups.append({"params": list(coefficients), "weight_decay": 0.0})  # type: ignore[dict-item]
    return torch.optim.SGD(
        groups, lr=config.lr, momentum=config.momentum, nesterov=config.nesterov,
        weight_decay=config.weight_decay, fused=True,
    )  # fmt: skip
