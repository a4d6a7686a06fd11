"""ShardedCCEEmbeddingBagCollection: ids cross the network once per owning rank, then expand.

TorchRec's sharded EmbeddingBagCollection does lookup, optimizer and output distribution over the
chunks; this module has its own input distribution over logical slots, and expands ids where the
codes live.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torchrec.distributed.embedding_sharding import EmbeddingShardingContext, KJTListSplitsAwaitable
from torchrec.distributed.embedding_types import (
    BaseEmbeddingSharder,
    KJTList,
    ShardedEmbeddingModule,
)
from torchrec.distributed.embeddingbag import (
    EmbeddingBagCollectionContext,
    EmbeddingBagCollectionSharder,
    ShardedEmbeddingBagCollection,
)
from torchrec.distributed.types import (
    Awaitable,
    LazyAwaitable,
    ParameterSharding,
    QuantizedCommCodecs,
    ShardingEnv,
    ShardingType,
)
from torchrec.distributed.utils import append_prefix
from torchrec.modules.embedding_configs import data_type_to_dtype
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor

from cce_torchrec.bounds import BoundsCheck
from cce_torchrec.chunk_codes import codes_of
from cce_torchrec.config import CCEEmbeddingBagConfig
from cce_torchrec.distributed.input_dist import batch_sizes, sharding_inputs
from cce_torchrec.distributed.plan import (
    SUPPORTED,
    check_world_size,
    chunk_owners,
    is_data_parallel,
    physical_plan,
    warn_of_ignored_optimizers,
)
from cce_torchrec.distributed.state_dict import CodesState
from cce_torchrec.modules.embedding_bag_collection import (
    CCEEmbeddingBagCollection,
    finalised_configs,
    select_slots,
    without_weights,
)
from cce_torchrec.modules.output import check_features


class ShardedCCEEmbeddingBagCollection(
    ShardedEmbeddingModule[KJTList, list[torch.Tensor], KeyedTensor, EmbeddingBagCollectionContext]
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
        self._configs = module.embedding_bag_configs()
        self._is_weighted = module.is_weighted()
        self.weighed_later = False
        """Whether weights are computed where the ids are looked up, by feature processors."""
        self._env = env
        self._device = device
        self._bounds_check = BoundsCheck(module.bounds_check_mode)
        self._output = module._output
        missing = [c.name for c in self._configs if c.name not in params]
        if missing:
            raise ValueError(f"the plan has no entry for tables {missing}; it has {sorted(params)}")

        # Plans name global ranks, also where a sharding group is a part of them (2D parallelism).
        rank = getattr(env, "global_rank", env.rank)
        self.data_parallel = {c.name for c in self._configs if is_data_parallel(params[c.name])}
        """Tables that are whole on every rank."""
        warn_of_ignored_optimizers(module, self.data_parallel)
        self.chunk_owners = {
            c.name: chunk_owners(c, params[c.name])
            for c in self._configs
            if isinstance(c, CCEEmbeddingBagConfig) and c.name not in self.data_parallel
        }
        """Rank of each chunk, per CCE table that is not data-parallel."""
        self.codes = self._local_codes(module, rank)
        self._codes_state = state = CodesState(
            self.codes, self._configs, self.chunk_owners, rank, device, env.process_group
        )
        self._register_state_dict_hook(state.save)
        self._register_load_state_dict_pre_hook(state.load)
        self.embedding_bag_collection: ShardedEmbeddingBagCollection = ebc_sharder.shard(
            module.embedding_bag_collection,
            physical_plan(self._configs, params),
            env=env,
            device=device,
            module_fqn=append_prefix(module_fqn or "", "embedding_bag_collection"),
        )
        inner = self.embedding_bag_collection
        # Ids are distributed here; the inner module's input distribution is never called.
        inner._has_uninitialized_input_dist = False
        self._has_uninitialized_input_dist = False
        self._lookups = inner._lookups
        self._slices = self._output.column_slices(inner._embedding_names, inner._embedding_dims)
        self._inputs = sharding_inputs(inner, self._configs, self._output, self.codes, env.rank)
        self._input_dists += [sharded.dist for sharded in self._inputs]
        self._feature_order = [slot.feature for sharded in self._inputs for slot in sharded.slots]

    def _local_codes(self, module: CCEEmbeddingBagCollection, rank: int) -> nn.ModuleDict:
        """Codes of the chunks that `rank` looks up, by table."""
        local = nn.ModuleDict()
        for config in self._configs:
            codes = codes_of(module.codes, config.name)
            if codes is None:
                continue
            owners = self.chunk_owners.get(config.name, [rank] * len(codes.chunks))
            chunks = [chunk for chunk, owner in enumerate(owners) if owner == rank]
            if chunks:
                local[config.name] = codes.select(chunks, self._device)
        return local

    def input_dist(  # type: ignore[override]  # TorchRec's own modules narrow *input likewise
        self, ctx: EmbeddingBagCollectionContext, features: KeyedJaggedTensor
    ) -> Awaitable[Awaitable[KJTList]]:
        """Sends each id once to every rank that owns a chunk of its table.

        Raises:
            ValueError: a missing feature, missing weights or inverse indices, or a batch size per
            feature where a table is data-parallel.
        """
        check_features(features, self._output.slots, self._is_weighted and not self.weighed_later)
        if features.variable_stride_per_key() and self.data_parallel:
            raise ValueError(
                f"tables {sorted(self.data_parallel)} are data-parallel, for which TorchRec has no "
                "variable batch size per feature; plan them table-wise or column-wise, or give "
                "every feature the same batch size"
            )
        with torch.no_grad():
            ctx.divisor = self._output.divisor(features)
            ctx.variable_batch_per_feature = features.variable_stride_per_key()
            if ctx.variable_batch_per_feature:
                ctx.inverse_indices = self._inverse_indices(*features.inverse_indices())
            if not self._is_weighted:
                features = without_weights(features)
            bags = dict(zip(features.keys(), features.stride_per_key(), strict=True))
            awaitables = []
            ordered = select_slots(features, self._feature_order)
            pieces = ordered.split([len(sharded.slots) for sharded in self._inputs])
            for sharded, piece in zip(self._inputs, pieces, strict=True):
                awaitables.append(sharded.dist(piece))
                ctx.sharding_contexts.append(
                    EmbeddingShardingContext(
                        batch_size_per_feature_pre_a2a=[bags[s.feature] for s in sharded.looked_up],
                        variable_batch_per_feature=ctx.variable_batch_per_feature,
                    )
                )
            return KJTListSplitsAwaitable(awaitables, ctx)

    def _inverse_indices(
        self, names: list[str], inverse: torch.Tensor
    ) -> tuple[list[str], torch.Tensor]:
        """Rows of `inverse` in the order in which TorchRec gathers the physical features."""
        looked_up = [slot.feature for sharded in self._inputs for slot in sharded.looked_up]
        return looked_up, inverse[[names.index(feature) for feature in looked_up]]

    def compute(
        self, ctx: EmbeddingBagCollectionContext, dist_input: KJTList
    ) -> list[torch.Tensor]:
        """Expands the received ids against the local codes and looks the rows up."""
        return self.embedding_bag_collection.compute(ctx, self._expand(ctx, dist_input))

    def output_dist(
        self, ctx: EmbeddingBagCollectionContext, output: list[torch.Tensor]
    ) -> LazyAwaitable[KeyedTensor]:
        """Sends pooled chunks back and puts them into logical order."""
        return self._assembled(ctx, self.embedding_bag_collection.output_dist(ctx, output))

    def compute_and_output_dist(
        self, ctx: EmbeddingBagCollectionContext, input: KJTList
    ) -> LazyAwaitable[KeyedTensor]:
        """`compute` and `output_dist` in one, as the train pipelines call it."""
        inner = self.embedding_bag_collection
        return self._assembled(ctx, inner.compute_and_output_dist(ctx, self._expand(ctx, input)))

    def _expand(self, ctx: EmbeddingBagCollectionContext, dist_input: KJTList) -> KJTList:
        expanded = [
            sharded.expansion(features, self._bounds_check)
            for sharded, features in zip(self._inputs, dist_input, strict=True)
        ]
        if ctx.variable_batch_per_feature:
            for context, rows in zip(ctx.sharding_contexts, expanded, strict=True):
                context.batch_size_per_rank_per_feature = batch_sizes(rows, self._env.world_size)
        return KJTList(expanded)

    def _assembled(
        self, ctx: EmbeddingBagCollectionContext, awaitable: LazyAwaitable[KeyedTensor]
    ) -> LazyAwaitable[KeyedTensor]:
        awaitable.callbacks.append(
            partial(self._output.assemble, slices=self._slices, divisor=ctx.divisor)
        )
        return awaitable

    def create_context(self) -> EmbeddingBagCollectionContext:
        """A fresh context for one batch."""
        return EmbeddingBagCollectionContext()

    def embedding_bag_configs(self) -> list[Any]:
        """The tables as configured (or finalised), one entry per logical table."""
        return self._configs

    def drop_helpers(self, names: Sequence[str]) -> None:
        """Reads the tables `names` as finalised ones; `clustering.finalize` wrote them so."""
        self._configs = finalised_configs(self._configs, names, self.codes)
        for sharded in self._inputs:
            sharded.expansion.set_configs(self._configs)
        self._codes_state.set_configs(self._configs)

    def is_weighted(self) -> bool:
        """Whether bags are pooled by per-sample weights."""
        return self._is_weighted

    @property
    def num_invalid_ids(self) -> int:
        """Ids out of bounds that this rank has seen so far (bounds_check_mode WARNING)."""
        return self._bounds_check.num_invalid

    def replica_groups(self) -> dict[str, dist.ProcessGroup]:
        """Ranks that hold copies of a table's chunks, per table that has copies.

        All ranks for data-parallel tables; those of TorchRec's replica group in 2D parallelism.
        """
        of_chunks = getattr(self._env, "replica_pg", None)
        groups = {c.name: of_chunks for c in self._configs}
        groups |= dict.fromkeys(self.data_parallel, self._env.process_group)
        return {name: group for name, group in groups.items() if group is not None}

    def sharded_parameter_names(self, prefix: str = "") -> Iterator[str]:
        """Names of everything that DDP must leave alone: parameters and codes."""
        for name, _ in self.named_parameters():
            yield append_prefix(prefix, name)
        for name, _ in self.named_buffers():
            yield append_prefix(prefix, name)

    @property
    def unsharded_module_type(self) -> type[CCEEmbeddingBagCollection]:
        """The module this one replaces."""
        return CCEEmbeddingBagCollection


class CCEEmbeddingBagCollectionSharder(BaseEmbeddingSharder[CCEEmbeddingBagCollection]):
    """Shards `CCEEmbeddingBagCollection` by plans of logical tables.

    TABLE_WISE keeps the chunks of a table on one rank; COLUMN_WISE spreads them over ranks, and
    TABLE_COLUMN_WISE over those of one host. DATA_PARALLEL keeps all on every rank: such tables
    train by an optimizer of the user's, over `data_parallel_parameters`.

    Apply the fused optimizer before the plan is made, as for any TorchRec module.
    """

    def __init__(
        self,
        fused_params: dict[str, Any] | None = None,
        qcomm_codecs_registry: dict[str, QuantizedCommCodecs] | None = None,
    ) -> None:
        super().__init__(fused_params=fused_params, qcomm_codecs_registry=qcomm_codecs_registry)
        self._ebc_sharder = EmbeddingBagCollectionSharder(
            fused_params=fused_params, qcomm_codecs_registry=qcomm_codecs_registry
        )

    def shard(
        self,
        module: CCEEmbeddingBagCollection,
        params: dict[str, ParameterSharding],
        env: ShardingEnv,
        device: torch.device | None = None,
        module_fqn: str | None = None,
    ) -> ShardedCCEEmbeddingBagCollection:
        """The sharded form of `module` under the plan `params` of its logical tables."""
        device = device if device is not None else torch.device("cpu")
        # A group of the job's ranks has a plan of their numbers in the job.
        check_world_size(params, dist.get_world_size() if dist.is_initialized() else 1)
        return ShardedCCEEmbeddingBagCollection(
            module, params, self._ebc_sharder, env, device, module_fqn
        )

    def shardable_parameters(self, module: CCEEmbeddingBagCollection) -> dict[str, nn.Parameter]:
        """One parameter per logical table: the real one of a plain table, a proxy [k + k', D].

        The proxy carries the chunks' in-backward optimizer, without which the planner would
        choose the dense kernel.
        """
        real = self._ebc_sharder.shardable_parameters(module.embedding_bag_collection)
        out: dict[str, nn.Parameter] = {}
        for config in module.embedding_bag_configs():
            if not isinstance(config, CCEEmbeddingBagConfig):
                out[config.name] = real[config.name]
                continue
            proxy = nn.Parameter(
                torch.empty(
                    config.rows_per_chunk,
                    config.embedding_dim,
                    dtype=data_type_to_dtype(config.data_type),
                    device="meta",
                )
            )
            chunk = real[f"{config.name}#0"]
            for attribute in ("_in_backward_optimizers", "_optimizer_classes", "_optimizer_kwargs"):
                if hasattr(chunk, attribute):
                    setattr(proxy, attribute, getattr(chunk, attribute))
            out[config.name] = proxy
        return out

    def sharding_types(self, compute_device_type: str) -> list[str]:
        """Those that place whole chunks."""
        types = super().sharding_types(compute_device_type)
        return [kind for kind in types if kind in (ShardingType(t).value for t in SUPPORTED)]

    @property
    def module_type(self) -> type[CCEEmbeddingBagCollection]:
        """The module this sharder takes."""
        return CCEEmbeddingBagCollection

    @property
    def sharded_module_type(self) -> type[ShardedCCEEmbeddingBagCollection]:
        """The module this sharder makes."""
        return ShardedCCEEmbeddingBagCollection
