"""Passes over the ids of a chunk in Triton: pairs in, new codes and residuals out.

Each pass is one launch over a range of ids, without a temporary: an id's pair is found from its
code and its hash where it is needed. All sums are of integers, so that no bit depends on the order
of atomics. The torch and C++ forms are beside each use in id_passes.py and pairs.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from cce_torchrec.codes.counts import LEVELS
from cce_torchrec.codes.hashing import HashFunction
from cce_torchrec.gpu.launch import launch
from cce_torchrec.gpu.triton_functions import bits31, code_at, hashed, mix
from cce_torchrec.packing import CodePacking

_IDS = 1024
# Few, because a program holds a row of `_MOST_DIMS` coordinates of each in registers.
_RESIDUAL_IDS = 32
_MOST_DIMS = 64
_LEVELS = tl.constexpr(LEVELS)
# Numbers that differ from chunk to chunk: a kernel that was compiled anew for each (Triton does so
# where one is 1 or a multiple of 16) would take longer than its pass.
_VARYING = ["bits", "shift", "stride", "begin", "first", "count", "base", "helper_rows"]


@dataclass(frozen=True, kw_only=True)
class Range:
    """Ids [first, last) of one chunk, whose codes are a column of `codes`, from id `base` on."""

    codes: torch.Tensor
    """Packed, contiguous."""
    packing: CodePacking
    column: int
    base: int
    first: int
    last: int
    hash: HashFunction
    helper_rows: int
    counts: torch.Tensor | None = None
    """Of the ids from `base` on; see codes/counts.py."""

    @property
    def _count(self) -> int:
        return self.last - self.first

    @property
    def _args(self) -> tuple[object, ...]:
        codes, packing = self.codes, self.packing
        assert codes.is_contiguous() and self.base <= self.first
        how = (packing.bits, packing.group.bit_length() - 1, codes.shape[1])
        where = (8 * packing.width * self.column, self.first, self._count, self.base)
        return (
            codes,
            self.counts,
            *how,
            *where,
            self.hash.multiplier,
            self.hash.addend,
            self.helper_rows,
        )

    def pairs(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows of the points' codebooks of each id, int32 [n] each."""
        a = torch.empty(self._count, dtype=torch.int32, device=self.codes.device)
        b = torch.empty_like(a)
        self._write_pairs(a, b, keys=False)
        return a, b

    def keys(self) -> torch.Tensor:
        """Pair of each id: main row * k' + helper row, int64 [n]."""
        keys = torch.empty(self._count, dtype=torch.int64, device=self.codes.device)
        self._write_pairs(keys, keys, keys=True)
        return keys

    def _write_pairs(self, a: torch.Tensor, b: torch.Tensor, keys: bool) -> None:
        grid = (triton.cdiv(self._count, _IDS),)
        launch(_write_pairs, grid, *self._args, a, b, KEYS=keys, IDS=_IDS)

    def count(self, weights: torch.Tensor | None, counts: torch.Tensor) -> None:
        """Adds the ids, or their int64 `weights` [n], to their pairs in `counts` [k * k']."""
        launch(
            _count_pairs, (triton.cdiv(self._count, _IDS),), *self._args,
            counts if weights is None else weights, counts,
            WEIGHTED=weights is not None, IDS=_IDS,
        )  # fmt: skip

    def sampled(
        self,
        sample: HashFunction,
        threshold: int,
        weights: torch.Tensor | None,
        keys: torch.Tensor,
        sums: torch.Tensor | None,
        found: torch.Tensor,
    ) -> None:
        """Appends the pairs of ids whose hash by `sample` is below `threshold`, in any order.

        Args:
            sample: 31 bits of it count.
            threshold: at most 2^31.
            weights: int64 [n], or None.
            keys: int64, room for pairs (code * k' + hash); what does not fit is only counted.
            sums: int64 like `keys`, for the ids' weights, or None.
            found: int64 [1], ids so far, to which these are added.
        """
        launch(
            _append_sampled, (triton.cdiv(self._count, _IDS),), *self._args,
            keys if weights is None else weights, keys, keys if sums is None else sums, found,
            len(keys), sample.multiplier, sample.addend, threshold,
            WEIGHTED=weights is not None, IDS=_IDS,
        )  # fmt: skip

    def residuals(
        self,
        new_codes: torch.Tensor,
        by_pair: bool,
        new_hash: HashFunction,
        books: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        stats: tuple[torch.Tensor, torch.Tensor],
    ) -> None:
        """Adds x_i - new centroid to (sums [k', s], sizes [k']) of the ids' new helper rows.

        `new_codes`: of every pair, or of these ids; `books`: main, helper and centroids, int32.
        """
        dim = books[0].shape[1]
        launch(
            _add_residuals, (triton.cdiv(self._count, _RESIDUAL_IDS),), *self._args,
            new_codes, new_hash.multiplier, new_hash.addend, *books, *stats,
            BY_PAIR=by_pair, DIM=dim, DIMS=min(_MOST_DIMS, triton.next_power_of_2(dim)),
            IDS=_RESIDUAL_IDS,
        )  # fmt: skip

    def count_changed(self, new_codes: torch.Tensor, by_pair: bool, changed: torch.Tensor) -> None:
        """Adds the number of ids whose code is another one to `changed`, int64 [1]."""
        self._relabel(new_codes, by_pair, changed, None)

    def new_codes(self, new_codes: torch.Tensor, by_pair: bool) -> torch.Tensor:
        """New codes of these ids, int32 [n]."""
        out = torch.empty(self._count, dtype=torch.int32, device=self.codes.device)
        self._relabel(new_codes, by_pair, None, out)
        return out

    def _relabel(
        self,
        new_codes: torch.Tensor,
        by_pair: bool,
        changed: torch.Tensor | None,
        out: torch.Tensor | None,
    ) -> None:
        grid = (triton.cdiv(self._count, _IDS),)
        launch(
            _relabel, grid, *self._args, new_codes, changed, out, BY_PAIR=by_pair, IDS=_IDS
        )  # fmt: skip


@triton.jit
def _main_row(codes_ptr, levels_ptr, bits, shift, stride, begin, at, on):  # type: ignore[no-untyped-def]  # Triton's own types
    # Of the codebooks of points: the code, or (code, level) where ids are counted.
    bit = (at >> shift) * stride * 8 + begin + (at & ((1 << shift) - 1)) * bits
    has_bits = bits + tl.zeros(at.shape, tl.int64) > 0
    code = code_at(codes_ptr, bit, tl.maximum(bits, 1), on & has_bits)
    if levels_ptr is None:
        return code
    else:
        pair = tl.load(levels_ptr + (at >> 1), mask=on, other=0).to(tl.int64)
        return code * _LEVELS + ((pair >> ((at & 1) * 4)) & 15)


@triton.jit
def _read_whole(codes_ptr, cell, on):  # type: ignore[no-untyped-def]  # Triton's own types
    code = tl.load(codes_ptr + cell, mask=on, other=0)
    if codes_ptr.dtype.element_ty == tl.int16:  # unsigned values
        return code.to(tl.int64) & 0xFFFF
    else:
        return code.to(tl.int64)


@triton.jit(do_not_specialize=_VARYING)
def _write_pairs(  # type: ignore[no-untyped-def]
    codes_ptr, levels_ptr, bits, shift, stride, begin, first, count, base, multiplier, addend,
    helper_rows,
    a_ptr, b_ptr, KEYS: tl.constexpr, IDS: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * IDS + tl.arange(0, IDS)
    on = at < count
    ids = first + at
    a = _main_row(codes_ptr, levels_ptr, bits, shift, stride, begin, ids - base, on)
    b = hashed(mix(ids), multiplier, addend, helper_rows)
    if KEYS:
        tl.store(a_ptr + at, a * helper_rows + b, mask=on)
    else:
        if levels_ptr is not None:
            b += a % _LEVELS * helper_rows
        tl.store(a_ptr + at, a.to(tl.int32), mask=on)
        tl.store(b_ptr + at, b.to(tl.int32), mask=on)


@triton.jit(do_not_specialize=_VARYING)
def _count_pairs(  # type: ignore[no-untyped-def]
    codes_ptr, levels_ptr, bits, shift, stride, begin, first, count, base, multiplier, addend,
    helper_rows,
    weights_ptr, counts_ptr, WEIGHTED: tl.constexpr, IDS: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * IDS + tl.arange(0, IDS)
    on = at < count
    ids = first + at
    a = _main_row(codes_ptr, levels_ptr, bits, shift, stride, begin, ids - base, on)
    key = a * helper_rows + hashed(mix(ids), multiplier, addend, helper_rows)
    if WEIGHTED:
        weight = tl.load(weights_ptr + at, mask=on, other=0)
    else:
        weight = tl.full((IDS,), 1, counts_ptr.dtype.element_ty)
    # Relaxed: nothing reads the counts before the kernel has ended.
    tl.atomic_add(counts_ptr + key, weight, mask=on, sem="relaxed")


@triton.jit(do_not_specialize=[*_VARYING, "room"])
def _append_sampled(  # type: ignore[no-untyped-def]
    codes_ptr, levels_ptr, bits, shift, stride, begin, first, count, base, multiplier, addend,
    helper_rows,
    weights_ptr, keys_ptr, sums_ptr, found_ptr, room, sample_multiplier, sample_addend, threshold,
    WEIGHTED: tl.constexpr, IDS: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * IDS + tl.arange(0, IDS)
    ids = first + at
    mixed = mix(ids)
    on = (at < count) & (bits31(mixed, sample_multiplier, sample_addend) < threshold)
    a = _main_row(codes_ptr, levels_ptr, bits, shift, stride, begin, ids - base, on)
    key = a * helper_rows + hashed(mixed, multiplier, addend, helper_rows)
    # One atomic a program: places within it follow from a running sum.
    upto = tl.cumsum(on.to(tl.int32), axis=0)
    taken = tl.atomic_add(found_ptr, tl.max(upto, axis=0).to(tl.int64), sem="relaxed")
    to = taken + upto - 1
    # What has no room is counted all the same: the caller makes room for it and starts again.
    on &= to < room
    tl.store(keys_ptr + to, key, mask=on)
    if WEIGHTED:
        tl.store(sums_ptr + to, tl.load(weights_ptr + at, mask=on, other=0), mask=on)


@triton.jit
def _new_code(new_codes_ptr, key, at, on, BY_PAIR: tl.constexpr):  # type: ignore[no-untyped-def]
    if BY_PAIR:
        return _read_whole(new_codes_ptr, key, on)
    else:
        return _read_whole(new_codes_ptr, at, on)


@triton.jit(do_not_specialize=_VARYING)
def _add_residuals(  # type: ignore[no-untyped-def]
    codes_ptr, levels_ptr, bits, shift, stride, begin, first, count, base, multiplier, addend,
    helper_rows,
    new_codes_ptr, new_multiplier, new_addend, main_ptr, helper_ptr, centroids_ptr, sums_ptr,
    sizes_ptr, BY_PAIR: tl.constexpr, DIM: tl.constexpr, DIMS: tl.constexpr, IDS: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * IDS + tl.arange(0, IDS)
    on = at < count
    ids = first + at
    mixed = mix(ids)
    a = _main_row(codes_ptr, levels_ptr, bits, shift, stride, begin, ids - base, on)
    b = hashed(mixed, multiplier, addend, helper_rows)
    row = hashed(mixed, new_multiplier, new_addend, helper_rows)
    new = _new_code(new_codes_ptr, a * helper_rows + b, at, on, BY_PAIR)
    of_helper = b
    if levels_ptr is not None:
        of_helper += a % _LEVELS * helper_rows
    for start in range(0, DIM, DIMS):
        dims = start + tl.arange(0, DIMS)
        inside = on[:, None] & (dims < DIM)[None, :]
        x = tl.load(main_ptr + a[:, None] * DIM + dims[None, :], mask=inside, other=0).to(tl.int64)
        x += tl.load(helper_ptr + of_helper[:, None] * DIM + dims[None, :], mask=inside, other=0)
        x -= tl.load(centroids_ptr + new[:, None] * DIM + dims[None, :], mask=inside, other=0)
        tl.atomic_add(sums_ptr + row[:, None] * DIM + dims[None, :], x, mask=inside, sem="relaxed")
    tl.atomic_add(sizes_ptr + row, tl.full((IDS,), 1, tl.int64), mask=on, sem="relaxed")


@triton.jit(do_not_specialize=_VARYING)
def _relabel(  # type: ignore[no-untyped-def]
    codes_ptr, levels_ptr, bits, shift, stride, begin, first, count, base, multiplier, addend,
    helper_rows,
    new_codes_ptr, changed_ptr, out_ptr, BY_PAIR: tl.constexpr, IDS: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * IDS + tl.arange(0, IDS)
    on = at < count
    ids = first + at
    a = _main_row(codes_ptr, levels_ptr, bits, shift, stride, begin, ids - base, on)
    key = a * helper_rows + hashed(mix(ids), multiplier, addend, helper_rows)
    new = _new_code(new_codes_ptr, key, at, on, BY_PAIR)
    if changed_ptr is not None:
        if levels_ptr is not None:
            a //= _LEVELS
        differs = tl.sum((on & (new != a)).to(tl.int64), axis=0)
        tl.atomic_add(changed_ptr, differs, sem="relaxed")
    if out_ptr is not None:
        tl.store(out_ptr + at, new.to(tl.int32), mask=on)
