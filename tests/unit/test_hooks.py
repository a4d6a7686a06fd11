"""What a commit is checked by, and what `./run.sh` offers."""

import os
import re
import subprocess
import sys
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


def test_compiled_python_is_kept_whatever_a_container_says():
    before_setup = RUN.partition("\nsetup()")[0]
    told = "import sys; print(sys.dont_write_bytecode, sys.pycache_prefix)"
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    environment.pop("PYTHONPYCACHEPREFIX", None)
    done = subprocess.run(
        ["bash", "-c", f'{before_setup}\n"{sys.executable}" -c "{told}"', ROOT / "run.sh"],
        capture_output=True, text=True, env=environment,
    )  # fmt: skip
    assert done.stdout == f"False {ROOT / '.venv' / 'pycache'}\n", done.stderr
