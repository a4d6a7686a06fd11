"""Small forms of what benchmarks/hard does for hours: random programs, and damaged files."""

import logging

import pytest

from benchmarks.hard import files, properties
from tests.support.optional import needs


@pytest.fixture(autouse=True)
def quiet():
    """Warnings of ids out of bounds and of tables that are larger than plain ones."""
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


def test_random_programs_do_what_a_dictionary_of_rows_does():
    # As many as take 3 seconds; the benchmark, whose seeds are others each time, runs for hours.
    properties.run(properties.Programs, examples=20, steps=10, database=None, derandomize=True)


@pytest.mark.parametrize(
    "subject",
    [
        "checkpoint",
        "inference",
        pytest.param("vocabulary", marks=needs("pyarrow")),
        pytest.param("served", marks=[needs("onnx"), needs("onnxruntime")]),
    ],
)
def test_damaged_files_are_refused_or_do_not_matter(subject, tmp_path):
    found = files.run(20, [subject], tmp_path)
    faults = [case for case in found if case.outcome not in files.FINE]
    assert not faults, faults
    assert {"error", "equal"} <= {case.outcome for case in found}


@pytest.mark.parametrize(
    "subject",
    [
        "config",
        "tables",
        pytest.param("given", marks=[needs("pyarrow"), needs("safetensors")]),
        pytest.param("data", marks=needs("pyarrow")),
    ],
)
def test_damaged_settings_are_refused_or_are_others(subject, tmp_path):
    """They have no checksum: what can be read is taken."""
    found = files.run(12, [subject], tmp_path)
    faults = [case for case in found if case.outcome not in files.FINE]
    assert not faults, faults
    assert "error" in {case.outcome for case in found}
