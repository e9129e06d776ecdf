"""The official archives of CIFAR-10 and SVHN: downloaded, checked by hash, unpacked with care."""

import gzip
import hashlib
import http.client
import tarfile
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from defquant.errors import UserError, shown
from defquant.files import opened, write_bytes, write_whole

__all__ = ["LARGEST", "fetch", "read_tar"]

LARGEST = 1 << 26
"""Bytes of one member; the official ones have 31 million."""
_WHOLE = 1 << 30
_MEMBERS = 1000
_CHUNK = 1 << 20
_DOWNLOAD = 1 << 28
"""Bytes; the largest of the archives has two thirds of it."""
_TIMEOUT = 30.0
"""Seconds without a byte."""


@dataclass(frozen=True)
class _Archive:
    url: str
    md5: str

    @property
    def file_name(self) -> str:
        return self.url.rsplit("/", 1)[1]


_ARCHIVES: Mapping[str, tuple[_Archive, ...]] = {
    "cifar10": (
        _Archive(
            "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
            "c58f30108f718f92721af3b95e74349a",
        ),
    ),
    "svhn": (
        _Archive(
            "http://ufldl.stanford.edu/housenumbers/train_32x32.mat",
            "e26dedcc434d2e4c54c9b2d4a06d8373",
        ),
        _Archive(
            "http://ufldl.stanford.edu/housenumbers/test_32x32.mat",
            "eb5a983be6a315427106f1b164d9cef3",
        ),
    ),
}


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
        raise UserError(f"cannot fetch {name!r}: choose one of {', '.join(_ARCHIVES)}")
    root = Path(root).expanduser()
    for archive in _ARCHIVES[name]:
        path = root / archive.file_name
        if not _is_intact(path, archive.md5):
            _download(archive, path, opener, show_progress)
        if path.name.endswith(".tar.gz"):
            _unpack(path, root)
    return root


def _is_intact(path: Path, md5: str) -> bool:
    if not path.is_file():
        return False
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, _md5).hexdigest() == md5
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None


def _download(
    archive: _Archive, path: Path, opener: Callable[..., Any], show_progress: bool
) -> None:
    remedy = f"try again, or download {archive.url} by hand to {path}"

    def receive(temporary: Path) -> None:
        digest = _md5()
        with temporary.open("wb") as file, _progress(path.name, show_progress) as advance:
            for chunk, total in _chunks(archive.url, opener, remedy):
                file.write(chunk)
                digest.update(chunk)
                advance(len(chunk), total)
        if digest.hexdigest() != archive.md5:
            raise UserError(
                f"{archive.url} must have MD5 {archive.md5}; found {digest.hexdigest()}, and "
                f"removed it: {remedy}"
            )

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
        reason = _reason(error)
        raise UserError(f"cannot download {url} ({shown(reason)}): {remedy}") from None
    if total is not None and received < total:
        raise UserError(f"the download was cut after {received:,} of {total:,} bytes: {remedy}")


def _reason(error: Exception) -> str:
    if isinstance(error, urllib.error.HTTPError):
        error.close()
        return str(error)
    inner = error.reason if isinstance(error, urllib.error.URLError) else error
    return " ".join(str(inner).split()) or type(error).__name__


def _unpack(path: Path, root: Path) -> None:
    """Write the files of the tar at `path` below `root`, but for those that are there whole."""

    def missing(name: PurePosixPath, size: int) -> bool:
        there = root / name
        return not (there.is_file() and there.stat().st_size == size)

    for name, content in read_tar(path, missing):
        write_bytes(root / name, content)


@contextmanager
def _progress(label: str, show: bool) -> Iterator[Callable[[int, int | None], None]]:
    from rich import progress
    from rich.console import Console

    columns = (
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.DownloadColumn(),
        progress.TransferSpeedColumn(),
        progress.TimeRemainingColumn(),
    )
    with progress.Progress(*columns, console=Console(stderr=True), disable=not show) as bar:
        task = bar.add_task(label, total=None)
        yield lambda size, total: bar.update(task, advance=size, total=total)


def _md5() -> Any:
    return hashlib.md5(usedforsecurity=False)


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
                _refuse_harm(member, name, path, place)
                if member.isfile() and wanted(name, member.size):
                    yield name, _content(tar, member)
    except UserError:
        raise
    except (tarfile.TarError, EOFError, OSError, ValueError, zlib.error, RecursionError) as error:
        raise UserError(
            f"{path} must be a whole tar.gz archive ({shown(str(error), 200)}): it may be cut; "
            "download it again"
        ) from None


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    assert file is not None  # only links and devices have none
    return b"".join(iter(lambda: file.read(_CHUNK), b""))


def _refuse_harm(member: tarfile.TarInfo, name: PurePosixPath, path: Path, place: int) -> None:
    rule = None
    if not (member.isfile() or member.isdir()) or member.issparse():
        rule = "must hold files and folders only"
    elif name.is_absolute() or ".." in name.parts:
        rule = "must hold paths inside itself only"
    elif not 0 <= member.size <= LARGEST:
        rule = f"must hold files up to {LARGEST >> 20} MiB only"
    elif place >= _MEMBERS:
        rule = f"must hold up to {_MEMBERS:,} files"
    if rule:
        raise UserError(
            f"{path} {rule}; found {shown(member.name)!r}: it is not the official archive, "
            "remove it"
        )
