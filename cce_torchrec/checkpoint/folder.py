"""A folder of checkpoints: which there are, the latest, and which may go.

folder/step-000000100-0007/        the seventh save into the folder, after step 100
folder/step-000000100-0007-best/   the same, pinned as the best
    manifest.json                  written last: a folder without it is no checkpoint
    tensors.json, rank-0.safetensors, rank-0.json, ...

Nothing is renamed and nothing points to the latest, so that an object store will do.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from cce_torchrec.bars import bar
from cce_torchrec.checkpoint.location import (
    entries,
    fingerprint,
    location,
    make_folder,
    remove,
    write_whole,
)
from cce_torchrec.checkpoint.manifest import FORMAT, READABLE, Fingerprint, Manifest
from cce_torchrec.signed import is_as_written, shown, signed
from cce_torchrec.spans import span

logger = logging.getLogger(__name__)

RUN_FOLDER = "checkpoints"
"""Where a run of the training program has its checkpoints, in its --out."""

MANIFEST = "manifest.json"
_POINTER = "latest"
"""A file of format 2, with the name of its latest checkpoint."""
_NAME = re.compile(r"step-(?P<step>\d{9,})(?:-again|-(?P<number>\d{4,})(?:-(?P<pin>\w+))?)?")
_NAME_OF_FORMAT_2 = re.compile(r"step-\d{9,}(-again)?")
_LEFT_BY_FORMAT_2 = re.compile(r"\.(writing|pruned)-step-\d{9,}.*")


class _Saved(NamedTuple):
    """A folder by the name of a checkpoint; of two the later one is the larger."""

    number: int
    """Of the save into this folder, -1 in format 2, which has none."""
    pointed: bool
    """Whether format 2 says that it is the latest."""
    step: int
    path: Path
    pin: str
    """Empty where it has none."""


def _saved(folder: Path) -> list[_Saved]:
    """The checkpoints in `folder`, whole or not, the latest first."""
    inside = entries(folder)
    pointed = _pointed(inside)
    found = []
    for path in inside:
        if match := _NAME.fullmatch(path.name):
            number, pin = int(match["number"] or -1), match["pin"] or ""
            found.append(_Saved(number, path.name == pointed, int(match["step"]), path, pin))
    return sorted(found, key=lambda one: (one.number, one.pointed, one.step), reverse=True)


def _pointed(inside: Iterable[Path]) -> str:
    """The name that format 2's pointer among the files `inside` a folder has; "" without it."""
    for path in inside:
        if path.name == _POINTER and path.is_file():  # a user's link or folder may be called so
            name = path.read_bytes().decode(errors="replace").strip()
            return name if _NAME_OF_FORMAT_2.fullmatch(name) else ""
    return ""


def _is_whole(checkpoint: Path) -> bool:
    return (checkpoint / MANIFEST).is_file()


def _refuse_checkpoint(folder: Path) -> None:
    """Raises ValueError if `folder` is one checkpoint, in which there are no others."""
    if _is_whole(folder):
        raise ValueError(
            f"{folder} is one checkpoint, and no folder of a job; give the folder that it is in"
        )


def begin(folder: Path, step: int, pin: str) -> Path:
    """Removes what was never finished, and makes the folder of a new checkpoint."""
    _refuse_checkpoint(folder)
    make_folder(folder)
    saved = _saved(folder)
    # Format 2 renamed what was whole: a folder without a number is not ours to remove.
    clear(one.path for one in saved if one.number >= 0 and not _is_whole(one.path))
    clear(path for path in entries(folder) if _LEFT_BY_FORMAT_2.fullmatch(path.name))
    number = 1 + max([0, *(one.number for one in saved)])
    checkpoint = folder / f"step-{step:09d}-{number:04d}{pin and '-'}{pin}"
    make_folder(checkpoint)
    return checkpoint


def commit(checkpoint: Path, manifest: Manifest, keep: int) -> Path:
    """Turns a folder that is written into the latest checkpoint; then removes old ones."""
    # Where each machine has a disk of its own, rank 0 sees only what its own machine wrote.
    listed = {path.name for path in entries(checkpoint)}
    # Network file systems list late what other machines wrote, and find it by name at once.
    missing = [n for n in sorted(manifest.files.keys() - listed) if not (checkpoint / n).is_file()]
    if missing:
        raise ValueError(
            f"{checkpoint}: rank 0 does not see files {missing} that other ranks wrote; "
            "checkpoints need a folder that all ranks share"
        )
    # Last of all files, so that a folder with a manifest is whole.
    write_whole(checkpoint / MANIFEST, json.dumps(signed(manifest.to_json())))
    try:
        _rotate(checkpoint.parent, keep)
    except Exception as error:  # the new one is in place, and its caller discards what has failed
        logger.warning("%s: old checkpoints stay (%s)", checkpoint.parent, error)
    return checkpoint


def clear(checkpoints: Iterable[Path]) -> None:
    """Removes each of `checkpoints`, and logs which it cannot: it is in nobody's way."""
    for checkpoint in checkpoints:
        try:
            remove(checkpoint, MANIFEST)
        except Exception as error:  # clients of object stores have errors that are no OSError
            logger.warning("%s cannot be removed (%s); remove it by hand", checkpoint, error)


def _rotate(folder: Path, keep: int) -> None:
    """Removes all checkpoints but the `keep` latest, and the latest of each pin."""
    if _pointed(entries(folder)):
        (folder / _POINTER).unlink()
    pins, old = {""}, []
    for place, one in enumerate(one for one in _saved(folder) if _is_whole(one.path)):
        if place >= keep and one.pin in pins:
            old.append(one.path)
        pins.add(one.pin)
    clear(old)


def latest_checkpoint(folder: str | Path, *, pin: str | None = None) -> Path | None:
    """The checkpoint that a restart reads, None where none was finished yet.

    Args:
        folder: of the job, local or the URI of an object store.
        pin: the latest of those that were saved with `save_checkpoint(..., pin=pin)`.

    Raises:
        ValueError: `folder` is one checkpoint.
    """
    _refuse_checkpoint(location(folder))
    for one in _saved(location(folder)):
        if pin in (None, one.pin) and _is_whole(one.path):
            return one.path
    return None


def find(folder: Path) -> Path:
    """`folder` itself if it is a checkpoint, otherwise the latest one in it.

    A folder of a run of the training program has its checkpoints in `RUN_FOLDER` below it.

    Raises:
        ValueError: there is none.
    """
    if _is_whole(folder):
        return folder
    latest = latest_checkpoint(folder) or latest_checkpoint(folder / RUN_FOLDER)
    if latest is not None:
        return latest
    halves = [one.path.name for one in [*_saved(folder), *_saved(folder / RUN_FOLDER)]]
    hint = f"; {halves} have no {MANIFEST}, and were not finished" if halves else ""
    if not halves and (folder / "run.json").exists():
        hint = "; the training program saves them with --checkpoint-every STEPS"
    raise ValueError(f"no checkpoint in {folder}: no folder step-... with a {MANIFEST}{hint}")


def read_manifest(checkpoint: Path) -> Manifest:
    """The manifest of a checkpoint.

    Raises:
        ValueError: it cannot be read, or another format wrote it.
    """
    file = checkpoint / MANIFEST
    try:
        found = json.loads(file.read_text())
        # Those of older versions have none.
        if not is_as_written(found, needed=False):
            raise ValueError("its checksum differs")
        format_ = found["format"]
        if format_ in READABLE:  # the fields of others are other ones
            return Manifest.from_json(found)
    except Exception as error:  # whatever a damaged one leads to
        raise ValueError(f"{file} is damaged ({error}); load another checkpoint") from error
    remedy = "update cce_torchrec" if isinstance(format_, int) and format_ > FORMAT else "save anew"
    raise ValueError(
        f"{file} has format {shown(format_)}; this version reads "
        f"{', '.join(map(str, READABLE[:-1]))} and {FORMAT}: {remedy}"
    )


def verify(checkpoint: Path, files: dict[str, Fingerprint]) -> None:
    """Compares files with the fingerprints of the manifest.

    Raises:
        ValueError: naming the file that is missing, short or changed.
    """
    shown = bar(sum(file.size for file in files.values()), "checking the checkpoint", "B")
    with span("checkpoint load, verify"), shown:
        for name, expected in files.items():
            _verify(checkpoint / name, expected)
            shown.update(expected.size)


def _verify(file: Path, expected: Fingerprint) -> None:
    if not file.is_file():  # to read a pipe or a device would not end
        raise ValueError(f"{file} is missing; load another checkpoint")
    found = file.stat().st_size
    # Of a write that was cut short the size says more than a checksum, and is there at once.
    if found != expected.size:
        raise ValueError(
            f"{file} has {found} bytes, its manifest says {expected.size}; load another checkpoint"
        )
    if fingerprint(file) != expected:
        raise ValueError(f"{file} is damaged (its checksum differs); load another checkpoint")
