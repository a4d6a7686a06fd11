"""The training loop: epochs, clustering, evaluation, checkpoints and their resumption."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist
from torchrec.modules.embedding_configs import EmbeddingBagConfig

from cce_torchrec import data
from cce_torchrec.checkpoint import (
    checkpoint_info,
    latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from cce_torchrec.checkpoint.folder import RUN_FOLDER
from cce_torchrec.checkpoint.location import location
from cce_torchrec.checkpoint.pending import finish_pending
from cce_torchrec.clustering import ClusteringSchedule
from cce_torchrec.collectives import Ranks, gather
from cce_torchrec.config import all_rare
from cce_torchrec.distributed.embedding_bag_collection import ShardedCCEEmbeddingBagCollection
from cce_torchrec.spans import span
from cce_torchrec.train import options, pipelines, run_folder
from cce_torchrec.train.board import check_board
from cce_torchrec.train.closing import write_health, write_page
from cce_torchrec.train.job import Batch, build
from cce_torchrec.train.log import clustering_steps, say_decisions
from cce_torchrec.train.model import (
    Compression,
    chunks_by_default,
    chunks_in_common,
    keyed_jagged,
    refuse_to_finalize_none,
    tables,
)
from cce_torchrec.train.profiling import Trace, check_profile
from cce_torchrec.train.records import Records
from cce_torchrec.train.run_file import RunFile, describe
from cce_torchrec.train.shared_data import shared_data
from cce_torchrec.train.validation import Score, evaluate
from cce_torchrec.train.warm_start import WarmStart
from cce_torchrec.train.watch import Watch

T = TypeVar("T")


class Trainer:
    """One run: the model, its data, and what it writes to --out."""

    def __init__(self, args: argparse.Namespace, device: torch.device) -> None:
        self.args = args
        self.device = device
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        if args.batch_size < self.world_size:
            raise ValueError(
                f"--batch-size {args.batch_size} is global; give each of {self.world_size} ranks "
                "an example or more"
            )
        if args.num_chunks is None:  # options load no torch, which widths of chunks go by
            args.num_chunks = chunks_by_default(args)
        self.pipeline = pipelines.chosen(args.pipeline, device, self.world_size)
        self.warm_start = _warm_start(args)
        self.dataset = shared_data(args, self.warm_start)
        rows = options.rows_per_table(args, self.dataset)
        # A dot product of embeddings near zero has no gradient; DLRM's dense part has its own.
        init_bound = args.embedding_dim**-0.5 if args.model == "gmf" else None
        compression = Compression.asked_for(args, self.dataset, rows)
        configs = tables(self.dataset, compression, dim=args.embedding_dim, init_bound=init_bound)
        if self.warm_start is not None:
            configs = [self.warm_start.as_before(config) for config in configs]
        if args.num_chunks is None:
            args.num_chunks = chunks_in_common(configs)
        rare = all_rare(configs)
        lr_rule = options.set_defaults(args, self.dataset, rows, rare)
        args.out = location(args.out)
        if args.tensorboard:
            check_board(args.out)
        if args.profile:
            check_profile(args.out)
        self.checkpoints = args.out / RUN_FOLDER
        # Here and not by load_checkpoint, whose errors name shapes of tables and no options.
        latest = _latest(self.checkpoints) if args.resume else None
        if latest is not None:
            saved = checkpoint_info(latest).extra or {}
            options.check_same(saved.get("settings", {}), options.lasting(args), latest)
        torch.manual_seed(args.seed)
        if args.finalize:
            refuse_to_finalize_none(configs)
        self.steps = self.dataset.steps(args.batch_size)
        """Optimizer steps per epoch."""
        self.schedule = (
            ClusteringSchedule.for_tables(configs, args.epochs, self.steps, finalize=args.finalize)
            if args.clusterings is None
            else ClusteringSchedule.evenly(
                self.steps * args.epochs, args.clusterings, finalize=args.finalize
            )
        )
        self.model, self.optimizer, plan = build(
            args,
            configs,
            self.dataset.num_dense,
            device,
            self.rank,
            pipelines.fused_params(self.pipeline),
        )
        steps = {"epochs": args.epochs, "steps_per_epoch": self.steps}
        steps["clustering_steps"] = clustering_steps(self.schedule, self.steps * args.epochs)
        self.run_file = RunFile(args.out, describe(args, configs, plan, str(device), steps))
        self._decided = partial(
            say_decisions,
            args,
            tables=configs,
            plan=plan,
            schedule=self.schedule,
            total_steps=self.steps * args.epochs,
            lr_rule=lr_rule,
            pipeline=self.pipeline,
            device=device,
        )
        self.features = list(self.dataset.features)
        self.records = Records()
        self.step = 0
        """Optimizer steps so far."""
        # On the device: to read it at every step would make the host wait for each.
        self.loss = torch.zeros((), device=device)
        """Sum of this rank's losses in the running epoch."""
        self._running: TrainPipelineSparseDist[Any, Any] | None = None
        """The pipeline of the running epoch, if there is one."""

    def run(self) -> None:
        """Trains, evaluates every epoch, and writes what docs/observing.md says."""
        args = self.args
        _on_first_rank(lambda: run_folder.claim(args))
        try:
            _on_first_rank(lambda: self.run_file.write("running"))
            self._decided()
            if args.resume and _latest(self.checkpoints) is not None:
                self._resume()
            elif self.warm_start is not None:
                self.warm_start.load(self.model, [self.optimizer])
            _on_first_rank(lambda: self.records.write_metrics(args.out))
            self._train()
            write_health(self.model, [self.optimizer], args.out, self.step)
            _on_first_rank(lambda: self.run_file.write("finished"))
        except BaseException as error:
            self.run_file.failed(error)
            raise
        write_page(args.out, self.rank)

    def _train(self) -> None:
        """What is left of the run."""
        args, records = self.args, self.records
        done = len(records.history)
        self.watch = Watch(args, self.device, records=records, steps=self.steps, step=self.step)
        trace = Trace(args.out, args.profile, args.epochs * self.steps - self.step)
        for epoch in range(done + 1, args.epochs + 1):
            began = time.perf_counter() - records.epoch_seconds
            self._train_epoch(epoch, began, trace)
            self._end_epoch(time.perf_counter() - began)
        trace.end()
        if args.checkpoint_every and len(records.history) > done:
            self._save()
        finish_pending()
        self.watch.end()
        examples = self.steps * min(args.batch_size, self.dataset.num_train) * args.epochs
        _on_first_rank(lambda: records.write_metrics(args.out))
        _on_first_rank(
            lambda: records.write_summary(
                args, self.configs(), examples, self.world_size, str(self.device)
            )
        )

    def _train_epoch(self, epoch: int, began: float, trace: Trace) -> None:
        """The steps of an epoch that are not done yet."""
        self.model.train()
        watch = self.watch
        watch.begin_epoch(epoch)
        for output in self._losses(epoch, self.step - (epoch - 1) * self.steps):
            self.loss += output[0]
            self.step += 1
            watch.trained(output, self.optimizer)
            self._cluster()
            if self._due(self.args.validate_every):
                self._validate()
            if self._due(self.args.checkpoint_every):
                self.records.epoch_seconds = time.perf_counter() - began
                self._save()
            trace.step()
        watch.train_line(self.optimizer)
        watch.end_epoch()

    def _due(self, every: int) -> bool:
        return every > 0 and self.step % every == 0

    def configs(self) -> list[EmbeddingBagConfig]:
        """The tables as they are now: finalized ones have other rows than they started with."""
        return [
            config
            for module in self.model.modules()
            if isinstance(module, ShardedCCEEmbeddingBagCollection)
            for config in module.embedding_bag_configs()
        ]

    def _cluster(self) -> None:
        if not self.schedule.due(self.step):
            return
        with self.watch.meter.paused():
            limit = self.args.clustering_memory
            report = self.schedule.cluster_if_due(self.model, self.step, memory_limit=limit)
            if report is not None:
                self.watch.clustered(report)

    def _losses(self, epoch: int, done: int) -> Iterator[tuple[torch.Tensor, ...]]:
        """Trains on the batches of an epoch from the `done`-th on; yields what each step gives.

        A pipeline has read batches of later steps by then. They do not count: what is resumed
        starts from the number of steps.
        """
        batches = self._batches(epoch, done)
        if self.pipeline != "none":
            pipeline = pipelines.make(self.pipeline, self.model, self.optimizer, self.device)
            self._running = pipeline
            for _ in range(done, self.steps):
                yield pipeline.progress(batches)
            self._running = None
            pipeline.detach()
            return
        for batch in batches:
            self.optimizer.zero_grad()
            loss, output = self.model(batch.to(self.device, non_blocking=True))
            loss.backward()
            self.optimizer.step()
            yield output

    def _batches(self, epoch: int, done: int) -> Iterator[Batch]:
        """This rank's share of each batch of the epoch; the order depends on seed and epoch."""
        seed = self.args.seed
        for rows in self.dataset.batches(self._share(), seed=seed, epoch=epoch, done=done):
            yield self._batch(rows)

    def _share(self) -> data.Share:
        return data.Share(
            batch_size=self.args.batch_size, rank=self.rank, world_size=self.world_size
        )

    def _batch(self, rows: data.Rows) -> Batch:
        batch = Batch(rows.dense, keyed_jagged(rows, self.features), rows.labels)
        # A copy to a GPU waits for the device unless it is from pinned memory.
        return batch.pin_memory() if self.device.type == "cuda" else batch

    def _end_epoch(self, seconds: float) -> None:
        dist.all_reduce(self.loss)
        found = self.watch.last_validation
        if found is None:
            self._validate()
            found = self.watch.last_validation
        assert found is not None
        train_loss = float(self.loss) / (self.steps * self.world_size)
        values = {"train_loss": train_loss, "val_log_loss": found["log_loss"]}
        self.watch.epoch_ended(values | {"val_auc": found["auc"], "seconds": seconds})
        self.records.epoch_seconds = 0.0
        self.loss.zero_()
        _on_first_rank(lambda: self.records.write_metrics(self.args.out))
        if self.rank == 0:
            self.records.say_epoch()

    def _validate(self) -> None:
        """Scores the examples that validate, also in the middle of a pass."""
        began = time.perf_counter()
        with self.watch.meter.paused(), span("validation"):
            if self._running is not None:
                # Batches that are on their way stay in the pipeline, which goes on with them.
                self._running.detach()
            score = self._evaluate()
            if self._running is not None:
                self._running.attach(self.model)
        self.watch.validated(score, time.perf_counter() - began)

    def _evaluate(self) -> Score:
        most = self.args.validate_rows
        batches = None if most is None else -(-most // self.args.batch_size)
        rows = islice(self.dataset.validation_batches(self._share()), batches)
        return evaluate(self.model, map(self._batch, rows), self.device)

    def _save(self) -> None:
        self.watch.train_line(self.optimizer)  # of what it would not know after a restart
        self.records.run_seconds = self.watch.seconds
        began = time.perf_counter()
        losses = gather(float(self.loss), dist.group.WORLD)
        with self.watch.meter.paused():
            saved = save_checkpoint(  # type: ignore[call-overload]  # a bool may be either
                self.checkpoints,
                self.model,
                step=self.step,
                optimizers=[self.optimizer],
                schedule=self.schedule,
                extra={
                    "losses": losses,
                    "records": asdict(self.records),
                    "settings": options.lasting(self.args),
                },
                blocking=not self.args.async_checkpoints,
            )
        self.watch.saved(saved, time.perf_counter() - began)

    def _resume(self) -> None:
        report = load_checkpoint(self.checkpoints, self.model, optimizers=[self.optimizer])
        extra = report.extra or {}
        self.step = report.step
        self.records = Records.resumed(extra["records"])
        if self.rank == 0:
            self.records.keep_line_of(report.path, self.args.out)
        losses = extra["losses"]
        if len(losses) != self.world_size:  # their mean counts, which has another divisor now
            losses = [sum(losses) / len(losses)] * self.world_size
        self.loss.fill_(losses[self.rank])
        if self.rank == 0:
            print(f"resumed after step {self.step} from {report.path}", flush=True)


def _warm_start(args: argparse.Namespace) -> WarmStart | None:
    if args.warm_start is None:
        return None
    return _on_first_rank(lambda: WarmStart.from_run(args.warm_start))


def _latest(checkpoints: Path) -> Path | None:
    return _on_first_rank(lambda: latest_checkpoint(checkpoints))


def _on_first_rank(work: Callable[[], T]) -> T:
    """`work()` of the first rank; storage may fail it alone, for which the others would wait."""
    return Ranks(None).first(work)
