"""One training loop: plain, vanilla-quantised, Defensive Quantization and adversarial; and what
watches it: one attack step against ten on a fixed batch, and a loss that diverges.
"""

import math
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

from defquant.attacks import FGSM, PGD, Attack, untouched
from defquant.attacks.access import only_type
from defquant.attacks.contract import made_by
from defquant.config import TrainConfig, check_eps
from defquant.data import Dataset, num_batches, to_unit
from defquant.data.dataset import drawn
from defquant.distributed import pick_device, sum_over, watched, workers
from defquant.errors import DefquantWarning, UserError
from defquant.evaluate import accuracy, correct, robust
from defquant.integers import snap_biases_
from defquant.progress import TrainingProgress
from defquant.records import Score
from defquant.step import Replay, Training, take_step, training_attack

__all__ = [
    "History", "TrainConfig", "collapsed", "learning_rate", "monitor", "monitor_eps", "train",
    "training_attack", "warn_of_weak_steps",
]  # fmt: skip

History = tuple[Mapping[str, float], ...]
"""One record per epoch: epoch, lr, loss, accuracy, penalty, seconds, images_per_second, ...

`test_accuracy` and, of adversarial training, `monitor_fgsm` and `monitor_pgd` where measured.
"""

IMAGES = 256  # of the monitored batch
HALF, FALL, GAP = 0.5, 0.10, 0.20  # see `collapsed`


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


# --- watched --------------------------------------------------------------------------------


def monitor_eps(config: TrainConfig, attack: Attack | None) -> float | None:
    """The monitor's radius in [0, 1]; None where nothing is attacked in training, or `mix` is 0.

    The own eps of an `attack` that has one, else `attack_eps`, else (a random eps) `attack_sigma`.
    Raises `UserError` for an attack whose eps lies outside [0, 1].
    """
    if attack is None or config.mix == 0:
        return None
    fallback = config.attack_sigma if config.attack_eps is None else config.attack_eps
    return check_eps(float(getattr(attack, "eps", fallback)))


def monitor(
    model: nn.Module, data: Dataset, eps: float, *, batch_size: int = IMAGES
) -> dict[str, float]:
    """Accuracies in [0, 1] under FGSM and PGD-10 at `eps`: `monitor_fgsm` and `monitor_pgd`.

    Measured in eval mode on the first 256 images of `data` (all where it has fewer), as they are,
    without augmentation. They are images of the *training*: these numbers watch it and are no
    score. As in `robust_accuracy` an example counts that is right clean and at every iterate; both
    attacks begin with all that are right clean, so that the gap shows.

    The draws are the same in every call. `model` is left as it was found. `batch_size`: rows at a
    time.
    """
    batch = data.first(min(IMAGES, len(data)))
    attacks = {"monitor_fgsm": FGSM(eps), "monitor_pgd": PGD(eps, steps=10)}
    with untouched(model):
        clean = correct(model, batch, batch_size=batch_size)
        found = {
            name: robust(model, batch, attack, batch_size=batch_size, standing=clean)
            for name, attack in attacks.items()
        }
    return {name: Score.of(right).accuracy for name, right in found.items()}


def collapsed(history: History) -> int | None:
    """The epoch of the first catastrophic overfitting in `history`; None where there is none.

    One step of the attack still fails and ten succeed (Wong et al. 2020; Andriushchenko &
    Flammarion 2020): in this epoch `monitor_pgd` is below half of its best value of the epochs
    before and at least 10 points under that value, while `monitor_fgsm` is at least 20 points
    above `monitor_pgd` and not below that best value. On 256 images an accuracy's standard error
    is 3 points at most, so that chance alone does not make such a fall. Epochs without the two
    fields are passed over.
    """
    best = 0.0
    for record in history:
        if _monitored(record):
            fgsm, pgd = record["monitor_fgsm"], record["monitor_pgd"]
            fell = pgd < HALF * best and _at_least(best - pgd, FALL)
            if fell and _at_least(fgsm - pgd, GAP) and fgsm >= best:
                return int(record["epoch"])
            best = max(best, pgd)
    return None


def warn_of_weak_steps(history: History, epochs: int) -> None:
    """A `DefquantWarning` where the last epoch of `history` shows that one step is no measure.

    In the epoch of the first catastrophic overfitting (`collapsed`), and after all `epochs` where
    there was none but FGSM's accuracy is 20 points or more above PGD's.
    """
    message = _message(history, epochs)
    if message:
        warnings.warn(message, DefquantWarning, stacklevel=3)


def stop_if_diverged(loss: Tensor, epoch: int, index: int, lr: float) -> None:
    """Raise `UserError` where the sum of losses is infinite or NaN; epoch and index from 0."""
    total = float(loss)
    if not math.isfinite(total):
        raise UserError(
            f"training diverged: the loss is {total} in epoch {epoch + 1}, step "
            f"{index + 1}, at lr {lr:.3g}: lower --lr or --beta (earlier checkpoints stand)"
        )


def _message(history: History, epochs: int) -> str:
    if not history or not _monitored(last := history[-1]):
        return ""
    fgsm, pgd, epoch = last["monitor_fgsm"], last["monitor_pgd"], int(last["epoch"])
    fallen = collapsed(history)
    if fallen == epoch:
        best = max(record["monitor_pgd"] for record in history[:-1] if _monitored(record))
        return (
            f"PGD accuracy on the monitored batch fell from {best:.0%} to {pgd:.0%} in epoch "
            f"{epoch} while FGSM's is {fgsm:.0%}: catastrophic overfitting: only one-step attacks "
            "still fail, train with pgd, with rfgsm, or at a smaller eps"
        )
    if fallen is None and epoch == epochs and _at_least(fgsm - pgd, GAP):
        return (
            f"accuracy on the monitored batch is {fgsm:.0%} under FGSM and {pgd:.0%} under PGD at "
            "the end of training: FGSM overstates how robust the network is, score it by PGD"
        )
    return ""


def _monitored(record: Mapping[str, float]) -> bool:
    return "monitor_fgsm" in record and "monitor_pgd" in record


def _at_least(difference: float, points: float) -> bool:
    return difference >= points - 1e-9  # 0.3 - 0.1 < 0.2 in floats
