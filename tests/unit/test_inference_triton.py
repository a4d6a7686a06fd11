"""The lookup of packed tables in Triton: on a CPU that interprets kernels, and what it refuses.

What it does on a device is in tests/desk/test_inference.py.
"""

import importlib
import importlib.util

import pytest
import torch
from torchrec.models.dlrm import DLRM

from cce_torchrec.inference import (
    TensorInputs,
    inference_collection,
    inference_model,
    to_exported_program,
    to_package,
    to_torchscript,
)
from cce_torchrec.inference.lookup import numbers_of
from cce_torchrec.inference.packed_tables import PackedTables
from cce_torchrec.inference.row_types import ROW_TYPES
from tests.support.inference import batch_of, many_tables, one_table, tensors
from tests.support.optional import needs, needs_interpreter

INTERPRETED = """
import torch
from cce_torchrec import cluster
from cce_torchrec.inference import inference_collection
from tests.support.inference import batch_of, many_tables, tensors

collection = many_tables()
cluster(collection)
batch = tensors(batch_of(collection, 4))
found, expected = (inference_collection(collection, lookup=lookup).lookup(*batch)
                   for lookup in ("triton", "auto"))
torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
"""
BESIDE = {"packed tables": ["-c", INTERPRETED]}

PYTHON_ONLY = r"runs in Python alone; .* lookup='fused' or lookup='portable'"


@needs_interpreter
@pytest.mark.parametrize("beside_name", BESIDE)
def test_cpus_that_interpret_triton(beside, beside_name):
    status, said = beside.end_of(beside_name)
    assert status == 0, said[-3000:]


@needs("triton")
def test_other_cpus_are_refused():
    served = inference_collection(many_tables(), lookup="triton")
    with pytest.raises(RuntimeError, match=r"run on CUDA, not on cpu; or make .* lookup='auto'"):
        served(batch_of(many_tables(), 2))


@needs("triton")
def test_forms_without_python_are_refused(tmp_path):
    served = inference_collection(one_table(), lookup="triton")
    model = DLRM(one_table(), 4, [8, 16], [8, 1])
    inputs = TensorInputs(inference_model(model, lookup="triton"), ["f"])
    example = (torch.randn(2, 4), torch.tensor([1, 2]), torch.ones(2).long())
    for own, batch in ((served.lookup, None), (inputs, example)):
        for export in (to_torchscript, to_exported_program):
            with pytest.raises(ValueError, match=PYTHON_ONLY):
                export(own, batch)
        with pytest.raises(ValueError, match=PYTHON_ONLY):
            to_package(own, tmp_path / "model.pt2", batch)
    for module in (served, served.lookup):
        with pytest.raises(ValueError, match=PYTHON_ONLY):
            torch.jit.script(module)
    with pytest.raises(ValueError, match=PYTHON_ONLY):
        torch.export.export(served.lookup, tensors(batch_of(one_table(), 2))[:2], strict=False)


@needs("triton")
def test_rows_of_several_types_are_refused():
    mixed = PackedTables.of(many_tables(), ROW_TYPES["fp32"])
    numbers = numbers_of(mixed)
    numbers[1][13] = ROW_TYPES["int8"].number
    with pytest.raises(ValueError, match="rows are all of one type"):
        importlib.import_module("cce_torchrec.inference.triton_lookup").Shape.of(numbers)


def test_a_machine_without_triton_is_told(monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "triton" else found(name)
    )
    with pytest.raises(RuntimeError, match="lookup 'triton' needs Triton, which is not installed"):
        inference_collection(one_table(), lookup="triton")
