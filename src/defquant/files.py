"""Files that are written whole or not at all, and folders that one run owns at a time."""

import errno
import fcntl
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from defquant.errors import UserError
from defquant.typed import decode, parse_json

__all__ = [
    "append_line", "cache_folder", "claimed", "make_folder", "opened", "owned_folder", "read_bytes",
    "read_json", "read_lines", "read_text", "write_bytes", "write_json", "write_whole",
]  # fmt: skip


_PART = ".defquant-part"


def write_whole(path: Path, write: Callable[[Path], object]) -> Path:
    """Let `write` fill a temporary file beside `path`, flush it to disk and move it into place.

    A crash, a full disk or Ctrl-C leaves the former `path` untouched and no temporary file; what a
    kill leaves, the next call for the same folder removes. Of a link, the file it leads to is
    replaced.
    Raises `UserError` when the disk is full, the folder cannot be written, or `path` is a device.
    """
    try:
        path = path.resolve() if path.is_symlink() else path
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise UserError(f"{path} is a device or a pipe: name a file")
        path.parent.mkdir(parents=True, exist_ok=True)
        with _workshop(path) as folder:
            temporary = folder / path.name
            write(temporary)
            _flush(temporary)
            temporary.replace(path)
        with suppress(OSError):  # some network disks cannot flush a folder
            _flush(path.parent)
    except OSError as error:
        raise UserError(_cannot_write(path, error)) from None
    return path


@contextmanager
def _workshop(path: Path) -> Iterator[Path]:
    """A hidden folder beside `path`, locked while in use; one without a lock, a kill has left."""
    for left in path.parent.glob(f".*{_PART}"):
        with suppress(OSError), _handle(left) as handle:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(left)
    folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        with _handle(folder) as handle:
            with suppress(OSError):  # a disk without flock: nothing there is taken for left
                fcntl.flock(handle, fcntl.LOCK_EX)
            folder = folder.rename(f"{folder}{_PART}")  # not before it is locked
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _handle(path: Path) -> Iterator[int]:
    """A handle on the file or folder `path`."""
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        yield handle
    finally:
        os.close(handle)


def _flush(path: Path) -> None:
    with _handle(path) as handle:
        os.fsync(handle)


def write_bytes(path: Path, content: bytes) -> Path:
    """Write `content` to `path`, whole or not at all."""
    return write_whole(path, lambda temporary: temporary.write_bytes(content))


def write_json(path: Path, content: Any) -> Path:
    """Write `content` as indented JSON to `path`, whole or not at all."""
    return write_bytes(path, (json.dumps(content, indent=1, sort_keys=False) + "\n").encode())


def opened(path: Path) -> BinaryIO:
    """`path`, open for reading. Raises `OSError` for a pipe or a device too: they may never end."""
    # O_NONBLOCK: a pipe that nobody writes to opens at once
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return os.fdopen(handle, "rb")


def read_bytes(path: Path, most: int = 1 << 30) -> bytes:
    """Content of `path`. Raises `OSError` as `opened` does, and for more than `most` bytes."""
    with opened(path) as file:
        if os.fstat(file.fileno()).st_size > most:
            raise OSError(errno.EFBIG, f"it has more than {most:,} bytes", str(path))
        return file.read()


def read_text(path: Path, most: int = 1 << 30) -> str:
    """The UTF-8 text of `path`. Raises `UserError` where `read_bytes` raises, and for others."""
    try:
        content = read_bytes(path, most)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    except ValueError as error:  # NUL in a name
        raise UserError(f"cannot read {path}: {error}") from None
    return decode(content, str(path))


def read_json(path: Path) -> Any:
    """Parsed JSON of `path`. Raises `UserError` where it is missing, cut, or no JSON of ours."""
    return parse_json(read_text(path), str(path))


def read_lines(path: Path) -> Iterator[tuple[str, Any]]:
    """The values of a file of JSON lines, each after its place, `FILE, line N: `.

    A last line without its newline, which a crash cut short, is left out. Raises as `read_json`.
    """
    lines = read_text(path).rstrip("\0").split("\n")  # NULs: bytes that a power loss took
    for number, line in enumerate(lines, 1):
        where = f"{path}, line {number}"
        if number == len(lines) and _is_cut(line.encode()):
            return
        if line.strip():
            yield f"{where}: ", parse_json(line, where)


def append_line(path: Path, content: dict[str, Any]) -> None:
    """Append one JSON line with a single write, so that parallel writers never mix their lines.

    On return the disk holds the line. What a crash left of one is taken off first, cut short or
    with NULs for bytes that never came to the disk; a whole one that lacks its newline gets it.
    Raises `UserError` when the disk is full, or the folder is not there (any more).
    """
    line = (json.dumps(content, allow_nan=False) + "\n").encode()
    try:
        with path.open("ab+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            last = _last_line(file)
            kept = last.rstrip(b"\0")
            if _is_cut(kept):
                kept = b""
            if kept != last:
                file.truncate(file.seek(0, os.SEEK_END) - len(last) + len(kept))
            if kept:
                line = b"\n" + line
            size = file.seek(0, os.SEEK_END)
            written = os.write(file.fileno(), line)
            if written != len(line):
                os.ftruncate(file.fileno(), size)
                raise OSError(28, "No space left on device")
            os.fsync(file.fileno())
    except OSError as error:
        raise UserError(_cannot_write(path, error)) from None


def make_folder(folder: Path) -> Path:
    """Make `folder` and those above it where they are not there. Raises `UserError`."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(_cannot_write(folder, error)) from None
    return folder


def cache_folder() -> Path:
    """Of what can be made again at any time, one for all of a user's work."""
    given = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return given / "defquant" if given.is_absolute() else Path.home() / ".cache" / "defquant"


@contextmanager
def owned_folder(folder: Path) -> Iterator[Callable[[], None]]:
    """Hold `folder` for this process; the lock dies with the process, however it ends.

    A folder that was made for what failed before it wrote anything is taken away again.

    Raises `UserError` when another process holds it; so does a call of what is yielded when the
    folder was removed or replaced meanwhile, which writing into it would hide.
    """
    made = not folder.exists()
    with claimed(make_folder(folder) / ".lock", wait=False) as lock:
        if not lock:
            raise UserError(
                f"{folder} is in use by another run: wait for it or choose another folder"
            )

        def still() -> None:
            with suppress(OSError):
                if os.path.samestat(os.fstat(lock.fileno()), (folder / ".lock").stat()):
                    return
            raise UserError(
                f"{folder} or its .lock was removed while a run was in it: start it again"
            )

        still()
        try:
            yield still
        except BaseException:
            with suppress(OSError):
                if made and [path.name for path in folder.iterdir()] == [".lock"]:
                    (folder / ".lock").unlink()
                    folder.rmdir()
            raise


@contextmanager
def claimed(lock: Path, *, wait: bool) -> Iterator[BinaryIO | None]:
    """The file `lock`, held by this process; None where another holds it, or `wait` for it.

    The claim dies with the process, however it ends. It may stay within one process: two claims
    on one file, from two calls, exclude each other.
    """
    make_folder(lock.parent)
    try:
        file = lock.open("ab")
    except OSError as error:
        raise UserError(_cannot_write(lock, error)) from None
    with file:
        held: BinaryIO | None = file
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            held = None
        except OSError as error:
            reason = error.strerror or error
            raise UserError(f"cannot lock {lock}: {reason}; use a disk that knows flock") from None
        yield held


def _last_line(file: BinaryIO) -> bytes:
    """What stands after the last newline; nothing in a whole file."""
    end = start = file.seek(0, os.SEEK_END)
    while start:
        start = max(0, start - 4096)
        file.seek(start)
        _, newline, after = file.read(end - start).rpartition(b"\n")
        if newline or not start:
            return after
    return b""


def _is_cut(line: bytes) -> bool:
    """Whether it begins as one of our lines and does not end as one."""
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return line.startswith(b"{")
    return False


def _cannot_write(path: Path, error: OSError) -> str:
    return f"cannot write {path}: {error.strerror or error}; what was there before still stands"
