"""The tables that pages have of the benchmark's finished cells."""

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.quality import pages
from benchmarks.quality.cells import Group
from benchmarks.quality.summary import Row

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def cells():
    return pages.Cells.read(ROOT / "benchmarks/results/quality")


@pytest.mark.parametrize("page", pages.PAGES)
def test_pages_have_what_the_cells_say(cells, page):
    text = (ROOT / page).read_text()
    assert "<!-- quality: " in text
    # Otherwise: python -m benchmarks.quality.pages
    assert pages.renewed(text, cells) == text


def row(method, losses, splits=(20, 21), **values):
    records = [
        {"split": s, "log_loss": x, "parameters": 16_000, "made": "1 main row", **values}
        for s, x in zip(splits, losses, strict=True)
    ]
    group = Group("flights", 1, method, "1.1", "bytes=420000")
    return Row(group=group, choice=None, records=records, complete=True, difference=None)


def test_differences_are_of_the_splits_that_both_have():
    ours, other = row("ours", (0.41, 0.42)), row("CE", (0.45, 0.43), splits=(21, 22))
    assert pages.minus(ours, other) == (pytest.approx(-0.03), None)
    mean, error = pages.minus(ours, row("CE", (0.42, 0.45)))
    assert mean == pytest.approx(-0.02) and error == pytest.approx(0.01)


@pytest.mark.parametrize(
    ("other", "ahead"), [((0.43, 0.4401), -1), ((0.39, 0.3999), 1), ((0.40, 0.44), 0)]
)
def test_only_clear_differences_are_ahead(other, ahead):
    assert pages._ahead(row("ours", (0.41, 0.42)), row("CE", other)) == ahead


def test_a_table_of_one_main_row_is_called_by_what_it_is(cells):
    ids = cells.full("flights").mean("parameters") / 16
    few = row("ours", (0.41, 0.42), parameters=ids)
    many = row("ours", (0.41, 0.42), parameters=2 * ids)
    twice = replace(many, group=replace(many.group, passes=2))
    assert pages._kind(cells, few) == pages._kind(cells, twice) == ", restarted CE"
    assert pages._kind(cells, many) == ", CE"
    assert pages._kind(cells, row("ours", (0.41, 0.42), made="16 main rows")) == ""


@pytest.mark.parametrize(
    "directive", ["flights", "nowhere 2 bytes", "overview rows", "flights x bytes"]
)
def test_a_comment_that_asks_for_nothing_there_is(cells, directive):
    with pytest.raises(ValueError, match="is none of the forms"):
        pages.block(cells, directive)
