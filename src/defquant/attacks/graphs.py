"""What a GPU does the same way again and again, as one CUDA graph; and TensorFloat-32."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

__all__ = ["alike", "beside", "recorded", "tensor_float"]

_T = TypeVar("_T")


def alike(model: nn.Module) -> bool:
    """Whether each pass does the same: modules of torch and of this library alone, no hooks."""

    def known(module: nn.Module) -> bool:
        home = type(module).__module__
        hooks = (
            module._forward_hooks, module._forward_pre_hooks, module._backward_hooks,
            module._backward_pre_hooks,
        )  # fmt: skip
        own = home.startswith(("torch.nn.", "defquant.")) and "torch.nn.parallel" not in home
        return own and not any(hooks) and "forward" not in vars(module)

    return all(map(known, model.modules()))


def recorded(
    body: Callable[[], None],
    moved: Sequence[Tensor],
    device: torch.device,
    *,
    warm: int = 3,
    pool: Any = None,
) -> Callable[[], None]:
    """`body` as one CUDA graph; what its `warm` runs beforehand did to `moved` is undone.

    `pool`: of the memory, shared by graphs whose results are copied before another runs. On a CPU,
    for tests of all the rest, `body` itself.
    """
    before = [tensor.detach().clone() for tensor in moved]
    try:
        if device.type == "cpu":
            body()
            return body
        side = torch.cuda.Stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for _ in range(warm):  # plans of cuDNN, compilation
                body()
        torch.cuda.current_stream(device).wait_stream(side)
        torch.cuda.synchronize(device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            body()
        return graph.replay
    finally:
        with torch.no_grad():
            for tensor, value in zip(moved, before, strict=True):
                tensor.copy_(value)


def beside(body: Callable[[], _T], kind: str) -> Callable[[], _T]:
    """`body`, to be asked for later: in a CUDA graph it runs beside all that comes between."""
    if kind != "cuda" or not torch.cuda.is_current_stream_capturing():
        return body
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        found = body()

    def joined() -> _T:
        torch.cuda.current_stream().wait_stream(side)
        return found

    return joined


def _said(owner: Any, name: str, off: Any, on: Any) -> tuple[Any, Any, Any, Any]:
    return partial(getattr, owner, name), partial(setattr, owner, name), off, on


_CUDNN: Any = torch.backends.cudnn
_PRODUCTS: Any = torch.backends.cuda.matmul
_PRECISION = (
    torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "highest", "high"
)  # fmt: skip
_NAMES = (
    (_said(_CUDNN, "allow_tf32", False, True), _PRECISION),
    (_said(_CUDNN, "allow_tf32", False, True), _said(_PRODUCTS, "allow_tf32", False, True)),
    tuple(
        _said(owner, "fp32_precision", "ieee", "tf32")
        for owner in (_CUDNN.conv, _CUDNN.rnn, _PRODUCTS)
    ),
)
"""The names by which torch may be told, the oldest first: (get, set, off, on) of each setting.

What was set by newer ones the older refuse to read; torch's compiler wants the older where it can.
"""


@contextmanager
def tensor_float(on: bool | None) -> Iterator[None]:
    """TensorFloat-32 on or off inside, for convolutions and products; None: as it is.

    Off, products are in float32 on a CPU, too, whatever `torch.set_float32_matmul_precision` says.
    """
    if on is None:
        yield
        return
    for names in _NAMES:
        with suppress(RuntimeError):
            before = [get() for get, *_ in names]
            break
    moved = [
        (put, was, values[on])
        for (_, put, *values), was in zip(names, before, strict=True)
        if was != values[on]
    ]
    for put, _, value in moved:
        put(value)
    try:
        yield
    finally:
        for put, was, _ in moved:
            put(was)
