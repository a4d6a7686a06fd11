"""`cce-torchrec align`: tables of two checkpoints."""

import json
import shutil

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torchrec import KeyedJaggedTensor

from cce_torchrec.alignment.linear import linear_cka
from cce_torchrec.alignment.moments import moments
from cce_torchrec.alignment.saved import align_checkpoints
from cce_torchrec.checkpoint import save_checkpoint
from cce_torchrec.cli.main import command
from cce_torchrec.clustering import cluster
from tests.support.jobs import build, step
from tests.support.optional import needs


def run(*arguments):
    return CliRunner().invoke(command, ["align", *(str(one) for one in arguments)])


def vectors(model, name):
    """Of all ids, from the live model."""
    config = next(c for c in model.collection.embedding_bag_configs() if c.name == name)
    own, n = config.feature_names[0], config.num_embeddings
    names = [f for c in model.collection.embedding_bag_configs() for f in c.feature_names]
    names = list(dict.fromkeys(names))
    lengths = torch.tensor([[int(f == own)] * n for f in names]).view(-1)
    features = KeyedJaggedTensor(keys=names, values=torch.arange(n), lengths=lengths)
    with torch.no_grad():
        found = model.collection(features).to_dict()
    return found.get(own, found.get(f"{own}@{name}")).double()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Two checkpoints of a job, before and after a clustering, and their models' tables."""
    root, out = tmp_path_factory.mktemp("aligned"), {}
    model, own = build("unsharded", 1)
    step(model, own, 0)
    for name in ("first", "later"):
        path = save_checkpoint(root / name, model, step=1, optimizers=[own])
        tables = {c.name: vectors(model, c.name) for c in model.collection.embedding_bag_configs()}
        out[name] = path, tables
        cluster(model, optimizer=own)
        step(model, own, 1)
    return out


def test_checkpoints_give_what_their_models_have(saved):
    (a, own), (b, others) = saved.values()
    found = align_checkpoints(a, b, k=3)
    assert not found["only_a"] and not found["only_b"]
    for name, table in found["tables"].items():
        x, y = (tables[name.removeprefix("collection.")] for tables in (own, others))
        assert table["ids"] == len(x)
        expected = linear_cka(moments([(x, y)]))
        assert table["linear_cka"]["value"] == pytest.approx(expected, rel=1e-5)
        assert table["linear_cka"]["low"] < expected < table["linear_cka"]["high"]
    same = align_checkpoints(a, a, k=3)["tables"]
    for table in same.values():
        assert table["linear_cka"]["value"] == pytest.approx(1)
        assert table["neighbours"]["overlap"]["value"] == pytest.approx(1)
        assert table["codes"] is None or table["codes"] == pytest.approx([1] * len(table["codes"]))


def test_the_command_says_it_and_writes_it(saved, tmp_path):
    (a, _), (b, _) = saved.values()
    found = run(a, b, "-k", 3, "--json", tmp_path / "found.json")
    assert found.exit_code == 0, found.output
    for text in ("debiased CKA", "95 % interval", "neighbours shared", "the 3 nearest; by chance"):
        assert text in found.output
    assert json.loads((tmp_path / "found.json").read_text())["a"] == str(a)
    one = run(a, b, "--table", "collection.t")
    assert one.exit_code == 0 and one.output.count("table collection.") == 1


@needs("matplotlib")
def test_it_is_drawn(saved, tmp_path):
    (a, _), (b, _) = saved.values()
    assert run(a, b, "--plot", tmp_path / "found.png").exit_code == 0
    assert (tmp_path / "found.png").stat().st_size > 5000


def test_what_cannot_be_compared_is_said(saved, tmp_path):
    (a, _), _ = saved.values()
    found = run(a, tmp_path / "none")
    assert found.exit_code == 1 and "none" in found.output
    found = run(a, a, "--table", "t")
    assert found.exit_code == 1 and "'t' is not a table of both checkpoints; these" in found.output
    model, own = build("unsharded", 1)
    with torch.no_grad():
        for parameter in model.collection.parameters():
            parameter.fill_(1)
    constant = save_checkpoint(tmp_path / "constant", model, step=1, optimizers=[own])
    found = run(a, constant)
    assert found.exit_code == 1
    assert "not compared: all ids of the second table have the same vector" in found.output


def test_ids_weigh_as_often_as_they_are_looked_up(saved, tmp_path):
    (a, own), (b, others) = saved.values()
    n = len(own["t"])
    np.save(tmp_path / "counts.npy", np.arange(n))
    given = f"collection.t={tmp_path / 'counts.npy'}"
    found = run(a, b, "--counts", given, "--table", "collection.t", "--json", tmp_path / "c.json")
    assert found.exit_code == 0, found.output
    table = json.loads((tmp_path / "c.json").read_text())["tables"]["collection.t"]
    assert table["debiased_cka"] is None
    expected = linear_cka(moments([(own["t"], others["t"], torch.arange(n).double())]))
    assert table["linear_cka"]["value"] == pytest.approx(expected, rel=1e-5)


@needs("pyarrow")
def test_ids_that_runs_have_numbered_apart_are_compared_by_their_keys(saved, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    (a, own), (b, others) = saved.values()
    n = len(own["u"])
    ids = np.random.default_rng(0).permutation(n)
    folders = []
    # In the second run the key i has the id ids[i], and a tenth of the keys is new.
    for source, numbers, first in ((a, np.arange(n), 0), (b, ids, n // 10)):
        folder = tmp_path / source.parent.name
        shutil.copytree(source, folder / "checkpoints" / source.name)
        rows = {"column": ["h"] * n, "key": np.arange(n) + first, "id": numbers}
        pq.write_table(pa.table(rows), folder / "vocabulary.parquet")
        folders.append(folder)
    refused = run(*folders, "--table", "collection.u")
    common = n - n // 10
    assert refused.exit_code == 1
    assert f"{n:,} and {n:,} keys, {common:,} of them the same" in refused.output
    out = tmp_path / "found.json"
    found = run(*folders, "--table", "collection.u", "--common", "--json", out)
    assert found.exit_code == 0 and f"{common:,} ids" in found.output
    x, y = own["u"][n // 10 :], others["u"][ids[:common]]
    table = json.loads(out.read_text())["tables"]["collection.u"]
    assert table["linear_cka"]["value"] == pytest.approx(linear_cka(moments([(x, y)])), rel=1e-5)
    # What a caller says comes first.
    np.save(tmp_path / "names.npy", np.arange(n))
    names = "--names", "collection.u", tmp_path / "names.npy", tmp_path / "names.npy"
    same = run(*folders, "--table", "collection.u", *names)
    assert same.exit_code == 0 and f"{n:,} ids" in same.output
    # Of the same numbering nothing has to be said.
    assert run(folders[0], folders[0], "--table", "collection.u").exit_code == 0


def test_counts_that_cannot_be_read(saved, tmp_path):
    (a, _), _ = saved.values()
    (tmp_path / "empty.npy").write_bytes(b"")
    np.save(tmp_path / "text.npy", np.array(["x"]))
    np.save(tmp_path / "few.npy", np.ones(2))
    for given, status, message in (
        ("collection.t", 2, "give TABLE=FILE.npy"),
        (f"collection.t={tmp_path / 'none.npy'}", 2, "No such file"),
        (f"collection.t={tmp_path / 'empty.npy'}", 2, "empty.npy"),
        (f"collection.t={tmp_path / 'text.npy'}", 2, "could not convert string"),
        (f"x={tmp_path / 'few.npy'}", 1, "counts are given of 'x', and the tables compared are"),
    ):
        found = run(a, a, "--counts", given)
        assert found.exit_code == status and message in found.output, found.output
    found = run(a, a, "--table", "collection.t", "--counts", f"collection.t={tmp_path / 'few.npy'}")
    assert found.exit_code == 1 and "counts of shape (2,) are given" in found.output
    found = run(a, a, "--max-ids", 5)
    assert found.exit_code == 0 and "5 ids" in found.output
