"""A job killed by SIGKILL while it writes a checkpoint, clusters and trains ends bit-equal."""

from __future__ import annotations

import random

from benchmarks.kill import compare


def test_three_kills(tmp_path):
    rng = random.Random(7)  # the same moments in every run, or a failure could not be repeated
    aims = [("checkpoint", 2, rng.uniform(0, 0.03)), ("clustering", 2, rng.uniform(0, 0.05)),
            ("training", 3, rng.uniform(0, 0.1))]  # fmt: skip
    options = ["--epochs", "1", "--clusterings", "7", "--plan", rng.choice(["cw", "rw"])]
    result = compare(tmp_path, aims, options)
    assert len(result["kills"]) == 3, (aims, options)
    assert result["tensors"] > 40
    assert result["differing"] == [], options
    assert result["metrics_equal"] and result["epochs"] == 1
    log = (tmp_path / "killed" / "log").read_text()
    assert log.count("resumed after step") >= 2
