"""Lines of a run as JSON has them, names of scalars, and records of older checkpoints."""

import io
import json
import math
import sys
from pathlib import Path

import pytest

from cce_torchrec import bars
from cce_torchrec.bars import in_blocks
from cce_torchrec.extras import MissingExtra
from cce_torchrec.train.board import check_board, scalars
from cce_torchrec.train.records import METRICS, Records


def test_what_is_no_number_is_null():
    line = Records().add(
        "validation", step=1, auc=math.nan, log_loss=math.inf, memory=[1, math.nan]
    )
    assert line == {"kind": "validation", "step": 1, "auc": None, "log_loss": None,
                    "memory": [1, None]}  # fmt: skip
    json.dumps(line, allow_nan=False)


def test_records_of_an_older_checkpoint():
    old = {"history": [{"epoch": 1, "train_loss": 0.5}], "epoch_seconds": 2.0}
    found = Records.resumed(old)
    assert found.history == [{"kind": "epoch", "step": None, "epoch": 1, "train_loss": 0.5}]
    assert found.epoch_seconds == 2.0


def test_the_line_of_the_checkpoint_that_is_resumed_stays(tmp_path):
    saved = Records()
    saved.add("checkpoint", step=1, path="a", bytes=1, seconds=0.1)
    saved.add("checkpoint", step=2, path="b", bytes=1, seconds=0.1)
    saved.write_metrics(tmp_path)
    resumed = Records(lines=saved.lines[:1])
    resumed.keep_line_of(Path("b"), tmp_path)
    assert resumed.lines == saved.lines
    (tmp_path / METRICS).write_text('{"kind": "checkp')  # cut by a kill
    resumed.keep_line_of(Path("b"), tmp_path)
    assert resumed.lines == saved.lines


def test_a_line_that_cannot_be_written_ends_nothing(tmp_path, caplog):
    records = Records()
    records.append_metrics(tmp_path / "nowhere", records.add("train", step=1))
    assert "a line was not written" in caplog.text


def test_scalars_have_clean_names():
    chunk = {"table": "m.t", "chunk": 0, "ids": 5, "changed": 0.5, "dead_rows": 2}
    line = {"kind": "clustering", "step": 3, "changed": 0.5, "auc": None,
            "chunks": [chunk, {**chunk, "chunk": 1, "changed": 0.7}]}  # fmt: skip
    assert dict(scalars(line)) == {
        "clustering/changed": 0.5, "clustering/m.t/changed": pytest.approx(0.6),
        "clustering/m.t/dead_rows": 4,
    }  # fmt: skip
    line = {"kind": "train", "step": 3, "epoch": 1, "loss": 0.5, "rates": {"tables": 0.1},
            "memory": [7, 8]}  # fmt: skip
    assert dict(scalars(line)) == {
        "train/loss": 0.5, "train/rates/tables": 0.1, "train/memory/0": 7, "train/memory/1": 8,
    }  # fmt: skip


def test_tensorboard_is_an_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(MissingExtra, match=r"pip install 'cce-torchrec\[tensorboard\]'"):
        check_board(Path("runs"))


class Terminal(io.StringIO):
    """What a person looks on."""

    def isatty(self):
        return True


@pytest.mark.parametrize(("stream", "shown"), [(Terminal, True), (io.StringIO, False)])
def test_a_bar_is_shown_on_a_terminal_alone(monkeypatch, stream, shown):
    monkeypatch.setattr(bars, "_DELAY", 0.0)
    monkeypatch.setattr(sys, "stderr", stream())
    with bars.bar(3, "packing", "id") as own:
        own.update(2)
        own.refresh()
        assert ("packing" in sys.stderr.getvalue()) == shown


def test_blocks_are_the_bytes_of_all_parts():
    parts = [b"", bytes(range(256)) * 70_000, b"end"]  # more than a block
    found = list(in_blocks(iter(parts), sum(map(len, parts)), "writing"))
    assert len(found) == 3 and b"".join(found) == b"".join(parts)
