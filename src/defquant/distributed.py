"""Data-parallel training under `torchrun`: who am I, and sums over all processes."""

import os
import re
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from defquant.errors import UserError

__all__ = ["Workers", "leads", "pick_device", "place", "sum_over", "watched", "workers"]

T = TypeVar("T")

PATIENCE = 60.0  # seconds that a step may take without a word


@dataclass(frozen=True)
class Workers:
    """This process's place among those that train one network together; alone: rank 0 of 1."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0

    @property
    def leads(self) -> bool:
        """Whether this process writes the files."""
        return self.rank == 0


def place() -> Workers:
    """This process's place, as `torchrun` tells it; alone unless WORLD_SIZE says more than 1.

    RANK alone says nothing: batch schedulers set it for jobs that know nothing of each other.
    Raises `UserError` where the variables cannot be.
    """
    world = _number("WORLD_SIZE", 1, 1, 1 << 16)
    if world == 1:
        return Workers()
    lacking = [n for n in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(n)]
    if lacking:
        raise UserError(
            f"{world} processes (WORLD_SIZE) find each other by {', '.join(lacking)}, which is not "
            "set: start them with torchrun, or unset WORLD_SIZE for a process of its own"
        )
    return Workers(_number("RANK", 0, 0, world - 1), world, _number("LOCAL_RANK", 0, 0, world - 1))


def _number(name: str, default: int, lowest: int, highest: int) -> int:
    text = os.environ.get(name) or str(default)
    if not re.fullmatch(r"[0-9]{1,9}", text) or not lowest <= int(text) <= highest:
        raise UserError(
            f"the environment's {name} must be a whole number from {lowest} to {highest}; found "
            f"{text[:80]!r}: torchrun sets it, elsewhere unset it"
        )
    return int(text)


def leads() -> bool:
    """Whether this process speaks and writes for all; so does one that is alone."""
    return place().leads


@contextmanager
def workers(device: torch.device) -> Iterator[Workers]:
    """Join the process group of `torchrun` (nccl on GPUs, gloo on CPUs), if there is one.

    Raises `UserError` where another process ends, or does not answer for the minutes that torch
    waits.
    """
    me = place()
    if me.world == 1:
        yield me
        return
    try:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        yield me
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        reason = " ".join(str(error).split())[:80]
        raise UserError(
            f"process {me.rank} of {me.world} lost the others ({reason}): start all again, with "
            "--resume"
        ) from None
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def watched(steps: Iterable[T], me: Workers) -> Iterator[T]:
    """`steps`; says on stderr, once, where one of several processes is at one for a minute."""
    called, ended = threading.Event(), threading.Event()

    def watch() -> None:
        while called.wait(PATIENCE):
            if ended.is_set():
                return
            called.clear()
        print(
            f"defquant: process {me.rank} of {me.world} has not ended a step in {PATIENCE:g} s: "
            "if another one hangs, end all and start them again with --resume",
            file=sys.stderr, flush=True,
        )  # fmt: skip

    if me.world > 1:
        threading.Thread(target=watch, daemon=True).start()
    try:
        for step in steps:
            yield step
            called.set()
    finally:
        ended.set()
        called.set()


def sum_over(values: Tensor) -> Tensor:
    """`values` summed over all processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def pick_device(name: str) -> torch.device:
    """`auto`: this process's GPU where there is one, else the CPU. Raises `UserError`.

    On a GPU float32 convolutions are then computed as such: TensorFloat-32, torch's default for
    them, keeps 10 bits of a pixel, too few for attacks whose steps are a fraction of 1/255.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"unknown device {name!r}: use auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise UserError("device cuda asked for, but torch sees no GPU: use --device cpu")
        if device.index is None:
            device = torch.device("cuda", place().local_rank)
        torch.cuda.set_device(device)
        torch.backends.cudnn.allow_tf32 = False
    return device
