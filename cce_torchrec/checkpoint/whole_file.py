"""Files that appear under their name when they are whole."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A name beside `path` to write under, which is renamed where nothing failed, else removed.

    Raises:
        ValueError: it cannot be written, naming `path`.
    """
    writing = path.with_name(f".{path.stem}.writing-{os.getpid()}{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield writing
        writing.rename(path)
    except OSError as error:
        raise ValueError(f"{path} cannot be written ({error})") from error
    finally:
        with contextlib.suppress(OSError):
            writing.unlink(missing_ok=True)
