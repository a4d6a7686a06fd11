"""The folder of a job: what is in it beside checkpoints, and what cannot be removed or seen."""

from unittest import mock

import pytest
from torch import nn

from cce_torchrec.checkpoint import folder as folders
from cce_torchrec.checkpoint import latest_checkpoint, load_checkpoint, location, save_checkpoint
from cce_torchrec.checkpoint.location import write_whole


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("kind", ["link", "folder", "text", "bytes"])
def test_what_a_user_calls_latest_stays(tmp_path, kind):
    path, own = save_checkpoint(tmp_path, nn.Linear(2, 2), step=1), tmp_path / "latest"
    if kind == "link":
        own.symlink_to(path)
    elif kind == "folder":
        own.mkdir()
    else:
        own.write_bytes(b"mine" if kind == "text" else b"\xff\xfe")
    new = save_checkpoint(tmp_path, nn.Linear(2, 2), step=2)
    assert names(tmp_path) == ["latest", path.name, new.name]
    assert latest_checkpoint(tmp_path) == new


@pytest.mark.parametrize("what", ["folder inside", "file of its name"])
def test_what_was_not_finished_and_cannot_be_removed_is_in_nobodys_way(tmp_path, what, caplog):
    save_checkpoint(tmp_path, nn.Linear(2, 2), step=1)
    stuck = tmp_path / "step-000000002-0002"
    if what == "folder inside":
        (stuck / "inside").mkdir(parents=True)
    else:
        stuck.write_text("")
    assert save_checkpoint(tmp_path, nn.Linear(2, 2), step=2).name == "step-000000002-0003"
    assert f"{stuck} cannot be removed" in caplog.text and stuck.exists()


def test_an_old_one_that_cannot_be_removed_keeps_no_other(tmp_path, caplog):
    """And what a folder cannot be rid of is no checkpoint any more."""
    model = nn.Linear(2, 2)
    for step in range(3):
        path = save_checkpoint(tmp_path, model, step=step, keep=3)
        (path / "inside").mkdir() if step == 1 else None
    stuck, path = "step-000000001-0002", save_checkpoint(tmp_path, model, step=3, keep=1)
    assert names(tmp_path) == [stuck, path.name] and stuck in caplog.text
    assert latest_checkpoint(tmp_path) == path


@pytest.mark.parametrize("broken", ["remove", "entries", "_saved"])
def test_a_store_that_fails_once_a_checkpoint_is_in_place_loses_nothing(tmp_path, broken, caplog):
    """Clients of object stores raise errors of their own, which are no OSError."""
    model, real = nn.Linear(2, 2), getattr(folders, broken)
    save_checkpoint(tmp_path, model, step=1)

    def fails(folder, *args):
        if any(path.parent.name.startswith("step-000000002") for path in tmp_path.glob("*/man*")):
            raise RuntimeError("connection lost")
        return real(folder, *args)

    with mock.patch.object(folders, broken, fails):
        path = save_checkpoint(tmp_path, model, step=2, keep=1)
    assert "connection lost" in caplog.text
    assert latest_checkpoint(tmp_path) == path == load_checkpoint(tmp_path, model).path


def test_files_that_a_listing_does_not_show_yet_are_found_by_name(tmp_path):
    """As network file systems list, on another machine."""
    real = folders.entries

    def late(folder):
        return [path for path in real(folder) if path.suffix != ".safetensors"]

    with mock.patch.object(folders, "entries", late):
        path = save_checkpoint(tmp_path, nn.Linear(2, 2), step=1)
    assert load_checkpoint(tmp_path, nn.Linear(2, 2)).path == path


def test_a_file_system_that_cannot_sync_a_folder_will_do(tmp_path):
    real = location.os.fsync

    def fsync(handle):
        if location.os.path.isdir(f"/proc/self/fd/{handle}"):
            raise OSError(location.errno.EINVAL, "Invalid argument")
        real(handle)

    with mock.patch.object(location.os, "fsync", fsync):
        write_whole(tmp_path / "file", "text")
    assert (tmp_path / "file").read_text() == "text"


def test_a_store_that_cannot_be_asked_is_named(tmp_path):
    with (
        mock.patch.object(type(tmp_path), "iterdir", side_effect=RuntimeError("no credentials")),
        pytest.raises(ValueError, match=f"{tmp_path} cannot be read .no credentials"),
    ):
        latest_checkpoint(tmp_path)
