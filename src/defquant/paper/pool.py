"""Many jobs over processes of this machine, one thread each; Ctrl-C ends them all.

Not joblib's: its workers were still at work 25 s after their parent had been killed, and with them
stand their claims.
"""

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import resource_tracker
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from defquant.errors import UserError

__all__ = ["Job", "cores", "each", "progress"]

T = TypeVar("T")

Job = tuple[str, Callable[[], T]]


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def each(
    title: str, jobs: Sequence[Job[T]], processes: int
) -> Generator[tuple[str, T], None, None]:
    """The results of named jobs as they end, each made in one of `processes` of one thread.

    A job is a picklable call without arguments. Progress goes to stderr. When a job raises, or
    the caller stops, all processes are ended; they end, too, when this process is killed.

    Raises what a job raises, and `UserError` when a process dies, for want of memory say.
    """
    # spawn: a forked child inherits torch's thread pool in a state that can hang
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(processes, mp_context=context, initializer=_start_child)
    try:
        with progress(title, len(jobs)) as advance:
            with _deaf_children():
                names: dict[Future[T], str] = {pool.submit(job): name for name, job in jobs}
                pool.submit(int)  # wakes Python's watcher once all it must watch has been started
            for future in as_completed(names):
                result = future.result()
                advance(names[future], result)
                yield names[future], result
    except BaseException as error:
        for process in list((pool._processes or {}).values()):
            process.terminate()
        pool.shutdown(wait=True, cancel_futures=True)
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


def _start_child() -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    import torch

    torch.set_num_threads(1)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


@contextmanager
def progress(title: str, total: int) -> Iterator[Callable[[str, object], None]]:
    """A bar on a terminal, elsewhere one line per job that is done: whose result says no more."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(30), MofNCompleteColumn())
    hidden = not console.is_terminal
    with Progress(
        *columns, TimeElapsedColumn(), console=console, transient=True, disable=hidden
    ) as bar:
        task = bar.add_task(title, total=total)

        def advance(name: str, result: object) -> None:
            bar.advance(task)
            if hidden and result in (None, "done"):
                print(f"{title}: {name} done", file=sys.stderr, flush=True)

        yield advance
