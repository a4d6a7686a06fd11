"""`cce-torchrec compress`: a plain job's checkpoint in, one that compressed models load out."""

import json

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import nn
from torchrec import (
    EmbeddingBagCollection,
    EmbeddingBagConfig,
    EmbeddingCollection,
    EmbeddingConfig,
    KeyedJaggedTensor,
    PoolingType,
)

from cce_torchrec import (
    CCEEmbeddingBagCollection,
    CCEEmbeddingBagConfig,
    checkpoint_info,
    load_checkpoint,
    save_checkpoint,
)
from cce_torchrec.checkpoint import compress_like
from cce_torchrec.clustering import import_table
from tests.support.command_line import called

OPTIONS = ("--num-rows", 16, "--num-chunks", 4)


class Plain(nn.Module):
    """A job as TorchRec's users have it: bags, of which one are means, sequences, a network."""

    def __init__(self, device=None):
        super().__init__()
        self.ebc = EmbeddingBagCollection(
            tables=[
                EmbeddingBagConfig(
                    name="user", num_embeddings=3000, embedding_dim=16, feature_names=["u", "v"],
                    pooling=PoolingType.MEAN,
                ),
                EmbeddingBagConfig(
                    name="small", num_embeddings=20, embedding_dim=16, feature_names=["s"]
                ),
            ],
            device=device,
        )  # fmt: skip
        self.seq = EmbeddingCollection(
            tables=[
                EmbeddingConfig(
                    name="item", num_embeddings=2000, embedding_dim=16, feature_names=["i"]
                )
            ],
            device=device,
        )
        self.net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))


@pytest.fixture(scope="module")
def plain():
    torch.manual_seed(0)
    return Plain()


@pytest.fixture(scope="module")
def sources(plain, tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    state = plain.state_dict()
    torch.save(state, folder / "flat.pt")
    torch.save({"job": {"model": state}, "epoch": 3}, folder / "nested.pt")
    save_file(state, folder / "flat.safetensors")
    dcp.save({"model": state, "epoch": 3}, checkpoint_id=folder / "dcp", no_dist=True)
    save_checkpoint(folder / "own", plain, step=5)
    return folder


def imported(plain, name, weight, num_rows=16):
    """What `import_table` makes of a table, by itself."""
    config = CCEEmbeddingBagConfig(
        name=name, num_embeddings=len(weight), embedding_dim=16, num_rows=num_rows,
        num_helper_rows=0, feature_names=["f"],
    )  # fmt: skip
    collection = CCEEmbeddingBagCollection([config])
    return collection, import_table(collection, name, weight.detach())


def batch(names, ids, lengths):
    return KeyedJaggedTensor(names, ids, lengths=lengths)


@pytest.mark.parametrize("source", ["flat.pt", "nested.pt", "flat.safetensors", "dcp", "own"])
def test_a_compressed_model_loads_it(plain, sources, source, tmp_path):
    told = called(
        "compress", sources / source, tmp_path / "out", *OPTIONS, "--table", "user", "--table",
        "seq.item", "--json", tmp_path / "said.json",
    )  # fmt: skip
    model = Plain(device=torch.device("meta"))
    assert compress_like(model, tmp_path / "out") == ["ebc.user", "seq.item"]
    model = model.to_empty(device="cpu")
    report = load_checkpoint(tmp_path / "out", model)
    assert sorted(report.tables) == ["ebc.small", "ebc.user", "seq.item"]
    user, said = imported(plain, "user", plain.ebc.embedding_bags["user"].weight)
    item, _ = imported(plain, "item", plain.seq.embeddings["item"].weight)
    # Bags of two: the model's pooling is a mean, of which the checkpoint need not know.
    ids, two = torch.tensor([0, 2999, 7, 1500, 19, 3]), torch.tensor([2, 2])
    sums = user(batch(["f"], ids[:4], two))["f"]
    found = model.ebc(batch(["u", "v", "s"], torch.cat([ids[:4], ids[:4], ids[4:]]),
                            torch.tensor([2, 2, 2, 2, 1, 1])))  # fmt: skip
    assert torch.equal(found["u"], sums / 2) and torch.equal(found["v"], sums / 2)
    assert torch.equal(found["s"], plain.ebc.embedding_bags["small"].weight[ids[4:]])
    own = torch.tensor([0, 1999, 5])
    vectors = model.seq(batch(["i"], own, torch.tensor([3])))["i"].values()
    assert torch.equal(vectors, item(batch(["f"], own, torch.ones(3).int()))["f"])
    for key, value in plain.net.state_dict().items():
        assert torch.equal(model.net.state_dict()[key], value), key
    assert f"relative squared error {said.error:.4f}" in told
    tables = {t["table"]: t for t in json.loads((tmp_path / "said.json").read_text())["tables"]}
    assert tables["ebc.user"]["error"] == pytest.approx(said.error)
    assert tables["ebc.user"]["bytes"] == said.table_bytes
    assert tables["ebc.small"]["bytes"] == 20 * 16 * 4 and "not chosen" in told


def test_a_state_dict_is_written_for_unsharded_models(plain, sources, tmp_path):
    file = tmp_path / "out.pt"
    called("compress", sources / "flat.pt", file, *OPTIONS, "--table", "user")
    called("compress", sources / "flat.pt", tmp_path / "folder", *OPTIONS, "--table", "user")
    model = Plain()
    compress_like(model, tmp_path / "folder")
    model.load_state_dict(torch.load(file, weights_only=True))
    user, _ = imported(plain, "user", plain.ebc.embedding_bags["user"].weight)
    for chunk, weight in user.state_dict().items():
        if "embedding_bags" in chunk:
            assert torch.equal(model.state_dict()[f"ebc.{chunk}"], weight)


@pytest.mark.parametrize(
    ("budget", "most"),
    [(("--compression", 8), 3000 * 64 / 8), (("--table-bytes", "30kB"), 30_000)],
)
def test_budgets_are_kept_and_used(sources, tmp_path, budget, most):
    file = tmp_path / "said.json"
    called(
        "compress", sources / "dcp", tmp_path / "out", *budget, "--table", "user", "--json", file
    )
    said = next(t for t in json.loads(file.read_text())["tables"] if t["table"] == "ebc.user")
    assert 0.9 * most < said["bytes"] <= most
    assert said["bytes_before"] == 3000 * 16 * 4
    record = checkpoint_info(tmp_path / "out").tables["ebc.user"]
    assert (record.num_rows, record.num_helper_rows) == (said["num_rows"], 0)


def test_a_budget_that_holds_all_tables_in_full_leaves_them(sources, tmp_path):
    """Without the last byte they are compressed."""
    words = ("compress", sources / "flat.pt", tmp_path / "out", "--table", "user")
    told = called(*words, "--table-bytes", 3000 * 64)
    assert "ebc.user: stays at 192.0 kB, which the budget holds" in told
    told = called(*words[:2], tmp_path / "less", *words[3:], "--table-bytes", 3000 * 64 - 1)
    assert "instead of 192.0 kB" in told


def test_by_default_large_tables_are_compressed_twentyfold(tmp_path):
    weight = torch.randn(20_000, 16, generator=torch.Generator().manual_seed(0))
    torch.save({"e.embedding_bags.big.weight": weight, "e.embedding_bags.tiny.weight": weight[:9]},
               tmp_path / "plain.pt")  # fmt: skip
    told = called("compress", tmp_path / "plain.pt", tmp_path / "out")
    assert "e.big: 64.0 kB instead of 1.28 MB (20.0 times)" in told
    assert "e.tiny: stays at 576 B, not chosen" in told


def test_what_the_model_is_read_by_can_be_said(sources, tmp_path):
    called("compress", sources / "own", tmp_path / "out", *OPTIONS, "--table", "user",
           "--features", "user=u,v", "--pooling", "user=mean")  # fmt: skip
    reading = checkpoint_info(tmp_path / "out").tables["ebc.user"].reading
    assert (reading.features, reading.pooling, reading.weighted) == (["u", "v"], "MEAN", False)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--table", "usr"), "no table 'usr'"),
        (("--table", "user", "--table-bytes", "100"), "100 B do not hold two rows a chunk"),
        (("--pooling", "user=max", "--table", "user"), "pooling 'max' is not SUM or MEAN"),
        ((), "has 1.05 MB or more; name those to compress"),
        (("--table", "user", "--prefix", "x."), "behind the prefix 'x.'"),
        (("--table", "user", "--num-rows", 16, "--num-chunks", 3), "num_chunks 3"),
    ],
)
def test_what_cannot_be_is_said_and_nothing_is_written(sources, tmp_path, words, message):
    told = called("compress", sources / "flat.pt", tmp_path / "out", *words, status=1)
    assert told.startswith("Error: ") and message in told
    assert not list(tmp_path.iterdir())


def test_two_budgets_and_a_place_that_is_taken_are_refused(sources, tmp_path):
    words = ("compress", sources / "flat.pt", tmp_path)
    told = called(*words, "--num-rows", 4, "--compression", 3, status=2)
    assert "--compression and --num-rows both say how large" in told
    (tmp_path / "file").write_text("")
    assert "is there already" in called(*words, *OPTIONS, status=1)


def test_sources_that_are_none_are_refused(sources, tmp_path):
    called("compress", sources / "flat.pt", tmp_path / "out", *OPTIONS, "--table", "user")
    told = called("compress", tmp_path / "out", tmp_path / "again", *OPTIONS, status=1)
    assert "tables ['ebc.user'] are CCE tables already" in told
    state = {"e.embedding_bags.t.weight": torch.ones(9, 4)}
    torch.save({"a": state, "b": state}, tmp_path / "two.pt")
    told = called("compress", tmp_path / "two.pt", tmp_path / "again", *OPTIONS, status=1)
    assert "tables under the prefixes ['a.', 'b.']; choose one by --prefix" in told
    for name in ("none.pt", "damaged.pt"):
        (tmp_path / "damaged.pt").write_bytes(b"no zip file")
        assert called("compress", tmp_path / name, tmp_path / "again", *OPTIONS, status=1)


def test_a_model_that_does_not_fit_is_refused(sources, tmp_path):
    called("compress", sources / "flat.pt", tmp_path / "out", *OPTIONS, "--table", "user")
    with pytest.raises(ValueError, match="none is a plain table of the model"):
        compress_like(nn.ModuleDict({"other": Plain()}), tmp_path / "out")
    other = Plain()
    other.ebc.embedding_bag_configs()[0].num_embeddings = 99
    with pytest.raises(ValueError, match=r"is \[99, 16\] in the model and \[3000, 16\] in the"):
        compress_like(other, tmp_path / "out")
    bare = Plain().ebc
    torch.save(bare.state_dict(), tmp_path / "bare.pt")
    called("compress", tmp_path / "bare.pt", tmp_path / "bare", *OPTIONS, "--table", "user")
    with pytest.raises(ValueError, match="cannot be replaced in place"):
        compress_like(bare, tmp_path / "bare")
