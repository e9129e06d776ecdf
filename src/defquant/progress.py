"""Progress on stderr: a bar on a terminal, one line per epoch or attack elsewhere."""

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

__all__ = ["AttackProgress", "TrainingProgress"]


class TrainingProgress:
    """Bar over all steps of a run with loss, accuracy, penalty, images/s and time left."""

    def __init__(self, label: str, total: int, done: int, *, show: bool = True) -> None:
        self._show = show
        self._bar = _bar(show=show)
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

    def update(self, done: int, record: Mapping[str, float]) -> None:
        """Show the running means of this epoch, in words that fit 80 columns."""
        text = f"loss {record['loss']:.3f} acc {record['accuracy']:.1%} pen {record['penalty']:.3g}"
        text += f" {record['images_per_second']:,.0f} img/s"
        self._bar.update(self._task, completed=done, text=text)
        self._next = time.monotonic() + 0.5

    def epoch(self, epochs: int, record: Mapping[str, float], how: str = "") -> None:
        """Say that an epoch is done, and `how` its steps ran, where there is no bar to say so."""
        if not self._show or not self._bar.disable:
            return
        text = f"loss {record['loss']:.3f}  accuracy {record['accuracy']:.1%}"
        text += f"  penalty {record['penalty']:.3g}  {record['images_per_second']:,.0f} images/s"
        if "monitor_pgd" in record:
            text += f"  fgsm {record['monitor_fgsm']:.0%} pgd {record['monitor_pgd']:.0%}"
        if "test_accuracy" in record:
            text += f"  test {record['test_accuracy']:.1%}"
        number = f"{record['epoch']:.0f}/{epochs}"
        text += f"  {how}" if how else ""
        print(f"{self._label}: epoch {number}  {text}", file=sys.stderr, flush=True)


class AttackProgress:
    """The `Watch` of a sweep: for each attack how much is done, how many images stand, time left.

    It asks at most twice a second, and not at all where there is no terminal.
    """

    def __init__(self, label: str, images: int, attacks: int) -> None:
        self._label, self._images, self._attacks, self._begun = label, images, attacks, 0

    @contextmanager
    def __call__(
        self, attack: object
    ) -> Iterator[Callable[[Callable[[], tuple[float, int]]], None]]:
        self._begun += 1
        name, eps = getattr(attack, "name", attack), 255 * float(getattr(attack, "eps", 0.0))
        label = f"{self._label}: {name} {eps:.4g}/255 ({self._begun} of {self._attacks})"
        with _bar() as bar:
            task, due = bar.add_task(label, total=1.0, text=""), time.monotonic()
            if bar.disable:
                print(label, file=sys.stderr, flush=True)

            def tick(ask: Callable[[], tuple[float, int]]) -> None:
                nonlocal due
                if not bar.disable and time.monotonic() >= due:
                    done, standing = ask()
                    text = f"{standing:,} of {self._images:,} stand"
                    bar.update(task, completed=done, text=text)
                    due = time.monotonic() + 0.5

            yield tick


def _bar(*, show: bool = True) -> Progress:
    return Progress(
        TextColumn("{task.description}", markup=False), BarColumn(12),
        TextColumn("{task.percentage:>3.0f}%"),
        TextColumn("{task.fields[text]}"), TimeRemainingColumn(),
        console=Console(stderr=True), transient=True, redirect_stdout=False,
        disable=not (show and sys.stderr.isatty()),
    )  # fmt: skip
