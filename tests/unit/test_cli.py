"""The command line as a whole: help without heavy imports, and errors in a sentence."""

import json
import subprocess
import sys
from unittest import mock

import click
import pytest
from click.testing import CliRunner

from cce_torchrec.cli import main
from cce_torchrec.cli.__main__ import main as entry
from cce_torchrec.extras import MissingExtra, load_extra

HELP_OF_ALL = """
import json, sys
from click.testing import CliRunner
from cce_torchrec.cli.main import COMMANDS, command
told = {}
for words in [[], *([name] for name in COMMANDS)]:
    told[" ".join(words)] = CliRunner().invoke(command, [*words, "--help"]).output
heavy = {"torch", "torchrec", "pandas", "pyarrow", "numpy", "yaml"} & set(sys.modules)
print(json.dumps([sorted(heavy), told]))
"""


def test_help_of_every_command_loads_nothing_heavy():
    # In an interpreter of its own, as this one has loaded everything.
    done = subprocess.run(
        [sys.executable, "-c", HELP_OF_ALL], capture_output=True, text=True, check=True
    )
    heavy, told = json.loads(done.stdout)
    assert heavy == []
    for name, text in told.items():
        assert "Usage:" in text, (name, text)
    for name, purpose in main.COMMANDS.items():
        assert " ".join(purpose.split())[:30] in " ".join(told[""].split())
        assert "-h, --help" in told[name]


def test_an_unknown_command_names_the_nearest():
    result = CliRunner().invoke(main.command, ["inspct"])
    assert result.exit_code == 2 and "inspect" in result.output


@pytest.mark.parametrize(
    "error", [ValueError("as it is"), PermissionError("as it is"), MissingExtra("as it is")]
)
def test_what_a_user_can_cure_ends_with_a_sentence(error):
    @click.command()
    def fails():
        raise error

    with mock.patch.object(main.Commands, "get_command", return_value=fails):
        result = CliRunner().invoke(main.command, ["train"])
    assert result.exit_code == 1 and result.output == "Error: as it is\n"


def test_a_fault_of_ours_shows_where_it_is():
    @click.command()
    def fails():
        raise RuntimeError("a fault")

    with mock.patch.object(main.Commands, "get_command", return_value=fails):
        result = CliRunner().invoke(main.command, ["train"])
    assert isinstance(result.exception, RuntimeError)


def test_a_missing_extra_is_named():
    with pytest.raises(MissingExtra, match=r"a picture needs no_such_module, .*torchrec\[plots\]"):
        load_extra("no_such_module.inside", "plots", "a picture")


def test_without_click_the_program_says_what_to_install():
    with mock.patch.dict(sys.modules, click=None), pytest.raises(SystemExit) as ended:
        entry()
    assert ended.value.code == (
        "Error: the command line cce-torchrec needs click, which is not installed; "
        "pip install 'cce-torchrec[cli]'"
    )
