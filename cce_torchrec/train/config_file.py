"""`--config FILE`: the options of a run in YAML, and config.yaml, which a run leaves behind."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from cce_torchrec.train.parameters import BUDGETS, CALL, SETTINGS
from cce_torchrec.yaml_files import nearest, read_yaml, write_yaml

_KEY = "cce_torchrec.config"
"""Where a context has what its file said."""
_BY_NAME = {str(parameter.name): parameter for parameter in SETTINGS}
_YES_AND_NO = {True: "yes", False: "no"}  # as YAML reads these words


def names() -> list[str]:
    """Of the options that a configuration file may hold, in the order of the help."""
    return list(_BY_NAME)


def option_name(name: str) -> str:
    """`--table-bytes` of `table_bytes`."""
    return "--" + name.replace("_", "-")


def read_config(ctx: click.Context, parameter: click.Parameter, file: str | None) -> str | None:
    """The callback of `--config`, which comes before all others: its values become defaults.

    Raises:
        click.UsageError: naming the file and the key, if one is unknown or has no such value.
    """
    if file is None:
        return None
    try:
        found = read_yaml(file)
    except (ValueError, ImportError) as error:
        raise click.UsageError(str(error)) from error
    if found is None:  # an empty file
        found = {}
    if not isinstance(found, dict):
        raise click.UsageError(f"{file}: options are lines `name: value`, which these are not")
    # By the names of parameters, so that two spellings of an option are one.
    values: dict[str, Any] = {}
    for key, value in found.items():
        name = _known(file, key)
        if name in values:
            raise click.UsageError(f"{file}: {name} stands there in two spellings")
        if value is not None:
            values[name] = _value(ctx, file, name, value)
    _refuse_two_budgets(file, [name for name in values if name in BUDGETS])
    ctx.default_map = values
    ctx.meta[_KEY] = (file, values)
    return file


def settle(ctx: click.Context) -> None:
    """Of options that file and command line name both, or exclude, the command line's stay.

    Raises:
        click.UsageError: the command line itself names two budgets.
    """
    here = [name for name in ctx.params if _source(ctx, name) == ParameterSource.COMMANDLINE]
    budgets = [name for name in here if name in BUDGETS]
    _refuse_two_budgets("", budgets)
    file, values = ctx.meta.get(_KEY, ("", {}))
    for name, value in values.items():
        if name in here and ctx.params[name] != value:
            _say(f"{_shown(name, ctx.params[name])} is taken, not {value} as {file} has it")
        elif name in BUDGETS and budgets and name not in budgets:
            ctx.params[name] = None
            _say(f"{option_name(budgets[0])} is taken, not {_shown(name, value)} of {file}")


def given(ctx: click.Context, leave_out: str) -> list[str]:
    """The options of the command line as words, without `leave_out`."""
    # Not sys.argv, which is that of whoever calls the command from Python.
    words = []
    for name, value in ctx.params.items():
        if _source(ctx, name) == ParameterSource.COMMANDLINE and name != leave_out:
            words += [option_name(name)] if value is True else [option_name(name), str(value)]
    return words


def config_yaml(args: argparse.Namespace) -> str:
    """The run's options as a configuration file, by which the same run can be started again."""
    values = {name: getattr(args, name) for name in names()}
    lines = {
        name: value if isinstance(value, str | int | float) else str(value)  # a path
        for name, value in values.items()
        if value is not None
    }
    return write_yaml(lines)


def read_back(file: Path) -> dict[str, Any]:
    """What `config_yaml` wrote.

    Raises:
        ValueError: the file holds something else.
    """
    found = read_yaml(file)
    if not isinstance(found, dict):
        raise ValueError(f"{file} holds no options of a run; give another --out")
    return found


def _known(file: str, key: Any) -> str:
    name = str(key).replace("-", "_")
    if name in _BY_NAME:
        return name
    if name in CALL:
        raise click.UsageError(f"{file}: {option_name(name)} is for the command line only")
    raise click.UsageError(f"{file}: unknown option {key!r}{nearest(name, _BY_NAME)}")


def _value(ctx: click.Context, file: str, name: str, value: Any) -> Any:
    """The value as the option has it; texts and numbers as on the command line."""
    parameter = _BY_NAME[name]
    if isinstance(value, list) and all(isinstance(one, str | int) for one in value):
        value = ",".join(map(str, value))  # columns
    if not isinstance(value, str | int | float):
        raise click.UsageError(f"{file}: {name} is {type(value).__name__}, and has to be one value")
    is_flag = isinstance(parameter, click.Option) and parameter.is_flag
    if is_flag != isinstance(value, bool):
        if is_flag:
            raise click.UsageError(f"{file}: {name} is {value!r}; write true or false")
        # YAML reads the word `no`, which is a value of --joint, as false.
        value = _YES_AND_NO[bool(value)]
    try:
        return parameter.type_cast_value(ctx, value if is_flag else str(value))
    except click.BadParameter as error:
        raise click.UsageError(f"{file}: {name}: {error.message}") from error


def _refuse_two_budgets(file: str, names: list[str]) -> None:
    if len(names) > 1:
        first, second = (option_name(name) for name in names[:2])
        where = f"{file}: " if file else ""
        raise click.UsageError(
            f"{where}argument {second}: not allowed with argument {first}, as each says how many "
            "rows a table has; give one of them"
        )


def _source(ctx: click.Context, name: str) -> ParameterSource | None:
    return ctx.get_parameter_source(name)


def _shown(name: str, value: Any) -> str:
    return option_name(name) if value is True else f"{option_name(name)} {value}"


def _say(sentence: str) -> None:
    if os.environ.get("RANK", "0") == "0":  # the ranks have the same options
        click.echo(sentence, err=True)
