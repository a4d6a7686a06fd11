"""Files that appear under their name when they are whole."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A name beside `path` to write under, which is renamed where nothing failed, else removed.

    Raises:
        ValueError: it cannot be written, naming `path`.
    """
    # Of this thread alone: others may write under the same name at the same time.
    own = f"{os.getpid()}-{threading.get_ident()}"
    writing = path.with_name(f".{path.stem}.writing-{own}{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield writing
        if path.exists():  # since the caller looked
            raise FileExistsError(f"{path} is there by now")
        writing.rename(path)
    except OSError as error:
        raise ValueError(f"{path} cannot be written ({error})") from error
    finally:
        with contextlib.suppress(OSError):
            writing.unlink(missing_ok=True)


@contextlib.contextmanager
def folder_beside(path: Path) -> Iterator[Path]:
    """A folder beside `path` to write in, from which the caller renames; removed at the end.

    Raises:
        ValueError: it cannot be written, or what is renamed is there by now, naming `path`.
    """
    writing = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        writing = Path(tempfile.mkdtemp(prefix=f".{path.name}.writing-", dir=path.parent))
        yield writing
    except OSError as error:
        raise ValueError(f"{path} cannot be written ({error})") from error
    finally:
        if writing is not None:
            shutil.rmtree(writing, ignore_errors=True)
