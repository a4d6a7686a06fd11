"""Help and completion of the commands, which load nothing heavy, and their page."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.shell_completion import BashComplete, FishComplete, ZshComplete

from cce_torchrec.cli.main import COMMANDS, command
from tests.support.command_line import called

PAGE = Path(__file__).parents[2] / "docs" / "command_line.md"
OWN = ("plan", "compress", "export", "serve-check", "advise", "bench")
HEAVY = """
import sys
from click.testing import CliRunner
from cce_torchrec.cli.main import command
for words in sys.argv[1:]:
    assert CliRunner().invoke(command, [*words.split(), "--help"]).exit_code == 0, words
print(*sorted({name.split(".")[0] for name in sys.modules} & {"torch", "numpy", "pandas"}))
"""


def test_help_loads_no_torch():
    program = [sys.executable, "-c", HEAVY, *OWN, "bench step"]
    ended = subprocess.run(program, capture_output=True, text=True, check=True)
    assert ended.stdout.split() == []


@pytest.mark.parametrize("name", OWN)
def test_every_option_says_what_it_is_and_an_example_is_given(name):
    own = command.get_command(click.Context(command), name)
    options = [param for param in own.params if isinstance(param, click.Option)]
    for option in options:
        assert option.help, option.name
        # A default is shown by click, or said; what is off or nothing by default need not be.
        text = " ".join(called(name, "--help").split())
        assert option.opts[0] in text
    assert f"Example: cce-torchrec {name} " in text


def completed(words, incomplete, kind=BashComplete):
    complete = kind(command, {}, "cce-torchrec", "_CCE_TORCHREC_COMPLETE")
    return [item.value for item in complete.get_completions(words, incomplete)]


@pytest.mark.parametrize("kind", [BashComplete, ZshComplete, FishComplete])
def test_names_options_and_choices_are_completed(kind):
    assert completed([], "com", kind) == ["compress"]
    assert set(completed([], "", kind)) == set(COMMANDS)
    assert completed(["plan"], "--mem", kind) == ["--memory"]
    assert completed(["plan", "--device"], "c", kind) == ["cpu", "cuda"]
    assert completed(["export", "--format"], "t", kind) == ["torchscript"]
    assert "step_time" in completed(["bench"], "step", kind)
    assert completed(["bench", "step", "--ids"], "z", kind) == ["zipf"]
    assert "_CCE_TORCHREC_COMPLETE" in kind(
        command, {}, "cce-torchrec", "_CCE_TORCHREC_COMPLETE"
    ).source_template % {"complete_func": "", "complete_var": "_CCE_TORCHREC_COMPLETE",
                         "prog_name": "cce-torchrec"}  # fmt: skip


def examples(text):
    for block in re.findall(r"^```bash\n(.*?)^```$", text, re.M | re.S):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words[:1] == ["cce-torchrec"]:
                yield words[1:]


def test_commands_of_the_page_parse():
    seen = set()
    for name, *words in examples(PAGE.read_text()):
        seen.add(name)
        own = command.get_command(click.Context(command), name)
        if name != "bench":  # whose arguments are those of programs
            own.make_context(name, words)
    assert seen >= set(OWN)


def test_the_page_has_a_section_of_every_command():
    sections = re.findall(r"^## `([\w-]+)`", PAGE.read_text(), re.M)
    assert sections == list(COMMANDS)
