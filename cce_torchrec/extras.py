"""Packages that only some users want: loaded when they are used, and asked for in one sentence."""

from __future__ import annotations

import importlib
from types import ModuleType


class MissingExtra(ImportError):
    """A package of one of the extras in pyproject.toml is not installed."""


def load_extra(module: str, extra: str, purpose: str) -> ModuleType:
    """The module, which the extra `extra` of this package installs.

    Args:
        module: as it is imported: `torch.utils.tensorboard`.
        extra: of pyproject.toml.
        purpose: what cannot be done without it, as the subject of a sentence.

    Raises:
        MissingExtra: it is not installed, with the command that installs it.
    """
    try:
        return importlib.import_module(module)
    # Not ImportError: a package that is there and broken has to say how itself.
    except ModuleNotFoundError as error:
        raise MissingExtra(
            f"{purpose} needs {error.name}, which is not installed; "
            f"pip install 'cce-torchrec[{extra}]'"
        ) from error
