"""Checkpoints on disk: a folder each, renamed into place when it is whole, and a pointer.

folder/latest               name of the last whole checkpoint, replaced by rename
folder/step-000000100/      manifest.json (written last), .metadata, __r_0.distcp, rank-r.json
folder/.writing-.../        a checkpoint that is being written, or was when the job was killed
"""

from __future__ import annotations

import json
import os
import shutil
import zlib
from pathlib import Path

from cce_torchrec.checkpoint.manifest import FORMAT, Fingerprint, Manifest

LATEST = "latest"
MANIFEST = "manifest.json"
_WRITING = ".writing-"
_PRUNED = ".pruned-"
_BLOCK = 1 << 22


def write_durably(path: Path, text: str) -> None:
    """Replaces `path` by a file that holds `text`, or leaves it as it was."""
    # Renamed into place, as a kill may stop a write anywhere but no rename halfway.
    beside = path.with_name(f".{path.name}.new")
    with beside.open("w") as file:
        file.write(text)
        file.flush()
        # Before the rename: else a power cut may leave the new name with none of the content.
        os.fsync(file.fileno())
    beside.rename(path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Makes renames inside `folder` durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def begin(folder: Path, step: int) -> tuple[Path, str]:
    """An empty folder to write the checkpoint of `step` into, and the name it will have."""
    folder.mkdir(parents=True, exist_ok=True)
    for stale in [*folder.glob(f"{_WRITING}*"), *folder.glob(f"{_PRUNED}*")]:
        shutil.rmtree(stale)
    name = f"step-{step:09d}"
    if name == _pointed(folder):  # never touch the checkpoint that a restart would read
        name += "-again"
    writing = folder / f"{_WRITING}{name}"
    writing.mkdir()
    return writing, name


def commit(writing: Path, name: str, manifest: Manifest, keep: int) -> Path:
    """Turns a folder that is written into the latest checkpoint; then removes old ones."""
    folder = writing.parent
    # Where each machine has a disk of its own, rank 0 sees only what its own machine wrote.
    missing = [file for file in manifest.files if not (writing / file).exists()]
    if missing:
        raise ValueError(
            f"{folder}: rank 0 does not see files {missing} that other ranks wrote; checkpoints "
            "need a folder that all ranks share"
        )
    # Last of all files, so that a folder with a manifest is whole.
    write_durably(writing / MANIFEST, json.dumps(manifest.to_json()))
    final = folder / name
    if final.exists():  # left by a kill between the two renames below, or an older run
        _remove(final)
    writing.rename(final)
    sync_folder(folder)
    write_durably(folder / LATEST, name + "\n")
    for old in _whole(folder)[keep:]:
        if old.name != name:
            _remove(old)
    return final


def _remove(checkpoint: Path) -> None:
    """Removes a checkpoint; a kill halfway leaves nothing that looks like one."""
    pruned = checkpoint.with_name(f"{_PRUNED}{checkpoint.name}")
    checkpoint.rename(pruned)
    shutil.rmtree(pruned)


def _pointed(folder: Path) -> str | None:
    pointer = folder / LATEST
    return pointer.read_text().strip() if pointer.exists() else None


def _whole(folder: Path) -> list[Path]:
    """Checkpoints in `folder`, newest first."""
    # By time: of step-000000003 and step-000000003-again either may be the newer one.
    found = [path for path in folder.glob("step-*") if (path / MANIFEST).exists()]
    return sorted(found, key=lambda path: (path / MANIFEST).stat().st_mtime_ns, reverse=True)


def latest_checkpoint(folder: str | Path) -> Path | None:
    """The checkpoint that a restart reads, None where none was finished yet."""
    folder = Path(folder)
    name = _pointed(folder)
    return folder / name if name is not None else None


def find(folder: Path) -> Path:
    """`folder` itself if it is a checkpoint, otherwise the latest one in it.

    Raises:
        ValueError: there is none.
    """
    if (folder / MANIFEST).exists():
        return folder
    latest = latest_checkpoint(folder)
    if latest is not None and (latest / MANIFEST).exists():
        return latest
    others = [str(path) for path in _whole(folder)]
    hint = f"; load one of {others} by its path" if others else ""
    if latest is not None:
        raise ValueError(f"{latest} has no {MANIFEST}, so it is no whole checkpoint{hint}")
    raise ValueError(f"no checkpoint in {folder}: it has no file {LATEST!r}{hint}")


def read_manifest(checkpoint: Path) -> Manifest:
    """The manifest of a checkpoint.

    Raises:
        ValueError: it cannot be read, or another format wrote it.
    """
    file = checkpoint / MANIFEST
    try:
        found = json.loads(file.read_text())
        format_ = found["format"]
        if format_ == FORMAT:  # the fields of others are other ones
            return Manifest.from_json(found)
    except (OSError, AttributeError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is damaged ({error}); load another checkpoint") from error
    raise ValueError(f"{file} has format {format_}; this version reads {FORMAT}")


def fingerprint(file: Path) -> Fingerprint:
    """Size and CRC-32 of a file."""
    crc, size = 0, 0
    # Block by block: a file may have more bytes than a machine has memory left.
    with file.open("rb") as stream:
        while block := stream.read(_BLOCK):
            crc = zlib.crc32(block, crc)
            size += len(block)
    return Fingerprint(size, crc)


def verify(checkpoint: Path, files: dict[str, Fingerprint]) -> None:
    """Compares files with the fingerprints of the manifest.

    Raises:
        ValueError: naming the file that is missing, short or changed.
    """
    for name, expected in files.items():
        file = checkpoint / name
        if not file.exists():
            raise ValueError(f"{file} is missing; load another checkpoint")
        found = file.stat().st_size
        # Of a write that was cut short the size says more than a checksum, and is there at once.
        if found != expected.size:
            raise ValueError(
                f"{file} has {found} bytes, its manifest says {expected.size}; load another "
                "checkpoint"
            )
        if fingerprint(file) != expected:
            raise ValueError(f"{file} is damaged (its checksum differs); load another checkpoint")
