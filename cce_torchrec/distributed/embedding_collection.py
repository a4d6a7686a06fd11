"""ShardedCCEEmbeddingCollection: ids travel as in the bag form, one embedding per id returns.

The network carries lengths and ids as for pooled tables; where the codes live every id becomes a
bag of its own, and TorchRec's output distribution for a batch size per feature takes the
embeddings back.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torchrec.distributed.embedding_types import (
    BaseEmbeddingSharder,
    KJTList,
    ShardedEmbeddingModule,
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
from torchrec.modules.embedding_configs import BaseEmbeddingConfig
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor

from cce_torchrec.collectives import agree
from cce_torchrec.config import is_cce
from cce_torchrec.distributed.batch_form import BatchRefusedError
from cce_torchrec.distributed.context import CCEContext
from cce_torchrec.distributed.embedding_bag_sharder import CCEEmbeddingBagCollectionSharder
from cce_torchrec.distributed.id_partition import is_row_wise
from cce_torchrec.lookup.output import LogicalOutput
from cce_torchrec.modules.embedding_collection import (
    CCEEmbeddingCollection,
    check_one_batch_size,
    sequences,
    take_old_names_of_sequences,
    with_current_configs,
)
from cce_torchrec.torchrec_internals import (
    fused_kernels,
    input_dists,
    lookups_of,
    output_dists,
    uncombined_features,
)

Sequences = dict[str, JaggedTensor]


@dataclass
class SequenceContext(CCEContext):
    """The context of a batch, with the features that the rank put in."""

    # Without a value until `input_dist`: pipelines record streams of distributed batches only.
    features: KeyedJaggedTensor = field(init=False)

    def record_stream(self, stream: torch.Stream) -> None:
        """Keeps the tensors alive for `stream`."""
        super().record_stream(stream)
        self.features.record_stream(stream)


class SequencesAwaitable(LazyAwaitable[Sequences]):
    """Waits for the embeddings of all shardings and puts the chunks of each feature together."""

    def __init__(
        self,
        awaitables: list[Awaitable[torch.Tensor]],
        names: list[str],
        shapes: list[tuple[int, int]],
        output: LogicalOutput,
        features: KeyedJaggedTensor,
        need_indices: bool,
    ) -> None:
        super().__init__()
        self._awaitables, self._names, self._shapes = awaitables, names, shapes
        self.output, self._features, self._need_indices = output, features, need_indices

    def _wait_impl(self) -> Sequences:
        # Flat, as chunks of one table may be wider than those of another.
        flat = torch.cat([awaitable.wait().view(-1) for awaitable in self._awaitables])
        parts = flat.split([ids * dim for ids, dim in self._shapes])
        vectors = {
            name: part.view(shape)
            for name, part, shape in zip(self._names, parts, self._shapes, strict=True)
        }
        return sequences(self.output, vectors, self._features, self._need_indices)


class ShardedCCEEmbeddingCollection(
    ShardedEmbeddingModule[KJTList, list[torch.Tensor], Sequences, SequenceContext]
):
    """Sharded form of `CCEEmbeddingCollection`, made by `CCEEmbeddingCollectionSharder`."""

    def __init__(
        self,
        module: CCEEmbeddingCollection,
        params: dict[str, ParameterSharding],
        bag_sharder: CCEEmbeddingBagCollectionSharder,
        env: ShardingEnv,
        device: torch.device,
        module_fqn: str | None = None,
    ) -> None:
        super().__init__(qcomm_codecs_registry=bag_sharder.qcomm_codecs_registry)
        self._configs = module.embedding_configs()
        plain = [config.name for config in self._configs if not is_cce(config)]
        by_rows = [name for name in plain if name in params and is_row_wise(params[name])]
        if by_rows:
            raise ValueError(
                f"tables {by_rows}: plain tables of sequence embeddings cannot be ROW_WISE, where "
                "TorchRec pools rows of several ranks; plan them table-wise, column-wise or "
                "data-parallel"
            )
        self._need_indices = module.need_indices()
        self.bags = bag_sharder.shard(
            module.bags, params, env, device, append_prefix(module_fqn or "", "bags")
        )
        self.bags.checked.check_partly_frozen()  # of batches alike, FBGEMM takes one kernel's only
        self.bags.distribution.each_by_itself = True
        self.register_load_state_dict_pre_hook(take_old_names_of_sequences)
        self._lookups = lookups_of(self.bags)
        self._input_dists += input_dists(self.bags)
        self._has_uninitialized_input_dist = False
        if self.bags.device.type == "cpu":
            agree(self._check_kernels, self.bags.process_group)

    def _check_kernels(self) -> tuple[None, None]:
        """Refuses tables of a rank that share no kernel, of which FBGEMM takes one on CPUs.

        Raises:
            ValueError: naming the tables of each.
        """
        for sharded, lookup in zip(self.bags.inputs, self._lookups, strict=True):
            kernels = [[t.name for t in tables] for tables, _ in fused_kernels([lookup])]
            if len(kernels) > 1 and not sharded.replicated:
                raise ValueError(
                    f"chunks {kernels} have a kernel each (by optimizer, rate, data type or size), "
                    "and FBGEMM's CPU kernels take sequences in one kernel only; give the tables "
                    "one optimizer, or a collection each"
                )
        return None, None

    def input_dist(  # type: ignore[override]  # TorchRec's own modules narrow *input likewise
        self, ctx: SequenceContext, features: KeyedJaggedTensor
    ) -> Awaitable[Awaitable[KJTList]]:
        """Sends each id once to every rank that owns a chunk of its table.

        Raises:
            ValueError: a missing feature, a batch size per feature, or lengths and offsets that do
                not fit.
        """
        try:
            features = self.bags.checked(features, check_one_batch_size)
        except BatchRefusedError as refused:
            ctx.features = KeyedJaggedTensor.empty(device=self.bags.device)
            return self.bags.distribution.refuse(ctx, refused, self.bags.bounds_check)
        ctx.features = features
        return self.bags.distribute(ctx, features)

    def compute(self, ctx: SequenceContext, dist_input: KJTList) -> list[torch.Tensor]:
        """Looks up every received id by itself."""
        return self.bags.compute(ctx, dist_input)

    def prefetch(  # type: ignore[override]  # pipelines always give a context, by name
        self,
        dist_input: KJTList,
        forward_stream: torch.Stream | None = None,
        *,
        ctx: SequenceContext,
    ) -> None:
        """Brings the codebook rows of a batch into the caches of kernels that have some (CUDA)."""
        self.bags.prefetch(dist_input, forward_stream, ctx=ctx)

    def output_dist(
        self, ctx: SequenceContext, output: list[torch.Tensor]
    ) -> LazyAwaitable[Sequences]:
        """Sends embeddings back to the ranks that asked for them."""
        inner = self.bags.embedding_bag_collection
        awaitables: list[Awaitable[torch.Tensor]] = []
        ids: list[int] = []
        names, dims = uncombined_features(inner)
        for dist, embeddings, context, sharded in zip(
            output_dists(inner), output, ctx.sharding_contexts, self.bags.inputs, strict=True
        ):
            own = context.batch_size_per_feature_pre_a2a
            # TorchRec's form is one row a bag, and ours, of the other shardings too, is flat.
            if sharded.replicated:
                embeddings = _by_feature(embeddings, own, dims[len(ids) : len(ids) + len(own)])
            awaitables.append(dist(embeddings, context))
            ids += own
        return SequencesAwaitable(
            awaitables,
            names,
            list(zip(ids, dims, strict=True)),
            self.bags.output,
            ctx.features,
            self._need_indices,
        )

    def create_context(self) -> SequenceContext:
        """A fresh context for one batch."""
        return SequenceContext(in_flight=self.bags.create_context().in_flight)

    def embedding_configs(self) -> list[BaseEmbeddingConfig]:
        """The tables as configured (or finalized), one entry per logical table."""
        return with_current_configs(self._configs, self.bags.embedding_bag_configs())

    @property
    def num_invalid_ids(self) -> int:
        """Ids out of bounds seen by this rank, of those that have chunks of the table (WARNING)."""
        return self.bags.num_invalid_ids

    def sharded_parameter_names(self, prefix: str = "") -> Iterator[str]:
        """Names of everything that DDP must leave alone: parameters and codes."""
        yield from self.bags.sharded_parameter_names(append_prefix(prefix, "bags"))

    @property
    def unsharded_module_type(self) -> type[CCEEmbeddingCollection]:
        """The module this one replaces."""
        return CCEEmbeddingCollection


def _by_feature(embeddings: torch.Tensor, ids: list[int], dims: list[int]) -> torch.Tensor:
    """Those of each feature in turn, flat, of `embeddings` [ids and empty bags, sum of dims]."""
    parts = zip(embeddings.split(dims, dim=1), ids, strict=True)
    return torch.cat([part[:count].reshape(-1) for part, count in parts])


class CCEEmbeddingCollectionSharder(BaseEmbeddingSharder[CCEEmbeddingCollection]):
    """Shards `CCEEmbeddingCollection` by plans of logical tables; plain tables not ROW_WISE.

    See `CCEEmbeddingBagCollectionSharder` for what each of the sharding types means.

    Args:
        use_index_dedup: as TorchRec's sharder takes it, and without effect: ids travel as they
            come, and the embeddings are the same.
    """

    def __init__(
        self,
        fused_params: dict[str, Any] | None = None,
        qcomm_codecs_registry: dict[str, QuantizedCommCodecs] | None = None,
        use_index_dedup: bool = False,
    ) -> None:
        super().__init__(fused_params=fused_params, qcomm_codecs_registry=qcomm_codecs_registry)
        self._bags = CCEEmbeddingBagCollectionSharder(fused_params, qcomm_codecs_registry)
        self.offers_row_wise = False
        """Whether planners may cut tables by rows; plain tables of sequences cannot be."""

    def shard(
        self,
        module: CCEEmbeddingCollection,
        params: dict[str, ParameterSharding],
        env: ShardingEnv,
        device: torch.device | None = None,
        module_fqn: str | None = None,
    ) -> ShardedCCEEmbeddingCollection:
        """The sharded form of `module` under the plan `params` of its logical tables."""
        device = device if device is not None else torch.device("cpu")
        return ShardedCCEEmbeddingCollection(module, params, self._bags, env, device, module_fqn)

    def shardable_parameters(self, module: CCEEmbeddingCollection) -> dict[str, nn.Parameter]:
        """One parameter per logical table."""
        return self._bags.shardable_parameters(module.bags)

    def sharding_types(self, compute_device_type: str) -> list[str]:
        """Those that all tables may have, and ROW_WISE where it is offered."""
        types, by_rows = self._bags.sharding_types(compute_device_type), ShardingType.ROW_WISE.value
        # On GPUs TorchRec offers it for all tables of a collection, plain ones too.
        own = [kind for kind in types if kind != by_rows]
        return [*own, by_rows] if self.offers_row_wise else own

    @property
    def module_type(self) -> type[CCEEmbeddingCollection]:
        """The module this sharder takes."""
        return CCEEmbeddingCollection

    @property
    def sharded_module_type(self) -> type[ShardedCCEEmbeddingCollection]:
        """The module this sharder makes."""
        return ShardedCCEEmbeddingCollection
