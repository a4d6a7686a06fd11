"""The text of manifest.json, which stays what it was, and what of it is refused."""

import json
import shutil
from pathlib import Path

import pytest

from cce_torchrec.checkpoint.folder import read_manifest
from cce_torchrec.checkpoint.manifest import CCETableRecord, Fingerprint, TableRecord
from cce_torchrec.clustering import ClusteringSchedule
from cce_torchrec.signed import is_as_written, signed

WRITTEN = Path(__file__).with_name("manifest_format_2.json")
"""Of an unsharded job, by the code that kept manifests in dictionaries; some entries left out."""


def test_a_manifest_of_older_code_is_read_and_written_as_it_was(tmp_path):
    shutil.copy(WRITTEN, tmp_path / "manifest.json")
    manifest = read_manifest(tmp_path)
    assert json.dumps(manifest.to_json()) == WRITTEN.read_text()
    plain, compressed = manifest.tables["collection.p"], manifest.tables["collection.t"]
    assert type(plain) is TableRecord and plain.num_embeddings == 40
    assert isinstance(compressed, CCETableRecord) and compressed.num_helper_rows == 15
    assert all(name == table.full_name for name, table in manifest.tables.items())
    adam = manifest.optimizers["over.weight"]
    assert (adam.kind, adam.settings["betas"]) == ("Adam", [0.9, 0.999])
    assert adam.state == {"step": [], "exp_avg": [2, 56], "exp_avg_sq": [2, 56]}
    assert manifest.schedule == ClusteringSchedule.evenly(100, 5)
    assert all(isinstance(file, Fingerprint) for file in manifest.files.values())


def changed(folder, change):
    found = json.loads(WRITTEN.read_text())
    change(found)
    (folder / "manifest.json").write_text(json.dumps(found))


@pytest.mark.parametrize(
    "change",
    [
        lambda found: found.pop("files"),
        lambda found: found["tables"]["collection.t"].pop("seed"),
        lambda found: found["tables"]["collection.t"].update(kind="other"),
        lambda found: found.update(tables=[]),
        lambda found: found.update(files={"a": [1]}),
        lambda found: found.pop("format"),
    ],
)
def test_what_is_missing_is_found(tmp_path, change):
    changed(tmp_path, change)
    with pytest.raises(ValueError, match=r"manifest.json is damaged .*; load another checkpoint"):
        read_manifest(tmp_path)


def test_what_is_unknown_is_left_out(tmp_path):
    changed(tmp_path, lambda found: found["tables"]["collection.t"].update(later=1))
    assert json.dumps(read_manifest(tmp_path).to_json()) == WRITTEN.read_text()


@pytest.mark.parametrize(("number", "remedy"), [(1, "save anew"), (5, "update cce_torchrec")])
def test_another_format_is_named_whatever_it_has(tmp_path, number, remedy):
    (tmp_path / "manifest.json").write_text(json.dumps({"format": number}))
    with pytest.raises(ValueError, match=rf"format {number}; .* reads 2, 3 and 4: {remedy}"):
        read_manifest(tmp_path)


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "..", ".", "a/b", "a\\b", ""])
def test_a_file_outside_of_the_checkpoint_is_refused(tmp_path, name):
    changed(tmp_path, lambda found: found["files"].update({name: [1, 1]}))
    with pytest.raises(ValueError, match=r"damaged \(the file '.*' is not one of the checkpoint's"):
        read_manifest(tmp_path)


def test_a_digit_that_was_flipped_is_found(tmp_path):
    """Step, rates and the caller's own are nowhere else, so that nothing contradicts them."""
    found = signed(json.loads(WRITTEN.read_text()))
    (tmp_path / "manifest.json").write_text(json.dumps(found))
    step = read_manifest(tmp_path).step
    (tmp_path / "manifest.json").write_text(json.dumps(found | {"step": step + 1}))
    with pytest.raises(ValueError, match=r"manifest.json is damaged \(its checksum differs\)"):
        read_manifest(tmp_path)


def test_a_checksum_is_of_what_is_read():
    """JSON has text for keys, and sorts 10 before 9 then."""
    written = signed({"extra": {9: (1, 2), 10: float("nan")}})
    assert is_as_written(json.loads(json.dumps(written)), needed=True)
