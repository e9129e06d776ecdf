"""Many jobs over processes of this machine or the nodes of a Ray cluster, one thread each.

Ctrl-C ends them all. Not joblib's processes: they were still at work 25 s after their parent had
been killed, and with them stand their claims.
"""

import logging
import math
import multiprocessing
import os
import re
import signal
import socket
import sys
import threading
import time
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence, Sized
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, nullcontext, suppress
from itertools import islice
from multiprocessing import resource_tracker
from pathlib import Path
from textwrap import shorten
from typing import Any, TypeVar

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn
from rich.text import Text

from defquant.errors import UserError
from defquant.progress import quiet, say

__all__ = ["Job", "Tell", "cores", "each", "each_on_cluster"]

PATIENCE = 10.0  # seconds in which an address must answer
DEATHS = 10  # of a job's workers before it is given up: nodes may be taken away at any time

T = TypeVar("T")

Job = tuple[str, Callable[[], T]]
Tell = Callable[[str], Sequence[str]]
"""What there is to tell of a job that is done, by its name; without a name, of all together."""


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def each(
    title: str,
    jobs: Iterable[Job[T]],
    processes: int,
    *,
    total: int | None = None,
    tell: Tell = lambda name: [],
    until: float = math.inf,
) -> Generator[tuple[str, T], None, None]:
    """The results of named jobs as they end, each made in one of `processes` of one thread.

    The next of `jobs`, `total` in number, is asked for when a process is free. Progress, and what
    there is to `tell`, goes to stderr. When a job raises, the caller stops, or the monotonic clock
    has come to `until`, all processes are ended; they end, too, when this process is killed.

    Raises what a job raises, and `UserError` when a process dies, for want of memory say.
    """
    queue, names = iter(jobs), dict[Future[T], str]()
    with _pool(processes) as (pool, end), _progress(title, jobs, total, tell) as advance:
        while time.monotonic() < until:
            free = list(islice(queue, processes - len(names)))
            with _late_ctrl_c(sys.maxsize), _deaf_children():
                names |= {pool.submit(job): name for name, job in free}
                if free:  # wakes Python's watcher once all it must watch has been started
                    pool.submit(int)
            if not names:
                break
            ready, _ = wait(names, max(0.0, min(1.0, until - time.monotonic())), FIRST_COMPLETED)
            for future in ready:
                result = future.result()
                name = names.pop(future)
                advance(name, result)
                yield name, result
        if names:
            end()


@contextmanager
def _pool(processes: int) -> Iterator[tuple[ProcessPoolExecutor, Callable[[], None]]]:
    """Processes of one thread each, and what ends them in their work, as an error does."""
    # spawn: a forked child inherits torch's thread pool in a state that can hang
    context = multiprocessing.get_context("spawn")
    compilers = max(1, cores() // processes)
    pool = ProcessPoolExecutor(
        processes, mp_context=context, initializer=_start_child, initargs=(compilers,)
    )

    def end() -> None:
        for process in list((pool._processes or {}).values()):
            process.terminate()
        pool.shutdown(wait=True, cancel_futures=True)

    try:
        yield pool, end
    except BaseException as error:
        end()
        if isinstance(error, BrokenProcessPool):
            raise UserError(
                f"one of {processes} processes died (out of memory?): run again, with fewer at a "
                "time if need be; what was finished stands"
            ) from None
        raise
    pool.shutdown()


@contextmanager
def _deaf_children() -> Iterator[None]:
    """Processes started meanwhile do not hear Ctrl-C: their parent does, and ends them."""
    resource_tracker.ensure_running()  # its start would unblock the signal
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _late_ctrl_c(most: int) -> Iterator[Callable[[], None]]:
    """Ctrl-C waits for a call of what is yielded, or the end: a child half started would print a
    traceback, a call of Ray's could leave locks held. Those after the first `most` do not wait.
    """
    heard: list[int] = []

    def stop(late: int = 0) -> None:
        if len(heard) > late:
            raise KeyboardInterrupt

    def hear(number: int, _: object) -> None:
        heard.append(number)
        stop(most)

    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield stop
        return
    signal.signal(signal.SIGINT, hear)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    stop()


def _start_child(compilers: int) -> None:
    """`compilers`: processes in which torch compiles for this one, else as many as cores."""
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(compilers))
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _one_thread()
    _thread_lock()


def _thread_lock() -> None:
    """For the bars that torch's compiler draws: tqdm's own lock is a semaphore between processes,
    of which Python warns as leaked where this one is ended.
    """
    from torch import hub

    bar = vars(hub)["tqdm"]
    if hasattr(bar, "set_lock"):  # torch has one of its own where tqdm is not there
        bar.set_lock(threading.RLock())


def _end_with_parent() -> None:
    if (parent := multiprocessing.parent_process()) is not None:
        parent.join()
        os._exit(1)


def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


@contextmanager
def _progress(
    title: str, jobs: Iterable[Job[T]], total: int | None, tell: Tell
) -> Iterator[Callable[[str, object], None]]:
    """One line per job that is done, whose result says no more, where there is something to tell
    or no terminal; on a terminal also a bar and the lines that `tell` has, each second.
    """
    console = Console(stderr=True)
    hidden = not console.is_terminal or quiet()
    columns = BarColumn(30), MofNCompleteColumn(), TimeElapsedColumn()
    bar = Progress("{task.description}", *columns, console=console)
    task = bar.add_task(title, total=len(jobs) if isinstance(jobs, Sized) else total)

    def shown() -> Group:
        room = console.width - 3  # for the `^C` that a terminal writes: a new line would stay
        lines = (line if len(line) <= room else f"{line[: room - 1]}…" for line in tell(""))
        return Group(bar, *(Text(line, no_wrap=True) for line in lines))

    live = Live(get_renderable=shown, console=console, transient=True, refresh_per_second=1)
    with nullcontext() if hidden else live:

        def advance(name: str, result: object) -> None:
            bar.advance(task)
            if result in (None, "done"):
                words = tell(name)
                say("; ".join([f"{title}: {name} done", *words]), shown=hidden or bool(words))

        yield advance


# --- a cluster ----------------------------------------------------------------------------


def each_on_cluster(
    title: str,
    jobs: Iterable[Job[str]],
    address: str,
    *,
    gpus: int | None = None,
    total: int | None = None,
    tell: Tell = lambda name: [],
    until: float = math.inf,
) -> Generator[tuple[str, str], None, None]:
    """The results of named jobs as they end, each made by a task of the Ray cluster at `address`.

    As `each`, but a job whose worker or node dies is begun again, where there is room: jobs must go
    on from what they find on the disk. One that dies ten times is given up, with a line that says
    so for its result, and the others go on. Every node needs the same defquant, Python and Ray, and
    must see the files that the jobs name, under the same paths (a shared disk). Relative paths are
    those of the caller's folder, where the node has it. Each job gets one CPU core, one thread and
    `gpus`; None for one where the cluster has any. All are handed in at once, in their order.

    `address`: `ray://HOST:10001` from anywhere; `HOST:6379` or `auto` on a node of the cluster,
    where `auto` asks the node itself; `ray`: as `auto` on a node, elsewhere a cluster of this
    machine alone, ended with the call.

    Raises `UserError`: Ray is not installed, nothing answers, or a node lacks defquant.
    """
    bar = _progress(title, jobs, total, tell)
    with _late_ctrl_c(1) as stop, _connected(address) as ray, bar as advance:
        if gpus is None:
            gpus = int(ray.cluster_resources().get("GPU", 0) >= 1)
        # not by Ray's own retries: it begins what was killed for its memory again without end
        task = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=0)(_run)
        kinds = ("WorkerCrashedError", "NodeDiedError", "OutOfMemoryError")
        death = tuple(getattr(ray.exceptions, kind) for kind in kinds)
        folder = str(Path.cwd())
        begun = {task.remote(folder, job): (name, job, 1) for name, job in jobs}
        try:
            while begun and time.monotonic() < until:
                if not ray.is_initialized():  # Ray would join or start another cluster by itself
                    raise ConnectionError("no connection")
                ready, _ = ray.wait(list(begun), timeout=1.0)
                stop()
                for reference in ready:
                    name, job, turn = begun.pop(reference)
                    try:
                        result = ray.get(reference)
                    except death as error:
                        if turn < DEATHS:
                            begun[task.remote(folder, job)] = (name, job, turn + 1)
                            continue
                        reason = shorten(str(error) or type(error).__name__, 200)
                        result = (
                            f"{name}: its worker died {DEATHS} times (out of memory?): {reason}: "
                            "run again, with more memory for each; what was finished stands"
                        )
                    advance(name, result)
                    yield name, result
        finally:  # done, interrupted, or out of time
            with suppress(Exception):  # the cluster may be gone
                for reference in begun if ray.is_initialized() else ():
                    ray.cancel(reference, force=True)


def _run(folder: str, job: Any) -> Any:
    """The task: `job` as `each` would run it."""
    _one_thread()
    with suppress(OSError):
        os.chdir(folder)
    return job()


@contextmanager
def _connected(address: str) -> Iterator[Any]:
    """The module `ray`, connected: as the caller has it, else for this block.

    Its errors, and users' mistakes in jobs, are `UserError`; a job's other errors are Ray's.
    """
    try:
        import ray
    except ImportError:
        raise UserError(
            f"workers at {address} need Ray: pip install 'defquant[ray]', here and on every node"
        ) from None
    own = not ray.is_initialized()
    if own:
        _reach(address)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # Ray's, of its own versions to come
                ray.init(None if address == "ray" else address, logging_level=logging.WARNING)
        except Exception as error:  # Ray raises of many kinds
            reason = shorten(str(error) or type(error).__name__, 300)
            raise UserError(f"cannot join the Ray cluster at {address}: {reason}") from None
    try:
        yield ray
    except (ray.exceptions.RayError, ConnectionError) as error:
        text = " ".join(str(error).split())
        if isinstance(cause := getattr(error, "cause", None), UserError):
            raise cause from None
        if re.search(r"failed to import on the worker|No module named '", text):
            raise UserError(
                "a node of the cluster cannot import the job: install the same defquant on all"
            ) from None
        if isinstance(error, ray.exceptions.RayTaskError):
            raise
        lost = f"the cluster is lost ({shorten(text, 300)}); what was finished stands"
        raise UserError(lost) from None
    finally:
        if own:
            ray.shutdown()


def _reach(address: str) -> None:
    """Raise `UserError` unless something answers where `address` points; Ray would wait long."""
    if address in ("auto", "ray"):
        address = os.environ.get("RAY_ADDRESS", "auto")
        if address in ("auto", "local"):
            return
    host, _, port = re.sub(r"^\w+://", "", address).rpartition(":")
    if not host or not port.isdecimal():
        raise UserError(f"workers are at ray://HOST:10001, HOST:6379, auto or ray; found {address}")
    try:
        socket.create_connection((host.strip("[]"), int(port)), PATIENCE).close()
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"nothing answers at {address} ({reason}): is the cluster up?") from None
