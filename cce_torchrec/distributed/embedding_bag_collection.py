"""ShardedCCEEmbeddingBagCollection: ids cross the network once per owning rank, then expand.

TorchRec's sharded EmbeddingBagCollection does lookup, optimizer and output distribution over the
chunks; this module has its own input distribution over logical slots, and expands ids where the
codes live.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
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
from torchrec.distributed.sharding.dp_sharding import (
    DpPooledEmbeddingSharding,
    DpSparseFeaturesDist,
)
from torchrec.distributed.sharding.tw_sharding import TwSparseFeaturesDist
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

from cce_torchrec.config import CCEEmbeddingBagConfig
from cce_torchrec.distributed.plan import SUPPORTED, check_world_size, chunk_owners, fan_out
from cce_torchrec.distributed.state_dict import CodesState
from cce_torchrec.expand import (
    Block,
    BoundsCheck,
    ChunkCodes,
    Expansion,
    Slot,
    codes_of,
    physical_feature,
)
from cce_torchrec.modules.embedding_bag_collection import (
    CCEEmbeddingBagCollection,
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
        self._env = env
        self._device = device
        self._bounds_check = BoundsCheck(module.bounds_check_mode)
        self._output = module._output
        missing = [c.name for c in self._configs if c.name not in params]
        if missing:
            raise ValueError(f"the plan has no entry for tables {missing}; it has {sorted(params)}")

        rank = env.rank
        physical: dict[str, ParameterSharding] = {}
        local: dict[str, ChunkCodes] = {}
        self.chunk_owners: dict[str, list[int]] = {}
        for config in self._configs:
            if not isinstance(config, CCEEmbeddingBagConfig):
                physical[config.name] = params[config.name]
                continue
            owners = chunk_owners(config, params[config.name])
            self.chunk_owners[config.name] = owners
            physical |= fan_out(config, params[config.name])
            chunks = [j for j, owner in enumerate(owners) if owner == rank]
            if chunks:
                codes = codes_of(module.codes, config.name)
                assert codes is not None
                local[config.name] = _local_codes(codes, chunks, device)
        self.codes = nn.ModuleDict(local)
        compressed = [c for c in self._configs if isinstance(c, CCEEmbeddingBagConfig)]
        state = CodesState(
            self.codes, compressed, self.chunk_owners, rank, device, env.process_group
        )
        self._register_state_dict_hook(state.save)
        self._register_load_state_dict_pre_hook(state.load)
        self.embedding_bag_collection: ShardedEmbeddingBagCollection = ebc_sharder.shard(
            module.embedding_bag_collection,
            physical,
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
        self._create_input_dists(rank)

    def _create_input_dists(self, rank: int) -> None:
        inner = self.embedding_bag_collection
        slot_of: dict[str, Slot] = {
            name: slot
            for slot, names in zip(self._output.slots, self._output.physical, strict=True)
            for name in names
        }
        self._feature_order: list[str] = []
        self._splits: list[int] = []
        self._pre_a2a: list[list[Slot]] = []
        self._expansions: list[Expansion] = []
        for sharding in inner._embedding_shardings:
            data_parallel = isinstance(sharding, DpPooledEmbeddingSharding)
            per_rank = (
                [sharding.feature_names()] if data_parallel else sharding.feature_names_per_rank()
            )
            slots_per_rank = [list(dict.fromkeys(slot_of[n] for n in names)) for names in per_rank]
            counts = [len(slots) for slots in slots_per_rank]
            self._input_dists.append(
                DpSparseFeaturesDist()
                if data_parallel
                else TwSparseFeaturesDist(sharding._pg, counts)
            )
            self._feature_order += [s.feature for slots in slots_per_rank for s in slots]
            self._splits.append(sum(counts))
            self._pre_a2a.append([slot_of[name] for names in per_rank for name in names])
            mine = 0 if data_parallel else rank
            self._expansions.append(
                Expansion(
                    self._blocks(per_rank[mine], slots_per_rank[mine]),
                    slots_per_rank[mine],
                    list(per_rank[mine]),
                )
            )

    def _blocks(self, names: list[str], slots: list[Slot]) -> list[Block]:
        """Blocks that produce the physical features `names`, in order, from `slots`."""
        position = {slot: i for i, slot in enumerate(slots)}
        by_first: dict[str, tuple[Any, list[str], int | None]] = {}
        for config in self._configs:
            is_cce = isinstance(config, CCEEmbeddingBagConfig)
            for chunk in range(config.num_chunks) if is_cce else [None]:
                features = [physical_feature(config.name, f, chunk) for f in config.feature_names]
                by_first[features[0]] = (config, features, chunk)
        blocks: list[Block] = []
        at = 0
        while at < len(names):
            config, features, chunk = by_first[names[at]]
            assert names[at : at + len(features)] == features, "TorchRec tore a table apart"
            at += len(features)
            if chunk is None:
                own = [position[Slot(config.name, f)] for f in config.feature_names]
                blocks.append(Block(config, own, None, []))
                continue
            codes = codes_of(self.codes, config.name)
            assert codes is not None
            column = codes.chunks.index(chunk)
            if blocks and blocks[-1].config is config:
                blocks[-1].columns.append(column)
            else:
                own = [position[Slot(config.name, f)] for f in config.feature_names]
                blocks.append(Block(config, own, codes, [column]))
        return blocks

    def input_dist(  # type: ignore[override]  # TorchRec's own modules narrow *input likewise
        self, ctx: EmbeddingBagCollectionContext, features: KeyedJaggedTensor
    ) -> Awaitable[Awaitable[KJTList]]:
        """Sends each id once to every rank that owns a chunk of its table.

        Raises:
            ValueError: a missing feature, or missing weights.
        """
        check_features(features, self._output.slots, self._is_weighted)
        with torch.no_grad():
            ctx.divisor = self._output.divisor(features)
            if not self._is_weighted:
                features = without_weights(features)
            awaitables = []
            ordered = select_slots(features, self._feature_order)
            pieces = ordered.split(self._splits)
            for dist, piece, slots in zip(self._input_dists, pieces, self._pre_a2a, strict=True):
                awaitables.append(dist(piece))
                ctx.sharding_contexts.append(
                    EmbeddingShardingContext(
                        batch_size_per_feature_pre_a2a=[features.stride()] * len(slots)
                    )
                )
            return KJTListSplitsAwaitable(awaitables, ctx)

    def compute(
        self, ctx: EmbeddingBagCollectionContext, dist_input: KJTList
    ) -> list[torch.Tensor]:
        """Expands the received ids against the local codes and looks the rows up."""
        return self.embedding_bag_collection.compute(ctx, self._expand(dist_input))

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
        return self._assembled(ctx, inner.compute_and_output_dist(ctx, self._expand(input)))

    def _expand(self, dist_input: KJTList) -> KJTList:
        with torch.no_grad():
            return KJTList(
                [
                    expansion(features, self._bounds_check)
                    for expansion, features in zip(self._expansions, dist_input, strict=True)
                ]
            )

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
        """The tables as configured, one entry per logical table."""
        return self._configs

    def is_weighted(self) -> bool:
        """Whether bags are pooled by per-sample weights."""
        return self._is_weighted

    @property
    def num_invalid_ids(self) -> int:
        """Ids out of bounds that this rank has seen so far (bounds_check_mode WARNING)."""
        return self._bounds_check.num_invalid

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


def _local_codes(codes: ChunkCodes, chunks: list[int], device: torch.device) -> ChunkCodes:
    """The columns of `codes` that live on this rank; fresh ones if `codes` is on meta."""
    config = codes.config
    local = ChunkCodes(config, chunks, device)
    if codes.clusterings.device.type != "meta":
        local.set_rounds(codes.rounds)
        if local.codes is not None and codes.codes is not None:
            local.codes.copy_(codes.codes[:, chunks])
        if local.seen is not None and codes.seen is not None:
            local.seen.copy_(codes.seen)
    return local


class CCEEmbeddingBagCollectionSharder(BaseEmbeddingSharder[CCEEmbeddingBagCollection]):
    """Shards `CCEEmbeddingBagCollection` by plans of logical tables.

    TABLE_WISE keeps the chunks of a table on one rank; COLUMN_WISE spreads them over ranks.
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
        check_world_size(params, env.world_size)
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
        """TABLE_WISE and COLUMN_WISE."""
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


def get_default_sharders(
    fused_params: dict[str, Any] | None = None,
) -> list[Any]:
    """TorchRec's default sharders with `CCEEmbeddingBagCollectionSharder` in front."""
    from torchrec.distributed.sharding_plan import get_default_sharders as torchrec_default

    return [CCEEmbeddingBagCollectionSharder(fused_params=fused_params), *torchrec_default()]
