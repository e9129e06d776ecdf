"""Tar archives from elsewhere, read member by member, so that none of them can do harm."""

import tarfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

from defquant.errors import UserError

__all__ = ["read_tar"]

_LARGEST = 1 << 27
"""Bytes of one member; the official ones have 31 million."""


def read_tar(
    path: Path, wanted: Callable[[PurePosixPath, int], bool]
) -> Iterator[tuple[PurePosixPath, bytes]]:
    """Name and content of each regular file in the tar.gz at `path` for which `wanted(name, size)`.

    Raises `UserError` where the archive is cut or broken, or holds a link, a device, a file above
    128 MiB, or a path that is absolute or climbs out with `..`.
    """
    try:
        with tarfile.open(path, "r:gz") as tar:
            for member in tar:
                name = PurePosixPath(member.name)
                _refuse_harm(member, name, path)
                if member.isfile() and wanted(name, member.size):
                    file = tar.extractfile(member)
                    assert file is not None  # only links and devices have none
                    yield name, file.read()
    except UserError:
        raise
    except (tarfile.TarError, EOFError, OSError, ValueError, zlib.error) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"{path} must be a whole tar.gz archive ({reason}): it may be cut; download it again"
        ) from None


def _refuse_harm(member: tarfile.TarInfo, name: PurePosixPath, path: Path) -> None:
    rule = None
    if not (member.isfile() or member.isdir()):
        rule = "must hold files and folders only"
    elif name.is_absolute() or ".." in name.parts:
        rule = "must hold paths inside itself only"
    elif member.size > _LARGEST:
        rule = f"must hold files up to {_LARGEST >> 20} MiB only"
    if rule:
        raise UserError(
            f"{path} {rule}; found {member.name!r}: it is not the official archive, remove it"
        )
