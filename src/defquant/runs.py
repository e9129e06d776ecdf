"""A run: one folder with its checkpoint, configuration, log and results."""

import importlib.util
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from defquant import checkpoint
from defquant.checkpoint import Checkpoint, Facts
from defquant.config import DataConfig, ModelConfig, TrainConfig
from defquant.data import Dataset, load
from defquant.distributed import leads, pick_device
from defquant.errors import DefquantWarning, UserError, shown
from defquant.files import owned_folder
from defquant.models import build
from defquant.training import History, train

__all__ = ["Split", "check_settings", "load_images", "test_images", "train_run"]

Split = Literal["train", "validation", "test"]


def train_run(
    model_config: ModelConfig,
    data_config: DataConfig,
    config: TrainConfig,
    out: Path,
    *,
    resume: bool = False,
    on_epoch: Callable[[dict[str, float]], object] | None = None,
    show: bool = True,
) -> Facts:
    """Train a network into the folder `out`, with a checkpoint after every epoch.

    With `resume`, a run that was killed goes on from its last checkpoint to the same weights, bit
    for bit on a CPU, with the same versions, threads and processes: a `DefquantWarning` names what
    differs, and `Facts.versions` keeps both. A finished one is left as it is. `on_epoch` is called
    as `train` calls it, with the checkpoint on the disk.

    Raises:
        UserError: `out` holds a run already (without `resume`), one of another configuration or
            of other images, is in use by another process, or was removed meanwhile; and whatever
            reading the data or training raises.
    """
    with owned_folder(out) if leads() else nullcontext(lambda: None) as check:
        if (out / checkpoint.NAME).exists() and not resume:
            raise UserError(
                f"{out} holds a run already: continue it with --resume, or choose another"
            )
        before = checkpoint.load(out) if (out / checkpoint.NAME).exists() else None
        data = load_images(data_config, "train")
        facts = Facts(
            model_config, data_config, config, data.num_classes, data.in_channels, data.classes,
            data.name, data.fingerprint, versions=checkpoint.versions(pick_device(config.device)),
        )  # fmt: skip
        ends: Any = {"num_classes": data.num_classes, "in_channels": data.in_channels}
        model, momentum = build(model_config, **ends, seed=config.seed), dict[str, Tensor]()
        if before is not None:
            facts, momentum = _joined(before.facts, facts, out), before.momentum
            if leads():
                checkpoint.write_companions(out, before.facts)
            checkpoint.restore(model, before.weights, str(out))
            if config.momentum and len(facts.history) < config.epochs:
                _check_momentum(model, momentum, out)
        torch.backends.cudnn.deterministic = True
        test = load_images(data_config, "test")
        with _tensorboard(out) as log:

            def keep(history: History, buffers: Mapping[str, Tensor]) -> None:
                check()
                now = replace(facts, history=history)
                checkpoint.save(out, Checkpoint(now, model.state_dict(), dict(buffers)))
                log(history[-1])

            history = train(
                model, data, config, test=test, history=facts.history, momentum=momentum,
                on_epoch=on_epoch, keep=keep, label=out.name, show=show,
            )  # fmt: skip
        return replace(facts, history=history)


def _check_momentum(model: nn.Module, momentum: Mapping[str, Tensor], out: Path) -> None:
    """Raise `UserError` unless there is one for each parameter: other weights would come of it."""
    wanted = {name: p.shape for name, p in model.named_parameters() if p.requires_grad}
    found = {name: buffer.shape for name, buffer in momentum.items()}
    if wanted != found:
        name = min(n for n in wanted | found if wanted.get(n) != found.get(n))
        raise UserError(
            f"cannot resume {out}: the momentum of {shown(name)} is missing or of another shape, "
            "so that other weights would come of it: train again, from the start"
        )


def load_images(config: DataConfig, split: Split) -> Dataset:
    """The images that `config` names: of the `train`, the `validation` or the `test` split.

    The validation images are the last of the official training images; `train_images` cuts what
    comes before them. Raises `UserError` where that leaves nothing.
    """
    if split == "test":
        return load(config.data, config.data_root, "test")
    images = load(config.data, config.data_root, "train")
    trained = len(images) - config.validation_images
    if trained < 1 or (split == "validation" and not config.validation_images):
        place = "" if config.data_root is None else f" in {config.data_root}"
        raise UserError(
            f"{images.name}{place} has {len(images):,} training images, of which validation_images "
            f"holds out the last {config.validation_images:,}: no {split} image is left; correct "
            "the data root, or hold out another number"
        )
    if split == "validation":
        name = f"{images.name}, validation"
        held = {"images": images.images[trained:], "labels": images.labels[trained:]}
        return replace(images, **held, name=name)  # type: ignore[arg-type]
    return images.first(trained).first(config.train_images)


def test_images(
    facts: Facts, data_root: str | None = None, limit: int | None = None, split: Split = "test"
) -> Dataset:
    """The test or validation images of a run, from `data_root` where they have moved."""
    root = facts.data.data_root if data_root is None else data_root
    return load_images(replace(facts.data, data_root=root), split).first(limit)


def check_settings(
    before: Facts, now: tuple[ModelConfig, DataConfig, TrainConfig], out: Path
) -> None:
    """Raise `UserError` where the run in `out` was started with other settings than `now`."""
    old = {**asdict(before.model), **asdict(before.data), **asdict(before.train)}
    new = {name: value for part in now for name, value in asdict(part).items()}
    changed = [
        name for name in new if new[name] != old[name] and name not in ("device", "data_root")
    ]
    if changed:
        name = changed[0]
        raise UserError(
            f"cannot resume {out}: it was started with {name}={old[name]!r}, not {new[name]!r}: "
            "choose another folder, or remove this one"
        )


def _joined(before: Facts, now: Facts, out: Path) -> Facts:
    """`now` with the epochs of `before` and the versions of both; warns where they differ.

    Raises `UserError` where settings or training images do.
    """
    check_settings(before, (now.model, now.data, now.train), out)
    if before.fingerprint != now.fingerprint:
        raise UserError(
            f"cannot resume {out}: its training images had fingerprint {before.fingerprint}, these "
            f"have {now.fingerprint}"
        )
    versions = dict(before.versions)
    if len(before.history) < now.train.epochs:
        last = {name: value.rpartition(" then ")[2] for name, value in versions.items()}
        changed = {n: v for n, v in now.versions.items() if last.get(n, v) != v}
        versions |= {name: value for name, value in now.versions.items() if name not in versions}
        versions |= {name: f"{versions[name]} then {value}" for name, value in changed.items()}
        if changed and leads():
            told = ", ".join(f"{name} {last[name]}, now {changed[name]}" for name in changed)
            warnings.warn(
                f"{out} goes on with {told}: its weights will not be those of a run never stopped",
                DefquantWarning, stacklevel=3,
            )  # fmt: skip
    return replace(now, history=before.history, versions=versions)


@contextmanager
def _tensorboard(out: Path) -> Iterator[Callable[[Mapping[str, float]], None]]:
    """Writes an epoch's record as TensorBoard events; does nothing where it is not installed."""
    if not leads() or importlib.util.find_spec("tensorboard") is None:
        yield lambda record: None
        return
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(out / "tensorboard")) as writer:

        def log(record: Mapping[str, float]) -> None:
            for name, value in record.items():
                writer.add_scalar(name, value, int(record["epoch"]))
            writer.flush()

        yield log
