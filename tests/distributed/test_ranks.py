"""The ranks that tests run on: a check that fails there fails alone, and nothing waits for it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.support import ranks
from tests.support.ranks import RanksFailed, on_ranks

ROOT = Path(__file__).parents[2]

CHECKS = """
import os

import pytest
import torch
import torch.distributed as dist

from tests.support.ranks import on_ranks


def together():
    total = torch.ones(1)
    dist.all_reduce(total)
    assert total == dist.get_world_size()


@on_ranks(1, 2)
def test_before(rank, world_size):
    together()


@on_ranks(2)
def test_that_fails_on_one(rank, world_size):
    assert rank == 0, "as it should"
    dist.barrier()


@on_ranks(2)
@pytest.mark.parametrize("number", [3, 4])
def test_between(rank, world_size, number, tmp_path):
    together()
    (tmp_path / str(rank)).write_text(str(number))


@on_ranks(2)
def test_that_dies_on_one(rank, world_size):
    if rank == 1:
        os._exit(3)
    dist.barrier()


@on_ranks(2)
def test_deselected(rank, world_size):
    raise AssertionError


@on_ranks(2)
def test_after(rank, world_size):
    together()
"""


def outcomes(folder):
    """Outcome of every selected test of `CHECKS` by its name, and what pytest printed."""
    (folder / "test_some.py").write_text(CHECKS)
    command = [sys.executable, "-m", "pytest", "-rA", "-p", "tests.conftest", "test_some.py"]
    done = subprocess.run(
        [*command, "-k", "not deselected"], cwd=folder, capture_output=True, text=True, timeout=120,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    found = re.findall(r"^(PASSED|FAILED|ERROR) test_some.py::(\S+)", done.stdout, re.M)
    return {name: outcome for outcome, name in found}, done.stdout


def test_a_check_that_fails_on_one_rank_fails_alone(tmp_path):
    began = time.monotonic()
    found, said = outcomes(tmp_path)
    assert found == {
        "test_before[1]": "PASSED",
        "test_before[2]": "PASSED",
        "test_that_fails_on_one[2]": "FAILED",
        "test_between[3-2]": "PASSED",
        "test_between[4-2]": "PASSED",
        "test_that_dies_on_one[2]": "FAILED",
        "test_after[2]": "PASSED",
    }
    assert "rank 1: Traceback" in said and "AssertionError: as it should" in said
    assert "rank 1: died with exit code 3" in said
    assert time.monotonic() - began < 60  # a hang would take the group's timeout of 60 s


def own_process(rank, world_size):
    return os.getpid()


def never_ends_on_one(rank, world_size):
    if rank == 1:
        time.sleep(600)


def test_a_rank_that_is_stuck_is_replaced(rank_pool, monkeypatch):
    before = rank_pool.run(2, own_process)
    assert rank_pool.run(2, own_process) == before  # the same ranks for every check
    monkeypatch.setattr(ranks, "LIMIT", 1.0)
    with pytest.raises(RanksFailed, match=r"^rank 1: had not ended after 1 s$"):
        rank_pool.run(2, never_ends_on_one)
    monkeypatch.undo()
    assert not set(rank_pool.run(2, own_process)) & set(before)


@on_ranks(2)
@pytest.mark.parametrize("number", [1, 2])
def test_random_numbers_do_not_depend_on_earlier_checks(rank, world_size, number):
    assert torch.initial_seed() == 0 and dist.get_world_size() == world_size
    expected = torch.rand(1, generator=torch.Generator().manual_seed(0))
    assert torch.equal(torch.rand(1), expected)
