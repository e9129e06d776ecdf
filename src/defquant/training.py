"""One training loop: plain, vanilla-quantised, Defensive Quantization and adversarial."""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from defquant.attacks import FGSM, PGD, RFGSM, Attack, RandomEps, untouched
from defquant.attacks.contract import made_by
from defquant.attacks.first_order import FirstOrder
from defquant.attacks.lint import lint_answer
from defquant.config import TrainConfig
from defquant.data import Dataset, batches, num_batches, to_unit
from defquant.distributed import Workers, pick_device, sum_over, watched, workers
from defquant.evaluate import accuracy
from defquant.integers import snap_biases_
from defquant.lipschitz import ConvexSum, OrthogonalPenalty, project_simplex_
from defquant.monitor import (
    History,
    monitor,
    monitor_eps,
    stop_if_diverged,
    warn_of_weak_steps,
)
from defquant.progress import TrainingProgress

__all__ = ["History", "TrainConfig", "learning_rate", "train", "training_attack"]


def learning_rate(config: TrainConfig, step: int, steps_per_epoch: int) -> float:
    """Learning rate of optimiser step `step` (from 0); a pure function, so runs resume exactly.

    `step`: lr · gamma^(milestones passed). `one-cycle`: linear from 0 to lr over the first
    quarter of all steps, then linear to 0 (Smith & Topin 2017).
    """
    if config.schedule == "step":
        return config.lr * config.gamma ** sum(
            step // steps_per_epoch >= milestone for milestone in config.milestones
        )
    if config.schedule == "constant":
        return config.lr
    total = config.epochs * steps_per_epoch
    warm = max(1.0, 0.25 * total)
    return config.lr * min((step + 1) / warm, (total - step) / max(1.0, total - warm))


def training_attack(config: TrainConfig) -> Attack | None:
    """The attack that `config.attack` names, at a fixed or at the paper's random eps."""
    kinds: dict[str, type[FirstOrder]] = {"fgsm": FGSM, "rfgsm": RFGSM, "pgd": PGD}
    if config.attack == "none":
        return None
    if config.attack_eps is None:
        return RandomEps(kinds[config.attack](0.0), config.attack_sigma)
    return kinds[config.attack](config.attack_eps).last


def train(
    model: nn.Module,
    data: Dataset,
    config: TrainConfig,
    *,
    attack: Attack | None = None,
    test: Dataset | None = None,
    history: History = (),
    momentum: Mapping[str, Tensor] | None = None,
    on_epoch: Callable[[History, Mapping[str, Tensor]], None] | None = None,
    label: str = "train",
    show: bool = False,
) -> History:
    """Train `model` in place by SGD on cross-entropy plus the orthogonality penalty (Eq. 8).

    Adversarial training is watched (`monitor`): each record gains `monitor_fgsm` and `monitor_pgd`,
    which the weights do not depend on, and a `DefquantWarning` says where one-step attacks stop
    to tell the truth (`collapsed`). At the end of training with quantised weights the biases move
    onto the grid of the deployed network (`snap_biases_`).

    Args:
        model: maps images in [0, 1] to logits; its weights lie in memory as before when it ends.
        data: training images.
        config: everything else; see `TrainConfig`.
        attack: train on its examples (with the model in eval mode while they are made); when
            None, what `config.attack` names. Any function of that signature; what it returns is
            checked (shape, range, its own eps).
        test: images for `test_accuracy`.
        history, momentum: of the epochs already done, to go on from them bit for bit.
        on_epoch: called after every epoch with the history and the momentum by parameter name.
        label: of the progress bar.
        show: progress on stderr.

    Returns:
        One record per epoch.

    Raises:
        UserError: the loss became infinite or NaN; labels that the model has no logit for; an
            attack that breaks its own rules.
    """
    device = pick_device(config.device)
    with _layout_kept(model), workers(device) as me:
        eps = monitor_eps(config, training_attack(config) if attack is None else attack)
        attack = training_attack(config) if attack is None else partial(made_by, attack)
        state = _Training.start(model, data.to(device), config, attack, device, me)
        state.load_momentum(momentum or {})
        steps = num_batches(state.data, config.batch_size, me.world)
        total, done = config.epochs * steps, len(history) * steps
        with TrainingProgress(label, total, done, show=show and me.leads) as progress:
            for epoch in range(len(history), config.epochs):
                record = _epoch(state, epoch, steps, progress)
                if epoch + 1 == config.epochs:
                    snap_biases_(model, to_unit(state.data.images[:1]))
                if eps is not None and me.leads:
                    rows = max(64, config.batch_size // me.world)  # what fits in training fits here
                    record |= monitor(model, state.data, eps, batch_size=rows)
                if test is not None and me.leads and _tested(config, epoch):
                    model.eval()
                    record["test_accuracy"] = accuracy(model, test.to(device)).accuracy
                history = (*history, record)
                if on_epoch is not None and me.leads:
                    on_epoch(history, state.momentum())
                progress.epoch(config.epochs, record)  # after it: what is said to be done is kept
                warn_of_weak_steps(history, config.epochs)
    model.eval()
    return history


@dataclass
class _Training:
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
def _layout_kept(model: nn.Module) -> Iterator[None]:
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


def _epoch(
    state: _Training, epoch: int, steps: int, progress: TrainingProgress
) -> dict[str, float]:
    config, me = state.config, state.me
    totals = torch.zeros(4, dtype=torch.float64, device=state.device)  # loss, right, seen, penalty
    start = time.perf_counter()
    state.model.train()
    lr = config.lr
    loader = batches(
        state.data, config.batch_size, seed=config.seed, epoch=epoch, augment=config.augment,
        rank=me.rank, world=me.world,
    )  # fmt: skip
    for index, (x, y) in enumerate(watched(loader, me)):
        step = epoch * steps + index
        lr = learning_rate(config, step, steps)
        whole = min(config.batch_size, len(state.data) - index * config.batch_size)
        totals += _step(state, x, y, lr, step, share=len(x) * me.world / whole)
        if progress.due or index % 50 == 49 or index + 1 == steps:
            stop_if_diverged(totals[0], epoch, index, lr)
        if progress.due:
            elapsed = time.perf_counter() - start
            progress.update(step + 1, _record(totals, epoch, lr, elapsed, index + 1))
    totals = sum_over(totals)
    totals[3] /= me.world
    return _record(totals, epoch, lr, time.perf_counter() - start, steps)


def _step(state: _Training, x: Tensor, y: Tensor, lr: float, step: int, share: float) -> Tensor:
    """One optimiser step; returns (loss sum, right answers, images, penalty) of this process.

    `share`: this process's images over an even share; it weighs the mean that DDP takes.
    """
    config, model, penalty = state.config, state.model, state.penalty
    if state.layout is torch.channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    x = _attacked(state, x, y, step)
    with torch.autocast(state.device.type, torch.bfloat16, enabled=config.amp):
        logits = state.network(x)
    lint_answer(logits, len(x), state.top)
    loss = nn.functional.cross_entropy(logits.float(), y)
    value = penalty.penalty() if penalty and config.penalty == "loss" else loss.new_zeros(())
    state.optimizer.zero_grad(set_to_none=True)
    objective = loss if share == 1 else loss * share
    (objective + value if value.requires_grad else objective).backward()
    if penalty and config.penalty == "fused":
        value = penalty.add_grad_()
    for group in state.optimizer.param_groups:
        group["lr"] = lr
    if config.clip:
        nn.utils.clip_grad_norm_(model.parameters(), config.clip)
    state.optimizer.step()
    if penalty and config.penalty == "parseval":
        penalty.retract_()
        with torch.no_grad():
            value = penalty.penalty()
    if state.coefficients:
        project_simplex_(model)
    right = (logits.argmax(1) == y).sum()
    return (
        torch.stack([loss * len(x), right, torch.full_like(right, len(x)), value]).detach().double()
    )


def _attacked(state: _Training, x: Tensor, y: Tensor, step: int) -> Tensor:
    """`x` with the first `mix` share of it made adversarial; outside autocast, in float32."""
    if state.attack is None or state.config.mix == 0:
        return x
    seed = (state.config.seed * 1_000_003 + step) * state.me.world + state.me.rank
    generator = torch.Generator().manual_seed(seed)
    share = math.ceil(state.config.mix * len(x))
    adversarial = state.attack(state.model, x[:share], y[:share], generator=generator).detach()
    return adversarial if share == len(x) else torch.cat([adversarial, x[share:]])


def _record(totals: Tensor, epoch: int, lr: float, seconds: float, steps: int) -> dict[str, float]:
    loss, right, seen, penalty = totals.tolist()
    return {
        "epoch": epoch + 1,
        "lr": lr,
        "loss": loss / seen,
        "accuracy": right / seen,
        "penalty": penalty / steps,
        "seconds": seconds,
        "images_per_second": seen / seconds,
    }


def _tested(config: TrainConfig, epoch: int) -> bool:
    last = epoch + 1 == config.epochs
    return last or (config.test_every > 0 and (epoch + 1) % config.test_every == 0)
