"""`cce-torchrec bench`: programs of the checkout, and a step that needs none."""

import json
import sys
from pathlib import Path

import pytest

import benchmarks
from cce_torchrec.cli import bench
from cce_torchrec.train.step_cost import StepSetting
from tests.support.command_line import called


def test_benchmarks_are_listed_with_a_line_each():
    lines = called("bench", "--list").splitlines()
    said = {line.split()[0]: line.split(maxsplit=1)[1:] for line in lines}
    assert {"step", "kmeans", "step_time", "quality", "serving"} <= said.keys()
    assert all(said.values()) and "machine" not in said


def test_options_are_handed_on(monkeypatch):
    calls = []

    def run(program, env):
        calls.append((program, env))
        return type("Ended", (), {"returncode": 3})

    monkeypatch.setattr(bench.subprocess, "run", run)
    called("bench", "step-time", "--quick", "--json", "out.json", "--help", status=3)
    [(program, env)] = calls
    assert program[:3] == [sys.executable, "-m", "benchmarks.step_time"]
    assert program[3:] == ["--quick", "--json", "out.json", "--help"]
    assert env["PYTHONPATH"].startswith(str(Path(benchmarks.__file__).parents[1]))


def test_an_installed_package_finds_the_checkout_that_it_is_called_in(monkeypatch, tmp_path):
    monkeypatch.setattr(bench, "_BESIDE", tmp_path)
    monkeypatch.chdir(Path(benchmarks.__file__).parents[1])
    assert "step_time" in called("bench", "--list")
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "own.py").write_text("if __name__ == '__main__': pass\n")
    (tmp_path / "pyproject.toml").write_bytes(b'[project]\nname = "another"  # \xff\n')
    monkeypatch.chdir(tmp_path)
    assert "own" not in called("bench", "--list")


def test_what_there_is_not_is_said(monkeypatch, tmp_path):
    assert "no benchmark 'kmean'; did you mean 'kmeans'?" in called("bench", "kmean", status=2)
    monkeypatch.setattr(bench, "_BESIDE", tmp_path)
    monkeypatch.chdir(tmp_path)
    told = called("bench", "kmeans", status=1)
    assert told.startswith("Error: benchmark 'kmeans': the benchmarks are in the folder `benchmark")
    assert told.count("\n") == 1
    assert called("bench", "--list").splitlines()[-1].endswith("`benchmarks` of the repository")


@pytest.mark.parametrize("ids", ["uniform", "zipf"])
def test_a_step_is_measured(tmp_path, ids):
    file = tmp_path / "step.json"
    words = ("--num-embeddings", 2000, "--embedding-dim", 16, "--num-rows", 8, "--batch-size", 64,
             "--bag", 2, "--tables", 2, "--repeats", 2, "--ids", ids)  # fmt: skip
    told = called("bench", "step", *words, "--json", file)
    found = json.loads(file.read_text())
    assert found["steps"] == 10 and found["setting"]["num_embeddings"] == 2000
    assert found["plain"]["bytes"] == 2 * 2000 * 16 * 4
    [config, _] = StepSetting(num_embeddings=2000, embedding_dim=16, num_rows=8, tables=2).configs(
        "cce"
    )
    assert found["cce"]["bytes"] == 2 * config.table_bytes
    assert found["cce"]["optimizer_bytes"] == 2 * 32 * 4 * 4  # a float for each row of a chunk
    ratio = found["cce"]["milliseconds"] / found["plain"]["milliseconds"]
    assert found["cce_over_plain"] == pytest.approx(ratio)
    assert "torch" in found["versions"] and f"takes {ratio:.2f} times as long" in told


def test_a_step_of_no_table_is_refused():
    told = called("bench", "step", "--embedding-dim", 30, status=1)
    assert told.startswith("Error: table 't0': embedding_dim 30 is not divisible by num_chunks 4")
