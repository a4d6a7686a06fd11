"""Collections of packed tables, in place of those that were trained."""

from __future__ import annotations

import copy
import importlib.util
from typing import Optional

import torch
from torch import nn
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor, KeyedTensor

from cce_torchrec.distributed.embedding_bag_collection import ShardedCCEEmbeddingBagCollection
from cce_torchrec.distributed.embedding_collection import ShardedCCEEmbeddingCollection
from cce_torchrec.inference import native
from cce_torchrec.inference.fused import FusedLookup
from cce_torchrec.inference.gpu_lookup import TritonLookup
from cce_torchrec.inference.lookup import PackedLookup, reordered
from cce_torchrec.inference.packed_tables import PackedTables
from cce_torchrec.inference.portable import PortableLookup
from cce_torchrec.inference.row_types import row_type
from cce_torchrec.modules.embedding_bag_collection import CCEEmbeddingBagCollection
from cce_torchrec.modules.embedding_collection import CCEEmbeddingCollection

LOOKUPS = ("auto", "fused", "portable", "triton")


class InferenceEmbeddingBagCollection(nn.Module):
    """What a trained `CCEEmbeddingBagCollection` gives, read-only, for TorchScript and export.

    Called with a KeyedJaggedTensor that holds (at least) the features, it returns a KeyedTensor
    [B, sum of embedding_dim] with the same names in the same order. `lookup` is the same for
    tensors: `lookup(values, lengths, weights=None)`, ids feature by feature in the order of
    `inputs`.

    Made by `inference_collection`.
    """

    def __init__(self, packed: PackedTables, lookup: PackedLookup) -> None:
        super().__init__()
        self.packed = packed
        self.lookup = lookup
        self.ignores = lookup.ignores
        self.inputs = packed.inputs
        self.keys = [feature.key for feature in packed.features]
        self.dims = [packed.tables[feature.table].dim for feature in packed.features]
        self.weighted = packed.is_weighted

    def forward(self, features: KeyedJaggedTensor) -> KeyedTensor:
        """Pooled embeddings of `features`, of which nothing is written to.

        Raises:
            ValueError: a missing feature, missing weights, a batch size per feature, or an id out
                of bounds where these are not ignored.
        """
        order = _places(features, self.inputs)
        values, lengths = features.values(), features.lengths()
        weights: Optional[torch.Tensor] = None  # noqa: UP045  # TorchScript reads no other form
        if self.weighted:
            weights = features.weights_or_none()
            if weights is None:
                raise ValueError("the tables are pooled by weights, and the features have none")
        # Not by `permute`, whose operator of FBGEMM neither traces nor takes batches of no row.
        if features.keys() != self.inputs:
            own = lengths.view(len(features.keys()), -1)
            at = torch.tensor(order, device=lengths.device)
            source = reordered(own, at)
            values, lengths = values.index_select(0, source), own.index_select(0, at).view(-1)
            if weights is not None:
                weights = weights.index_select(0, source)
        pooled = self.lookup(values, lengths, weights)
        return KeyedTensor(self.keys, self.dims, pooled)


def _places(features: KeyedJaggedTensor, names: list[str]) -> list[int]:
    """Which keys of `features` are `names`.

    Raises:
        ValueError: one is missing, or the features have a batch size each.
    """
    if features.variable_stride_per_key():
        raise ValueError("packed tables take one batch size for all features")
    keys = features.keys()
    order: list[int] = []
    for name in names:
        if name not in keys:
            raise ValueError(f"the features {keys} lack {name}, which a table reads")
        order.append(keys.index(name))
    return order


class InferenceEmbeddingCollection(nn.Module):
    """What a trained `CCEEmbeddingCollection` gives, read-only, for TorchScript and export.

    Called with a KeyedJaggedTensor, it returns a dictionary from feature name to a JaggedTensor of
    embeddings [ids, embedding_dim]. Made by `inference_collection`.
    """

    def __init__(
        self, packed: PackedTables, lookups: list[PackedLookup], need_indices: bool
    ) -> None:
        super().__init__()
        self.packed = packed
        # One of each feature: they have unequal numbers of ids, each of which is a bag.
        self.lookups = nn.ModuleList(lookups)
        self.need_indices = need_indices
        self.ignores = any(lookup.ignores for lookup in lookups)
        self.inputs = packed.inputs
        self.names = [feature.feature for feature in packed.features]
        self.keys = [feature.key for feature in packed.features]

    def forward(self, features: KeyedJaggedTensor) -> dict[str, JaggedTensor]:
        """Embeddings of the ids of `features`, of which nothing is written to.

        Raises:
            ValueError: see `InferenceEmbeddingBagCollection.forward`.
        """
        _places(features, self.inputs)
        jagged = features.to_dict()
        out: dict[str, JaggedTensor] = {}
        for number, lookup in enumerate(self.lookups):
            own = jagged[self.names[number]]
            vectors = lookup(own.values(), torch.ones_like(own.values()))
            indices: Optional[torch.Tensor] = None  # noqa: UP045  # as above
            if self.need_indices:
                indices = own.values()
            out[self.keys[number]] = JaggedTensor(vectors, weights=indices, lengths=own.lengths())
        return out


def inference_collection(
    collection: CCEEmbeddingBagCollection | CCEEmbeddingCollection,
    *,
    data_type: str = "int8",
    lookup: str = "auto",
    ignores: bool = False,
) -> InferenceEmbeddingBagCollection | InferenceEmbeddingCollection:
    """The tables of a trained `collection`, packed for serving; it stays as it is.

    Args:
        collection: unsharded, finalized or not, on any device.
        data_type: of codebook rows and plain tables: "fp32", "fp16", "int8" or "int4".
        lookup: "fused" is one compiled operator, "portable" operators of torch and FBGEMM, both for
            CPUs; "auto" is fused where there is its library, or a compiler to build it. "triton" is
            a kernel for a GPU, to which the collection then has to be moved: `.to("cuda")`.
        ignores: whether ids out of bounds are read as id 0; they are refused otherwise.

    Raises:
        ValueError: an unknown `data_type` or `lookup`, or values that are not finite.
        RuntimeError: "fused", and neither the library nor a compiler; or "triton", which is not
            installed.
    """
    if hasattr(collection, "packed"):
        raise ValueError(f"the {type(collection).__name__} is packed already")
    if not isinstance(collection, CCEEmbeddingBagCollection | CCEEmbeddingCollection):
        raise ValueError(
            f"{type(collection).__name__} is no CCE collection; of a model that has some inside "
            "make an inference_model"
        )
    bags, sequences, need_indices = collection, False, False
    if isinstance(collection, CCEEmbeddingCollection):
        bags, sequences, need_indices = collection.bags, True, collection.need_indices()
    return collection_of(
        PackedTables.of(bags, row_type(data_type)),
        lookup=lookup,
        ignores=ignores,
        sequences=sequences,
        need_indices=need_indices,
    )


def collection_of(
    packed: PackedTables, *, lookup: str, ignores: bool, sequences: bool, need_indices: bool
) -> InferenceEmbeddingBagCollection | InferenceEmbeddingCollection:
    """The collection of `packed` tables; see `inference_collection`."""
    kind = lookup_type(lookup)
    if not sequences:
        return InferenceEmbeddingBagCollection(packed, kind(packed, ignores))
    each = [kind(packed.only(i), ignores) for i in range(len(packed.features))]
    return InferenceEmbeddingCollection(packed, each, need_indices)


def inference_model(
    model: nn.Module,
    *,
    data_type: str = "int8",
    lookup: str = "auto",
    ignores: bool = False,
) -> nn.Module:
    """A copy of a trained `model` in which every CCE collection is an `inference_collection`.

    Collections of TorchRec's own stay what they are. The copy is in evaluation mode.

    Raises:
        ValueError: what `inference_collection` refuses, a model without CCE collections, or one
            that is sharded, with the way out.
        RuntimeError: see `inference_collection`.
    """
    made: dict[int, nn.Module] = {}
    # A collection of sequences has one of bags inside, which is packed with it.
    inside: set[nn.Module] = set()
    for path, module in model.named_modules():
        if isinstance(module, ShardedCCEEmbeddingBagCollection | ShardedCCEEmbeddingCollection):
            raise ValueError(
                f"{path}: the tables are sharded; save a checkpoint, load it into the unsharded "
                "model (load_checkpoint), and give that"
            )
        if isinstance(module, CCEEmbeddingBagCollection | CCEEmbeddingCollection):
            if module not in inside:
                made[id(module)] = inference_collection(
                    module, data_type=data_type, lookup=lookup, ignores=ignores
                )
            inside |= set(module.modules())
    if not made:
        raise ValueError(f"{type(model).__name__} has no CCE collection to pack")
    # Whatever is known already is not copied: that is the packed form in place of the trained one.
    return copy.deepcopy(model, made).eval()


def lookup_type(lookup: str) -> type[PackedLookup]:
    """The kind of lookup that is called `lookup`; see `inference_collection`."""
    if lookup not in LOOKUPS:
        raise ValueError(f"lookup {lookup!r} is none of {list(LOOKUPS)}")
    if lookup == "triton":
        if importlib.util.find_spec("triton") is None:
            raise RuntimeError("lookup 'triton' needs Triton, which is not installed; install it")
        return TritonLookup
    if lookup == "fused":
        native.load()
    fused = lookup == "fused" or (lookup == "auto" and native.available())
    return FusedLookup if fused else PortableLookup
