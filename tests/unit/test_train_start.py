"""How the training program ends where its ranks cannot start."""

import os
import socket
from unittest import mock

import pytest

from cce_torchrec.train import options
from cce_torchrec.train.run import run


def started(port, **other):
    env = dict(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1")
    with mock.patch.dict(os.environ, env | {"MASTER_PORT": str(port)} | other):
        return run(options.parse(["--timeout", "1"]))


def test_a_port_in_use_is_named():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert f"port {port} of 127.0.0.1 is in use by another program" in started(port)


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"RANK": "1", "WORLD_SIZE": "2"}, "did not find each other at 127.0.0.1:1 ("),
        ({"WORLD_SIZE": "two"}, "invalid literal"),
    ],
)
def test_ranks_that_do_not_meet_are_told_where(other, said):
    message = started(1, **other)
    assert said in message and "\n" not in message
