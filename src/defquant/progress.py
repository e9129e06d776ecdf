"""Progress on stderr: a bar on a terminal, one line per epoch or attack elsewhere; and the log.

What a command prints is also appended to `run.log` in the folder of the run, line by line.
"""

import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Self, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from defquant.errors import visible

__all__ = [
    "LOG", "AttackProgress", "TrainingProgress", "keep_log", "note", "quiet", "say", "spoken",
]  # fmt: skip

LOG = "run.log"


@dataclass
class _Command:
    """The command that runs: its words, where its lines go, and those that are not there yet."""

    words: str = ""
    quiet: bool = False
    log: Path | None = None
    begun: bool = False
    waiting: list[str] = field(default_factory=list)


_command = _Command()


@contextmanager
def spoken(words: str, *, quiet: bool = False) -> Iterator[None]:
    """Run the command `words`: without progress where `quiet`; what is printed can be logged."""
    global _command
    before, _command = _command, _Command(words, quiet)
    try:
        with redirect_stdout(_Copied(sys.stdout)):
            yield
    finally:
        _command = before


def quiet() -> bool:
    """Whether progress is not wanted."""
    return _command.quiet


def keep_log(folder: Path) -> None:
    """From now on, append what the command says to `run.log` in `folder`, first the command."""
    _command.log, _command.begun, _command.waiting = folder / LOG, False, []
    note(f"$ {_command.words}", begins=False)


def note(text: str, *, begins: bool = True) -> None:
    """Append a line with the time to the log, if one is kept; one that cannot be written is lost.

    A line that does not begin the log waits for one that does: a refused command leaves nothing.
    """
    if _command.log is None:
        return
    now = datetime.now().astimezone().isoformat(timespec="seconds")
    _command.waiting.append(f"{now} {visible(_COLOURS.sub('', text))}\n")
    _command.begun |= begins
    if _command.begun:
        with suppress(OSError), _command.log.open("a", encoding="utf-8") as file:
            file.write("".join(_command.waiting))
            _command.waiting.clear()


_COLOURS = re.compile(r"\x1b\[[0-9;]*m")


def say(text: str, *, shown: bool = True) -> None:
    """One line of progress: into the log, and on stderr where it is `shown` and not `quiet`."""
    if shown and not quiet():
        print(text, file=sys.stderr, flush=True)
    note(text)


class _Copied:
    """A stream whose whole lines are noted, too."""

    def __init__(self, stream: TextIO) -> None:
        self._stream, self._line = stream, ""

    def write(self, text: str) -> int:
        *lines, self._line = (self._line + text).split("\n")
        for line in lines:
            note(line)
        return self._stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


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

    def __exit__(self, *_: object) -> None:
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
        """Say that an epoch is done, and `how` its steps ran; on stderr where no bar does."""
        if not self._show:
            return
        text = f"loss {record['loss']:.3f}  accuracy {record['accuracy']:.1%}"
        text += f"  penalty {record['penalty']:.3g}  {record['images_per_second']:,.0f} images/s"
        if "monitor_pgd" in record:
            text += f"  fgsm {record['monitor_fgsm']:.0%} pgd {record['monitor_pgd']:.0%}"
        if "test_accuracy" in record:
            text += f"  test {record['test_accuracy']:.1%}"
        number = f"{record['epoch']:.0f}/{epochs}"
        text += f"  {how}" if how else ""
        say(f"{self._label}: epoch {number}  {text}", shown=self._bar.disable)


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
            say(label, shown=bar.disable)

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
        disable=quiet() or not (show and sys.stderr.isatty()),
    )  # fmt: skip
