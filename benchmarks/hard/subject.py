"""What is damaged: good files of a kind, how they are read, and what they give."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path

from benchmarks.hard.drivers import Local
from benchmarks.hard.specs import BatchSpec, ModelSpec, TableSpec
from cce_torchrec import cluster

SPEC = ModelSpec(
    tables=(
        TableSpec(name="t", ids=37, features=("f", "g"), mean=True, width=4, chunks=2, rows=5,
                  helper=9, seen=True, joint=True, rotated=True),
        TableSpec(name="p", ids=11, features=("h",), mean=False, width=8),
        TableSpec(name="u", ids=20, features=("h",), mean=False, width=4, chunks=1, rows=3,
                  helper=4, recipe="rare"),
    ),
    optimizer="Adam",
    in_backward=False,
)  # fmt: skip


class Changed(Exception):
    """A load was refused, and has changed the model all the same."""


class Subject(ABC):
    """Files of one kind in `folder`, and others of the same kind in `donor`."""

    name: str
    settings = False
    """Whether they are a user's own words: without a checksum, other values are as good, and a
    command line may give a pipe (`--config <(...)`), for whose writer it waits."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.donor = folder / "good", folder / "donor"
        folder.mkdir(parents=True)

    @abstractmethod
    def read(self, folder: Path) -> bool:
        """Reads the files; whether they give what the good ones do.

        Raises:
            ValueError, OSError: they are refused.
        """

    def forge(self, folder: Path) -> bool:
        """Makes checksums fit the files again; whether there are some."""
        return False

    def allows(self, error: BaseException) -> bool:
        """Whether the command line makes a sentence of such an error."""
        return False


def content_of(file: Path) -> bytes:
    """Of a file, and of nothing that would not end."""
    if not file.is_file():
        raise ValueError(f"{file} is no file")
    return file.read_bytes()


def trained(seed: int) -> Local:
    """A model after some steps and a clustering."""
    driver = Local(ModelSpec(**{**vars(SPEC), "seed": seed}))
    for step in range(3):
        driver.call("step", BatchSpec(seed=seed + step, bags=4, outside=False))
        if step == 1:
            cluster(driver.job.model, optimizer=driver.job.optimizer)
    return driver
