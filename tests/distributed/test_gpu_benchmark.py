"""benchmarks.gpu on a CPU: every part runs with small shapes, and what the two files hold."""

from __future__ import annotations

import importlib
import json
import sys

import pytest
import torch

from benchmarks import gpu
from benchmarks.gpu_parts import train
from benchmarks.gpu_parts.page import page
from benchmarks.gpu_parts.part import Part
from cce_torchrec.train.__main__ import main
from tests.support.ranks import run_ranks
from tests.support.torchrun import forked

CPU = torch.device("cpu")
GOAL_KEYS = {"what", "figure", "unit", "goal", "aim", "at_least", "met"}
PART_KEYS = {"state", "seconds", "limit", "quick", "goals", "rows", "notes", "errors"}
GOALS = {
    "step": 4,  # bag 1 and 10, uniform and Zipf
    "tables26": 3,  # over plain, and two options over none
    "published": 2,  # optimizers
    "clustering": 4,  # seconds, and times faster than torch; both by samples and by all pairs
    "sums": 7,
}


def small_parts(rank, world_size, folder):
    """One process for all parts but those that tests below run."""
    found = {}
    for name in GOALS:
        part = Part(name, CPU, True, folder / f"{name}.json")
        importlib.import_module(f"benchmarks.gpu_parts.{name}").run(part)
        found[name] = json.loads(part.path.read_text())
    return found


def test_parts_find_a_figure_for_every_goal(tmp_path):
    ((found),) = run_ranks(1, small_parts, tmp_path)
    for name, part in found.items():
        assert part["errors"] == []
        assert len(part["goals"]) == GOALS[name], name
        for goal in part["goals"]:
            assert goal.keys() == GOAL_KEYS
            assert goal["figure"] is not None and goal["met"] is None, "small shapes say nothing"
    (step, *_) = found["step"]["rows"]["milliseconds a step"]
    parts = {"input_dist", "expansion", "lookup", "output_dist", "backward"}
    assert step["parts of cce, ms"].keys() == parts
    assert step["cce wall"] > 0 and step["plain host"] > 0
    for name, contenders in (("step", 3), ("tables26", 4), ("published", 2)):
        kernels = found[name]["rows"]["kernels of a step"]
        assert len({row["contender"] for row in kernels}) == contenders
        assert all(len(row["longest kernels, ms"]) == 10 and row["launches"] for row in kernels)
    assert all(goal["figure"] == 0 for goal in found["sums"]["goals"]), "not the same bytes"


def program(command, **settings):
    """A process is forked in place of the interpreter that `subprocess.run` would start."""
    assert command[:3] == [sys.executable, "-m", "cce_torchrec.train"]
    return forked(1, main, *command[3:])


def test_a_run_of_the_training_program_and_its_resumption(tmp_path, monkeypatch):
    monkeypatch.setattr(train.subprocess, "run", program)
    timed = train._examples
    monkeypatch.setattr(train, "_examples", lambda part, folder, ways: timed(part, folder, {}))
    part = Part("train", CPU, True, tmp_path / "train.json")
    train.run(part)
    assert part.found["errors"] == []
    (resumed,), (full,) = part.found["rows"].values()
    assert resumed["tensors"] > 80 and resumed["differing"] == 0, resumed
    assert resumed["metrics equal"] and resumed["resumed after"].startswith("step-000000013-")
    assert full["run"] == "full, default pipeline" and full["examples a second"] > 0


def test_the_command(tmp_path, capsys):
    gpu.main(["--quick", "--only", "expansion", "--out", str(tmp_path)])
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert report.keys() == {"device", "driver", "versions", "settings", "parts"}
    assert report["device"]["name"] and {"torch", "fbgemm"} <= report["versions"].keys()
    assert report["settings"] == {"quick": True, "minutes": 8.0, "parts": ["expansion"]}
    part = report["parts"]["expansion"]
    assert part["state"] == "done" and part.keys() >= PART_KEYS
    one, many = part["rows"]["milliseconds an expansion"]
    assert one["tables"] == 1 and many["tables"] == 4 and one["bytes"]["codes"] == 32 * one["ids"]
    text = (tmp_path / "summary.md").read_text()
    assert text == page(report) and text in capsys.readouterr().out
    for line in ("## Goals", "## Parts", "| expansion | done |", "not judged", "Small shapes"):
        assert line in text


def test_a_part_that_fails_stops_no_other(tmp_path, monkeypatch):
    limits = {"no_such_part": gpu.Limit(60, "fails"), "sums": gpu.Limit(1, "is slow")}
    monkeypatch.setattr(gpu, "PARTS", limits)
    monkeypatch.setattr(gpu, "LEAST", 0.5)
    report = gpu.run(tmp_path, list(limits), True, 2)
    failed, slow = report.json["parts"].values()
    assert failed["state"] == "failed" and "no_such_part" in failed["errors"][0]
    assert slow["state"] == "stopped after 1 s"
    assert "ModuleNotFoundError" in (tmp_path / "summary.md").read_text()


def test_a_part_without_time_is_left_out(tmp_path):
    report = gpu.run(tmp_path, ["step"], True, 0.1)
    assert report.json["parts"]["step"]["state"] == "left out: no time"
    assert "left out" in (tmp_path / "summary.md").read_text()


@pytest.mark.parametrize(
    "figure, at_least, met",
    [(0.9, False, True), (1.2, False, False), (12.0, True, True), (8.0, True, False)],
)
def test_goals_are_judged_on_full_shapes(tmp_path, figure, at_least, met):
    part = Part("step", CPU, False, tmp_path / "part.json")
    part.goal("a ratio", figure, 10 if at_least else 1.0, at_least=at_least)
    assert part.found["goals"][0]["met"] is met
