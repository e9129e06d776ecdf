"""Watches a training: one attack step against ten on a fixed batch, and a loss that diverges."""

import math
import warnings
from collections.abc import Mapping

from torch import Tensor, nn

from defquant.attacks import FGSM, PGD, Attack, untouched
from defquant.config import TrainConfig, check_eps
from defquant.data import Dataset
from defquant.errors import DefquantWarning, UserError
from defquant.evaluate import correct, robust
from defquant.records import Score

__all__ = [
    "History", "collapsed", "monitor", "monitor_eps", "stop_if_diverged", "warn_of_weak_steps",
]  # fmt: skip

History = tuple[Mapping[str, float], ...]
"""One record per epoch: epoch, lr, loss, accuracy, penalty, seconds, images_per_second, ...

`test_accuracy` and, of adversarial training, `monitor_fgsm` and `monitor_pgd` where measured.
"""

IMAGES = 256  # of the monitored batch
HALF, FALL, GAP = 0.5, 0.10, 0.20  # see `collapsed`


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
    return {name: Score(int(right.sum()), len(right)).accuracy for name, right in found.items()}


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
