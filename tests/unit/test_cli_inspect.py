"""`cce-torchrec inspect` and `diff`: of whole, damaged, older and other checkpoints."""

import json
from pathlib import Path
from unittest import mock

import pytest
import torch
from click.testing import CliRunner

from cce_torchrec.checkpoint import compare_tables, save_checkpoint, saved_state
from cce_torchrec.checkpoint.compare import compare_checkpoints, differing
from cce_torchrec.checkpoint.inspection import inspect_checkpoint
from cce_torchrec.cli.main import command
from cce_torchrec.clustering import ClusteringSchedule, cluster
from tests.support.jobs import build, step

FORMAT_2 = Path(__file__).with_name("format_2")
SETTINGS = {"lr": 0.1, "tables": {"t": 3}}


def run(*arguments):
    return CliRunner().invoke(command, [str(one) for one in arguments])


def save(folder, model, own, number=3, **options):
    options = {"extra": {"settings": SETTINGS, "records": [1]}} | options
    schedule = ClusteringSchedule(frozenset([2, 4]), 0, 6, frozenset([3]))
    return save_checkpoint(
        folder, model, step=number, optimizers=[own], schedule=schedule, **options
    )


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    """Checkpoints by name, of a job at several times."""
    root, out = tmp_path_factory.mktemp("jobs"), {}
    model, own = build("unsharded", 1)
    step(model, own, 0)
    out["first"] = save(root / "first", model, own)
    other = {"settings": {**SETTINGS, "lr": 0.2}, "records": [2]}
    out["other settings"] = save(root / "settings", model, own, extra=other)
    codes = model.collection.codes["t"]
    # Cluster i of chunk 1 is called 4 - i, and its row is moved along.
    codes.write(1, 4 - codes.unpacked[:, 1])
    weight = model.collection.embedding_bag_collection.embedding_bags["t#1"].weight
    with torch.no_grad():
        weight[:5] = weight[:5].flip(0).clone()
    out["renumbered"] = save(root / "renumbered", model, own)
    cluster(model, optimizer=own)
    step(model, own, 1)
    out["later"] = save(root / "later", model, own, 4)
    return out


def test_inspect_says_what_there_is(jobs, tmp_path):
    found = run("inspect", jobs["later"], "--json", tmp_path / "found.json")
    assert found.exit_code == 0, found.output
    for text in (
        "step 4, format 4, saved by 1 rank with torch",
        "clustering schedule: after steps 2, 4, finalize after step 6, tables of rare ids after",
        "all as they were written", "  lr: 0.1", "collection.t: 1 clustering, RowWiseAdagrad",
        "collection.u  CCE    1,000    8       2  300 + 900",
        "warning: a third of the helper rows of chunks 0 and 1 have no id",
    ):  # fmt: skip
        assert text in found.output, text
    written = json.loads((tmp_path / "found.json").read_text())
    assert written == json.loads(json.dumps(inspect_checkpoint(jobs["later"])))
    by_name = {table["name"]: table for table in written["tables"]}
    # 5 + 15 rows of 16 float32, an accumulator a row and chunk with one step count each.
    assert by_name["collection.t"]["bytes"] == {
        "rows": 20 * 16 * 4, "codes": 38 * 12, "notes": 16, "optimizer": 4 * (20 + 1) * 4,
    }  # fmt: skip
    assert written["bytes"] == sum(
        file.stat().st_size for file in jobs["later"].iterdir() if file.name != "manifest.json"
    )


def test_inspect_of_one_table_and_of_the_manifest_alone(jobs):
    found = inspect_checkpoint(jobs["first"], ["t"])
    assert [t["name"] for t in found["tables"] if t["health"]] == ["collection.t"]
    with mock.patch.object(saved_state.SavedState, "__init__", side_effect=AssertionError):
        fast = inspect_checkpoint(jobs["first"], fast=True)
    sizes = [[t["bytes"][k] for k in ("rows", "codes", "optimizer")] for t in fast["tables"]]
    assert sizes == [
        [t["bytes"][k] for k in ("rows", "codes", "optimizer")] for t in found["tables"]
    ]
    assert "not read" in run("inspect", jobs["first"], "--fast").output
    wrong = run("inspect", jobs["first"], "--table", "tt")
    assert wrong.exit_code == 1 and "did you mean 't'" in wrong.output


def damaged(folder, jobs, change):
    """A copy of the checkpoint "later", changed."""
    copy = folder / "step-000000004-0001"
    copy.mkdir()
    for file in jobs["later"].iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    change(copy)
    return copy


def flip(file):
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(bytes(content))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda c: flip(c / "rank-0.safetensors"), "rank-0.safetensors: is damaged (its checksum"),
        (lambda c: (c / "rank-0.safetensors").unlink(), "rank-0.safetensors: is missing"),
        (lambda c: (c / "rank-0.json").write_text(""), "rank-0.json: has 0 bytes, its manifest"),
        (lambda c: (c / "tensors.json").write_text("{"), "tensors.json: has 1 bytes"),
    ],
    ids=["changed", "missing", "short", "index"],
)
def test_damaged_files_are_named_and_the_rest_is_read(change, said, jobs, tmp_path):
    copy = damaged(tmp_path, jobs, change)
    found = run("inspect", copy)
    assert found.exit_code == 1
    assert said in found.output and "1 damaged" in found.output
    assert "step 4" in found.output and "collection.u  CCE" in found.output
    tables = inspect_checkpoint(copy)["tables"]
    readable = "rank-0.json" in said
    assert all((table["health"] is not None) == readable for table in tables)
    assert all((table["not_read"] is None) == readable for table in tables)
    # What is damaged is not compared.
    assert run("diff", copy, jobs["later"]).exit_code == 2


def manifest_with(folder, **fields):
    folder.mkdir()
    (folder / "manifest.json").write_text(json.dumps(fields))
    return folder


def test_what_is_no_checkpoint_is_refused_in_a_sentence(jobs, tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "half" / "step-000000001-0001").mkdir(parents=True)
    for where, said in [
        (tmp_path / "nowhere", "is not there"),
        (tmp_path / "file", "is a file"),
        (tmp_path, "no checkpoint in"),
        (tmp_path / "half", "were not finished"),
        (manifest_with(tmp_path / "newer", format=99), "format 99"),
        (manifest_with(tmp_path / "older", format=1), "save anew"),
    ]:
        for arguments, status in ((("inspect", where), 1), (("diff", jobs["first"], where), 2)):
            found = run(*arguments)
            assert found.exit_code == status, found.output
            assert found.output.startswith("Error: ") and said in found.output
            assert found.output.count("\n") == 1


def test_no_permission_is_no_damage(jobs):
    refused = PermissionError(13, "Permission denied")
    with mock.patch.object(Path, "read_text", side_effect=refused):
        found = run("inspect", jobs["first"])
    assert found.exit_code == 1
    assert "cannot be read" in found.output and "damaged" not in found.output


def test_format_2_is_inspected_and_compared():
    found = inspect_checkpoint(FORMAT_2)
    (table,) = found["tables"]
    assert not found["damaged"] and table["health"]["clusterings"] == 1
    assert sum(chunk["ids"] for chunk in table["health"]["chunks"]) == 4 * 50
    assert run("diff", FORMAT_2, FORMAT_2).exit_code == 0


def test_equal_checkpoints_whose_extra_differs(jobs):
    found = run("diff", jobs["first"], jobs["other settings"])
    assert found.exit_code == 0, found.output
    assert "lr: 0.1 and 0.2" in found.output and found.output.endswith("bit-equal\n")


def test_renumbered_clusters_are_no_changed_codes(jobs, tmp_path):
    out = tmp_path / "found.json"
    with mock.patch.object(compare_tables, "BLOCK", 64):
        assert run("diff", jobs["first"], jobs["renumbered"], "--json", out).exit_code == 1
    (table,) = [t for t in json.loads(out.read_text())["tables"]["both"] if not t["equal"]]
    assert table["name"] == "collection.t"
    assert table["codes_equal"] is False and table["codes"] == [0, 0, 0, 0]
    assert table["embeddings"] == {"relative_norm": 0.0, "ids": 300, "exact": True}
    assert "renumbered" in run("diff", jobs["first"], jobs["renumbered"]).output


def test_what_training_has_changed_is_told(jobs):
    found = compare_checkpoints(jobs["first"], jobs["later"])
    assert found["step"] == [3, 4] and not found["equal"] and found["settings"] == {}
    by_name = {table["name"]: table for table in found["tables"]["both"]}
    assert by_name["collection.t"]["clusterings"] == [0, 1]
    assert all(0 < share < 1 for share in by_name["collection.t"]["codes"])
    assert by_name["collection.p"]["codes"] is None
    key = "model.over.bias"
    assert found["dense"]["differing"][key]["max_abs"] > 0
    with mock.patch.object(compare_tables, "SAMPLE", 100):
        sampled = compare_checkpoints(jobs["first"], jobs["later"])["tables"]["both"]
    for table in sampled:
        exact, own = by_name[table["name"]]["embeddings"], table["embeddings"]
        assert own["exact"] == (exact["ids"] <= 100)
        if table["name"] == "collection.t":
            # Of 300 ids that share 20 rows. In u a few ids of 1,000 that were trained have most of
            # the difference, which no sample of 100 tells.
            assert own["relative_norm"] == pytest.approx(exact["relative_norm"], rel=0.3)


def test_the_distance_is_that_of_embeddings_that_models_look_up(jobs):
    """Against the rows that a loop over ids adds up."""
    from cce_torchrec.checkpoint.inspection import open_checkpoint
    from cce_torchrec.checkpoint.saved_table import SavedTable

    model, own = build("unsharded", 1)
    step(model, own, 0)
    rows = {name: bag.weight for name, bag in
            model.collection.embedding_bag_collection.embedding_bags.items()}  # fmt: skip
    path, manifest = open_checkpoint(jobs["first"])
    found = SavedTable("collection.u", saved_state.SavedState(path, manifest))
    ids = torch.tensor([0, 5, 17, 999])
    codes = model.collection.codes["u"]
    main, helper = codes.main_rows(ids), codes.helper_rows(ids) + 300
    expected = [
        torch.cat([rows[f"u#{j}"][main[j, i]] + rows[f"u#{j}"][helper[j, i]] for j in range(2)])
        for i in range(len(ids))
    ]
    torch.testing.assert_close(found.embeddings(ids), torch.stack(expected).double())


def test_tables_and_tensors_of_one_side_alone(jobs):
    found = compare_checkpoints(jobs["first"], FORMAT_2)
    assert found["tables"]["only_a"] == ["collection.p", "collection.u"]
    (table,) = found["tables"]["both"]
    assert table["config"]["num_embeddings"] == [300, 50]
    assert table["codes"] is not None and table["embeddings"]["ids"] == 50
    assert found["format"] == [4, 2]
    text = run("diff", jobs["first"], FORMAT_2).output
    assert "table only in a: collection.p" in text and "num_rows 5 and 3" in text


def test_dictionaries_are_compared_to_their_depth():
    nan = float("nan")
    assert differing({"a": {"b": 1, "c": nan}, "d": 2}, {"a": {"b": 3, "c": nan}, "e": None}) == {
        "a.b": [1, 3], "d": [2, None],
    }  # fmt: skip
