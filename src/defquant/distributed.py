"""Data-parallel training under `torchrun`: who am I, and sums over all processes."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from defquant.errors import UserError

__all__ = ["Workers", "leads", "pick_device", "sum_over", "workers"]


@dataclass(frozen=True)
class Workers:
    """This process's place among those that `torchrun` started; alone: rank 0 of 1."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0

    @property
    def leads(self) -> bool:
        """Whether this process writes the files."""
        return self.rank == 0


def leads() -> bool:
    """Whether this process speaks and writes for all; so does one that is alone."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def workers(device: torch.device) -> Iterator[Workers]:
    """Join the process group of `torchrun` (nccl on GPUs, gloo on CPUs), if there is one."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        yield Workers()
        return
    me = Workers(int(os.environ["RANK"]), world, int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield me
    finally:
        dist.destroy_process_group()


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
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
        torch.backends.cudnn.allow_tf32 = False
    return device
