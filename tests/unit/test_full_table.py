"""A trained plain table is found wherever a job has left it."""

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, EmbeddingCollection
from torchrec.modules.embedding_configs import EmbeddingConfig

from cce_torchrec import CCEEmbeddingBagCollection, CCEEmbeddingBagConfig, save_checkpoint
from cce_torchrec.checkpoint import full_table
from cce_torchrec.clustering import import_table


def job():
    """A job's model with two tables, one of sequences."""
    torch.manual_seed(0)
    bags = EmbeddingBagConfig(name="item", num_embeddings=300, embedding_dim=8, feature_names=["i"])
    sequence = EmbeddingConfig(name="word", num_embeddings=20, embedding_dim=4, feature_names=["w"])
    return nn.ModuleDict(
        {
            "bags": EmbeddingBagCollection([bags]),
            "sequences": EmbeddingCollection([sequence]),
            "over": nn.Linear(3, 2),
        }
    )


def saved(model, folder, kind):
    """What the job has left in `folder`."""
    if kind == "live":
        return model
    if kind == "state dict":
        return model.state_dict()
    if kind == "torch.save":
        torch.save(model.state_dict(), folder / "model.pt")
        return folder / "model.pt"
    if kind == "nested":
        torch.save({"epoch": 3, "state": {"model": model.state_dict()}}, folder / "job.pth")
        return str(folder / "job.pth")
    if kind == "safetensors":
        tensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
        tensors.save_file(model.state_dict(), folder / "model.safetensors")
        return folder / "model.safetensors"
    if kind == "dcp":
        dcp.save(model.state_dict(), checkpoint_id=folder / "dcp", no_dist=True)
        return folder / "dcp"
    return save_checkpoint(folder / "own", model, step=1).parent


KINDS = ["live", "state dict", "torch.save", "nested", "safetensors", "dcp", "own"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_weight_is_found(tmp_path, kind):
    model = job()
    source = saved(model, tmp_path, kind)
    for name, own in (("item", model["bags"].embedding_bags), ("word", None)):
        weight = own[name].weight if own is not None else model["sequences"].embeddings[name].weight
        found = full_table(source, name)
        assert torch.equal(torch.as_tensor(found), weight) and not found.requires_grad


@pytest.mark.parametrize("kind", ["dcp", "own"])
def test_a_checkpoint_is_read_into_a_file_that_is_mapped(tmp_path, kind):
    model = job()
    source = saved(model, tmp_path, kind)
    found = full_table(source, "item", file=tmp_path / "item.npy")
    assert isinstance(found, np.memmap)
    assert np.array_equal(found, model["bags"].embedding_bags["item"].weight.detach().numpy())
    with pytest.raises(ValueError, match=r"item\.npy is there already"):
        full_table(source, "item", file=tmp_path / "item.npy")
    with pytest.raises(ValueError, match=r"is put together in an \.npy"):
        full_table(source, "item", file=tmp_path / "item.bin")
    assert not [file for file in tmp_path.iterdir() if file.name.startswith(".")]


def test_what_was_found_is_imported():
    config = CCEEmbeddingBagConfig(
        name="item",
        num_embeddings=300,
        embedding_dim=8,
        num_chunks=1,
        num_rows=300,
        num_helper_rows=0,
    )
    report = import_table(CCEEmbeddingBagCollection([config]), "item", full_table(job(), "item"))
    assert report.error < 1e-3


def test_a_numpy_file_is_mapped(tmp_path):
    np.save(tmp_path / "one.npy", np.ones((4, 2), np.float32))
    assert isinstance(full_table(tmp_path / "one.npy", "any"), np.memmap)
    np.save(tmp_path / "flat.npy", np.ones(4, np.float32))
    with pytest.raises(ValueError, match=r"flat\.npy is float32 \[4\], and a table is \[ids, D\]"):
        full_table(tmp_path / "flat.npy", "any")


def test_a_whole_key_is_a_name_too():
    weight = torch.ones(4, 2)
    found = full_table({"tower.emb.weight": weight, "other": torch.ones(3)}, "tower.emb.weight")
    assert torch.equal(found, weight)


def test_what_is_not_there_or_no_table(tmp_path):
    state = job().state_dict()
    with pytest.raises(ValueError, match=r"found no table 'user'; give one of these keys: \['bags"):
        full_table(state, "user")
    twice = {f"{tower}.embedding_bags.item.weight": torch.ones(2, 2) for tower in "ab"}
    with pytest.raises(ValueError, match=r"2 tables 'item': \['a.embedding_bags"):
        full_table(twice, "item")
    with pytest.raises(ValueError, match=r"'over.bias' is torch.float32 \[2\], and a table is"):
        full_table(state, "over.bias")
    with pytest.raises(ValueError, match="is not there"):
        full_table(tmp_path / "none.pt", "item")
    (tmp_path / "cut.pt").write_bytes(b"PK\x03\x04 not whole")
    with pytest.raises(ValueError, match=r"cut\.pt is no weight, state dict or checkpoint"):
        full_table(tmp_path / "cut.pt", "item")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no checkpoint in"):
        full_table(tmp_path / "empty", "item")


def test_damage_is_told_where_there_are_checksums(tmp_path):
    """Of checkpoints of this package, and of torch.save, which loads flipped bytes itself."""
    model = job()
    own = next(saved(model, tmp_path, "own").rglob("*.safetensors"))
    for source, file in ((tmp_path / "own", own), (saved(model, tmp_path, "torch.save"),) * 2):
        weight = model["bags"].embedding_bags["item"].weight.detach().numpy().tobytes()
        content = bytearray(file.read_bytes())
        content[content.index(weight[:64]) + 30] ^= 0xFF
        file.write_bytes(content)
        with pytest.raises(ValueError, match=r"damaged.* checksum"):
            full_table(source, "item")
    with pytest.raises(ValueError, match=r"damaged.* checksum"):
        full_table(tmp_path / "own", "item", file=tmp_path / "item.npy")
    assert not list(tmp_path.glob("*.npy")) and not list(tmp_path.glob(".*"))


def test_what_is_no_full_table(tmp_path):
    config = CCEEmbeddingBagConfig(name="item", num_embeddings=300, embedding_dim=16, num_rows=20)
    with pytest.raises(ValueError, match=r"'item' is a CCE table \(of .*item#0"):
        full_table(CCEEmbeddingBagCollection([config]), "item")
    torch.save([torch.ones(2, 2)], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="'item' is a list, and a table is a tensor"):
        full_table(tmp_path / "list.pt", "item")
    torch.save(job().state_dict(), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert full_table(tmp_path / "old.pt", "item").shape == (300, 8)
    folder = saved(job(), tmp_path, "dcp")
    next(folder.glob("*.distcp")).unlink()
    with pytest.raises(ValueError, match=r"dcp is no weight, state dict or checkpoint"):
        full_table(folder, "item", file=tmp_path / "item.npy")
    assert not list(tmp_path.glob("*.npy"))


def test_a_name_that_ends_another_is_not_taken_for_it():
    state = {"embedding_bags.big_item.weight": torch.ones(2, 2)}
    with pytest.raises(ValueError, match="no table 'item'"):
        full_table(state, "item")
