"""Exports of a collection, compared with the dictionary of rows."""

from __future__ import annotations

from pathlib import Path

import torch

from benchmarks.hard.reference import Reference
from benchmarks.hard.specs import BatchSpec
from cce_torchrec import CCEEmbeddingBagCollection
from cce_torchrec.inference import (
    inference_collection,
    load_inference,
    plain_collection,
    save_inference,
    vectors_of,
)


def check_exports(
    collection: CCEEmbeddingBagCollection, reference: Reference, batch: BatchSpec, folder: Path
) -> None:
    """The packed form, its folder and the plain form give what the dictionary of rows does.

    Raises:
        AssertionError: one does not.
    """
    spec = reference.spec
    expected = reference.pooled(batch)

    def check(values: torch.Tensor, who: str) -> None:
        assert reference.close(values.double().numpy(), expected), (who, values, expected)

    for lookup in ("fused", "portable"):
        served = inference_collection(collection, data_type="fp32", lookup=lookup, ignores=True)
        check(served(batch.tensors(spec)).values(), lookup)
    written = save_inference(served, folder / "export")
    for lookup, mmap in (("portable", True), ("fused", False)):
        loaded = load_inference(written, lookup=lookup, mmap=mmap)
        check(loaded(batch.tensors(spec)).values(), f"loaded, {lookup}")
    keys = list(served.keys)
    for number, (table, feature) in enumerate(spec.slots()):
        ids = torch.arange(len(table.ranges[feature]))
        vectors = vectors_of(served, keys[number], ids)
        for id_, vector in zip(ids.tolist(), vectors, strict=True):
            own = reference.vector(table, feature, id_)
            assert reference.close(vector.double().numpy(), own)
    means = any(table.mean for table in spec.tables)
    if not any(t.hashed and t.chunks for t in spec.tables) and not (spec.weighted and means):
        plain = plain_collection(collection)
        inside = type(batch)(seed=batch.seed, bags=batch.bags, outside=False)
        out = plain(inside.tensors(spec)).values()
        assert out.shape[1] == expected.shape[1]
