"""Packed tables in a folder: written whole or not at all, and checked when they are read."""

import json
import os
import shutil

import pytest
import torch
from torchrec import KeyedJaggedTensor

from cce_torchrec import CCEEmbeddingBagConfig, CCEEmbeddingCollection, cluster
from cce_torchrec.inference import folder as folders
from cce_torchrec.inference import inference_collection, load_inference, save_inference
from cce_torchrec.signed import checksum
from tests.support.inference import batch_of, many_tables, one_table

REPAIR = "copy the whole export again"


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    """A collection with a batch and what it gives, and the folder that it was saved in."""
    torch.manual_seed(0)
    collection = many_tables()
    cluster(collection)
    batch = batch_of(collection, 6)
    served = inference_collection(collection, lookup="portable")
    folder = save_inference(served, tmp_path_factory.mktemp("exports") / "one")
    return batch, served(batch).values(), folder


@pytest.fixture
def copied(export, tmp_path):
    """A copy of the folder, to be damaged."""
    return shutil.copytree(export[2], tmp_path / "copy")


@pytest.mark.parametrize("mmap", [False, True])
@pytest.mark.parametrize("lookup", ["auto", "portable"])
def test_what_was_saved_is_loaded(export, lookup, mmap):
    batch, expected, folder = export
    served = load_inference(folder, lookup=lookup, mmap=mmap)
    assert torch.equal(served(batch).values(), expected)
    assert sorted(file.name for file in folder.iterdir()) == [
        "codes.bin",
        "manifest.json",
        "rows.bin",
    ]
    assert not [file for file in folder.parent.iterdir() if file.name.startswith(".")]


def test_options_are_loaded_too(tmp_path):
    ignoring = inference_collection(one_table(), lookup="portable", ignores=True)
    loaded = load_inference(save_inference(ignoring, tmp_path / "ignoring"), lookup="portable")
    bad = KeyedJaggedTensor(["f"], torch.tensor([-5]), lengths=torch.ones(1).int())
    assert torch.equal(loaded(bad).values(), ignoring(bad).values())
    weighted = many_tables(is_weighted=True)
    served = inference_collection(weighted, lookup="portable")
    loaded = load_inference(save_inference(served, tmp_path / "weighted"), lookup="portable")
    batch = batch_of(weighted, 3)
    assert torch.equal(loaded(batch).values(), served(batch).values())


def test_sequences_are_loaded(tmp_path):
    table = CCEEmbeddingBagConfig(name="a", num_embeddings=100, embedding_dim=16, num_rows=20)
    served = inference_collection(
        CCEEmbeddingCollection([table], need_indices=True), lookup="portable"
    )
    loaded = load_inference(save_inference(served, tmp_path / "one"), lookup="portable")
    batch = KeyedJaggedTensor(["a"], torch.tensor([3, 4]), lengths=torch.tensor([2, 0]))
    assert torch.equal(loaded(batch)["a"].values(), served(batch)["a"].values())
    assert torch.equal(loaded(batch)["a"].weights(), torch.tensor([3, 4]))


def test_what_is_no_inference_collection_is_not_saved(tmp_path):
    with pytest.raises(ValueError, match="is no inference collection"):
        save_inference(one_table(), tmp_path / "one")


def test_a_folder_that_is_there_is_left_alone(export, copied):
    before = (copied / "manifest.json").read_bytes()
    with pytest.raises(ValueError, match="is there already"):
        save_inference(inference_collection(one_table(), lookup="portable"), copied)
    assert (copied / "manifest.json").read_bytes() == before


def test_a_save_that_fails_leaves_nothing(monkeypatch, tmp_path):
    def full(path, parts):
        raise ValueError(f"{path} cannot be written (No space left on device)")

    monkeypatch.setattr(folders, "write", full)
    with pytest.raises(ValueError, match="No space left"):
        save_inference(inference_collection(one_table(), lookup="portable"), tmp_path / "one")
    assert not list(tmp_path.iterdir())


def damaged(file, change):
    """Puts what `change` makes of the bytes of `file` into it."""
    data = bytearray(file.read_bytes())
    file.write_bytes(change(data))


def flipped(data):
    data[len(data) // 2] ^= 4
    return data


@pytest.mark.parametrize("name", ["codes.bin", "rows.bin"])
def test_damaged_files_are_refused(copied, name):
    damaged(copied / name, flipped)
    with pytest.raises(ValueError, match=f"{name} is damaged .its checksum differs.; {REPAIR}"):
        load_inference(copied, lookup="portable")
    damaged(copied / name, lambda data: data[:-8])
    with pytest.raises(ValueError, match=rf"{name} has \d+ bytes, its manifest says \d+; {REPAIR}"):
        load_inference(copied, lookup="portable", check=False)
    (copied / name).unlink()
    with pytest.raises(ValueError, match=f"{name} is missing; {REPAIR}"):
        load_inference(copied, lookup="portable")


def test_manifests_that_cannot_be_read_are_refused(copied, tmp_path):
    with pytest.raises(ValueError, match=r"nothing is no folder; give one that save_inference"):
        load_inference(tmp_path / "nothing")
    with pytest.raises(ValueError, match=r"has no manifest.json: it is no export, or is still"):
        load_inference(tmp_path)
    with pytest.raises(ValueError, match=r"s3://bucket/one: exports are mapped; download it"):
        load_inference("s3://bucket/one")
    manifest = copied / "manifest.json"
    found = json.loads(manifest.read_text())
    manifest.write_text(json.dumps(found | {"format": 2}))
    with pytest.raises(ValueError, match="has format 2; this version reads 1"):
        load_inference(copied)
    manifest.write_text(json.dumps({k: v for k, v in found.items() if k != "golden"}))
    with pytest.raises(ValueError, match=r"manifest\.json is damaged \(its checksum differs"):
        load_inference(copied)
    less = {key: value for key, value in found.items() if key != "golden"}
    manifest.write_text(json.dumps(less | {"crc32": checksum(less)}))
    with pytest.raises(ValueError, match=r"does not describe tables \(KeyError\('golden'\)\)"):
        load_inference(copied, check=False)
    manifest.write_text("[]")
    with pytest.raises(ValueError, match="has format None"):
        load_inference(copied)
    for content in (b"{", b"[" * 100_000):
        damaged(manifest, lambda data, content=content: content)
        with pytest.raises(ValueError, match="cannot be read"):
            load_inference(copied)


def test_a_digit_that_was_flipped_is_found(copied):
    manifest = copied / "manifest.json"
    text = manifest.read_text()
    assert text.count("333,") > 0
    manifest.write_text(text.replace("333,", "338,", 1))
    with pytest.raises(ValueError, match=r"manifest\.json is damaged"):
        load_inference(copied, lookup="portable")


@pytest.mark.parametrize(
    "change",
    [
        lambda found: found["features"][0].update(ids=[0, 9_000_000]),
        lambda found: found["features"][0].update(table=99),
        lambda found: found["tables"][0].update(num_chunks=0),
        lambda found: found["tables"][0].update(num_embeddings=10**9),
        lambda found: found["tables"][0].update(row_bytes=8),
        lambda found: found["tables"].pop(),
        lambda found: found["tables"][0].pop("plain"),
        lambda found: found["files"].pop("rows.bin"),
        lambda found: found.pop("is_weighted"),
    ],
)
def test_numbers_that_contradict_each_other_are_refused(copied, change):
    manifest = copied / "manifest.json"
    found = json.loads(manifest.read_text())
    change(found)
    manifest.write_text(json.dumps(found | {"crc32": checksum(found)}))
    with pytest.raises(ValueError):
        load_inference(copied, lookup="portable")


@pytest.mark.parametrize(
    "change",
    [
        lambda found: found["golden"][0].update(vectors="x"),
        lambda found: found["golden"][0].update(ids=True),
        lambda found: found["golden"][0]["vectors"].pop(),
        lambda found: found["golden"].append({}),
        lambda found: found.update(golden=7),
    ],
)
def test_golden_rows_of_another_form_are_refused(copied, change):
    manifest = copied / "manifest.json"
    found = json.loads(manifest.read_text())
    change(found)
    manifest.write_text(json.dumps(found | {"crc32": checksum(found)}))
    with pytest.raises(ValueError, match="does not describe tables"):
        load_inference(copied, lookup="portable")


def test_a_manifest_that_never_ends_is_not_read(copied):
    (copied / "manifest.json").unlink()
    os.mkfifo(copied / "manifest.json")
    with pytest.raises(ValueError, match=r"manifest.json cannot be read \(it is no file\)"):
        load_inference(copied)


def test_a_message_ends_though_what_it_shows_does_not(copied):
    (copied / "manifest.json").write_text(json.dumps({"format": "9" * 10_000}))
    with pytest.raises(ValueError, match=r"has format '9{55} \.\.\.; this version reads 1"):
        load_inference(copied)


def test_other_versions_are_told(copied, caplog):
    manifest = copied / "manifest.json"
    found = json.loads(manifest.read_text())
    found["versions"]["torch"] = "1.0"
    manifest.write_text(json.dumps(found | {"crc32": checksum(found)}))
    load_inference(copied, lookup="portable")
    assert "was written with {'torch': '1.0'" in caplog.text


def test_other_versions_are_refused_where_nothing_is_checked(copied):
    manifest = copied / "manifest.json"
    found = json.loads(manifest.read_text())
    found["versions"]["fbgemm"] = "1.0"
    manifest.write_text(json.dumps(found | {"crc32": checksum(found)}))
    with pytest.raises(ValueError, match=r"was written with .*'1\.0'.* load it with check=True"):
        load_inference(copied, check=False)


def test_golden_rows_see_what_bags_are_pooled_by(copied):
    """Not what one id of each table is alone."""
    manifest = copied / "manifest.json"
    found = json.loads(manifest.read_text())
    assert any(own["mean"] for own in found["features"])
    for own in found["features"]:
        own["mean"] = False
    found["crc32"] = checksum(found)
    manifest.write_text(json.dumps(found))
    with pytest.raises(ValueError, match=r"is off by .* from what it was"):
        load_inference(copied)


def test_golden_rows_find_what_checksums_do_not(copied):
    manifest = copied / "manifest.json"
    found = json.loads(manifest.read_text())
    found["golden"][0]["vectors"][1][2] += 1
    manifest.write_text(json.dumps(found | {"crc32": checksum(found)}))
    with pytest.raises(ValueError, match=r"feature 'f' of ids \[0, 333, 666, 999\] is off by 1 "):
        load_inference(copied, lookup="portable")
    load_inference(copied, lookup="portable", check=False)
