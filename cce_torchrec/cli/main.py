"""The group of all commands, each of which is loaded only when it is called or asked for help."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

import click
from click.shell_completion import CompletionItem

from cce_torchrec.yaml_files import nearest

COMMANDS: Mapping[str, str] = {
    "train": "Train DLRM or GMF with full or compressed tables.",
    "plan": "Say what tables take, and where they would be, before a GPU is booked.",
    "inspect": "Say what a checkpoint holds, and how its clusters are.",
    "diff": "Compare two checkpoints.",
    "align": "Say how far the vectors of two runs agree.",
    "compress": "Make a CCE checkpoint of a plain TorchRec one.",
    "export": "Write a trained model's tables for serving.",
    "serve-check": "Compare an export with what the trained model gave.",
    "advise": "Say what to make of the tables of a data set.",
    "report": "Write a page in HTML about one run, or several beside each other.",
    "bench": "Run one of the benchmarks.",
}
"""With what the group's help says of them, so that it needs to load none."""


class Commands(click.Group):
    """Loads `cce_torchrec.cli.NAME` and takes its `command`."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """All of them, in the order of `COMMANDS`."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command:
        """The command.

        Raises:
            click.UsageError: there is none of this name.
        """
        if cmd_name not in COMMANDS:
            ctx.fail(f"no command {cmd_name!r}{nearest(cmd_name, COMMANDS)}")
        name = cmd_name.replace("-", "_")
        return importlib.import_module(f"cce_torchrec.cli.{name}").command

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Names of commands without loading these, and options of the group."""
        # click's own asks each command for its help, and so loads all of them.
        names = [
            CompletionItem(name, help=said)
            for name, said in COMMANDS.items()
            if name.startswith(incomplete)
        ]
        return [*names, *click.Command.shell_complete(self, ctx, incomplete)]

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """A line of help for each, without loading it."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def invoke(self, ctx: click.Context) -> Any:
        """Runs a command; what a user can cure ends it with one sentence and status 1."""
        try:
            return super().invoke(ctx)
        # Anything else is a fault of ours, whose place has to be seen.
        except (ValueError, OSError, ImportError) as error:
            raise click.ClickException(str(error)) from error


@click.command(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="cce-torchrec")
def command() -> None:
    """Embedding tables that are trained compressed (CCE), for TorchRec."""
