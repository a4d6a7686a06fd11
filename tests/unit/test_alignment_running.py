"""The benchmark of alignment: cells are computed once, kept, and said."""

import sys
from dataclasses import dataclass

import pytest

from benchmarks.alignment import __main__ as program
from benchmarks.alignment import all_parts, cost
from benchmarks.alignment.parts import Part
from benchmarks.alignment.running import records_of


@dataclass(frozen=True)
class Square:
    number: int

    @property
    def key(self):
        return f"square of {self.number}"

    def measure(self):
        if self.number < 0:
            raise ValueError("no negative numbers here")
        return {"square": self.number**2}


def part(numbers):
    return Part(
        name="squares",
        title="Squares",
        cells=lambda quick: [Square(number) for number in (numbers[:1] if quick else numbers)],
        lines=lambda records: [str([one["square"] for one in records])],
        draw=lambda records, file: file.write_text(str(len(records))),
    )


def squares(own, folder, quick=False, compute=True, jobs=1):
    return [one["square"] for one in records_of(own, folder, quick, jobs, compute)]


def test_cells_are_computed_once_and_kept(tmp_path):
    assert squares(part([3, 4]), tmp_path, quick=True) == [9]
    file = tmp_path / "squares.jsonl"
    before = file.read_text()
    assert squares(part([3, 5]), tmp_path, compute=False) == [9]
    assert squares(part([3, 4]), tmp_path) == [9, 16]
    assert before in file.read_text()
    file.write_text(file.read_text().replace('"square": 16', '"square": 17'))
    assert squares(part([4, 3]), tmp_path) == [17, 9]  # as kept, in the order of the cells


def test_cells_have_processes(tmp_path):
    assert squares(part([3]), tmp_path, jobs=2) == [9]


def test_a_cell_that_fails_is_named_and_the_others_are_kept(tmp_path, capfd):
    with pytest.raises(ValueError, match="no negative"):
        records_of(part([2, -1]), tmp_path, False, 1, True)
    assert "failed: square of -1" in capfd.readouterr().err
    assert squares(part([2]), tmp_path, compute=False) == [4]


def test_the_program_prints_and_draws(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(all_parts, "PARTS", {"squares": part([3, 4])})
    monkeypatch.setattr(sys, "argv", ["align", "--results", str(tmp_path), "--jobs", "1"])
    program.main()
    assert "## Squares\n\n[9, 16]\n" in capsys.readouterr().out
    assert (tmp_path / "squares.png").read_text() == "2"
    for wrong in (["--jobs", "0"], ["--only", "cubes"]):
        monkeypatch.setattr(sys, "argv", ["align", *wrong])
        with pytest.raises(SystemExit):
            program.main()
    assert "invalid choice: 'cubes' (choose from squares" in capsys.readouterr().err.replace(
        "'squares'", "squares"
    )


def test_cost_is_that_of_the_products_and_more():
    found = cost.CostCell(20_000, norms=False).measure()
    assert found["memory_mb"] < 200 and len(found["ratios"]) == 7
    assert "20,000" in "\n".join(cost.PART.lines([found]))
