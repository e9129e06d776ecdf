"""Tar archives from elsewhere, read member by member, so that none of them can do harm."""

import gzip
import tarfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

from defquant.errors import UserError, shown
from defquant.files import opened

__all__ = ["LARGEST", "read_tar"]

LARGEST = 1 << 26
"""Bytes of one member; the official ones have 31 million."""
_WHOLE = 1 << 30
_MEMBERS = 1000
_STEP = 1 << 20


class _Limited(gzip.GzipFile):
    """A tar.gz unpacked, whose reader may not ask for as much as a header claims.

    `tarfile` reads a long name at one go, however long, and follows a size below 0 back.
    """

    def read(self, size: int | None = -1) -> bytes:
        if size is None or not 0 <= size <= _STEP:
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
    return b"".join(iter(lambda: file.read(_STEP), b""))


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
