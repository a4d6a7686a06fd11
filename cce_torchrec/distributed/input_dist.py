"""Input distribution over logical slots: ids to the ranks that look them up, and to rows there."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torchrec.distributed.embedding_sharding import EmbeddingShardingContext, KJTListSplitsAwaitable
from torchrec.distributed.embedding_types import KJTList
from torchrec.distributed.types import Awaitable
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from cce_torchrec.distributed.batch_form import BatchRefusedError, check_arrived
from cce_torchrec.distributed.code_fetch import CodeFetch
from cce_torchrec.distributed.context import CCEContext
from cce_torchrec.distributed.sharding_input import ShardingInput
from cce_torchrec.lookup.bags import bags_of_one, bags_of_one_alike
from cce_torchrec.lookup.bounds import BoundsCheck
from cce_torchrec.modules.embedding_bag_collection import select_slots
from cce_torchrec.spans import span


class InputDistribution:
    """The input distribution of one sharded collection, over all of TorchRec's shardings.

    Args:
        inputs: one per sharding.
        fetch: of the codes of ROW_WISE tables, where there are some.
        world_size: ranks that share the tables.
    """

    def __init__(
        self, inputs: Sequence[ShardingInput], fetch: CodeFetch | None, world_size: int
    ) -> None:
        self.inputs, self.fetch = inputs, fetch
        self._world_size = world_size
        self._feature_order = [slot.feature for sharded in inputs for slot in sharded.slots]
        self.each_by_itself = False
        """Whether ids are looked up each by itself, and not pooled: embeddings return one an id."""

    def __call__(
        self, ctx: CCEContext, features: KeyedJaggedTensor, check: BoundsCheck
    ) -> Awaitable[Awaitable[KJTList]]:
        """Sends `features` to their tables' owners; ids of ROW_WISE tables become rows before."""
        return self._send(ctx, features, check, again=False)

    def again(self, ctx: CCEContext, features: KeyedJaggedTensor, check: BoundsCheck) -> KJTList:
        """The same for a batch whose codes have changed; waits for what the other ranks send."""
        with torch.no_grad():
            return self._send(ctx, features, check, again=True).wait().wait()

    def _send(
        self, ctx: CCEContext, features: KeyedJaggedTensor, check: BoundsCheck, again: bool
    ) -> Awaitable[Awaitable[KJTList]]:
        self._open_contexts(ctx, features)
        given = features
        if self.fetch is not None:
            with span("code_fetch"):
                rows, answered = self.fetch.replace(features, check)
            ctx.in_flight.fetched(features, answered)
            features = rows
        split = self.split(features)
        sent = []
        for sharded, own in zip(self.inputs, split, strict=True):
            if sharded.before is not None:
                own = sharded.before(own, check)
            sent.append(sharded.redistribute(own) if again else sharded.dist(own))
        awaitable = KJTListSplitsAwaitable(sent, ctx)
        if self.each_by_itself:
            self._return_each(ctx, given)
        return awaitable

    def _return_each(self, ctx: CCEContext, features: KeyedJaggedTensor) -> None:
        """Has the output distribution send back an embedding for each id of `features`.

        As for a batch size per feature; ids themselves are sent with one batch size for all.
        """
        ids = dict(zip(features.keys(), features.length_per_key(), strict=True))
        ctx.variable_batch_per_feature = True
        for sharded, context in zip(self.inputs, ctx.sharding_contexts, strict=True):
            context.batch_size_per_feature_pre_a2a = [ids[s.feature] for s in sharded.looked_up]
            context.variable_batch_per_feature = not sharded.replicated

    def refuse(
        self, ctx: CCEContext, refused: BatchRefusedError, check: BoundsCheck
    ) -> Awaitable[Awaitable[KJTList]]:
        """Sends, in place of a batch, that there is none; `check_arrived` raises by it.

        Raises:
            BatchRefusedError: at once, where ROW_WISE tables need to ask for codes before.
        """
        if self.fetch is not None:
            self.fetch.refuse(refused)
        ctx.refusals.append(refused)
        sent = []
        for sharded in self.inputs:
            keys = [slot.feature for slot in sharded.slots]
            # Plain tables that are cut by rows sort ids by them on the way, and get none.
            own = refused.form.refusal(keys, ids=int(sharded.before is None))
            sent.append(own if sharded.before is None else sharded.before(own, check))
        self._open_contexts(ctx, sent[0])
        return KJTListSplitsAwaitable(
            [sharded.dist(own) for sharded, own in zip(self.inputs, sent, strict=True)], ctx
        )

    def _open_contexts(self, ctx: CCEContext, features: KeyedJaggedTensor) -> None:
        """What lookups and outputs will be told of `features`, which are this rank's own."""
        # TorchRec asks for sizes only then.
        variable = ctx.variable_batch_per_feature and not self.each_by_itself
        sizes = features.stride_per_key() if variable else []
        bags = dict(zip(features.keys(), sizes, strict=False))
        # Ids that are sent tell their number on arrival; those of a rank alone are not sent.
        alone = self._world_size == 1 and not variable
        ctx.sharding_contexts = [
            EmbeddingShardingContext(
                batch_size_per_rank=[features.stride()] if alone else [],
                batch_size_per_feature_pre_a2a=[
                    bags[s.feature] for s in sharded.looked_up if variable
                ],
                variable_batch_per_feature=variable,
            )
            for sharded in self.inputs
        ]

    def split(self, features: KeyedJaggedTensor) -> list[KeyedJaggedTensor]:
        """The slots of every sharding."""
        ordered = select_slots(features, self._feature_order)
        # Also what is known of the lengths afterwards, so that values beyond the last bag are.
        ordered.length_per_key()
        return ordered.split([len(sharded.slots) for sharded in self.inputs])

    def expand(self, ctx: CCEContext, received: KJTList, check: BoundsCheck) -> KJTList:
        """Codebook rows of the ids that this rank has received.

        Raises:
            ValueError: this rank or another has refused the batch.
        """
        self.check_arrived(ctx, received)
        if self.each_by_itself:
            received = self._in_bags_of_one(ctx, received)
        rows = [
            ids if sharded.expansion is None else sharded.expansion(ids, check)
            for sharded, ids in zip(self.inputs, received, strict=True)
        ]
        if ctx.variable_batch_per_feature:
            for sharded, context, own in zip(self.inputs, ctx.sharding_contexts, rows, strict=True):
                if not sharded.replicated:  # others are sent, and return
                    context.batch_size_per_rank_per_feature = _batch_sizes(own, self._world_size)
        return KJTList(rows)

    def _in_bags_of_one(self, ctx: CCEContext, received: KJTList) -> KJTList:
        """What arrived, each id in a bag of its own; ids of ROW_WISE tables arrive as rows."""
        out = []
        for sharded, ids, context in zip(self.inputs, received, ctx.sharding_contexts, strict=True):
            # Nothing of them returns, and their kernels want one batch size.
            if sharded.replicated:
                out.append(bags_of_one_alike(ids))
                continue
            slots = [] if sharded.expansion is None else sharded.expansion.slots
            rows = [1 if self.fetch is None else self.fetch.rows_per_id(slot) for slot in slots]
            out.append(bags_of_one(ids, context.batch_size_per_rank, rows))
        return KJTList(out)

    def check_arrived(self, ctx: CCEContext, received: KJTList) -> None:
        """Raises what this rank has refused its batch for, or that another one has.

        Raises:
            ValueError: a batch was refused.
        """
        for refused in ctx.refusals:
            raise refused
        for sharded, ids in zip(self.inputs, received, strict=True):
            if not sharded.stays and sharded.expansion is not None:
                check_arrived(ids)

    def inverse_indices(
        self, names: list[str], inverse: torch.Tensor
    ) -> tuple[list[str], torch.Tensor]:
        """Rows of `inverse` in the order in which TorchRec gathers the physical features."""
        looked_up = [slot.feature for sharded in self.inputs for slot in sharded.looked_up]
        return looked_up, inverse[[names.index(feature) for feature in looked_up]]


def _batch_sizes(rows: KeyedJaggedTensor, world_size: int) -> list[list[int]]:
    """Bags per rank and physical feature of `rows`, received with a batch size per feature."""
    per_feature = rows.stride_per_key_per_rank() if rows.keys() else []
    return [[int(sizes[rank]) for sizes in per_feature] for rank in range(world_size)]
