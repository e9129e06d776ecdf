"""Progress on stderr: a bar on a terminal, one line per epoch elsewhere."""

import sys
import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

__all__ = ["TrainingProgress"]


class TrainingProgress:
    """Bar over all steps of a run with loss, accuracy, penalty, images/s and time left."""

    def __init__(self, label: str, total: int, done: int, *, show: bool = True) -> None:
        self._show = show
        self._bar = Progress(
            TextColumn("{task.description}"), BarColumn(20), TextColumn("{task.percentage:>3.0f}%"),
            TextColumn("{task.fields[text]}"), TimeRemainingColumn(),
            console=Console(stderr=True), transient=True,
            disable=not (show and sys.stderr.isatty()),
        )  # fmt: skip
        self._task = self._bar.add_task(label, total=total, completed=done, text="")
        self._label = label
        self._next = time.monotonic() + 0.5

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()

    @property
    def due(self) -> bool:
        """Whether the bar is worth the reading of the device's numbers now."""
        return not self._bar.disable and time.monotonic() >= self._next

    def update(self, done: int, text: str) -> None:
        self._bar.update(self._task, completed=done, text=text)
        self._next = time.monotonic() + 0.5

    def epoch(self, number: int, epochs: int, text: str) -> None:
        """Say that an epoch is done, where there is no bar to say so."""
        if self._show and self._bar.disable:
            print(f"{self._label}: epoch {number}/{epochs}  {text}", file=sys.stderr, flush=True)
