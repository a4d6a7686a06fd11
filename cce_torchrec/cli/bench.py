"""`cce-torchrec bench`: the benchmarks of the repository, and one that needs no checkout."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import click

from cce_torchrec.yaml_files import nearest

_BESIDE = Path(__file__).parents[2]
_FOLDER = "benchmarks"
_NAME = b'name = "cce-torchrec"'
_STEP = "a training step of your table here, plain and CCE; needs no checkout"


def _root() -> Path | None:
    """The checkout: where the package is, or where an installed one is called; None if neither."""
    for root in (_BESIDE, Path()):
        about = root / "pyproject.toml"
        # Others have a folder of this name, too, and a file in whatever encoding.
        if (root / _FOLDER).is_dir() and about.is_file() and _NAME in about.read_bytes():
            return root.absolute()
    return None


def _modules() -> dict[str, Path]:
    """Programs of the checkout by their names; none where there is no checkout."""
    root = _root()
    if root is None:
        return {}
    folder = root / _FOLDER
    found = {file.stem: file for file in folder.glob("*.py")}
    found |= {file.parent.name: file for file in folder.glob("*/__main__.py")}
    programs = {name: file for name, file in found.items() if "__main__" in file.read_text()}
    return dict(sorted(programs.items()))


def _said(file: Path) -> str:
    """What the first line of a program says of it."""
    lines = (ast.get_docstring(ast.parse(file.read_text())) or "").splitlines()
    # Some begin with how they are called, and say what they are behind it, or below.
    for line in lines:
        called, _, behind = line.partition("`: ")
        said = behind if called.startswith("`python") else line.strip()
        if said and not said.startswith(("`python", "python -m")):
            lower = said[:1].lower() if said[1:2].islower() or said[1:2] == " " else said[:1]
            return f"{lower}{said[1:]}".rstrip(".")
    return ""


def _no_checkout(name: str) -> ValueError:
    return ValueError(
        f"benchmark {name!r}: the benchmarks are in the folder `{_FOLDER}` of the repository, and "
        "this is an installed package without it; clone the repository, and call it there"
    )


@click.pass_context
def _run(ctx: click.Context) -> None:
    name = str(ctx.info_name).replace("-", "_")
    root = _root()
    if root is None or name not in _modules():
        raise _no_checkout(name)
    # Not where the call is made from, whose folder may have a `benchmarks` of its own.
    paths = [str(root), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONSAFEPATH": "1"}
    program = [sys.executable, "-m", f"{_FOLDER}.{name}", *ctx.args]
    raise SystemExit(subprocess.run(program, env=env).returncode)


class Benchmarks(click.Group):
    """`step`, and whatever is in the checkout."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """All of them."""
        return ["step", *_modules()]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The built-in one, or one that hands its options on; None if there is none."""
        if cmd_name == "step":
            from cce_torchrec.cli.bench_step import command as step

            return step
        if _modules() and cmd_name.replace("-", "_") not in _modules():
            return None
        return click.Command(
            cmd_name,
            callback=_run,
            # Its own help is the benchmark's.
            add_help_option=False,
            context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
        )

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """The command that is called, with its own arguments."""
        if args and self.get_command(ctx, args[0]) is None:
            known = self.list_commands(ctx)
            raise click.UsageError(f"no benchmark {args[0]!r}{nearest(args[0], known)}", ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """A line of help for each."""
        with formatter.section("Benchmarks"):
            formatter.write_dl(_lines())


def _lines() -> list[tuple[str, str]]:
    return [("step", _STEP), *((name, _said(file)) for name, file in _modules().items())]


def _list(ctx: click.Context, parameter: click.Parameter, value: bool) -> None:
    # Completion parses too, and must not end the process.
    if not value or ctx.resilient_parsing:
        return
    for name, said in _lines():
        click.echo(f"{name:16}{said}")
    if not _modules():
        click.echo(f"the others are in the folder `{_FOLDER}` of the repository")
    ctx.exit()


@click.command(
    cls=Benchmarks,
    subcommand_metavar="NAME [ARGS]...",
    epilog="Example: cce-torchrec bench kmeans --quick",
)
@click.option(
    "--list", is_flag=True, is_eager=True, expose_value=False, callback=_list,
    help="say what there is, in a line each",
)  # fmt: skip
def command() -> None:
    """Run one of the benchmarks.

    NAME is `step`, which comes with the package, or a program of the repository's folder
    benchmarks, which `python -m benchmarks.NAME ARGS` would start; ARGS are its own.
    """
