"""CUDA streams as TorchRec's pipelines use them, on a CPU, where one thing runs after the other."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from unittest import mock

import torch


class Stream:
    """Does at once what it is given, so that nobody waits for it."""

    device = torch.device("cpu")

    def __init__(self, *_, **__):
        pass

    def _nothing(self, *_, **__):
        pass

    wait_stream = wait_event = synchronize = record = wait = _nothing


STREAM = Stream()
DEVICE = SimpleNamespace(
    Stream=Stream,
    Event=Stream,
    current_stream=lambda *_: STREAM,
    default_stream=lambda *_: STREAM,
    stream=lambda _: contextlib.nullcontext(),
    synchronize=lambda *_: None,
)


@contextlib.contextmanager
def emulated_streams():
    """Inside, pipelines that ask torch for streams, on whatever device, get these."""
    with (
        mock.patch.object(torch, "get_device_module", lambda *_: DEVICE),
        mock.patch.object(torch.Tensor, "record_stream", lambda *_: None),
        mock.patch.multiple(
            torch.cuda,
            Stream=Stream,
            Event=Stream,
            stream=DEVICE.stream,
            current_stream=DEVICE.current_stream,
            current_device=lambda: 0,
            set_device=lambda _: None,
        ),
    ):
        yield
