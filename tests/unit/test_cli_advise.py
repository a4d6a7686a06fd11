"""`cce-torchrec advise` and `serve-check`: the same as the functions behind them."""

import argparse
import json

import pyarrow as pa
import pytest
import torch
from pyarrow import parquet

from cce_torchrec import advise, id_counts
from cce_torchrec.data import TableDataset, TableOptions
from cce_torchrec.inference import inference_collection, save_inference, serve_check, write_examples
from cce_torchrec.planning.table_file import read_tables
from cce_torchrec.serve_options import OPTIONS
from tests.support.command_line import called
from tests.support.inference import batch_of, one_table


@pytest.fixture(scope="module")
def clicks(tmp_path_factory):
    """Two rare features, which share ids with none, and a small one."""
    random = torch.Generator().manual_seed(0)
    columns = {
        name: torch.randint(most, (4000,), generator=random).numpy()
        for name, most in {"user": 3000, "item": 2000, "few": 5, "click": 2}.items()
    }
    file = tmp_path_factory.mktemp("data") / "clicks.parquet"
    parquet.write_table(pa.table(columns), file)
    return file


def test_advice_of_a_file_is_that_of_the_library(clicks, tmp_path):
    words = ("--dataset", "table", "--data", clicks, "--label", "click", "--categorical",
             "user,item,few", "--min-bytes", "50kB", "--split-seed", 3)  # fmt: skip
    told = called("advise", *words, "--table-bytes", "40kB", "--yaml", tmp_path / "t.yaml",
                  "--json", tmp_path / "t.json")  # fmt: skip
    options = TableOptions(label="click", categorical=("user", "item", "few"), split_seed=3)
    counts = id_counts(TableDataset(clicks, options))
    advice = advise(counts, embedding_dim=16, table_bytes=40_000, min_bytes=50_000)
    assert told.startswith(str(advice))
    made = read_tables(tmp_path / "t.yaml")
    assert [t.name for t in made] == [t.name for t in advice.configs] == ["joint", "few"]
    assert made[0].id_ranges == advice.configs[0].id_ranges
    assert made[0].recipe == "rare" and made[0].table_bytes == advice.configs[0].table_bytes
    found = json.loads((tmp_path / "t.json").read_text())
    assert found["bytes"] == advice.bytes and found["tables"][0]["name"] == "user"
    called("plan", tmp_path / "t.yaml")
    # A product of two features wants tables of their own.
    told = called("advise", *words, "--loss-increase", 0.02, "--model", "gmf")
    assert "joint" not in told and told.count("CCE, frequent") == 2


def test_a_trained_full_table_is_read(clicks, tmp_path):
    torch.save({"embedding_bags.user.weight": torch.randn(3000, 16)}, tmp_path / "full.pt")
    words = ("--dataset", "table", "--data", clicks, "--label", "click", "--categorical",
             "user,item", "--min-bytes", "50kB", "--table-bytes", "40kB",
             "--full-table")  # fmt: skip
    told = called("advise", *words, f"user={tmp_path / 'full.pt'}", "--json", tmp_path / "a.json")
    assert "(noise " in told
    user, item = json.loads((tmp_path / "a.json").read_text())["tables"]
    assert 0 < user["explained"] <= 1 and item["explained"] is None
    for wrong in ("user", "usr=full.pt", f"user={tmp_path / 'none.pt'}"):
        said = called("advise", *words, wrong, status=1)
        assert said.startswith("Error: ") and ("none.pt" in said or "give FEATURE=PATH" in said)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--dataset", "synthetic"), "give one of --table-bytes and --loss-increase"),
        (("--dataset", "table", "--table-bytes", "1MB"), "give --data a file or a folder"),
        (("--label", "x", "--table-bytes", "1MB"), "has columns of its own"),
    ],
)
def test_options_that_contradict_are_refused(words, message):
    assert message in called("advise", *words, status=2)


def test_serve_check_says_what_the_module_says(tmp_path, capsys):
    collection = one_table()
    save_inference(inference_collection(collection), tmp_path / "export")
    write_examples(tmp_path / "examples.npz", collection, batch_of(collection, 30))
    words = [str(tmp_path / "export"), "--data", str(tmp_path / "examples.npz")]
    told = called("serve-check", *words, "--json", tmp_path / "made" / "found.json")
    assert "checksums and golden rows are right" in told and ": right" in told
    assert json.loads((tmp_path / "made" / "found.json").read_text())["ok"] is True
    serve_check.main(words)
    assert capsys.readouterr().out.splitlines()[:2] == told.splitlines()[:2]
    told = called("serve-check", *words, "--tolerance", 0, status=1)
    assert ": WRONG" in told
    words[0] = str(tmp_path / "none")
    assert called("serve-check", *words, status=1) == f"Error: {tmp_path / 'none'} is not there\n"


def test_both_ways_to_call_serve_check_have_the_same_options():
    from cce_torchrec.cli.serve_check import command

    here = {param.opts[0]: param.default for param in command.params if param.name != "export"}
    assert here == {f"--{one.name}": one.default for one in OPTIONS}
    parsed = argparse.Namespace()
    with pytest.raises(SystemExit):
        serve_check.main(["export", "--lookup", "slow"])
    assert not vars(parsed)
    assert "'slow' is not one of" in called("serve-check", "x", "--data", "y", "--lookup", "slow",
                                            status=2)  # fmt: skip
