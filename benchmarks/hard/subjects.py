"""All that is damaged: checkpoints, exports, files of a data set, settings, `single_files`."""

from __future__ import annotations

import importlib.util
import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.hard.drivers import Local
from benchmarks.hard.properties import assert_equal
from benchmarks.hard.single_files import Clicks, Files, Given, clicks, examples_of
from benchmarks.hard.specs import BatchSpec, TableSpec
from benchmarks.hard.subject import SPEC, Changed, Subject, content_of, trained
from cce_torchrec import (
    ClusteringSchedule,
    checkpoint_info,
    load_checkpoint,
    save_checkpoint,
)
from cce_torchrec.inference import inference_collection, load_inference, save_inference


class Checkpoint(Subject):
    """A job's folder of two checkpoints, of which the earlier is read where the later is none."""

    name = "checkpoint"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.states = []
        driver = trained(1)
        for step in (3, 4):
            self._save(driver, self.folder, step)
            self.states.append(driver.state())
            driver.call("step", BatchSpec(seed=9, bags=4, outside=False))
        self._save(trained(5), self.donor, 7)
        self.fresh = Local(SPEC)
        self.before = self.fresh.state()

    def _save(self, driver: Local, folder: Path, step: int) -> None:
        save_checkpoint(
            folder, driver.job.model, step=step, optimizers=driver.job.optimizers,
            schedule=ClusteringSchedule.every(5), extra={"position": [step, {"a": 0.5}]}, keep=2,
        )  # fmt: skip

    def read(self, folder: Path) -> bool:
        """Into a fresh model, which is to stay as it is where the load is refused."""
        job = self.fresh.job
        torch.manual_seed(0)
        try:
            info = checkpoint_info(folder)
            report = load_checkpoint(folder, job.model, optimizers=job.optimizers)
        except ValueError as error:
            if "may be overwritten" not in str(error):
                self._check_untouched(error)
            raise
        if report.step != info.step or report.step not in (3, 4) or report.dropped:
            return False
        if report.extra != {"position": [report.step, {"a": 0.5}]}:
            return False
        if report.schedule != ClusteringSchedule.every(5):
            return False
        group = job.optimizer.param_groups[0]
        if (group["lr"], group["eps"], group["betas"]) != (0.0625, 1e-3, (0.9, 0.999)):
            return False
        try:
            assert_equal(self.fresh.state(), self.states[report.step - 3], exact=True)
        except AssertionError:
            return False
        return True

    def _check_untouched(self, refused: ValueError) -> None:
        try:
            assert_equal(self.fresh.state(), self.before, exact=True)
        except AssertionError as error:
            raise Changed(f"{refused}; changed is {error}") from error

    def forge(self, folder: Path) -> bool:
        """Writes sizes and sums of the files into the manifest."""
        forged = False
        for manifest in folder.rglob("manifest.json"):
            try:
                found = json.loads(content_of(manifest))
                for name in found["files"]:
                    content = content_of(manifest.parent / name)
                    found["files"][name] = [len(content), zlib.crc32(content)]
                found.pop("crc32", None)  # as of an older version
                manifest.write_text(json.dumps(found))
                forged = True
            except Exception:  # damaged so that nothing can be made to fit
                continue
        return forged


class Export(Subject):
    """A folder of packed tables."""

    name = "inference"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        for seed, at in ((1, self.folder), (5, self.donor)):
            served = inference_collection(trained(seed).job.collection, data_type="int8")
            save_inference(served, at)
        self.batch = BatchSpec(seed=3, bags=8, outside=False).tensors(SPEC)
        self.expected = load_inference(self.folder)(self.batch).values()

    def read(self, folder: Path) -> bool:
        """By both lookups, mapped or not."""
        same = True
        for lookup, mmap in (("portable", True), ("fused", False)):
            served = load_inference(folder, lookup=lookup, mmap=mmap)
            try:
                out = served(self.batch).values()
                if not isinstance(out, torch.Tensor):  # forged to be of sequences
                    return False
            except ValueError:  # of forged tables, which lack a feature or an id
                return False
            # The two lookups round in other places.
            same &= out.shape == self.expected.shape and bool(
                torch.allclose(out, self.expected, rtol=1e-5, atol=1e-6)
            )
        return same

    def forge(self, folder: Path) -> bool:
        """Writes sizes and sums of the files into the manifest, and the sum of that."""
        try:
            manifest = folder / "manifest.json"
            found = json.loads(content_of(manifest))
            for name in found["files"]:
                content = content_of(folder / name)
                found["files"][name] = {"bytes": len(content), "crc32": zlib.crc32(content)}
            rest = {key: value for key, value in found.items() if key != "crc32"}
            found["crc32"] = zlib.crc32(json.dumps(rest, sort_keys=True).encode())
            manifest.write_text(json.dumps(found))
        except Exception:  # damaged so that nothing can be made to fit
            return False
        return True


class Vocabulary(Subject):
    """The file in which a scan of a user's table is kept."""

    name = "vocabulary"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        g = np.random.default_rng(0)
        for at in (self.donor, self.folder):
            at.mkdir()
            self.clicks = folder / f"{at.name}.parquet"
            clicks(g).to_parquet(self.clicks, index=False)
            self.expected = examples_of(self.clicks, at)

    def read(self, folder: Path) -> bool:
        """Every batch, made with the ids of the file, or with ids that are counted anew."""
        return examples_of(self.clicks, folder) == self.expected


class Configuration(Subject):
    """A file of options of the training program. It has no checksum: other values are as good."""

    name, settings = "config", True

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        from cce_torchrec.train.config_file import config_yaml
        from cce_torchrec.train.options import parse

        for at, words in ((self.folder, ["--epochs", "3"]), (self.donor, ["--method", "full"])):
            at.mkdir()
            own = ["--dataset", "synthetic", "--out", "run", "--table-bytes", "100000", *words]
            (at / "config.yaml").write_text(config_yaml(parse(own)))
        self.expected = self._options(self.folder)

    def _options(self, folder: Path) -> dict[str, Any]:
        """Of a run, which does not start."""
        import click

        from cce_torchrec.train.options import PARAMS, resolved

        command = click.Command("train", params=PARAMS)
        with command.make_context("train", ["--config", str(folder / "config.yaml")]) as ctx:
            found = vars(resolved(ctx))
        return {key: value for key, value in found.items() if key != "config"}

    def read(self, folder: Path) -> bool:
        """As options of a run."""
        import click

        try:
            return self._options(folder) == self.expected
        except click.ClickException as error:  # what a command makes of its user's mistakes
            raise ValueError(error.format_message()) from error


class Tables(Subject):
    """Files of tables, as `cce-torchrec plan` reads them. These have no checksum either."""

    name, settings = "tables", True

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        from cce_torchrec.planning.table_file import read_tables, tables_yaml

        self.read_tables: Callable[[Path], Any] = read_tables
        for at, rows in ((self.folder, 5), (self.donor, 9)):
            at.mkdir()
            tables = [TableSpec(**{**vars(one), "rows": rows}).config() for one in SPEC.tables]
            (at / "tables.yaml").write_text(tables_yaml(tables))
            described = [{"name": "user", "num_embeddings": 1000, "embedding_dim": 16,
                          "num_rows": rows, "feature_names": ["f", "g"]},
                         {"name": "item", "num_embeddings": 50, "embedding_dim": 8}]  # fmt: skip
            (at / "tables.json").write_text(json.dumps({"tables": described}))
        self.expected = self._read(self.folder)

    def _read(self, folder: Path) -> list[str]:
        found = [self.read_tables(folder / name) for name in ("tables.yaml", "tables.json")]
        return [str({**vars(table), "init_fn": None}) for part in found for table in part]

    def read(self, folder: Path) -> bool:
        """Both files."""
        return self._read(folder) == self.expected


SUBJECTS: dict[str, Callable[[Path], Subject]] = {
    kind.name: kind
    for kind in (Checkpoint, Export, Vocabulary, Configuration, Tables, Files, Given, Clicks)
}


def available() -> list[str]:
    """Subjects whose packages are installed."""
    needed = {
        "vocabulary": ("pyarrow",),
        "config": ("yaml",),
        "tables": ("yaml",),
        "served": ("onnx", "onnxruntime"),
        "given": ("pyarrow", "safetensors"),
        "data": ("pyarrow",),
    }
    return [name for name in SUBJECTS if all(map(importlib.util.find_spec, needed.get(name, ())))]
