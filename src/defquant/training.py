"""One training loop: plain, vanilla-quantised, Defensive Quantization and adversarial."""

import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from defquant.attacks import Attack
from defquant.attacks.access import only_type
from defquant.attacks.contract import made_by
from defquant.config import TrainConfig
from defquant.data import Dataset, num_batches, to_unit
from defquant.data.dataset import drawn
from defquant.distributed import pick_device, sum_over, watched, workers
from defquant.errors import DefquantWarning, UserError
from defquant.evaluate import accuracy
from defquant.integers import snap_biases_
from defquant.monitor import (
    History,
    monitor,
    monitor_eps,
    stop_if_diverged,
    warn_of_weak_steps,
)
from defquant.progress import TrainingProgress
from defquant.step import Replay, Training, take_step, training_attack

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


def train(
    model: nn.Module,
    data: Dataset,
    config: TrainConfig,
    *,
    attack: Attack | None = None,
    test: Dataset | None = None,
    history: History = (),
    momentum: Mapping[str, Tensor] | None = None,
    on_epoch: Callable[[dict[str, float]], object] | None = None,
    keep: Callable[[History, Mapping[str, Tensor]], None] | None = None,
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
        history: of the epochs already done, to go on from them bit for bit.
        momentum: of that history's last epoch.
        on_epoch: called after every epoch, in one process of several, with the epoch's record, a
            dictionary of plain numbers: `epoch` from 1, `lr`, `loss`, `accuracy`, `penalty`,
            `seconds`, `images_per_second`, and where they were measured `test_accuracy`,
            `monitor_fgsm` and `monitor_pgd`. Neither what it changes there nor what it draws from
            torch's random state changes the training; what it raises ends it.
        keep: called before that with the history and the momentum by parameter name, to save them.
        label: of the progress bar.
        show: progress on stderr.

    Returns:
        One record per epoch.

    Raises:
        UserError: the loss became infinite or NaN; labels that the model has no logit for; an
            attack that breaks its own rules; weights of another type than float32.
    """
    if (kind := only_type(model)) not in (None, torch.float32):
        raise UserError(
            f"training needs float32 weights; found {kind}: train model.float(), with --amp in "
            "bfloat16, and make it half after that"
        )
    device = pick_device(config.device)
    with _layout_kept(model), _determined(config, device), workers(device) as me:
        eps = monitor_eps(config, training_attack(config) if attack is None else attack)
        own = attack is None
        attack = training_attack(config) if attack is None else partial(made_by, attack)
        state = Training.start(model, data.to(device), config, attack, device, me)
        state.load_momentum(momentum or {})
        if history and device.type == "cuda" and not config.deterministic and me.leads:
            warnings.warn(_NOT_THE_SAME, DefquantWarning, stacklevel=2)
        state.replay = Replay.of(state, own)
        steps = num_batches(state.data, config.batch_size, me.world)
        total, done = config.epochs * steps, len(history) * steps
        with TrainingProgress(label, total, done, show=show and me.leads) as progress:
            for epoch in range(len(history), config.epochs):
                record = _epoch(state, epoch, steps, progress)
                if epoch + 1 == config.epochs:
                    snap_biases_(model, to_unit(state.data.images[:1]))
                history = (*history, record | _looked(state, eps, test, epoch))
                if keep is not None and me.leads:
                    keep(history, state.momentum())
                if on_epoch is not None and me.leads:
                    devices = [device] if device.type == "cuda" else []
                    with torch.random.fork_rng(devices):
                        on_epoch(dict(history[-1]))
                progress.epoch(config.epochs, history[-1], state.how)  # what is said is kept
                warn_of_weak_steps(history, config.epochs)
        if state.replay is not None:
            state.optimizer.zero_grad(set_to_none=True)  # they lie in the graph's memory
    model.eval()
    return history


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


def _epoch(state: Training, epoch: int, steps: int, progress: TrainingProgress) -> dict[str, float]:
    config, me, totals = state.config, state.me, state.totals.zero_()
    start = time.perf_counter()
    state.model.train()
    lr = config.lr
    draws = drawn(
        state.data, config.batch_size, config.seed, epoch, config.augment, me.rank, me.world
    )
    for index, mine in enumerate(watched(draws, me)):
        step = epoch * steps + index
        lr = learning_rate(config, step, steps)
        state.learn_at(lr)
        if state.replay is not None and mine.shape[1] == config.batch_size:
            state.replay(mine, step)
        else:
            take_step(state, mine, step, index)
        if progress.due or index % 50 == 49 or index + 1 == steps:
            stop_if_diverged(totals[0], epoch, index, lr)
        if progress.due:
            elapsed = time.perf_counter() - start
            progress.update(step + 1, _record(totals, epoch, lr, elapsed, index + 1))
    totals = sum_over(totals)
    totals[3] /= me.world
    return _record(totals, epoch, lr, time.perf_counter() - start, steps)


_NOT_THE_SAME = (
    "training goes on with a GPU and without --deterministic: its weights will not be those of a "
    "run never stopped"
)


@contextmanager
def _determined(config: TrainConfig, device: torch.device) -> Iterator[None]:
    """Deterministic algorithms alone, on a GPU where `config` asks for them."""
    if not (config.deterministic and device.type == "cuda"):
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    rules: Any = torch.utils.deterministic
    fill = rules.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = rules.fill_uninitialized_memory = False
    try:
        yield
    except RuntimeError as error:
        if "deterministic" not in str(error):
            raise
        what = str(error).split()[0]
        raise UserError(
            f"{what} has no deterministic form on a GPU: train without --deterministic"
        ) from None
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.backends.cudnn.benchmark = before[1]
        rules.fill_uninitialized_memory = fill


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


def _looked(
    state: Training, eps: float | None, test: Dataset | None, epoch: int
) -> dict[str, float]:
    """What an epoch ends with, in the first process: the monitor, and the test images."""
    config, model, found = state.config, state.model, dict[str, float]()
    if eps is not None and state.me.leads:
        rows = max(64, config.batch_size // state.me.world)  # what fits in training fits here
        found |= monitor(model, state.data, eps, batch_size=rows)
    last = epoch + 1 == config.epochs
    due = last or (config.test_every > 0 and (epoch + 1) % config.test_every == 0)
    if test is not None and state.me.leads and due:
        model.eval()
        found["test_accuracy"] = accuracy(model, test.to(state.device)).accuracy
    return found
