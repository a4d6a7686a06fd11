"""`cce-torchrec train`."""

from cce_torchrec.train.command import command

__all__ = ["command"]
