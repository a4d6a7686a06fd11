"""What a commit is checked by, and what `./run.sh` offers."""

import re
import subprocess
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]
RUN = (ROOT / "run.sh").read_text()


def test_hooks_of_git_are_the_checks_beside_the_tests():
    """The same commands in the same order, by the tools of the project's environment."""
    (repository,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert repository["repo"] == "local"
    hooks = repository["hooks"]
    assert all(hook["language"] == "system" and not hook["pass_filenames"] for hook in hooks)
    checks = re.search(r'"== ruff"\n  (.*)\n  (.*)\n(?:.*\n)*?  (mypy) > .* & types', RUN).groups()
    assert [hook["entry"] for hook in hooks] == list(checks)


def test_an_unknown_command_is_told_what_there_is():
    done = subprocess.run([ROOT / "run.sh", "weel"], capture_output=True, text=True)
    assert done.returncode == 2
    offered = "demo|test|setup|wheel [--suite]|sanitize"
    assert done.stderr == f"usage: ./run.sh {offered}\n"
