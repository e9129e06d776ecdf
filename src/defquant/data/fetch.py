"""The official archives of CIFAR-10 and SVHN: downloaded, checked by hash, unpacked with care."""

import gzip
import hashlib
import http.client
import tarfile
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from defquant.errors import UserError, near, shown
from defquant.files import opened, write_bytes, write_whole

__all__ = ["LARGEST", "fetch", "read_tar"]

LARGEST = 1 << 26  # bytes of one member; the official ones have 31 million
_WHOLE = 1 << 30
_MEMBERS = 1000
_CHUNK = 1 << 20
_DOWNLOAD = 1 << 28  # bytes; the largest of the archives has two thirds of it
_TIMEOUT = 30.0  # seconds without a byte


_ARCHIVES: Mapping[str, tuple[str, Mapping[str, str]]] = {  # where they lie, and their MD5s
    "cifar10": (
        "https://www.cs.toronto.edu/~kriz/",
        {"cifar-10-python.tar.gz": "c58f30108f718f92721af3b95e74349a"},
    ),
    "svhn": (
        "http://ufldl.stanford.edu/housenumbers/",
        {"train_32x32.mat": "e26dedcc434d2e4c54c9b2d4a06d8373",
         "test_32x32.mat": "eb5a983be6a315427106f1b164d9cef3"},
    ),
}  # fmt: skip


def fetch(
    name: str,
    root: str | Path,
    *,
    opener: Callable[..., Any] = urllib.request.urlopen,
    show_progress: bool = True,
) -> Path:
    """Bring the official `cifar10` or `svhn` into the folder `root`, which `load` then reads.

    Files that are there with the right MD5 are not downloaded again. Nothing partial is left
    behind. `opener(url, timeout=seconds)` returns a response to read; progress goes to stderr.
    Raises `UserError`, with the address and the place for a download by hand, where there is no
    network, the transfer is cut or does not end, or the hash is another; and for an archive that
    would do harm.
    """
    if name not in _ARCHIVES:
        known = ", ".join(_ARCHIVES)
        raise UserError(f"cannot fetch {name!r}{near(name, _ARCHIVES)}: choose one of {known}")
    root = Path(root).expanduser()
    host, files = _ARCHIVES[name]

    def missing(member: PurePosixPath, size: int) -> bool:
        there = root / member
        return not (there.is_file() and there.stat().st_size == size)

    for file, md5 in files.items():
        path = root / file
        if not (path.is_file() and _md5(path) == md5):
            _download(host + file, md5, path, opener, show_progress)
        if file.endswith(".tar.gz"):
            for member, content in read_tar(path, missing):
                write_bytes(root / member, content)
    return root


def _md5(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None


def _download(
    url: str, md5: str, path: Path, opener: Callable[..., Any], show_progress: bool
) -> None:
    from rich import progress
    from rich.console import Console

    from defquant.progress import quiet

    remedy = f"try again, or download {url} by hand to {path}"
    columns = (
        progress.TextColumn("{task.description}"), progress.BarColumn(), progress.DownloadColumn(),
        progress.TransferSpeedColumn(), progress.TimeRemainingColumn(),
    )  # fmt: skip
    hidden = quiet() or not show_progress
    bar = progress.Progress(*columns, console=Console(stderr=True), disable=hidden)

    def receive(temporary: Path) -> None:
        with temporary.open("wb") as file, bar:
            task = bar.add_task(path.name, total=None)
            for chunk, total in _chunks(url, opener, remedy):
                file.write(chunk)
                bar.update(task, advance=len(chunk), total=total)
        if (found := _md5(temporary)) != md5:
            raise UserError(f"{url} must have MD5 {md5}; found {found}, and removed it: {remedy}")

    write_whole(path, receive)


def _chunks(
    url: str, opener: Callable[..., Any], remedy: str
) -> Iterator[tuple[bytes, int | None]]:
    """Parts of the body, each with the length of the whole where the server told it."""
    received, total = 0, None
    try:
        with opener(url, timeout=_TIMEOUT) as response:
            length = response.headers.get("Content-Length") or ""
            total = int(length) if length.isdigit() else None
            while chunk := response.read(_CHUNK):
                received += len(chunk)
                if received > _DOWNLOAD:
                    raise UserError(f"{url} sends more than {_DOWNLOAD:,} bytes: {remedy}")
                yield chunk, total
    except (OSError, http.client.HTTPException) as error:
        reason = str(getattr(error, "reason", "") or error) or type(error).__name__
        if isinstance(error, urllib.error.HTTPError):
            error.close()
            reason = str(error)
        raise UserError(f"cannot download {url} ({shown(reason)}): {remedy}") from None
    if total is not None and received < total:
        raise UserError(f"the download was cut after {received:,} of {total:,} bytes: {remedy}")


class _Limited(gzip.GzipFile):
    """A tar.gz unpacked, whose reader may not ask for as much as a header claims.

    `tarfile` reads a long name at one go, however long, and follows a size below 0 back.
    """

    def read(self, size: int | None = -1) -> bytes:
        if size is None or not 0 <= size <= _CHUNK:
            raise ValueError(f"a name or header of {size:,} bytes")
        return super().read(size)

    def seek(self, offset: int, whence: int = 0) -> int:
        if offset > _WHOLE:
            raise ValueError(f"it is longer than {_WHOLE >> 20:,} MiB")
        return super().seek(offset, whence)


def read_tar(
    path: Path, wanted: Callable[[PurePosixPath, int], bool]
) -> Iterator[tuple[PurePosixPath, bytes]]:
    """Name and content of each regular file in the tar.gz at `path` for which `wanted(name, size)`.

    Raises `UserError` where the archive is cut or broken, holds a link, a device, a file above
    64 MiB, or a path that is absolute or climbs out with `..`, or is longer than 1 GiB.
    """
    try:
        with (
            opened(path) as raw,
            _Limited(fileobj=raw) as unpacked,
            tarfile.open(fileobj=unpacked, mode="r:") as tar,
        ):
            for place, member in enumerate(tar):
                name = PurePosixPath(member.name)
                rules = {
                    "files and folders only": member.issparse()
                    or not member.isfile() | member.isdir(),
                    "paths inside itself only": name.is_absolute() or ".." in name.parts,
                    f"files up to {LARGEST >> 20} MiB only": not 0 <= member.size <= LARGEST,
                    f"up to {_MEMBERS:,} files": place >= _MEMBERS,
                }
                for rule in (rule for rule, broken in rules.items() if broken):
                    raise UserError(
                        f"{path} must hold {rule}; found {shown(member.name)!r}: it is not the "
                        "official archive, remove it"
                    )
                if member.isfile() and wanted(name, member.size):
                    file = tar.extractfile(member)
                    assert file is not None  # only links and devices have none
                    yield name, b"".join(iter(partial(file.read, _CHUNK), b""))
    except UserError:
        raise
    except (tarfile.TarError, EOFError, OSError, ValueError, zlib.error, RecursionError) as error:
        raise UserError(
            f"{path} must be a whole tar.gz archive ({shown(str(error), 200)}): it may be cut; "
            "download it again"
        ) from None
