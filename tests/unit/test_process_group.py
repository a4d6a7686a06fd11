"""Ranks that torchrun starts again do not read what the dead ones left in its store."""

from __future__ import annotations

from unittest import mock

import pytest
import torch.distributed as dist

from cce_torchrec import start_process_group


def started(server, attempt, monkeypatch, nodes="1", shared="True"):
    """What `init_process_group` is given, by name, in a rank of one attempt of torchrun."""
    for name, value in {
        "TORCHELASTIC_USE_AGENT_STORE": shared, "GROUP_WORLD_SIZE": nodes, "RANK": "1",
        "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(server.port),
        "TORCHELASTIC_RESTART_COUNT": str(attempt),
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    with mock.patch.object(dist, "init_process_group") as init:
        start_process_group("gloo")
    return init.call_args.kwargs


@pytest.fixture
def server():
    """The store of torchrun's agent, which lives as long as the job."""
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


@pytest.mark.parametrize("attempts", [(0, 1), (1, 2), (0, 3)])
def test_each_attempt_has_keys_of_its_own(server, attempts, monkeypatch):
    first, second = (started(server, attempt, monkeypatch) for attempt in attempts)
    assert (first["rank"], first["world_size"]) == (1, 2)
    first["store"].set("address", "of a rank that died")
    assert not second["store"].check(["address"])
    again = started(server, attempts[0], monkeypatch)["store"]  # as the other rank makes it
    assert again.get("address") == b"of a rank that died"


@pytest.mark.parametrize(("nodes", "shared"), [("2", "True"), ("1", "False")])
def test_otherwise_torch_finds_the_store(server, nodes, shared, monkeypatch):
    assert "store" not in started(server, 1, monkeypatch, nodes, shared)
