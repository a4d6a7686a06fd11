"""Files that commands write besides what they print."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

JSON_FILE = click.Path(dir_okay=False)
"""The type of `--json FILE`."""


def write_text(file: str | Path, text: str) -> None:
    """Replaces `file` by one that holds `text`, or leaves it as it was; makes folders above it.

    Raises:
        ValueError: naming the file, if it cannot be written.
    """
    # Here, as it loads torch.
    from cce_torchrec.checkpoint.location import make_folder, write_whole

    path = Path(file)
    make_folder(path.parent)
    write_whole(path, text)


def write_json(file: str | Path, found: dict[str, Any]) -> None:
    """The same with what was found, as JSON."""
    write_text(file, json.dumps(found, indent=1, default=str) + "\n")
