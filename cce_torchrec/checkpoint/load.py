"""Loading a checkpoint at any world size and plan: checked first, then taken over."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata

from cce_torchrec.checkpoint import folder as folders
from cce_torchrec.checkpoint.finalized import finalized_as
from cce_torchrec.checkpoint.format_2 import Format2Plans, Format2Reader
from cce_torchrec.checkpoint.grow import Growth
from cce_torchrec.checkpoint.load_report import LoadReport, in_part
from cce_torchrec.checkpoint.location import location
from cce_torchrec.checkpoint.manifest import NO_OPTIMIZER, Manifest, OptimizerRecord
from cce_torchrec.checkpoint.matching import Matching, match_state
from cce_torchrec.checkpoint.optimizers import optimizer_states
from cce_torchrec.checkpoint.parameter_state import (
    ParameterState,
    State,
    dropped_state,
    joined_groups,
)
from cce_torchrec.checkpoint.pending import finish_pending
from cce_torchrec.checkpoint.random_state import check_random_state, set_random_state
from cce_torchrec.checkpoint.renamed import renamed_weights
from cce_torchrec.checkpoint.save import model_state
from cce_torchrec.checkpoint.tables import choose_tables, describe_tables, match_tables, table_of
from cce_torchrec.checkpoint.tensor_files import LoadPlans, TensorReader
from cce_torchrec.collectives import Ranks, same_task
from cce_torchrec.table import refuse_none

logger = logging.getLogger(__name__)

LEARNING_RATES = ("checkpoint", "model")


def load_checkpoint(
    folder: str | Path,
    model: nn.Module,
    *,
    optimizers: Sequence[torch.optim.Optimizer] = (),
    tables: Sequence[str] | None = None,
    grow: Sequence[str] = (),
    strict: bool = True,
    learning_rates: str = "checkpoint",
    process_group: dist.ProcessGroup | None = None,
) -> LoadReport:
    """Loads what `save_checkpoint` saved, at any number of ranks and under any plan.

    A collective call. Everything is checked on every rank before anything is written: a file
    that is missing, short or changed, tables of another shape or seed, codes on one side only.
    Optimizer state moves with its parameter where both sides use the same optimizer; otherwise
    the report and the log name it. Random state returns at the same number of ranks. Tables that
    are finalized in the checkpoint, and not in the model, become finalized.

    Args:
        folder: of the job, whose latest checkpoint is loaded, or of one checkpoint; a local path or
            the URI of an object store.
        model: unsharded, or under DistributedModelParallel.
        optimizers: those that the user steps, as in `save_checkpoint`.
        tables: load these tables only (codebooks, codes, optimizer state), by name or as
            `collection.table`; nothing else of the model changes, nor random state and settings.
        grow: tables that may have more ids in the model than in the checkpoint. The new ids of a
            CCE table start from their hash; the new rows of a plain one, and the state of
            its optimizer for them, stay as the model has them.
        strict: False loads what matches, and leaves the rest of the model as it is: tables and
            parameters that one side lacks or whose shapes differ, which the report lists. Tables
            with more ids than in the checkpoint grow without being named.
        learning_rates: "model" keeps those that the model and `optimizers` have, and how far their
            warm-up is, for fine-tuning at another rate; everything else of the optimizers is taken
            from the checkpoint. With `tables` they are always kept.

    Raises:
        ValueError: on every rank, naming file or table, both values and the remedy.
    """
    began = time.perf_counter()
    ranks = Ranks(process_group)
    rates = "model" if tables is not None else learning_rates

    def asked() -> tuple[Path, tuple[Any, ...]]:
        finish_pending()  # here, as what failed on one rank has to be raised on all
        if learning_rates not in LEARNING_RATES:
            raise ValueError(f"learning_rates {learning_rates!r}: choose one of {LEARNING_RATES}")
        # In one order, as each rank has its own of a set.
        chosen = None if tables is None else tuple(sorted(tables))
        return location(folder), (chosen, tuple(sorted(grow)), strict, learning_rates)

    where = same_task(asked, "tables, grow, strict, learning_rates", ranks.group)
    path = ranks.first(lambda: folders.find(where))
    manifest = ranks.agree(lambda: folders.read_manifest(path))[0]
    # Each file is checked by one rank: by all, each byte would be read as often as there are ranks.
    names = sorted(manifest.files)[ranks.rank :: ranks.size]
    ranks.agree(lambda: folders.verify(path, {name: manifest.files[name] for name in names}))
    with finalized_as(model, manifest.tables, tables, ranks) as finalized:
        choice = _Choice(tables=tables, grow=grow, strict=strict, learning_rates=rates)
        job = ranks.each(lambda: _Load(path, manifest, model, optimizers, choice))
        report = _loaded(job, ranks, finalized)
    if ranks.rank == 0:
        seconds = time.perf_counter() - began
        logger.info("loaded %s: %s in %.2f s", path, manifest.summary, seconds)
    if ranks.rank == 0 and report.dropped:
        # One line: a load for evaluation has no optimizers, and drops the state of every parameter.
        first, more = report.dropped[:3], len(report.dropped) - 3
        rest = f"; and {more} more, which report.dropped has" if more > 0 else ""
        logger.warning("%s: not taken over: %s%s", path, "; ".join(first), rest)
    return report


def _loaded(job: _Load, ranks: Ranks, finalized: list[str]) -> LoadReport:
    """Goes through the stages of a load on all ranks together; what was taken over."""
    metadata = ranks.each(job.metadata)
    keys = {key for part in ranks.agree(job.keys) for key in part}
    job.matching.add(ranks.agree(lambda: job.check(metadata, keys)))
    ranks.each(job.leave_out)
    owned = {name for part in ranks.agree(lambda: list(job.states)) for name in part}
    dropped = {d for part in ranks.agree(lambda: job.prepare(owned, ranks)) for d in part}
    random = ranks.each(lambda: job.random_state(ranks))
    ranks.agree(lambda: job.read(ranks.group))
    ranks.agree(lambda: job.take_over(random))
    return job.report(sorted(dropped), finalized)


@dataclass(frozen=True, kw_only=True)
class _Choice:
    """What a caller wants of a checkpoint, by the names of `load_checkpoint`."""

    tables: Sequence[str] | None
    grow: Sequence[str]
    strict: bool
    learning_rates: str


class _Load:
    """The stages of one load on one rank; nothing is written before `read`."""

    def __init__(
        self,
        path: Path,
        manifest: Manifest,
        model: nn.Module,
        optimizers: Sequence[torch.optim.Optimizer],
        choice: _Choice,
    ) -> None:
        self.path, self.model = path, model
        self._learning_rates, self._strict = choice.learning_rates, choice.strict
        current, tables = describe_tables(model), choice.tables
        # Both sides' own, so that state of a table that the model lacks is known to be one's.
        self._tables = manifest.tables | current
        refuse_none(tables)
        self._wanted = None if tables is None else choose_tables(tables, current, "tables")
        growing = choose_tables(choice.grow, current, "grow")
        self.matching = match_tables(
            manifest.tables, current, self._wanted, growing, strict=choice.strict
        )
        self._whole = {key: v for key, v in model_state(model).items() if self._chosen(key)}
        whole, grown = manifest.has_whole_codes, self.matching.grown
        self._growth = Growth(model, current, manifest.tables, grown, whole_codes=whole)
        self._state = self._growth.targets(self._whole)
        states = optimizer_states(model, optimizers)
        self.states = {n: s for n, s in states.items() if self._chosen(f"model.{n}")}
        self._made: list[tuple[ParameterState, State]] = []
        """Tensors that optimizers have not made yet."""
        names = renamed_weights(manifest.tables.values(), current, set(map(_name, self._whole)))
        of_model = {names.get(name, name): one for name, one in manifest.optimizers.items()}
        self.manifest = replace(manifest, optimizers=of_model)
        kind = Format2Reader if manifest.is_format_2 else TensorReader
        self._reader = kind(path, manifest.files, names)
        self._plans = Format2Plans() if manifest.is_format_2 else LoadPlans()

    def _chosen(self, key: str) -> bool:
        table = table_of(key.removeprefix("model."), self._tables)
        if table in self.matching.left_out:
            return False
        return self._wanted is None or table in self._wanted

    def _called(self, key: str) -> str:
        """The table that the state `key` is of, or its name in the model's state dict."""
        return table_of(_name(key), self._tables) or _name(key)

    def metadata(self) -> Metadata:
        """What the checkpoint says of its tensors."""
        return self._reader.read_metadata()

    def keys(self) -> list[str]:
        """Names of the model's state on this rank."""
        return list(self._state)

    def check(self, metadata: Metadata, everywhere: set[str]) -> Matching:
        """Compares names and shapes of all state with the checkpoint's.

        Raises:
            ValueError: something differs, unless what matches is wanted.
        """
        stored = {
            key: value for key, value in metadata.state_dict_metadata.items()
            if key.startswith("model.") and self._chosen(key) and not self._growth.is_void(key)
        }  # fmt: skip
        try:
            return match_state(stored, self._state, everywhere, self._called, strict=self._strict)
        except ValueError as error:
            raise ValueError(f"{self.path}: {error}") from error

    def leave_out(self) -> None:
        """Takes what does not match out of what is read.

        Raises:
            ValueError: nothing is left.
        """
        self.matching.refuse_nothing(self.path)
        for key in [key for key in self._state if self._called(key) in self.matching.left_out]:
            del self._state[key]
            del self._whole[key]

    def prepare(self, owned: set[str], ranks: Ranks) -> list[str]:
        """Adds the optimizer state that can be carried over; names what cannot."""
        dropped = []
        saved = self.manifest.optimizers
        for name in sorted(set(saved) | set(self.states)):
            # Where other ranks have the parameter, they carry its state over or name it.
            if not self._chosen(f"model.{name}") or (name in owned and name not in self.states):
                continue
            if name in self.matching.left_out:  # as its parameter is, which the report says
                continue
            record = self._growth.record(name, saved.get(name, NO_OPTIMIZER))
            state = self.states.get(name, ParameterState())
            if state.is_schedule and self._learning_rates == "model":
                continue
            table = table_of(name, self._tables)
            subject = f"table {table!r}" if table else f"parameter {name!r}"
            why = dropped_state(record, state)
            if why is not None:
                dropped.append(f"optimizer state of {subject}: {why}")
                continue
            lost = record.unsaved_settings
            dropped += [f"optimizer setting of {subject}: JSON does not hold {key}" for key in lost]
            self._add(name, state, record)
        dropped += joined_groups(self._restored(), self._learning_rates == "checkpoint")
        if self._wanted is None and ranks.size != self.manifest.world_size:
            dropped.append(
                f"random state: saved by {self.manifest.world_size} ranks, loaded by {ranks.size}"
            )
        return dropped

    def _add(self, name: str, state: ParameterState, record: OptimizerRecord) -> None:
        """Has the tensors of a parameter's optimizer read, which may have to be made first."""
        made = state.unmade(record)
        self._made.append((state, made))
        for key, value in (state.tensors | made).items():
            if key in record.state:
                self._state[f"optimizer.{name}.{key}"] = self._growth.kept(name, value)

    def _restored(self) -> list[tuple[str, OptimizerRecord, ParameterState]]:
        """Name, record and state of each parameter whose optimizer is restored; none of parts."""
        # The optimizers are of the whole job, which goes on as it was where some tables are loaded.
        if self._wanted is not None:
            return []
        found = [
            (name, self.manifest.optimizers.get(name, NO_OPTIMIZER), state)
            for name, state in self.states.items()
            if name not in self.matching.left_out
        ]
        rates = self._learning_rates == "checkpoint"
        return [
            (name, record, state)
            for name, record, state in found
            if dropped_state(self._growth.record(name, record), state) is None
            and (rates or not state.is_schedule)
        ]

    def random_state(self, ranks: Ranks) -> dict[str, Any]:
        """This rank's random state, where it is to be taken over; otherwise nothing."""
        # Another number of ranks has no generators to which the saved ones would belong.
        if self._wanted is not None or ranks.size != self.manifest.world_size:
            return {}
        name = f"rank-{ranks.rank}.json"
        if name not in self.manifest.files:
            raise ValueError(f"{self.path}: its manifest has no file {name!r}; load another")
        try:
            found = json.loads((self.path / name).read_bytes())
            check_random_state(found)
        except Exception as error:  # whatever a damaged one leads to
            raise ValueError(f"{self.path / name} is damaged ({error}); load another") from error
        return found

    def read(self, group: dist.ProcessGroup | None) -> None:
        """Reads into the tensors of the model, or copies of them."""
        try:
            dcp.load(
                self._state, storage_reader=self._reader, planner=self._plans, process_group=group
            )
        except (Exception, CheckpointException) as error:  # the latter is no Exception
            raise in_part(self.path, error) from error

    def take_over(self, random: dict[str, Any]) -> None:
        """Hands everything that was read to the model, its optimizers and the process."""
        self._growth.finish()
        loaded = {_name(key): value for key, value in self._whole.items()}
        for key in loaded:
            read = self._state[f"model.{key}"]
            if not isinstance(read, torch.Tensor) and not hasattr(read, "local_shards"):
                loaded[key] = read  # extra state of a module is replaced, not written into
        # Parts of a model lack the keys of the rest, and `check` has compared those that count.
        every = self._wanted is None and not self.matching.left_out
        try:
            self.model.load_state_dict(loaded, strict=every)
        except Exception as error:  # tensors that contradict the manifest, which was checked
            raise in_part(self.path, error) from error
        for state, made in self._made:
            state.create(made)
        for _, record, state in self._restored():
            state.restore(record, self._learning_rates == "checkpoint")
        if random:  # not read where only some tables are
            set_random_state(random)

    def report(self, dropped: list[str], finalized: list[str]) -> LoadReport:
        """What was taken over."""
        return LoadReport(
            path=self.path,
            step=self.manifest.step,
            schedule=self.manifest.schedule,
            extra=self.manifest.extra,
            world_size=self.manifest.world_size,
            tables=sorted(self.matching.loaded & self._tables.keys()),
            dropped=dropped,
            finalized=finalized,
            loaded=sorted(self.matching.loaded),
            grown=sorted(self.matching.grown),
            new=sorted(self.matching.new),
            missing=sorted(self.matching.missing),
            conflicts=dict(sorted(self.matching.conflicts.items())),
            learning_rates=self._learning_rates,
        )


def _name(key: str) -> str:
    """A name in the model's state dict, of that in the checkpoint."""
    return key.removeprefix("model.")
