"""How options are made, with their defaults in what `--help` says."""

from __future__ import annotations

from typing import Any

import click


def option(*names: str, help: str, **kwargs: Any) -> click.Option:
    """An option of the command line and of the configuration file; None unless it has a default."""
    if isinstance(kwargs.get("default"), str | int | float) and not kwargs.get("is_flag"):
        kwargs["show_default"] = True
    return click.Option(names, help=help, **kwargs)


def flag(*names: str, help: str) -> click.Option:
    """An option that is off unless it is named."""
    return click.Option(names, help=help, is_flag=True, default=False)


def choice(*values: str) -> click.Choice[str]:
    """One of the values, in these letters."""
    return click.Choice(values)
