"""Counts of a batch's ids on a GPU: codes/counts.py once more, three launches for all tables.

The first finds for each value of the batch the level that its id rises to, if it does. The others
write these levels, of even and then of odd ids, since two ids share a byte: what they write does
not depend on what another value of the same id has written before.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from cce_torchrec.gpu.launch import launch
from cce_torchrec.gpu.triton_functions import bits31, hashed_raw, last_at, mix

_VALUES = 512
_STAYS = tl.constexpr(255)
"""In place of a level that an id does not rise to."""
_GAMMA = tl.constexpr(-0x61C8864680B583EB)
_ADDEND = tl.constexpr(0xADD)


@triton.jit
def _rises(field, ids, level, chances_ptr, on):  # type: ignore[no-untyped-def]  # Triton's own types
    # hashing.bits_of_batch, of the batch that the table counts now.
    batches = tl.load(field + 17, mask=on, other=0).to(tl.pointer_type(tl.int64))
    state = tl.load(field + 18, mask=on, other=0) ^ tl.load(batches, mask=on, other=0)
    state = mix(state + _GAMMA)
    bits = bits31(mix(ids), mix(state + _GAMMA) | 1, mix((state ^ _ADDEND) + _GAMMA))
    return bits < tl.load(chances_ptr + level)


@triton.jit(
    do_not_specialize=[
        "table_of_at", "chances_at", "num_values", "num_features", "step", "half",
    ]
)  # fmt: skip
def count(  # type: ignore[no-untyped-def]
    ids_ptr, starts_ptr, lookup_ptr, new_ptr, table_of_at, chances_at, num_values, num_features,
    step, half, STEPS: tl.constexpr, VALUES: tl.constexpr, TABLE_FIELDS: tl.constexpr,
    WRITE: tl.constexpr,
):  # fmt: skip
    """Finds new levels [values], uint8, or writes those of ids whose last bit is `half`."""
    at = tl.program_id(0).to(tl.int64) * VALUES + tl.arange(0, VALUES)
    end = tl.load(starts_ptr + num_features.to(tl.int64) * step).to(tl.int64)
    on = at < tl.minimum(num_values, end)
    ids = tl.load(ids_ptr + at, mask=on, other=0).to(tl.int64)
    feature = last_at(starts_ptr, step, at, num_features, STEPS)
    table = tl.load(lookup_ptr + table_of_at + feature, mask=on, other=0)
    field = lookup_ptr + table * TABLE_FIELDS
    counts = tl.load(field + 16, mask=on, other=0)
    on = on & (counts != 0)  # tables that count are in one lookup with others
    num_embeddings = tl.load(field, mask=on, other=1)
    is_raw = tl.load(field + 10, mask=on, other=0) != 0
    raw = hashed_raw(ids, tl.load(field + 11, mask=on, other=0), num_embeddings)
    ids = tl.where(is_raw, raw, ids)
    ids = tl.where((ids < 0) | (ids >= num_embeddings), 0, ids)
    # Bad ids are read as 0, and counted as such, as lookups read them.
    place = counts.to(tl.pointer_type(tl.uint8)) + (ids >> 1)
    pair = tl.load(place, mask=on, other=0).to(tl.int32)
    side = (ids & 1).to(tl.int32)
    # The other half of the byte is another id's, which only the other launch writes.
    if WRITE:
        new = tl.load(new_ptr + at, mask=on, other=255).to(tl.int32)
        on = on & (side == half) & (new != _STAYS)
        kept = pair & (15 << (4 * (1 - side)))
        tl.store(place, (kept | (new << (4 * side))).to(tl.uint8), mask=on)
    else:
        level = (pair >> (4 * side)) & 15
        rises = _rises(field, ids, level, lookup_ptr + chances_at, on)
        tl.store(new_ptr + at, tl.where(rises, level + 1, _STAYS).to(tl.uint8), mask=on)


def count_ids(
    ids: torch.Tensor,
    starts: torch.Tensor,
    step: int,
    lookup: torch.Tensor,
    *,
    table_of_at: int,
    chances_at: int,
    num_features: int,
    table_fields: int,
) -> None:
    """Counts the batch for its `ids` [V] in the tables that count.

    Args:
        ids: of all features, one after the other.
        starts: where each feature's begin, every `step` numbers, and behind the last one its end.
        step: see `starts`.
        lookup: what describes the tables, see triton_kernel.py.
        table_of_at: where in `lookup` the table of each feature is.
        chances_at: where the chances of the levels are.
        num_features: of the lookup.
        table_fields: numbers that describe a table.
    """
    if not ids.numel():
        return
    new = torch.empty(ids.numel(), dtype=torch.uint8, device=ids.device)
    for half, write in ((0, False), (0, True), (1, True)):
        launch(
            count, (triton.cdiv(ids.numel(), _VALUES),), ids, starts, lookup, new, table_of_at,
            chances_at, ids.numel(), num_features, step, half, STEPS=num_features.bit_length(),
            VALUES=_VALUES, TABLE_FIELDS=table_fields, WRITE=write,
        )  # fmt: skip
