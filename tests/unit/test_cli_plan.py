"""`cce-torchrec plan`: tables of files and checkpoints, what they take, and what is refused."""

import json

import pytest
import torch
from torchrec import EmbeddingBagConfig, PoolingType
from torchrec.modules.embedding_configs import DataType

from cce_torchrec import CCEEmbeddingBagConfig, save_checkpoint, tables_for_memory
from cce_torchrec.byte_sizes import parse_bytes, said_bytes
from cce_torchrec.planning.outlook import outlook
from cce_torchrec.planning.table_file import read_tables, tables_yaml
from tests.support.command_line import called
from tests.support.inference import trained

JOB = """
common: {embedding_dim: 64, num_chunks: 4}
tables:
  - {name: user, num_embeddings: 1e9, table_bytes: 3GB, feature_names: [u, friend]}
  - {name: item, num_embeddings: 1_000_000, num_rows: 256, data_type: fp16, pooling: mean}
  - {name: country, num_embeddings: 250, embedding_dim: 16}
"""


def said(tables):
    """All of tables but their functions of initial values, which are equal to nothing else."""
    return [vars(table) | {"init_fn": None, "kind": type(table)} for table in tables]


@pytest.fixture
def job(tmp_path):
    file = tmp_path / "tables.yaml"
    file.write_text(JOB)
    return file


@pytest.mark.parametrize(
    ("text", "expected"),
    [("40GB", 40 * 10**9), ("512MiB", 512 << 20), ("1.5 kb", 1500), ("1_000", 1000), (7, 7)],
)
def test_bytes_are_read(text, expected):
    assert parse_bytes(text) == expected


@pytest.mark.parametrize("text", ["", "40G", "-1", "GB", "4 apples", "1e9", -3, True])
def test_what_is_no_number_of_bytes_is_refused(text):
    with pytest.raises(ValueError, match="is no number of bytes"):
        parse_bytes(text)


def test_bytes_are_said():
    said = [said_bytes(n) for n in (0, 999, 1000, 12_345, 4 * 10**10)]
    assert said == ["0 B", "999 B", "1.00 kB", "12.3 kB", "40.0 GB"]


def test_a_file_holds_tables(job):
    user, item, country = read_tables(job)
    assert user.feature_names == ["u", "friend"] and user.table_bytes <= 3 * 10**9
    assert (item.num_rows, item.helper_rows, item.pooling) == (256, 768, PoolingType.MEAN)
    assert item.data_type == DataType.FP16 and item.num_chunks == 4
    assert type(country) is EmbeddingBagConfig and country.embedding_dim == 16
    as_json = job.with_suffix(".json")
    as_json.write_text(json.dumps([{"name": "a", "num_embeddings": 9, "embedding_dim": 4}]))
    assert read_tables(as_json)[0].feature_names == ["a"]


def test_tables_that_are_written_are_read_again(tmp_path):
    tables = [
        CCEEmbeddingBagConfig(
            name="joint", num_embeddings=100, embedding_dim=16, num_rows=4,
            feature_names=["x", "y"], id_ranges={"x": range(0, 40), "y": range(40, 100)},
            seed=3, track_seen=True,
            recipe="auto", examples_per_id=7.0, pooling=PoolingType.MEAN, data_type=DataType.BF16,
        ),
        CCEEmbeddingBagConfig(
            name="counted", num_embeddings=100, embedding_dim=16, num_rows=4, num_helper_rows=0,
            feature_names=["c"], recipe="auto", examples_per_id=500.0, hash_ids=True,
        ),
        CCEEmbeddingBagConfig(
            name="ce", num_embeddings=100, embedding_dim=16, num_rows=4, num_chunks=2,
            feature_names=["e"], learned_codes=False,
        ),
        EmbeddingBagConfig(name="p", num_embeddings=9, embedding_dim=4, feature_names=["p"]),
    ]  # fmt: skip
    file = tmp_path / "tables.yml"
    file.write_text(tables_yaml(tables))
    assert said(read_tables(file)) == said(tables)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("num_embedings: 5", "unknown key 'num_embedings'; did you mean 'num_embeddings'"),
        ("num_embeddings: x", "num_embeddings 'x' is no whole number of 1 or more"),
        ("num_embeddings: 1.5", "num_embeddings 1.5 is no whole number"),
        ("num_embeddings: 9, table_bytes: 40G", "table_bytes: '40G' is no number of bytes"),
        ("num_embeddings: 9, num_rows: 2, table_bytes: 9kB", "num_rows and table_bytes both say"),
        ("num_embeddings: 9, recipe: rare", "recipe is of compressed tables; give one of"),
        ("num_embeddings: 9, num_rows: 2, recipe: scarce", "recipe 'scarce' is none of"),
        ("num_embeddings: 9, num_rows: 2, helper_ratio: 2", "helper_ratio does not go with"),
        ("num_embeddings: 9, params_per_dim: 8, helper_ratio: x", "helper_ratio 'x' is no number"),
        ("num_embeddings: 9, num_rows: 2, hash_ids: 1", "hash_ids 1 is neither true nor false"),
        ("num_embeddings: 9, num_rows: 2, id_ranges: [1]", "are no ranges; write"),
        ("num_embeddings: 9, pooling: max", "pooling 'max' is none of SUM, MEAN"),
        ("num_embeddings: 9, feature_names: []", "are no names; write"),
        ("num_embeddings: 9, num_rows: 2, embedding_dim: 30", "is not divisible by num_chunks 4"),
        ("feature_names: f", "table 'a' has no num_embeddings; give it"),
    ],
)
def test_what_is_wrong_with_a_table_is_said(tmp_path, line, message):
    file = tmp_path / "t.yaml"
    file.write_text(f"common: {{embedding_dim: 16}}\ntables:\n  - {{name: a, {line}}}\n")
    told = called("plan", file, status=1)
    assert told.startswith(f"Error: {file}: ") and message in told and told.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no list of tables"),
        ("tables: []", "the list of tables is empty"),
        ("tabels: [{name: a}]\ntables: []", "unknown key 'tabels'; did you mean 'tables'"),
        ("common: {name: a}\ntables: [{name: a}]", "common: name is of one table"),
        (
            "- {name: a, num_embeddings: 9, embedding_dim: 4}\n" * 2,
            r"tables \['a'\] are named twice",
        ),
        ("- 5", "table 1 is int, and has to be lines"),
    ],
)
def test_what_is_wrong_with_a_file_is_said(tmp_path, text, message):
    (tmp_path / "t.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_tables(tmp_path / "t.yaml")


def test_a_plan_of_gpus_needs_none(job, tmp_path):
    file = tmp_path / "made" / "plan.json"
    told = called(
        "plan", job, "--world-size", 8, "--memory", "40GB", "--device", "cuda", "--json", file
    )
    found = json.loads(file.read_text())
    user, item, country = found["tables"]
    assert user["num_embeddings"] == 10**9 and (user["kind"], country["kind"]) == ("CCE", "plain")
    assert user["codebook_bytes"] + user["code_bytes"] == read_tables(job)[0].table_bytes
    assert item["optimizer_bytes"] == 4 * 1024 * 4  # a float for each row of each chunk
    assert country["full_bytes"] == country["codebook_bytes"] == 250 * 16 * 4
    sums = ("codebook_bytes", "code_bytes", "optimizer_bytes")
    assert sum(found["rank_bytes"]) == sum(t[name] for t in found["tables"] for name in sums)
    assert (found["world_size"], found["memory_bytes"]) == (8, 40 * 10**9)
    assert "1,000,000,000" in told and "rank 7: " in told and "of 40.0 GB" in told


def test_tables_that_do_not_fit_are_compressed_on_demand(tmp_path):
    file, made = tmp_path / "t.yaml", tmp_path / "made.yaml"
    file.write_text("- {name: a, num_embeddings: 10_000_000, embedding_dim: 64}")
    told = called("plan", file, "--memory", "1GB", status=1)
    assert "there is no plan: 1 tables take 2.56 GB" in told
    told = called("plan", file, "--memory", "1GB", "--fit", "--yaml", made)
    assert "table_wise" in told
    [expected] = tables_for_memory(read_tables(file), 10**9, 1)
    assert said(read_tables(made)) == said([expected])
    assert "--fit compresses tables until they fit --memory" in called(
        "plan", file, "--fit", status=2
    )


def test_a_checkpoint_has_the_tables_that_it_was_saved_with(tmp_path):
    collection = trained(False, "finalized")
    save_checkpoint(tmp_path / "job", torch.nn.ModuleDict({"sparse": collection}), step=3)
    file = tmp_path / "t.yaml"
    called("plan", tmp_path / "job", "--yaml", file)
    found = {table.name: table for table in read_tables(file)}
    expected = {table.name: table for table in collection.embedding_bag_configs()}
    assert list(found) == list(expected)
    for name, table in expected.items():
        for key in ("feature_names", "pooling", "num_embeddings", "embedding_dim", "data_type"):
            assert getattr(found[name], key) == getattr(table, key), (name, key)
    assert found["joint"].id_ranges == expected["joint"].id_ranges
    assert found["a"].helper_rows == 0 and found["a"].num_rows == 80


def test_what_is_no_source_is_said(tmp_path):
    assert "no checkpoint in" in called("plan", tmp_path / "none", status=1)
    assert "cannot be read (No such file" in called("plan", tmp_path / "none.yaml", status=1)
    with pytest.raises(ValueError, match="needs memory_bytes of each"):
        outlook([], world_size=1, device=torch.device("cuda"))
