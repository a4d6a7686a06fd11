"""Random programs of the public API beside a dictionary of rows, until something differs.

    python -m benchmarks.hard.properties [--minutes 10] [--ranks] [--json FILE]

Each program makes random tables, then trains, looks up, clusters, finalizes, freezes, saves, loads
and exports in random order, and all state is compared after every step. With `--ranks` the tables
are sharded over two gloo ranks by random plans, and a checkpoint moves between them and a model of
one process. A program that fails is printed with the blob that repeats it, and kept in --database.
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.database import DirectoryBasedExampleDatabase
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)

from benchmarks.hard.clustering_checks import ClusteringCheck
from benchmarks.hard.drivers import Driver, Local, Ranks, Sharded
from benchmarks.hard.exports import check_exports
from benchmarks.hard.reference import Reference
from benchmarks.hard.specs import BATCHES, SEEDS, BatchSpec, ModelSpec, State, model_specs
from benchmarks.machine import device_name
from cce_torchrec.versions import installed_versions

PLANS = ["tw", "cw", "rw", "rw+plain"]


def assert_equal(found: State, expected: State, *, exact: bool, optimizer: bool = True) -> None:
    """All state is the same: weights and optimizer state to rounding unless `exact`."""
    for field in ("clusterings", "finalized", "batches"):
        assert getattr(found, field) == getattr(expected, field), (
            field, getattr(found, field), getattr(expected, field),
        )  # fmt: skip
    for field in ("codes", "seen", "levels"):
        ours, theirs = getattr(found, field), getattr(expected, field)
        assert ours.keys() == theirs.keys(), field
        for name in ours:
            assert ours[name].equal(theirs[name]), (field, name, ours[name], theirs[name])
    assert found.weights.keys() == expected.weights.keys()
    tensors = {(name, "weight"): weight for name, weight in expected.weights.items()}
    if optimizer:
        tensors |= {(n, k): v for n, kept in expected.optimizer.items() for k, v in kept.items()}
    for (name, key), value in tensors.items():
        own = found.weights[name] if key == "weight" else found.optimizer[name].get(key)
        assert own is not None, f"{name} has no {key}"
        own, value = own.reshape(-1), value.reshape(-1)
        if exact:
            assert own.equal(value), (name, key, own, value)
        else:
            assert Reference.close(own.double().numpy(), value.double().numpy()), (
                name, key, own, value,
            )  # fmt: skip


class Programs(RuleBasedStateMachine):
    """Random programs over one model at a time, which loads and copies put another in place of."""

    ranks: ClassVar[Ranks | None] = None
    """Where tables are sharded, if they are."""
    done: ClassVar[Counter[str]] = Counter()

    driver: Driver
    reference: Reference

    @initialize(spec=model_specs(), plan=st.sampled_from([None, *PLANS]))
    def make(self, spec: ModelSpec, plan: str | None) -> None:
        """A new model."""
        self.spec, self.training, self.steps, self.invalid = spec, True, 0, 0
        self._use(self._driver(spec, plan))
        self.done["programs"] += 1

    def _driver(self, spec: ModelSpec, plan: str | None) -> Driver:
        # FBGEMM has no fused Adam for CPUs.
        if plan is None or self.ranks is None or spec.optimizer == "Adam":
            return Local(spec)
        return Sharded(ModelSpec(**{**vars(spec), "in_backward": True}), plan, self.ranks)

    def _use(self, driver: Driver) -> None:
        """Goes on with another model."""
        frozen = self.reference.frozen if hasattr(self, "reference") else None
        self.driver, self.invalid = driver, 0
        self.reference = Reference(self.spec, driver.state(), isinstance(driver, Sharded))
        self.driver.call("train_mode", self.training)
        if frozen is not None and isinstance(driver, Local):
            for table in self.spec.tables:
                self.driver.call("freeze", table.name, table.name in frozen)
            self.reference.frozen = frozen

    def _batches(self, batch: BatchSpec) -> list[BatchSpec]:
        """Of all ranks."""
        return [
            BatchSpec(seed=batch.seed + 7919 * rank, bags=batch.bags, outside=batch.outside)
            for rank in range(self.driver.world_size)
        ]

    def _check_outputs(self, batch: BatchSpec, outputs: list[torch.Tensor]) -> None:
        for own, output in zip(self._batches(batch), outputs, strict=True):
            expected = self.reference.pooled(own)
            assert self.reference.close(output.double().numpy(), expected), (output, expected)

    def _check_state(self, *, exact: bool) -> None:
        """The model's state is the reference's, which then takes over what rounding there was."""
        ours, found = self.reference, self.driver.state()
        weights = {k: torch.from_numpy(v) for k, v in ours.weights.items()}
        kept = {
            name: {k: torch.from_numpy(np.asarray(v)) for k, v in state.items()}
            for name, state in ours.optimizer.items()
        }
        expected = State(**{**vars(ours.state), "weights": weights, "optimizer": kept})
        if exact:
            expected = ours.state
        assert_equal(found, expected, exact=exact)
        ours.take(found)

    @rule(batch=BATCHES)
    def look_up(self, batch: BatchSpec) -> None:
        """Outputs and their names; in training, ids are noted."""
        results = self.driver.call("lookup", batch)
        self._check_outputs(batch, [values for _, values in results])
        features = [feature for _, feature in self.spec.slots()]
        names = [
            f"{feature}@{table.name}" if features.count(feature) > 1 else feature
            for table, feature in self.spec.slots()
        ]
        assert all(found == names for found, _ in results), (results[0][0], names)
        if self.training:
            self.reference.note(self._batches(batch))
        self._count(batch)
        self._check_state(exact=True)

    def _count(self, batch: BatchSpec) -> None:
        """Ids out of bounds are counted, each once for every table that reads it."""
        if self.spec.mode == "WARNING":
            self.invalid += sum(map(self.reference.invalid, self._batches(batch)))
            found = sum(self.driver.call("invalid"))
            # Each rank counts what it looks up: ids of a table whose chunks are spread, on several.
            if isinstance(self.driver, Sharded):
                assert bool(found) == bool(self.invalid) and found >= self.invalid
            else:
                assert found == self.invalid, f"{found} ids out of bounds, not {self.invalid}"
        self.done["lookups"] += 1

    @precondition(lambda self: self.training and self._trains())
    @rule(batch=BATCHES)
    def train(self, batch: BatchSpec) -> None:
        """A step."""
        outputs = self.driver.call("step", batch)
        self._check_outputs(batch, outputs)
        self.reference.train(self._batches(batch))
        self._count(batch)
        self._check_state(exact=False)
        self.steps += 1
        self.done["steps"] += 1

    def _trains(self) -> bool:
        return len(self.reference.frozen) < len(self.spec.tables)

    @rule(on=st.booleans())
    def switch(self, on: bool) -> None:
        """Training or evaluation."""
        self.training = on
        self.driver.call("train_mode", on)

    @rule(
        last=st.integers(0, 5).map(lambda n: n == 0),
        iterations=st.integers(1, 8),
        init=st.sampled_from(["random", "k-means++", "main"]),
        samples=st.sampled_from([None, None, 1, 3]),
        weigh=st.sampled_from([None, "given", "seen"]),
        some=st.booleans(),
        seed=SEEDS,
    )
    def cluster(
        self, *, last: bool, iterations: int, init: str, samples: int | None,
        weigh: str | None, some: bool, seed: int,
    ) -> None:  # fmt: skip
        """A clustering step, or the last one, of all tables or some."""
        if last and init == "main":
            init = "random"
        options: dict[str, Any] = {
            "iterations": iterations, "init": init, "samples_per_centroid": samples,
        }  # fmt: skip
        check = ClusteringCheck(self.reference, options, last)
        chosen = [table for table in self.spec.tables if check.clustered(table)]
        g = torch.Generator().manual_seed(seed)
        if some and chosen:
            chosen = chosen[: 1 + seed % len(chosen)]
            options["tables"] = [table.name for table in chosen]
        if not chosen and not any(table.chunks for table in self.spec.tables):
            return  # a model without CCE tables is refused
        if weigh == "seen" and all(t.name in self.reference.state.seen for t in chosen):
            options["weights"] = "seen"
        elif weigh == "given":
            options["weights"] = {
                table.name: torch.randint(0, 4, (table.ids,), generator=g) for table in chosen[:1]
            }
        report = self.driver.call("cluster", options, last)[0]
        after = self.driver.state()
        check(after, report)
        self.reference.take(after)
        self.done["finalizations" if last else "clusterings"] += 1

    @precondition(lambda self: isinstance(self.driver, Local))
    @rule(which=st.integers(0, 3), frozen=st.booleans())
    def freeze(self, which: int, frozen: bool) -> None:
        """A table is trained no more, or again."""
        name = self.spec.tables[which % len(self.spec.tables)].name
        self.driver.call("freeze", name, frozen)
        (self.reference.frozen.add if frozen else self.reference.frozen.discard)(name)

    @rule(plan=st.sampled_from([None, *PLANS]), seed=SEEDS, blocking=st.booleans())
    def save_and_load(self, plan: str | None, seed: int, blocking: bool) -> None:
        """Goes on from a checkpoint in a fresh model, under any plan."""
        with tempfile.TemporaryDirectory() as folder:
            self.driver.call("save", Path(folder), self.steps, blocking)
            fresh = ModelSpec(**{**vars(self.spec), "seed": seed})
            other = self._driver(fresh, plan)
            reports = other.call("load", Path(folder))
        assert all(report["step"] == self.steps for report in reports)
        found, expected = other.state(), self.reference.state
        same = type(other) is type(self.driver)
        if not same:  # fused optimizers count steps together, and torch's each by itself
            kept = {
                name: {k: v for k, v in state.items() if k != "step"}
                for name, state in expected.optimizer.items()
            }
            expected = State(**{**vars(expected), "optimizer": kept})
        assert_equal(found, expected, exact=True)
        dropped = [d for d in reports[0]["dropped"] if "random state" not in d]
        assert not dropped, dropped
        self._use(other)
        self.done["loads"] += 1

    @precondition(lambda self: isinstance(self.driver, Local))
    @rule(seed=SEEDS)
    def state_dict(self, seed: int) -> None:
        """Goes on with a fresh model that took the state dict, without optimizer state."""
        assert isinstance(self.driver, Local)
        other = Local(ModelSpec(**{**vars(self.spec), "seed": seed}))
        if self.reference.state.finalized:
            return  # a state dict has no configurations: the model has to be built finalized
        other.job.model.load_state_dict(self.driver.job.model.state_dict())
        assert_equal(other.state(), self.reference.state, exact=True, optimizer=False)
        self._use(other)
        self.done["state dicts"] += 1

    @precondition(lambda self: isinstance(self.driver, Local))
    @rule(batch=BATCHES)
    def export(self, batch: BatchSpec) -> None:
        """Exports give what the model does."""
        assert isinstance(self.driver, Local)
        with tempfile.TemporaryDirectory() as folder:
            check_exports(self.driver.job.collection, self.reference, batch, Path(folder))
        self._check_state(exact=True)
        self.done["exports"] += 1


def run(
    machine: type[Programs],
    *,
    examples: int,
    steps: int,
    database: Path | None,
    derandomize: bool = False,
) -> None:
    """Runs so many random programs, the same in every run if `derandomize`.

    Raises:
        Exception: what the shortest failing program raised; it is printed.
    """
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            deadline=None,
            database=None if database is None else DirectoryBasedExampleDatabase(database),
            derandomize=derandomize,
            print_blob=True,
            suppress_health_check=list(HealthCheck),
            phases=[Phase.reuse, Phase.generate, Phase.shrink],
        ),
    )


def main() -> None:
    """Prints what failed, and writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--ranks", action="store_true", help="shard over two gloo ranks too")
    parser.add_argument("--steps", type=int, default=12, help="of a program")
    parser.add_argument("--database", type=Path, default=Path("runs/hypothesis"))
    parser.add_argument("--json", type=Path, default=Path("runs/properties.json"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)  # ids out of bounds, and tables that are larger than plain
    began, failures = time.monotonic(), []
    machine = type("Programs", (Programs,), {"done": Counter()})
    while time.monotonic() - began < 60 * args.minutes:
        machine.ranks = Ranks(2) if args.ranks else None
        try:
            run(machine, examples=20, steps=args.steps, database=args.database)
        except Exception:
            failures.append(traceback.format_exc())
            print(failures[-1], flush=True)
            break  # the database has it: the next run begins with it
        finally:
            if machine.ranks is not None:
                machine.ranks.close()
        print(f"{time.monotonic() - began:.0f} s: {dict(machine.done)}", flush=True)
    report = {
        "device": device_name(torch.device("cpu")),
        "versions": installed_versions(),
        "settings": {key: str(value) for key, value in vars(args).items()},
        "seconds": time.monotonic() - began,
        "done": dict(machine.done),
        "failures": failures,
    }
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
