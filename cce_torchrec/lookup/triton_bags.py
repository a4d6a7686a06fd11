"""Where features start and their rows go, and whether a batch says so soundly, in Triton.

The host does not wait for the lengths of a batch, so the kernels of triton_kernel.py are the first
to look at them. What they read and write has to be inside of its tensors whatever they find.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def start_of(starts_ptr, feature, step):  # type: ignore[no-untyped-def]
    """Where `feature` starts among the ids."""
    return tl.load(starts_ptr + feature.to(tl.int64) * step).to(tl.int64)


@triton.jit
def out_start_of(out_starts_ptr, table, first, copies, ALIKE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Where the rows of `table` start, whose first id is `first`."""
    if ALIKE:
        return first * copies
    else:
        return tl.load(out_starts_ptr + table)


@triton.jit
def is_sound(  # type: ignore[no-untyped-def]
    starts_ptr, out_starts_ptr, lookup_ptr, num_values, num_out, num_features, num_tables, step,
    FEATURES: tl.constexpr, ALIKE: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Whether features start one after the other among the ids, and their rows have room."""
    feature = tl.arange(0, FEATURES)
    real = feature < num_features
    at = starts_ptr + feature.to(tl.int64) * step
    start = tl.load(at, mask=real, other=0).to(tl.int64)
    end = tl.load(at + step, mask=real, other=0).to(tl.int64)
    wrong = real & ((start < 0) | (end < start) | (end > num_values))
    wrong = wrong | (real & (feature == 0) & (start != 0))
    last = start_of(starts_ptr, num_features, step)
    copies = tl.load(lookup_ptr + 13)  # of any table, where all are alike
    total = out_start_of(out_starts_ptr, num_tables, last, copies, ALIKE)
    fits = (total == num_out) if EXACT else (total <= num_out)
    return (tl.max(wrong.to(tl.int32), axis=0) == 0) & fits


@triton.jit
def blank(  # type: ignore[no-untyped-def]
    program, out_ptr, out_weights_ptr, num_out, most_copies, VALUES: tl.constexpr
):
    """Writes row 0, which every table has, for a program's part of a batch that is not sound."""
    at = program * VALUES * most_copies + tl.arange(0, VALUES)
    zeros = tl.zeros(at.shape, tl.int64)
    for _ in range(most_copies):
        tl.store(out_ptr + at, zeros, mask=at < num_out)
        if out_weights_ptr is not None:
            tl.store(out_weights_ptr + at, zeros.to(tl.float32), mask=at < num_out)
        at += VALUES


@triton.jit
def tell(table, wrong, invalid_ptr, first_bad_ptr):  # type: ignore[no-untyped-def]
    """Counts wrong bags as ids out of bounds, which come before all ids."""
    zeros = tl.zeros(wrong.shape, tl.int64)
    if invalid_ptr is not None:
        tl.atomic_add(invalid_ptr + table + zeros, zeros + 1, mask=wrong, sem="relaxed")
    if first_bad_ptr is not None:
        tl.atomic_min(first_bad_ptr + table + zeros, zeros - 1, mask=wrong, sem="relaxed")
