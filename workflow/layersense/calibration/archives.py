"""Files inside a zip, read as if the zip were a folder: ``val2017.zip/val2017/000000000139.jpg``.

Nothing is unpacked, so no name in a zip ever becomes a path on disk.
"""

import os
import zipfile
import zlib
from collections.abc import KeysView
from functools import lru_cache
from pathlib import Path, PurePosixPath

from layersense.errors import LayersenseError

MAX_MEMBER_BYTES = 4 * 2**30
"""Largest member that is inflated; COCO's largest file of annotations takes 0.5 GB."""


def read_file(path: str | Path, limit: int = MAX_MEMBER_BYTES) -> bytes:
    """Return the bytes of a file on disk or of a member of a zip.

    Args:
        path: a file, or a zip followed by a member's name.
        limit: the most bytes that a member of a zip may inflate to.

    Raises:
        OSError: it is missing or cannot be read.
        LayersenseError: the zip is damaged, or the member is encrypted or too large.
    """
    file = Path(path)
    place = find_member(file)
    if place is None:
        return file.read_bytes()
    archive, name = place
    # A zip may name a member twice or be replaced while it is open: it is asked as it is now.
    opened = _open(archive)
    try:
        member = opened.getinfo(name)
    except KeyError:
        raise FileNotFoundError(2, "No such file or directory", str(path)) from None
    if member.is_dir():
        raise IsADirectoryError(21, "Is a directory", str(path))
    if member.file_size > limit:
        raise LayersenseError(
            f"{path}: takes {member.file_size / 2**20:.0f} MiB unpacked, at most "
            f"{limit / 2**20:.0f} are read; unpack it, if that is right"
        )
    try:
        return opened.read(member)
    except RuntimeError as error:  # encrypted; NotImplementedError is one, too
        raise LayersenseError(
            f"{path}: cannot be read from its zip ({error}); unpack it, or make the zip without a "
            "password by deflate"
        ) from error
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, OSError) as error:
        raise LayersenseError(
            f"{path}: its zip is damaged ({error}); download {archive.name} again"
        ) from error


def is_file(path: str | Path) -> bool:
    """Return whether there is such a file, on disk or in a zip.

    Raises:
        LayersenseError: the zip is damaged.
    """
    file = Path(path)
    place = find_member(file)
    return file.is_file() if place is None else place[1] in _names(place[0])


def is_folder(path: str | Path) -> bool:
    """Return whether there is such a folder, on disk or in a zip; a whole zip is one.

    Raises:
        LayersenseError: the zip is damaged.
    """
    folder = Path(path)
    if folder.is_dir():
        return True
    if folder.is_file():
        return zipfile.is_zipfile(folder)
    place = find_member(folder)
    return place is not None and any(name.startswith(f"{place[1]}/") for name in _names(place[0]))


def image_folder(path: Path) -> Path:
    """Return the folder of images that ``path`` means: of a zip, the one folder in it if any.

    COCO's ``val2017.zip`` holds everything below ``val2017/``, which no file name repeats.

    Raises:
        LayersenseError: the zip is damaged.
    """
    if path.is_dir() or not path.is_file():
        return path
    tops = {PurePosixPath(name).parts[0] for name in _names(path) if name.strip("/")}
    top = tops.pop() if len(tops) == 1 else ""
    return path / top if top and top not in _names(path) else path


def find_in_zips(folders: list[Path], name: str) -> Path | None:
    """Return the first member called ``name``, wherever it lies in a zip of these folders.

    Raises:
        LayersenseError: a zip is damaged.
    """
    for folder in folders:
        for archive in sorted(folder.glob("*.zip")):
            for member in sorted(_names(archive)):
                if PurePosixPath(member).name == name:
                    return archive / member
    return None


def find_member(path: Path) -> tuple[Path, str] | None:
    """Return zip and member that a path means, None if it goes through no file."""
    if path.exists():
        return None
    for parent in path.parents:
        if parent.is_file():
            return parent, path.relative_to(parent).as_posix()
        if parent.exists():
            return None
    return None


def _names(archive: Path) -> KeysView[str]:
    # What `getinfo` finds. No copy of it: COCO's largest zip is asked for each of its images.
    return _open(archive).NameToInfo.keys()


def _open(archive: Path) -> zipfile.ZipFile:
    try:
        about = archive.stat()
        # A process that was forked shares the position of an open file, so it opens its own.
        return _opened(archive, about.st_mtime_ns, about.st_size, os.getpid())
    except (zipfile.BadZipFile, NotImplementedError, ValueError, EOFError) as error:
        raise LayersenseError(
            f"{archive}: is not a whole zip file ({error}); download it again"
        ) from error


@lru_cache(maxsize=8)
def _opened(archive: Path, modified: int, size: int, process: int) -> zipfile.ZipFile:
    """Return an open zip; reading its list of members takes a second for COCO's largest.

    Its members may be read by several threads at once.
    """
    return zipfile.ZipFile(archive)
