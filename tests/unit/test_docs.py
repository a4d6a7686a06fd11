"""The documents say what is so: their Python runs, their commands parse, their links lead on.

Blocks of a page share one namespace, in order. Comments of a page say how it is run:
`<!-- test: ranks=1 -->` in one gloo rank, `<!-- test: ranks=1, after=first_job.md -->` there too,
after the blocks of another page, `<!-- test: skip, reason -->` not the block that follows.
"""

import contextlib
import importlib
import importlib.util
import io
import os
import re
import shlex
import subprocess
from pathlib import Path
from unittest import mock

import pytest
import torch.distributed.run as torchrun

import cce_torchrec
from cce_torchrec.train import options
from tests.support.ranks import run_ranks

ROOT = Path(__file__).parents[2]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"(?:<!-- test: skip, [^>]+ -->\n+)?^```(\w+)\n(.*?)^```$", re.M | re.S)
SETTING = re.compile(r"<!-- test: ranks=1(?:, after=([\w.]+))? -->")
LINK = re.compile(r"\]\(([^)#\s]+)[^)]*\)")


def blocks(page, language):
    """Blocks of a page that are not skipped, each where it stands, so that errors name its line."""
    text = page.read_text()
    for block in BLOCK.finditer(text):
        if block[1] == language and not block[0].startswith("<!--"):
            yield "\n" * text.count("\n", 0, block.start(2)) + block[2]


def programs(page):
    """(page, code) of all that runs for `page`: the page that it goes on from, then its own."""
    setting = SETTING.search(page.read_text())
    before = programs(page.parent / setting[1]) if setting and setting[1] else []
    return [*before, *((page, code) for code in blocks(page, "python"))]


def run_page(page, folder):
    """Runs what a page shows, in `folder`."""
    os.chdir(folder)
    namespace = {"__name__": "__docs__"}
    with contextlib.redirect_stdout(io.StringIO()):
        for path, code in programs(page):
            exec(compile(code, str(path), "exec"), namespace)


def in_a_rank(rank, world_size, page, folder):
    """The page's own start and end of the process group do nothing: there is one already."""
    with (
        mock.patch("torch.distributed.init_process_group"),
        mock.patch("cce_torchrec.distributed.process_group.end_process_group"),
    ):
        run_page(page, folder)


def named(pages):
    return [pytest.param(page, id=page.relative_to(ROOT).as_posix()) for page in pages]


@pytest.mark.parametrize("page", named(p for p in PAGES if any(blocks(p, "python"))))
def test_python_runs(page, tmp_path, monkeypatch):
    if SETTING.search(page.read_text()):
        run_ranks(1, in_a_rank, page, tmp_path)
    else:
        monkeypatch.chdir(tmp_path)
        run_page(page, tmp_path)


def commands(page):
    """Command lines of a page, as lists of words; those of a container are what it runs."""
    for block in blocks(page, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            starts = [i for i, word in enumerate(words) if word in ("torchrun", "python")]
            if starts:
                yield words[starts[-1] :]


def check_program(words):
    """`words` follow `python` or the options of torchrun: -m MODULE or a file, and its options."""
    if words[0] != "-m":
        assert words[0] == "-c" or (ROOT / words[0]).exists(), f"no file {words[0]}"
        return
    module, *arguments = words[1:]
    assert importlib.util.find_spec(module) is not None, f"no module {module}"
    if module == "cce_torchrec.train":
        options.parse([word for word in arguments if word not in ("[", "]")])


def test_benchmarks_find_what_they_import():
    for file in sorted((ROOT / "benchmarks").rglob("*.py")):
        if file.stem != "__main__":
            name = ".".join(file.relative_to(ROOT).with_suffix("").parts)
            importlib.import_module(name.removesuffix(".__init__"))


@pytest.mark.parametrize("page", named(p for p in PAGES if any(commands(p))))
def test_commands_parse(page):
    for words in commands(page):
        if words[0] == "torchrun":
            told = torchrun.get_args_parser().parse_args(words[1:])
            assert told.training_script
            script = ["-m"] * told.module + [told.training_script, *told.training_script_args]
            check_program(script)
        else:
            check_program(words[1:])


@pytest.mark.parametrize("page", named(p for p in PAGES if any(blocks(p, "bash"))))
def test_shell_reads_every_block(page):
    for block in blocks(page, "bash"):
        told = subprocess.run(["bash", "-n"], input=block, capture_output=True, text=True)
        assert told.returncode == 0, told.stderr


@pytest.mark.parametrize("page", named(PAGES))
def test_links_lead_somewhere(page):
    for target in LINK.findall(page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), target


def test_every_public_name_has_its_place_in_the_reference():
    text = (ROOT / "docs" / "api.md").read_text()
    told = re.findall(r"^::: cce_torchrec\.([\w.]+)$", text, re.M)
    assert set(cce_torchrec.__all__) == {name for name in told if "." not in name}


def test_every_page_is_in_the_navigation():
    text = (ROOT / "mkdocs.yml").read_text()
    assert {p.name for p in PAGES if p.parent == ROOT / "docs"} == set(re.findall(r"\w+\.md", text))


def test_the_walk_names_every_file_once():
    package = Path(cce_torchrec.__file__).parent
    files = {str(path.relative_to(package)) for path in package.rglob("*.py")}
    files = {name for name in files if not name.endswith("__init__.py")}
    named = re.findall(r"`([\w/]+\.py)`", (ROOT / "docs" / "walk.md").read_text())
    assert sorted(named) == sorted(files)
