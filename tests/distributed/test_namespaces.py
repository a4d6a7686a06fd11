"""A job over two machines, network namespaces of this one, of which the second is killed."""

from __future__ import annotations

import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from benchmarks import nodes
from benchmarks.namespaces import OPTIONS, one_try, same_end
from cce_torchrec.train import __main__ as program
from tests.support.torchrun import forked

SERVER = """
import socket
socket.create_server(("node-0", 5000)).accept()[0].send(b"!")
"""
CLIENT = """
import socket, time
for _ in range(100):
    try:
        print(socket.create_connection(("node-0", 5000)).recv(1))
        break
    except ConnectionRefusedError:  # the server has not started yet
        time.sleep(0.1)
"""

SEED = 4
"""Of the moment of the kill, and a return 0.3 seconds later: the test waits for no more."""

WHY_NOT = nodes.why_not()
needs_nodes = pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))


@needs_nodes
def test_a_machine_that_is_killed_comes_back(tmp_path):
    alone, out = tmp_path / "alone", tmp_path / "out"
    with ThreadPoolExecutor() as beside:
        # Without torchrun and its machines, whose ranks do the same.
        other = beside.submit(forked, 2, program.main, *OPTIONS, "--out", alone)
        found = one_try("program", launch="own store", seed=SEED, out=out)
    assert other.result().returncode == 0
    assert found["recovered"], found
    assert found["resumed"] == 1
    assert same_end(alone, out)


def started(node, log):
    """A process that is in the node, and does nothing."""
    process = node.start(["sleep", "60"], log=log)
    while process.pid not in node.processes():
        time.sleep(0.01)
    return process


@needs_nodes
def test_nodes_reach_each_other_and_leave_nothing(tmp_path):
    log = tmp_path / "log"
    with nodes.two_nodes() as (first, second):
        server = first.start([sys.executable, "-c", SERVER], log=log)
        client = second.start([sys.executable, "-c", CLIENT], log=log)
        assert (server.wait(20), client.wait(20)) == (0, 0)
        assert log.read_text() == "b'!'\n"
        sleeping = started(second, log)
        assert second.kill() and sleeping.wait(5) == -9
        assert not second.processes()
        sleeping = started(first, log)
    assert sleeping.wait(5) == -9
    assert first.name not in nodes.existing()


def test_a_machine_without_the_command_is_told(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert "iproute2" in nodes.why_not()
