"""One training loop: plain, vanilla-quantised, Defensive Quantization and adversarial."""

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from defquant.attacks import FGSM, PGD, RFGSM, Attack, RandomEps
from defquant.attacks.gradient import FirstOrder
from defquant.config import TrainConfig
from defquant.data import Dataset, batches, num_batches
from defquant.distributed import Workers, pick_device, sum_over, workers
from defquant.errors import UserError
from defquant.evaluate import accuracy
from defquant.lipschitz import ConvexSum, OrthogonalPenalty, project_simplex_
from defquant.progress import TrainingProgress

__all__ = ["History", "TrainConfig", "learning_rate", "train", "training_attack"]

History = tuple[Mapping[str, float], ...]
"""One record per epoch: epoch, lr, loss, accuracy, penalty, seconds, images_per_second, ..."""


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
        return RandomEps(kinds[config.attack](0.0))
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

    Args:
        model: maps images in [0, 1] to logits.
        data: training images.
        config: everything else; see `TrainConfig`.
        attack: train on its examples (with the model in eval mode while they are made); when
            None, what `config.attack` names.
        test: images for `test_accuracy`.
        history, momentum: of the epochs already done, to go on from them bit for bit.
        on_epoch: called after every epoch with the history and the momentum by parameter name.
        label: of the progress bar.
        show: progress on stderr.

    Returns:
        One record per epoch.

    Raises:
        UserError: the loss became infinite or NaN.
    """
    device = pick_device(config.device)
    with workers(device) as me:
        run = _Run.start(model, data.to(device), config, attack, device, me)
        run.load_momentum(momentum or {})
        steps = num_batches(run.data, config.batch_size, me.world)
        total, done = config.epochs * steps, len(history) * steps
        with TrainingProgress(label, total, done, show=show and me.leads) as progress:
            for epoch in range(len(history), config.epochs):
                record = _epoch(run, epoch, steps, progress)
                if test is not None and me.leads and _tested(config, epoch):
                    model.eval()
                    record["test_accuracy"] = accuracy(model, test.to(device)).accuracy
                history = (*history, record)
                if on_epoch is not None and me.leads:
                    on_epoch(history, run.momentum())
                progress.epoch(config.epochs, record)  # after it: what is said to be done is kept
    model.eval()
    return history


@dataclass
class _Run:
    """What one training holds on to."""

    model: nn.Module
    network: nn.Module  # the model, wrapped where several processes train it
    data: Dataset
    config: TrainConfig
    attack: Attack | None
    penalty: OrthogonalPenalty | None
    optimizer: torch.optim.SGD
    device: torch.device
    me: Workers
    names: dict[nn.Parameter, str]
    coefficients: bool  # whether there are convex sums to project

    @classmethod
    def start(
        cls,
        model: nn.Module,
        data: Dataset,
        config: TrainConfig,
        attack: Attack | None,
        device: torch.device,
        me: Workers,
    ) -> "_Run":
        layout = torch.channels_last if config.channels_last else torch.contiguous_format
        model.to(device=device, memory_format=layout)  # type: ignore[call-overload]
        network: nn.Module = model
        if me.world > 1:
            ids = [device.index] if device.type == "cuda" else None
            network = DistributedDataParallel(model, device_ids=ids)
        penalty = OrthogonalPenalty(model, config.beta) if config.beta else None
        attack = training_attack(config) if attack is None else attack
        names = {parameter: name for name, parameter in model.named_parameters()}
        coefficients = [m.alpha for m in model.modules() if isinstance(m, ConvexSum)]
        optimizer = _optimizer(names, coefficients, config)
        return cls(
            model,
            network,
            data,
            config,
            attack,
            penalty,
            optimizer,
            device,
            me,
            names,
            bool(coefficients),
        )

    def momentum(self) -> dict[str, Tensor]:
        buffers = ((p, self.optimizer.state[p].get("momentum_buffer")) for p in self.names)
        return {self.names[p]: buffer for p, buffer in buffers if buffer is not None}

    def load_momentum(self, saved: Mapping[str, Tensor]) -> None:
        for parameter, name in self.names.items():
            if name in saved:
                buffer = torch.empty_like(parameter).copy_(saved[name])
                self.optimizer.state[parameter]["momentum_buffer"] = buffer.detach()


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


def _epoch(run: _Run, epoch: int, steps: int, progress: TrainingProgress) -> dict[str, float]:
    config, me = run.config, run.me
    totals = torch.zeros(4, dtype=torch.float64, device=run.device)  # loss, right, seen, penalty
    start = time.perf_counter()
    run.model.train()
    lr = config.lr
    loader = batches(
        run.data, config.batch_size, seed=config.seed, epoch=epoch, augment=config.augment,
        rank=me.rank, world=me.world,
    )  # fmt: skip
    for index, (x, y) in enumerate(loader):
        step = epoch * steps + index
        lr = learning_rate(config, step, steps)
        whole = min(config.batch_size, len(run.data) - index * config.batch_size)
        totals += _step(run, x, y, lr, step, share=len(x) * me.world / whole)
        if progress.due or index % 50 == 49 or index + 1 == steps:
            _stop_if_diverged(totals, epoch, index, lr)
        if progress.due:
            elapsed = time.perf_counter() - start
            progress.update(step + 1, _record(totals, epoch, lr, elapsed, index + 1))
    totals = sum_over(totals)
    totals[3] /= me.world
    return _record(totals, epoch, lr, time.perf_counter() - start, steps)


def _step(run: _Run, x: Tensor, y: Tensor, lr: float, step: int, share: float) -> Tensor:
    """One optimiser step; returns (loss sum, right answers, images, penalty) of this process.

    `share`: this process's images over an even share; it weighs the mean that DDP takes.
    """
    config, model, penalty = run.config, run.model, run.penalty
    if config.channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    x = _attacked(run, x, y, step)
    with torch.autocast(run.device.type, torch.bfloat16, enabled=config.amp):
        logits = run.network(x)
    loss = nn.functional.cross_entropy(logits.float(), y)
    value = penalty.penalty() if penalty and config.penalty == "loss" else loss.new_zeros(())
    run.optimizer.zero_grad(set_to_none=True)
    objective = loss if share == 1 else loss * share
    (objective + value if value.requires_grad else objective).backward()
    if penalty and config.penalty == "fused":
        value = penalty.add_grad_()
    for group in run.optimizer.param_groups:
        group["lr"] = lr
    if config.clip:
        nn.utils.clip_grad_norm_(model.parameters(), config.clip)
    run.optimizer.step()
    if penalty and config.penalty == "parseval":
        penalty.retract_()
        with torch.no_grad():
            value = penalty.penalty()
    if run.coefficients:
        project_simplex_(model)
    right = (logits.argmax(1) == y).sum()
    return (
        torch.stack([loss * len(x), right, torch.full_like(right, len(x)), value]).detach().double()
    )


def _attacked(run: _Run, x: Tensor, y: Tensor, step: int) -> Tensor:
    """`x` with the first `mix` share of it made adversarial."""
    if run.attack is None or run.config.mix == 0:
        return x
    seed = (run.config.seed * 1_000_003 + step) * run.me.world + run.me.rank
    generator = torch.Generator().manual_seed(seed)
    share = math.ceil(run.config.mix * len(x))
    adversarial = run.attack(run.model, x[:share], y[:share], generator=generator).detach()
    return torch.cat([adversarial, x[share:]])


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


def _stop_if_diverged(totals: Tensor, epoch: int, index: int, lr: float) -> None:
    if not math.isfinite(float(totals[0])):
        raise UserError(
            f"training diverged: the loss is {float(totals[0])} in epoch {epoch + 1}, step "
            f"{index + 1}, at lr {lr:.3g}: lower --lr or --beta (earlier checkpoints stand)"
        )
