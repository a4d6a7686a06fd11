"""Options that say how the model reads tables, where a checkpoint does not."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from cce_torchrec.checkpoint.read_as import ReadAs


class Assignment(click.ParamType):
    """TABLE=VALUE."""

    name = "table=value"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, str]:
        """The name and the value."""
        if isinstance(value, tuple):
            return value
        table, found, said = str(value).partition("=")
        if not (found and table.strip() and said.strip()):
            self.fail(f"{value!r} is not TABLE=VALUE", param, ctx)
        return table.strip(), said.strip()


def reading_options(default: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Gives a command `--features`, `--pooling` and `--weighted`; `default`: what holds else."""

    def give(command: Callable[..., Any]) -> Callable[..., Any]:
        # Decorators put the last one first.
        for option in reversed(
            [
                click.option(
                    "--features",
                    type=Assignment(),
                    multiple=True,
                    metavar="TABLE=A,B",
                    help=f"features that read a table; default {default}, or the table's name",
                ),
                click.option(
                    "--pooling",
                    type=Assignment(),
                    multiple=True,
                    metavar="TABLE=sum|mean",
                    help=f"of the bags of a table; default {default}, or sum",
                ),
                click.option(
                    "--weighted/--not-weighted",
                    default=None,
                    help=f"whether ids have weights; default {default}, or not",
                ),
            ]
        ):
            command = option(command)
        return command

    return give


def read_as(
    features: tuple[tuple[str, str], ...],
    pooling: tuple[tuple[str, str], ...],
    weighted: bool | None,
) -> ReadAs:
    """What the three options say."""
    from cce_torchrec.checkpoint.read_as import ReadAs

    named = {
        table: [name.strip() for name in said.split(",") if name.strip()]
        for table, said in features
    }
    return ReadAs(features=named, pooling=dict(pooling), weighted=weighted)
