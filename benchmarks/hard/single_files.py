"""Files of single kinds, to be damaged: ONNX, TorchScript, examples, full tables, a user's data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.hard.specs import BatchSpec
from benchmarks.hard.subject import SPEC, Subject, trained
from cce_torchrec.checkpoint.full_table import full_table
from cce_torchrec.inference import (
    inference_collection,
    to_onnx,
    to_torchscript,
    write_examples,
)
from cce_torchrec.inference.examples import Examples, read_examples
from cce_torchrec.inference.serve_check import check_export

BATCH = BatchSpec(seed=3, bags=8, outside=False)
FILES = ("model.onnx", "model.pt")


class Files(Subject):
    """One file of TorchScript and one of ONNX, which have checksums."""

    name = "served"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.folder.mkdir()
        self.donor = self.folder  # nothing is wrong about the whole file of another model
        collection = trained(1).job.collection
        served = inference_collection(collection, data_type="int8", lookup="portable")
        to_onnx(served, self.folder / "model.onnx")
        torch.jit.save(to_torchscript(served.lookup), str(self.folder / "model.pt"))
        self.examples = write_examples(folder / "good.npz", collection, BATCH.tensors(SPEC))

    def read(self, folder: Path) -> bool:
        """Both, as `cce-torchrec serve-check` reads them."""
        return all(check_export(folder / name, self.examples).ok for name in FILES)


class Given(Subject):
    """Examples and full tables, which are what their user says: other values are as good."""

    name, settings = "given", True

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        import pandas as pd
        from safetensors.torch import save_file

        for seed, at in ((1, self.folder), (5, self.donor)):
            at.mkdir()
            collection = trained(seed).job.collection
            write_examples(at / "examples.npz", collection, BATCH.tensors(SPEC))
            g = torch.Generator().manual_seed(seed)
            ids = {name: torch.randint(0, 11, (8,), generator=g).tolist() for name in "fgh"}
            pd.DataFrame(ids | {"g": [[i] * (i % 3) for i in ids["g"]]}).to_parquet(
                at / "examples.parquet"
            )
            weight = torch.randn(11, 4, generator=g)
            np.save(at / "weight.npy", weight.numpy())
            save_file({"embedding_bags.t.weight": weight}, at / "weight.safetensors")
            torch.save({"model": {"embedding_bags.t.weight": weight}, "step": 3}, at / "weight.pt")
        self.expected = self._read(self.folder)

    def _read(self, folder: Path) -> list[torch.Tensor]:
        found = [read_examples(folder / "examples.npz")]
        found.append(read_examples(folder / "examples.parquet", ["f", "g", "h"]))
        tables = [full_table(file, "t") for file in sorted(folder.glob("weight.*"))]
        return [*(part for own in found for part in _parts(own)), *map(torch.as_tensor, tables)]

    def read(self, folder: Path) -> bool:
        """Every file."""
        found = self._read(folder)
        return len(found) == len(self.expected) and all(
            torch.equal(*pair) for pair in zip(found, self.expected, strict=True)
        )


def _parts(examples: Examples) -> list[torch.Tensor]:
    return [part for part in vars(examples).values() if isinstance(part, torch.Tensor)]


def clicks(g: np.random.Generator) -> Any:
    """A user's table of 200 rows, a DataFrame."""
    import pandas as pd

    return pd.DataFrame({
        "click": g.integers(0, 2, 200), "price": g.normal(size=200),
        "user": [f"u{i}" for i in g.integers(0, 30, 200)], "item": g.integers(0, 9, 200),
    })  # fmt: skip


def examples_of(file: Path, folder: Path | None = None) -> list[str]:
    """All that the data set of such a table gives, as text; `folder` keeps its scan."""
    from cce_torchrec.data import Share
    from cce_torchrec.data.table import TableDataset
    from cce_torchrec.data.table_options import TableOptions

    options = TableOptions(
        label="click", dense=("price",), categorical=("user", "item"), folder=folder
    )
    dataset = TableDataset(file, options)
    share = Share(batch_size=64, rank=0, world_size=1)
    rows = [*dataset.batches(share, seed=0, epoch=1), *dataset.validation_batches(share)]
    return [str(dataset.features), *map(str, rows)]


class Clicks(Subject):
    """A user's own data, as Parquet and as text: what can be read is taken."""

    name, settings = "data", True

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        g = np.random.default_rng(0)
        for at in (self.donor, self.folder):
            at.mkdir()
            frame = clicks(g)
            frame.to_parquet(at / "clicks.parquet", index=False, row_group_size=50)
            frame.to_csv(at / "clicks.csv", index=False)
        self.expected = self._read(self.folder)

    def _read(self, folder: Path) -> list[list[str]]:
        return [examples_of(folder / name) for name in ("clicks.parquet", "clicks.csv")]

    def read(self, folder: Path) -> bool:
        """Every batch of both."""
        return self._read(folder) == self.expected
