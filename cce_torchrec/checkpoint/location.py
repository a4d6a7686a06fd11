"""Where checkpoints are: local folders, and object stores by their URIs.

Both are paths with the methods of `pathlib`: a local one is Python's own, one of an object store is
that of universal_pathlib, over fsspec. What differs between the two is here: a local write is
synced and renamed into place, a write to an object store is there as a whole or not at all.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from cce_torchrec.checkpoint.manifest import Fingerprint

_BLOCK = 1 << 22
_EXTRA = "cce-torchrec[object-stores]"


def location(folder: str | Path) -> Path:
    """`folder` as a path: a local one, or of an object store for a URI such as `s3://bucket/run`.

    Raises:
        ValueError: it is no path and no URI that anything here can open, or a package is missing.
    """
    if isinstance(folder, str):
        folder = _opened(folder) if "://" in folder else Path(folder)
    if store_of(folder) is None and re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", str(folder)):
        raise ValueError(
            f"{folder} would be a local folder; pass a URI as text with two slashes "
            "(s3://bucket/run), of which Path leaves one"
        )
    # universal_pathlib has local paths too, which would be taken for those of an object store.
    local = getattr(folder, "protocol", None) in ("", "file", "local")
    return Path(str(folder.path)) if local else folder  # type: ignore[attr-defined]  # UPath's


def _opened(folder: str) -> Path:
    """The path of a URI."""
    scheme, _, rest = folder.partition("://")
    if scheme.lower() == "file":
        if not rest.startswith("/"):  # which would be made below the working directory
            raise ValueError(
                f"{folder} names a host, or no whole path; write file:///path, or the path alone"
            )
        return Path(rest)
    try:
        from upath import UPath
    except ImportError as error:
        raise ValueError(
            f"{folder}: checkpoints in object stores need fsspec and universal_pathlib; "
            f"pip install '{_EXTRA}'"
        ) from error
    try:
        # Without its cache of listings: other ranks write files that it would not have.
        path: Any = UPath(folder, use_listings_cache=False)
        path.fs  # noqa: B018  # the package of the scheme is loaded here
    except (ImportError, ValueError) as error:
        raise ValueError(
            f"{folder}: fsspec cannot open {scheme}:// ({error}); use a local folder, or a scheme "
            f"of fsspec whose package is installed ({_EXTRA} has that of s3)"
        ) from error
    return path


def store_of(path: Path) -> Any:
    """fsspec's file system of `path`; None where it is local."""
    return getattr(path, "fs", None)


def make_folder(folder: Path) -> None:
    """Makes a local folder and those above it; object stores have none.

    Raises:
        ValueError: naming the folder, if it cannot be made.
    """
    if store_of(folder) is not None:
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        sync_folder(folder.parent)
    except OSError as error:
        raise ValueError(f"{folder} cannot be written ({error})") from error


def entries(folder: Path) -> list[Path]:
    """What is in `folder`; nothing where there is no such folder.

    Raises:
        ValueError: naming the folder, if it cannot be asked.
    """
    if store_of(folder) is not None:
        store_of(folder).invalidate_cache()  # which would hide what other ranks have written
    try:
        return list(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
    except Exception as error:  # clients of object stores have errors that are no OSError
        raise ValueError(f"{folder} cannot be read ({error})") from error


def remove(checkpoint: Path, first: str) -> None:
    """Removes a checkpoint, its file `first` before the others, without which it is none."""
    (checkpoint / first).unlink(missing_ok=True)
    for file in entries(checkpoint):
        file.unlink()
    if store_of(checkpoint) is None:
        checkpoint.rmdir()


def write(path: Path, parts: Iterable[Any]) -> Fingerprint:
    """Writes a file of `parts`, bytes each, and returns what it is.

    Raises:
        ValueError: naming the file, if it could not be written.
    """
    crc, size = 0, 0
    try:
        with path.open("wb") as file:
            for part in parts:
                file.write(part)
                crc = zlib.crc32(part, crc)
                size += len(part)
            if store_of(path) is None:
                file.flush()
                # A power cut may otherwise leave a manifest beside files without their content.
                os.fsync(file.fileno())
    except Exception as error:  # clients of object stores have errors that are no OSError
        raise ValueError(f"{path} cannot be written ({error})") from error
    return Fingerprint(size, crc)


def write_whole(path: Path, text: str) -> Fingerprint:
    """Replaces `path` by a file that holds `text`, or leaves it as it was.

    Raises:
        ValueError: naming the file, if it could not be written.
    """
    if store_of(path) is not None:  # an object is replaced by its last byte
        return write(path, [text.encode()])
    # Renamed into place, as a kill may stop a write anywhere but no rename halfway.
    beside = path.with_name(f".{path.name}.new")
    try:
        written = write(beside, [text.encode()])
        beside.rename(path)
        sync_folder(path.parent)
    except (OSError, ValueError) as error:
        with contextlib.suppress(OSError):  # a disk that is full would keep a part of it
            beside.unlink(missing_ok=True)
        if isinstance(error, ValueError):
            raise
        raise ValueError(f"{path} cannot be written ({error})") from error
    return written


def sync_folder(folder: Path) -> None:
    """Makes new names inside a local `folder` durable, where its file system can."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        # Some network and FUSE file systems sync files, and refuse to sync a folder.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)


def fingerprint(file: Path) -> Fingerprint:
    """Size and CRC-32 of a file."""
    crc, size = 0, 0
    # Block by block: a file may have more bytes than a machine has memory left.
    with file.open("rb") as stream:
        while block := stream.read(_BLOCK):
            crc = zlib.crc32(block, crc)
            size += len(block)
    return Fingerprint(size, crc)
