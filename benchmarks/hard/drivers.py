"""A model under test, in this process or sharded over forked gloo ranks, by the same calls."""

from __future__ import annotations

import logging
import multiprocessing as mp
import os
import socket
import traceback
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.hard.specs import OPTIMIZERS, BatchSpec, ModelSpec, State
from cce_torchrec import cluster, finalize, load_checkpoint, save_checkpoint
from cce_torchrec.clustering.local_chunks import fused_rows, unsharded_rows
from cce_torchrec.codes.chunk_codes import local_codes
from cce_torchrec.codes.counts import levels_of
from cce_torchrec.codes.storage import seen_ids

CPU = torch.device("cpu")
TIMEOUT = 60


class Job:
    """A model on this rank; every method is called on all ranks alike."""

    def __init__(self, spec: ModelSpec, plan: str | None) -> None:
        self.spec, self.plan = spec, plan
        self.model: Any = spec.model()
        self.optimizer: Any = None
        if plan is not None:
            # Loaded late: what runs in one process alone needs no planner.
            from torchrec.distributed import DistributedModelParallel

            from cce_torchrec import get_default_sharders, make_plan

            configs = [table.config() for table in spec.tables]
            kind, by_rows = plan.split("+")[0], []
            if "+" in plan:
                by_rows = [table.name for table in spec.tables if not table.chunks]
            made = make_plan(self.model, configs, CPU, kind, row_wise=by_rows)
            self.model = DistributedModelParallel(
                self.model, device=CPU, plan=made, sharders=get_default_sharders()
            )
        elif not spec.in_backward:
            kind, settings = OPTIMIZERS[spec.optimizer]
            self.optimizer = kind(self.model.parameters(), **settings)

    @property
    def collection(self) -> Any:
        """The collection of this rank."""
        return (self.model.module if self.plan is not None else self.model).collection

    @property
    def optimizers(self) -> list[torch.optim.Optimizer]:
        """Those that no backward pass steps."""
        return [] if self.optimizer is None else [self.optimizer]

    def train_mode(self, on: bool) -> None:
        """Training or evaluation."""
        self.model.train(on)

    def lookup(self, batch: BatchSpec) -> tuple[list[str], torch.Tensor]:
        """Names and values of the output."""
        with torch.no_grad():
            out = self.model(self._own(batch))
            out = out.wait() if hasattr(out, "wait") else out
            return list(out.keys()), out.values().clone()

    def step(self, batch: BatchSpec) -> torch.Tensor:
        """A training step; the output before it."""
        out = self.model(self._own(batch))
        out = out.wait() if hasattr(out, "wait") else out
        values = out.values()
        loss = (values * self._shifted(batch).coefficients(values.shape[1])).sum()
        loss.backward()
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad()
        return values.detach().clone()

    def _shifted(self, batch: BatchSpec) -> BatchSpec:
        """This rank's own batch."""
        rank = dist.get_rank() if self.plan is not None else 0
        return BatchSpec(seed=batch.seed + 7919 * rank, bags=batch.bags, outside=batch.outside)

    def _own(self, batch: BatchSpec) -> Any:
        return self._shifted(batch).tensors(self.spec)

    def invalid(self) -> int:
        """Ids out of bounds that this rank has counted."""
        return self.collection.num_invalid_ids

    def cluster(self, options: dict[str, Any], last: bool) -> list[dict[str, Any]]:
        """A clustering step, or the last one; what it reports of each chunk."""
        report = (finalize if last else cluster)(self.model, optimizer=self.optimizer, **options)
        return [vars(chunk) for chunk in report.chunks]

    def freeze(self, table: str, frozen: bool) -> None:
        """Stops or starts the training of an unsharded table."""
        for name, bag in self.collection.embedding_bags.items():
            if name.split("#")[0] == table:
                bag.weight.requires_grad_(not frozen)

    def save(self, folder: Path, step: int, blocking: bool) -> None:
        """Writes a checkpoint."""
        done = save_checkpoint(
            folder, self.model, step=step, optimizers=self.optimizers, blocking=blocking,
            extra={"step": step}, keep=1,
        )  # type: ignore[call-overload]  # a bool may be either  # fmt: skip
        if not blocking:
            done.result()

    def load(self, folder: Path) -> dict[str, Any]:
        """Reads a checkpoint; what the report says."""
        report = load_checkpoint(folder, self.model, optimizers=self.optimizers)
        return {"step": report.step, "dropped": report.dropped, "finalized": report.finalized}

    def part(self) -> State:
        """What this rank holds; codes and notes are in full length, 0 for ids of others."""
        module = self.collection
        sharded = self.plan is not None
        rows = (fused_rows if sharded else unsharded_rows)(module, self.optimizer)
        out = State()
        for name, (weight, state) in rows.items():
            out.weights[name] = weight.detach().clone()
            out.optimizer[name] = {k: v.detach().clone() for k, v in state.items()}
        held = module.current_codes() if sharded else module.codes
        for name in held:
            codes = local_codes(held, name)
            config = codes.config
            whole = torch.zeros(config.num_embeddings, config.num_chunks, dtype=torch.int64)
            own = torch.arange(codes.ids.start, codes.ids.stop)
            if codes.chunks and len(own):
                counted = own - codes.ids.start if codes.codes is not None else own
                whole[own[:, None], torch.tensor(codes.chunks)] = codes.main_rows(counted).t()
            out.codes[name] = whole
            out.clusterings[name] = codes.num_clusterings
            out.finalized |= {name} if not config.helper_rows else set()
            if codes.seen is not None:
                bits = torch.zeros(config.num_embeddings, dtype=torch.uint8)
                bits[own] = seen_ids(codes.seen, len(own)) if codes.chunks else bits[own]
                out.seen[name] = bits
            if codes.counts is not None:
                levels = torch.zeros(config.num_embeddings, dtype=torch.int64)
                levels[own] = levels_of(codes.counts, own - codes.ids.start)
                out.levels[name] = levels if codes.chunks else torch.zeros_like(levels)
                out.batches[name] = int(codes.batches)
        return out


def together(parts: list[State], rows: dict[str, int]) -> State:
    """One state of those of all ranks; `rows`: of each plain table."""
    out = parts[0]
    for part in parts[1:]:
        for name, weight in part.weights.items():
            if name in out.weights and len(out.weights[name]) < rows.get(name, 0):
                out.weights[name] = torch.cat([out.weights[name], weight])
                for key, value in part.optimizer[name].items():
                    if value.ndim:  # a number of the whole table stays
                        out.optimizer[name][key] = torch.cat([out.optimizer[name][key], value])
            else:
                out.weights.setdefault(name, weight)
                out.optimizer.setdefault(name, part.optimizer[name])
        for name, codes in part.codes.items():
            # Ids and chunks of others are 0, and what several hold is the same on all.
            out.codes[name] = torch.maximum(out.codes[name], codes)
            assert out.clusterings[name] == part.clusterings[name], name
        assert out.finalized == part.finalized
        for name, bits in part.seen.items():
            out.seen[name] = out.seen[name] | bits
        for name, levels in part.levels.items():
            out.levels[name] = torch.maximum(out.levels[name], levels)
            assert out.batches[name] == part.batches[name], name
    return out


class Local:
    """A job in this process."""

    world_size = 1

    def __init__(self, spec: ModelSpec) -> None:
        self.spec = spec
        self.job = Job(spec, None)

    def call(self, name: str, *args: Any) -> list[Any]:
        """What the method gives, of each rank."""
        return [getattr(self.job, name)(*args)]

    def state(self) -> State:
        """All state."""
        return self.job.part()


_HELD: dict[str, Job] = {}


def _serve(kind: type[Job], rank: int, size: int, port: int, pipe: Connection) -> None:
    """A rank's life: it makes the calls that come through the pipe until that is closed."""
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), LOCAL_WORLD_SIZE=str(size),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
    )  # fmt: skip
    dist.init_process_group("gloo", timeout=timedelta(seconds=TIMEOUT))
    while True:
        try:
            name, args = pipe.recv()
        except EOFError:
            break
        try:
            if name == "make":
                _HELD["job"] = kind(*args)
                pipe.send((None, None))
            else:
                pipe.send((getattr(_HELD["job"], name)(*args), None))
        except Exception:
            pipe.send((None, traceback.format_exc()))
    os._exit(0)  # without waiting for a group whose other ranks may be gone


class Ranks:
    """Processes of a gloo group, which hold one job after the other."""

    def __init__(self, size: int, kind: type[Job] = Job) -> None:
        context = mp.get_context("forkserver")
        context.set_forkserver_preload(["benchmarks.hard.drivers", "torchrec.distributed"])
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        self.pipes, self.processes = [], []
        for rank in range(size):
            here, there = context.Pipe()
            process = context.Process(
                target=_serve, args=(kind, rank, size, port, there), daemon=True
            )
            process.start()
            there.close()
            self.pipes.append(here)
            self.processes.append(process)

    def call(self, name: str, *args: Any) -> list[Any]:
        """What the call gives on each rank.

        Raises:
            RuntimeError: with the tracebacks, if it failed on any.
        """
        for pipe in self.pipes:
            pipe.send((name, args))
        values, errors = {}, {}
        waiting = dict(zip(self.pipes, range(len(self.pipes)), strict=True))
        while waiting and (ready := wait(list(waiting), 2 * TIMEOUT)):
            for pipe in ready:
                rank = waiting.pop(pipe)
                try:
                    values[rank], error = pipe.recv()
                except (EOFError, ConnectionResetError):
                    self.processes[rank].join()
                    error = f"died with exit code {self.processes[rank].exitcode}"
                if error:
                    errors[rank] = error
        errors |= {rank: "did not end" for rank in waiting.values()}
        if errors:
            raise RuntimeError("\n".join(f"rank {rank}: {text}" for rank, text in errors.items()))
        return [values[rank] for rank in sorted(values)]

    def close(self) -> None:
        """Ends the processes."""
        for process in self.processes:
            process.kill()
            process.join()


class Sharded:
    """A job on ranks."""

    def __init__(self, spec: ModelSpec, plan: str, ranks: Ranks) -> None:
        self.spec, self.ranks = spec, ranks
        self.world_size = len(ranks.pipes)
        ranks.call("make", spec, plan)

    def call(self, name: str, *args: Any) -> list[Any]:
        """What the method gives, of each rank."""
        return self.ranks.call(name, *args)

    def state(self) -> State:
        """All state, of all ranks."""
        rows = {table.name: table.ids for table in self.spec.tables if not table.chunks}
        return together(self.call("part"), rows)


Driver = Local | Sharded
