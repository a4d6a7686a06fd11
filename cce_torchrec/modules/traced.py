"""Lookups of unsharded collections as torch.fx records them: in operators of torch alone.

A tracer follows no number of a batch, such as the ids of a feature, which the compiled expansion
goes by. A graph reads the buffers of the collection that it was made of, and so follows clustering
steps; after `finalize`, ids have fewer rows than it has operators for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol, TypeVar, get_type_hints

import torch
from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode
from torch import nn
from torch.nn.functional import embedding
from torchrec.fx import symbolic_trace
from torchrec.modules.embedding_modules import (
    EmbeddingBagCollection,
    process_pooled_embeddings,
    reorder_inverse_indices,
)
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor

from cce_torchrec.codes.hashing import code_hash, hash_rows, helper_hashes
from cce_torchrec.lookup.expansion import Expansion
from cce_torchrec.lookup.id_ranges import id_range
from cce_torchrec.lookup.output import LogicalOutput
from cce_torchrec.lookup.table_lookup import TableLookup
from cce_torchrec.table import Table, physical_table

Forward = TypeVar("Forward", bound=Callable[..., Any])

# Called as a whole in a graph; torch asks for it in each file that calls them.
torch.fx.wrap("process_pooled_embeddings")
torch.fx.wrap("reorder_inverse_indices")


def with_types(forward: Forward) -> Forward:
    """`forward` with types for annotations, which a graph repeats.

    Strings, as this package has for annotations, name nothing in the code of a graph.
    """
    forward.__annotations__ = get_type_hints(forward)
    return forward


@torch.fx.wrap
def with_one_batch_size(features: KeyedJaggedTensor) -> KeyedJaggedTensor:
    """`features`, of which a graph asks when it is called.

    Raises:
        ValueError: they have a batch size per feature, saying what to give.
    """
    if features.variable_stride_per_key():
        raise ValueError(
            "sequence embeddings take one batch size for all features; a feature without ids in "
            "an example has length 0 there"
        )
    return features


@torch.fx.wrap
def with_examples(features: KeyedJaggedTensor, names: list[str]) -> KeyedJaggedTensor:
    """`features`, of which a graph asks when it is called.

    Raises:
        ValueError: they have a batch size per feature, and no bag of each example of some `names`.
    """
    inverse = features.inverse_indices_or_none()
    if inverse is None and not features.variable_stride_per_key():
        return features
    known = names[:0] if inverse is None else inverse[0]
    for name in names:
        if name not in known:
            raise ValueError(
                "the KeyedJaggedTensor has a batch size per feature, but no inverse_indices for "
                f"{name}; give (names, [features, batch size]), the bag of each example"
            )
    return features


class Traceable:
    """A collection of which TorchScript is that of its graph."""

    def __prepare_scriptable__(self) -> nn.Module:
        """What `torch.jit.script` takes in its place."""
        return symbolic_trace(self)  # type: ignore[arg-type]  # mixed into modules


class Bags(Protocol):
    """What is read of a pooled collection."""

    bounds_check_mode: BoundsCheckMode
    embedding_bag_collection: EmbeddingBagCollection
    expansion: Expansion
    output: LogicalOutput

    def is_weighted(self) -> bool:
        """Whether bags are pooled by per-sample weights."""
        ...


def is_traced(features: Any) -> bool:
    """Whether `features` are those of a graph that torch.fx, or torch.export, is recording."""
    if isinstance(features, torch.fx.Proxy):
        return True
    # While Dynamo traces, torch 2.11 says that it exports whatever it does.
    return torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling()


def pooled(bags: Bags, features: KeyedJaggedTensor) -> KeyedTensor:
    """The pooled embeddings of a collection, of each example's bag by the inverse indices.

    Raises:
        ValueError: bounds_check_mode FATAL, as a graph does not look at ids; and in the graph,
            batch sizes per feature without inverse indices.
    """
    names = [bags.output.slots[i].feature for i in bags.output.order]
    features = with_examples(features, names)
    inverse = reorder_inverse_indices(features.inverse_indices_or_none(), names)
    jagged, out = features.to_dict(), []
    for lookup in bags.expansion.table_lookups:
        rows_per_id = lookup.rows_per_id
        for slot in lookup.slots:
            own, parts = jagged[bags.output.slots[slot].feature], []
            weights = own.weights().repeat_interleave(rows_per_id) if bags.is_weighted() else None
            for name, rows in _chunks(bags, lookup, slot, own.values()):
                bag = bags.embedding_bag_collection.embedding_bags[name]
                ends = own.offsets() * rows_per_id
                parts.append(bag(rows.reshape(-1), ends, per_sample_weights=weights).float())
            vectors = torch.cat(parts, dim=1)
            # An empty bag has the sum 0, and 0 / 1 for its mean.
            if bags.output.mean[slot]:
                vectors = vectors / own.lengths().clamp(min=1).unsqueeze(1)
            out.append(vectors)
    return KeyedTensor(
        keys=bags.output.keys,
        length_per_key=bags.output.length_per_key,
        values=process_pooled_embeddings([out[i] for i in bags.output.order], inverse),
    )


def each_by_itself(bags: Bags, features: KeyedJaggedTensor) -> dict[str, torch.Tensor]:
    """The embedding of every id [ids, s], by physical feature.

    Raises:
        ValueError: see `pooled`; in the graph, batch sizes per feature of any kind.
    """
    jagged, out = with_one_batch_size(features).to_dict(), {}
    for lookup in bags.expansion.table_lookups:
        for slot in lookup.slots:
            ids = jagged[bags.output.slots[slot].feature].values()
            names = bags.output.physical[slot]
            for physical, (name, rows) in zip(names, _chunks(bags, lookup, slot, ids), strict=True):
                bag: Any = bags.embedding_bag_collection.embedding_bags[name]
                # Not by `bag`, whose bags of one would need offsets, whose number is not known.
                out[physical] = embedding(rows, bag.weight).sum(1).float()
    return out


def _chunks(
    bags: Bags, lookup: TableLookup, slot: int, ids: torch.Tensor
) -> Iterator[tuple[str, torch.Tensor]]:
    """The TorchRec table of each chunk of a slot, and its rows of `ids` [V], [V, rows per id].

    In the order in which the output has them.
    """
    found = dict(_own_chunks(bags, lookup, slot, ids))
    for chunk in Table(lookup.config).chunks_of(bags.expansion.slots[slot].feature):
        name = lookup.config.name
        name = name if chunk is None else physical_table(name, chunk)
        yield name, found[name]


def _own_chunks(
    bags: Bags, lookup: TableLookup, slot: int, ids: torch.Tensor
) -> Iterator[tuple[str, torch.Tensor]]:
    """The same in the order of the chunks."""
    # Hashes of int32 ids would wrap.
    ids, codes, size = lookup.hashed(ids.long()), lookup.codes, lookup.config.num_embeddings
    own = id_range(lookup, bags.expansion.slots[slot].feature)
    if own is not None:
        ids = own.apply(ids, checked=bags.bounds_check_mode != BoundsCheckMode.NONE)
    raw = lookup.hashes_ids or (own is not None and own.key is not None)
    if bags.bounds_check_mode == BoundsCheckMode.FATAL and not raw:
        raise ValueError(
            f"table {lookup.config.name!r}: bounds_check_mode FATAL looks at the ids of a batch, "
            "and a graph cannot; trace a collection that was made with WARNING or IGNORE"
        )
    # Not by `bags.bounds_check`, which counts on the host.
    if bags.bounds_check_mode != BoundsCheckMode.NONE:
        ids = ids.masked_fill((ids < 0) | (ids >= size), 0)
    if codes is None:
        yield lookup.config.name, ids.unsqueeze(1)
        return
    config = codes.config
    names = [physical_table(config.name, chunk) for chunk in codes.chunks]
    if torch.compiler.is_compiling():  # there tensors are seen as such, and counted in the graph
        yield from zip(names, lookup.rows(ids), strict=True)
        return
    # Whole rows at once, as an index for each chunk would read the memory as often.
    stored = codes.codes
    found = None if stored is None else codes.packing.read(stored, ids, len(codes.chunks))
    for column, chunk in enumerate(codes.chunks):
        if found is None:
            main = code_hash(config.seed, config.name, chunk)(ids, config.num_rows)
        else:
            main = found.select(1, column)
        rows = [main]
        # By the buffer of a graph: of the number in it, a constant would be made.
        if lookup.rows_per_id == 2:
            count = codes.count.type_as(ids)
            hashes = helper_hashes(config.seed, config.name, [chunk], count)
            helper = hash_rows(
                ids, hashes.narrow(1, 0, 1), hashes.narrow(1, 1, 1), config.helper_rows
            )
            rows.append(helper.select(0, 0) + config.num_rows)
        yield names[column], torch.stack(rows, dim=1)
