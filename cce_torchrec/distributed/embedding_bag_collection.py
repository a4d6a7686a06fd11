"""ShardedCCEEmbeddingBagCollection: ids cross the network once per owning rank, then expand.

TorchRec's sharded EmbeddingBagCollection does lookup, optimizer and output distribution over the
chunks; this module has its own input distribution over logical slots, and expands ids where the
codes live. Codes of ROW_WISE tables are fetched before (code_fetch.py).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode
from torch import nn
from torchrec.distributed.embedding_types import KJTList, ShardedEmbeddingModule
from torchrec.distributed.embeddingbag import (
    EmbeddingBagCollectionSharder,
    ShardedEmbeddingBagCollection,
)
from torchrec.distributed.memory_stashing import MemoryStashingManager
from torchrec.distributed.types import (
    Awaitable,
    LazyAwaitable,
    ParameterSharding,
    ShardingEnv,
)
from torchrec.distributed.utils import append_prefix
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor

from cce_torchrec.codes.chunk_codes import local_codes
from cce_torchrec.distributed import frozen
from cce_torchrec.distributed.alone import PooledNoWait, is_alone
from cce_torchrec.distributed.batch_check import BatchCheck
from cce_torchrec.distributed.batch_form import BatchRefusedError
from cce_torchrec.distributed.batch_in_flight import BatchInFlight, CacheResets
from cce_torchrec.distributed.caches import forget_prefetched
from cce_torchrec.distributed.code_fetch import CodeFetch
from cce_torchrec.distributed.context import CCEContext
from cce_torchrec.distributed.id_partition import check_group
from cce_torchrec.distributed.inference import outside_inference_mode, waited_in_inference_mode
from cce_torchrec.distributed.input_dist import InputDistribution
from cce_torchrec.distributed.optimizer_warnings import warn_of_optimizers
from cce_torchrec.distributed.plan import physical_plan
from cce_torchrec.distributed.sharding_input import sharding_inputs
from cce_torchrec.distributed.state_dict import CodesState
from cce_torchrec.distributed.table_placement import TablePlacement
from cce_torchrec.lookup import narrow
from cce_torchrec.lookup.backward import take_over
from cce_torchrec.lookup.bounds import BoundsCheck
from cce_torchrec.lookup.frozen_main import FrozenMain
from cce_torchrec.lookup.inputs import InputCheck
from cce_torchrec.lookup.pending import PendingLookups
from cce_torchrec.modules.embedding_bag_collection import CCEEmbeddingBagCollection
from cce_torchrec.modules.quantization import PassedOver
from cce_torchrec.spans import span
from cce_torchrec.table import tables_of
from cce_torchrec.torchrec_internals import (
    fused_kernels,
    leave_input_to_us,
    lookups_of,
    output_features,
    torchrec_kernels,
)


class ShardedCCEEmbeddingBagCollection(
    PassedOver, ShardedEmbeddingModule[KJTList, list[torch.Tensor], KeyedTensor, CCEContext]
):
    """Sharded form of `CCEEmbeddingBagCollection`, made by `CCEEmbeddingBagCollectionSharder`."""

    def __init__(
        self,
        module: CCEEmbeddingBagCollection,
        params: dict[str, ParameterSharding],
        ebc_sharder: EmbeddingBagCollectionSharder,
        env: ShardingEnv,
        device: torch.device,
        module_fqn: str | None = None,
    ) -> None:
        super().__init__(qcomm_codecs_registry=ebc_sharder.qcomm_codecs_registry)
        self.tables = tables_of(module.embedding_bag_configs())
        """As they are now; `embedding_bag_configs` reads their configurations."""
        self.cache_resets = CacheResets()
        self.device = torch.empty(0, device=device).device
        """Where this rank's part of the tables is, with its index."""
        self._is_weighted = module.is_weighted()
        self._env = env
        self.bounds_check = BoundsCheck(module.bounds_check_mode)
        placement = TablePlacement.from_plan(self.embedding_bag_configs(), params)
        check_group(placement.id_partitions, self.process_group)
        self.data_parallel = placement.data_parallel
        self.chunk_owners = placement.chunk_owners
        self.id_partitions = placement.id_partitions
        # A rank pools the rows that it has of a bag, so MEAN is taken of the sum of all parts.
        self.output = module.output.divided(placement.plain_row_wise)
        self.frozen = frozen.frozen_tables(module)
        """Tables whose parameters required no gradient, which no backward pass trains."""
        self.checked = BatchCheck(
            InputCheck(self.output.slots, self._is_weighted),
            placement,
            partly_frozen=self.frozen if len(self.frozen) < len(self.tables) else set(),
            device=self.device,
            group=self.process_group,
        )
        """Batches that lookups take; raises on what they do not."""
        frozen.keep_frozen_apart(module, self.frozen)
        warn_of_optimizers(module, params, ebc_sharder.fused_params or {}, self.frozen, device)
        # Plans name global ranks, also where a sharding group is a part of them (2D parallelism).
        rank = getattr(env, "global_rank", env.rank)
        # In the unsharded module's order, which torchrec.distributed.shard compares.
        self.embedding_bag_collection: ShardedEmbeddingBagCollection = ebc_sharder.shard(
            module.embedding_bag_collection,
            physical_plan(self.embedding_bag_configs(), params, device),
            env=env,
            device=device,
            module_fqn=append_prefix(module_fqn or "", "embedding_bag_collection"),
        )
        self.codes = placement.local_codes(self.tables, module.codes, rank, device)
        self._every_codes = [local_codes(self.codes, name) for name in self.codes]
        self._fetched_codes = [local_codes(self.codes, name) for name in self.id_partitions]
        compressed = [table.name for table in self.tables if table.cce is not None]
        self.pending = PendingLookups(compressed, self._every_codes)
        """Lookups of training whose backward pass is still to come."""
        self._codes_state = state = CodesState(
            self.codes, self.tables, placement, rank, device, env.process_group
        )
        # torch marks hooks, and methods it cannot.
        self.frozen_main = FrozenMain(self)
        self.register_state_dict_post_hook(partial(state.save))
        self.register_load_state_dict_pre_hook(state.load)
        self._prepare_lookups(device)

    def restore_main(self) -> None:
        """Main rows that no optimizer trains become what they were."""
        self.frozen_main.restore(frozen.untrained_rows(self._lookups, self.tables))

    def _prepare_lookups(self, device: torch.device) -> None:
        """What is between the input, TorchRec's lookups, and the output."""
        inner = self.embedding_bag_collection
        # Ids are distributed here; the inner module's input distribution is never called. Means
        # of tables cut by rows are taken here too.
        leave_input_to_us(inner)
        self._has_uninitialized_input_dist = False
        self._lookups = lookups_of(inner)
        for _, kernel in fused_kernels(self._lookups):
            # Rows are in bounds: ids were checked before they were expanded, all of them.
            kernel.bounds_check_mode_int = BoundsCheckMode.NONE.value
            take_over(kernel)
        for lookup in self._lookups:
            lookup.register_forward_hook(self._watch)
        self._columns = self.output.column_order(*output_features(inner))
        self.inputs = sharding_inputs(
            inner, self.tables, self.output, self.codes, self.id_partitions, self._env.rank
        )
        for sharded, lookup in zip(self.inputs, self._lookups, strict=True):
            if sharded.expansion is not None and device.type == "cuda":
                sharded.expansion.narrow = narrow.take_over(torchrec_kernels(lookup))
        fetch = CodeFetch.from_partitions(
            self.tables, self.codes, self.id_partitions, self.process_group
        )
        self.distribution = InputDistribution(self.inputs, fetch, self._env.world_size)
        # Where train pipelines look for what to fuse. Not `redistribute`, which has to stay as it
        # is: see ShardingInput.
        self._input_dists += [sharded.dist for sharded in self.inputs]
        stays = all(sharded.stays for sharded in self.inputs)
        self.checked.ranks_agree = not stays
        self._alone = is_alone(self._env, inner) and stays
        frozen.stop_training(self._lookups, self.frozen)

    def input_dist(  # type: ignore[override]  # TorchRec's own modules narrow *input likewise
        self, ctx: CCEContext, features: KeyedJaggedTensor
    ) -> Awaitable[Awaitable[KJTList]]:
        """Sends each id once to every rank that owns a chunk of its table.

        Ids of ROW_WISE tables go to the owners of their codes first, and as rows to the owners of
        the codebooks.

        Raises:
            ValueError: what `BatchCheck` does not take; of the first batch at once on every rank,
                of later ones where they are looked up, as messages tell the others.
        """
        try:
            return self.distribute(ctx, self.checked(features))
        except BatchRefusedError as refused:
            return self.distribution.refuse(ctx, refused, self.bounds_check)

    def distribute(
        self, ctx: CCEContext, features: KeyedJaggedTensor
    ) -> Awaitable[Awaitable[KJTList]]:
        """`input_dist` of features that are checked."""
        with torch.no_grad(), span("input_dist"):
            return self.distribution(ctx, self._prepared(ctx, features), self.bounds_check)

    def _prepared(self, ctx: CCEContext, features: KeyedJaggedTensor) -> KeyedJaggedTensor:
        """`features`, with what the output will need of them in `ctx`."""
        ctx.divisor = self.output.divisor(features)
        ctx.variable_batch_per_feature = features.variable_stride_per_key()
        if ctx.variable_batch_per_feature:
            ctx.inverse_indices = self.distribution.inverse_indices(*features.inverse_indices())
        return features

    def forward(self, *input: Any, **kwargs: Any) -> LazyAwaitable[KeyedTensor]:
        """The pooled embeddings; where nothing is sent there are no awaitables in between."""
        ctx = self.create_context()
        return self.compute_and_output_dist(ctx, self._arrived(ctx, *input, **kwargs))

    def _arrived(self, ctx: CCEContext, features: KeyedJaggedTensor) -> KJTList:
        """What this rank looks up of every rank's `features`."""
        if not (self._alone and self.distribution.fetch is None):
            # First the numbers of ids, then the ids: pipelines do other work in between.
            return self.input_dist(ctx, features).wait().wait()
        features = self.checked(features)
        with torch.no_grad(), span("input_dist"):
            features = self._prepared(ctx, features)
            if self._is_direct(ctx):
                return KJTList(self.distribution.split(features))
            return self.distribution(ctx, features, self.bounds_check).wait().wait()

    def compute(self, ctx: CCEContext, dist_input: KJTList) -> list[torch.Tensor]:
        """Expands the received ids against the local codes and looks the rows up."""
        with outside_inference_mode():
            rows = self._expand(ctx, dist_input)
            self.restore_main()
            with span("lookup"):
                return self.embedding_bag_collection.compute(ctx, rows)

    def output_dist(
        self, ctx: CCEContext, output: list[torch.Tensor]
    ) -> LazyAwaitable[KeyedTensor]:
        """Sends pooled chunks back and puts them into logical order."""
        with span("output_dist"):
            return self._assembled(ctx, self.embedding_bag_collection.output_dist(ctx, output))

    def compute_and_output_dist(
        self, ctx: CCEContext, input: KJTList
    ) -> LazyAwaitable[KeyedTensor]:
        """`compute` and `output_dist` in one, as the train pipelines call it."""
        with outside_inference_mode():
            rows = self._expand(ctx, input)
            self.restore_main()
            if self._is_direct(ctx):
                with span("lookup"):
                    pooled = [look(own) for look, own in zip(self._lookups, rows, strict=True)]
                values = pooled[0] if len(pooled) == 1 else torch.cat(pooled, dim=1)
                return PooledNoWait(self._in_order(ctx, values))
            with span("lookup and output_dist"):
                sent = self.embedding_bag_collection.compute_and_output_dist(ctx, rows)
        return self._assembled(ctx, sent)

    def _is_direct(self, ctx: CCEContext) -> bool:
        """Whether the lookups' output is this rank's: alone in its group, it sends nothing."""
        # What TorchRec does between the two for other jobs takes the host longer than the lookup.
        inner = self.embedding_bag_collection
        watched = inner.post_lookup_tracker_fn or inner.post_odist_tracker_fn
        watched = watched or MemoryStashingManager.is_enabled()
        return self._alone and not (watched or ctx.variable_batch_per_feature)

    def prefetch(  # type: ignore[override]  # pipelines always give a context, by name
        self,
        dist_input: KJTList,
        forward_stream: torch.Stream | None = None,
        *,
        ctx: CCEContext,
    ) -> None:
        """Brings the codebook rows of a batch into the caches of kernels that have some (CUDA).

        The rows are kept for `compute`, unless codes change before it.
        """
        rows = ctx.in_flight.prefetched(self._expand(ctx, dist_input))
        super().prefetch(rows, forward_stream, ctx)

    def _expand(self, ctx: CCEContext, dist_input: KJTList) -> KJTList:
        """Codebook rows of what arrived, by the codes as they are now."""
        self._codes_state.take_written()
        with span("expand"):
            return ctx.in_flight.current_rows(
                dist_input,
                self.bounds_check,
                distribute_again=partial(self.distribution.again, ctx),
                expand=partial(self.distribution.expand, ctx),
                forget_prefetched=partial(forget_prefetched, self._lookups),
            )

    def _assembled(
        self, ctx: CCEContext, awaitable: LazyAwaitable[KeyedTensor]
    ) -> LazyAwaitable[KeyedTensor]:
        if ctx.variable_batch_per_feature:
            awaitable = waited_in_inference_mode(awaitable)
        awaitable.callbacks.append(lambda pooled: self._in_order(ctx, pooled.values()))
        return awaitable

    def _in_order(self, ctx: CCEContext, pooled: torch.Tensor) -> KeyedTensor:
        with span("output"):
            return self.output.assemble(pooled, self._columns, ctx.divisor)

    def create_context(self) -> CCEContext:
        """A fresh context for one batch."""
        in_flight = BatchInFlight(self._every_codes, self._fetched_codes, self.cache_resets)
        return CCEContext(in_flight=in_flight)

    def current_codes(self) -> nn.ModuleDict:
        """The codes of this rank, with what was written into the tensors of a state dict."""
        self._codes_state.take_written()
        return self.codes

    def _watch(self, _: nn.Module, __: Any, output: torch.Tensor) -> torch.Tensor:
        """Notes a lookup of training, which a clustering step must not overtake."""
        return self.pending.watched(output, trains=self.training)

    def embedding_bag_configs(self) -> list[Any]:
        """The tables as configured (or finalized), one entry per logical table."""
        return [table.config for table in self.tables]

    def is_weighted(self) -> bool:
        """Whether bags are pooled by per-sample weights."""
        return self._is_weighted

    @property
    def num_invalid_ids(self) -> int:
        """Ids out of bounds seen by this rank, of those that have chunks of the table (WARNING)."""
        return self.bounds_check.num_invalid

    @property
    def process_group(self) -> dist.ProcessGroup | None:
        """The ranks that share the tables; None without such."""
        return getattr(self._env, "sharding_pg", self._env.process_group)  # of 2D parallelism

    def replica_groups(self) -> dict[str, dist.ProcessGroup]:
        """Ranks that hold copies of a table's chunks: of data-parallel tables, and in 2D."""
        of_chunks = getattr(self._env, "replica_pg", None)
        groups = {table.name: of_chunks for table in self.tables}
        groups |= dict.fromkeys(self.data_parallel, self._env.process_group)
        return {name: group for name, group in groups.items() if group is not None}

    def sharded_parameter_names(self, prefix: str = "") -> Iterator[str]:
        """Names of everything that DDP must leave alone: parameters and codes."""
        # Buffers as well, which DDP broadcasts: ranks have different codes.
        for name, _ in itertools.chain(self.named_parameters(), self.named_buffers()):
            yield append_prefix(prefix, name)

    @property
    def unsharded_module_type(self) -> type[CCEEmbeddingBagCollection]:
        """The module this one replaces."""
        return CCEEmbeddingBagCollection
