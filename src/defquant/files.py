"""Files that are written whole or not at all, and folders that one run owns at a time."""

import fcntl
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from defquant.errors import UserError

__all__ = ["append_line", "owned_folder", "read_json", "write_bytes", "write_json", "write_whole"]


def write_whole(path: Path, write: Callable[[Path], object]) -> Path:
    """Let `write` fill a temporary file beside `path`, flush it to disk and move it into place.

    A crash, a full disk or Ctrl-C leaves the former `path` untouched and no temporary file.
    Raises `UserError` when the disk is full or the folder cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    except OSError as error:
        raise UserError(_cannot_write(path, error)) from None
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(path)
    except OSError as error:
        raise UserError(_cannot_write(path, error)) from None
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
    return path


def write_bytes(path: Path, content: bytes) -> Path:
    """Write `content` to `path`, whole or not at all."""
    return write_whole(path, lambda temporary: temporary.write_bytes(content))


def write_json(path: Path, content: Any) -> Path:
    """Write `content` as indented JSON to `path`, whole or not at all."""
    return write_bytes(path, (json.dumps(content, indent=1, sort_keys=False) + "\n").encode())


def read_json(path: Path) -> Any:
    """Parsed JSON of `path`. Raises `UserError` where it is missing or cut."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}): it may be cut; make it again") from None


def append_line(path: Path, content: dict[str, Any]) -> None:
    """Append one JSON line with a single write, so that parallel writers never mix their lines.

    A file that a crash left without its last newline is mended first.
    """
    line = (json.dumps(content, allow_nan=False) + "\n").encode()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            size = file.seek(0, os.SEEK_END)
            if size:
                file.seek(size - 1)
                line = line if file.read(1) == b"\n" else b"\n" + line
            written = os.write(file.fileno(), line)
            if written != len(line):
                os.ftruncate(file.fileno(), size)
                raise OSError(28, "No space left on device")
    except OSError as error:
        raise UserError(_cannot_write(path, error)) from None


@contextmanager
def owned_folder(folder: Path) -> Iterator[Path]:
    """Hold `folder` for this process; the lock dies with the process, however it ends.

    Raises `UserError` when another process holds it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("a")
    except OSError as error:
        raise UserError(_cannot_write(folder, error)) from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(
                f"{folder} is in use by another run: wait for it or choose another folder"
            ) from None
        yield folder


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _cannot_write(path: Path, error: OSError) -> str:
    return f"cannot write {path}: {error.strerror or error}; what was there before still stands"
