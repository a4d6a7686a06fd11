"""Codes [N, c] of a table's chunks: storage type, initial hash, lookup."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from cce_torchrec.codes.hashing import code_hash, mix
from cce_torchrec.config import CCEEmbeddingBagConfig, code_dtype

# Ids at a time, as int64 mixes and rows of all ids take several times what their codes do.
_BLOCK = 1 << 20
_WORDS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def hashed_codes(
    config: CCEEmbeddingBagConfig,
    chunks: Sequence[int],
    device: torch.device,
    ids: range | None = None,
) -> torch.Tensor:
    """Initial codes of `ids` (all N), [len(ids), len(chunks)] in storage type, made in blocks."""
    ids = range(config.num_embeddings) if ids is None else ids
    codes = torch.empty(len(ids), len(chunks), dtype=code_dtype(config.num_rows), device=device)
    if codes.device.type != "meta":
        fill_hashed(codes, config, chunks, ids.start)
    return codes


def fill_hashed(
    codes: torch.Tensor, config: CCEEmbeddingBagConfig, chunks: Sequence[int], first: int = 0
) -> None:
    """Writes the initial codes of the ids from `first` on into `codes` [ids, len(chunks)]."""
    for start in range(0, len(codes), _BLOCK):
        part = codes[start : start + _BLOCK]
        mixed = mix(torch.arange(first + start, first + start + len(part), device=codes.device))
        for column, chunk in enumerate(chunks):
            rows = code_hash(config.seed, config.name, chunk).of_mixed(mixed, config.num_rows)
            part[:, column] = rows.to(codes.dtype)


def widen(codes: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Codes as int64 rows; int16 storage holds unsigned values.

    Args:
        codes: in storage type, or what stands for them in a graph.
        dtype: their type, of which a graph's stand-in says nothing.
    """
    dtype = codes.dtype if dtype is None else dtype
    return codes.long() & 0xFFFF if dtype == torch.int16 else codes.long()


def read_codes(codes: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Codes of `ids` [V] as int64 rows [V, c]."""
    # All codes of an id are gathered as one word where there is one of their width: 0.26 ms
    # against 1.0 for rows of four int16.
    word = _WORDS.get(codes.shape[1] * codes.element_size())
    if word is None or not codes.is_contiguous():
        return widen(codes.index_select(0, ids))
    words = codes.view(word).view(-1).index_select(0, ids)
    return widen(words.view(-1, 1).view(codes.dtype))


def in_rows(codes: torch.Tensor) -> torch.Tensor:
    """`codes` [N, c], or a copy of them, with those of an id side by side and rows as whole words.

    Kernels read them by address, a row at once.
    """
    aligned = codes.storage_offset() * codes.element_size() % 8 == 0  # storages begin so
    return (
        codes
        if codes.is_contiguous() and aligned
        else codes.clone(memory_format=torch.contiguous_format)
    )


def pack(rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Rows as codes of storage type `dtype`; the inverse of `widen`."""
    return rows.to(dtype)


def converted(codes: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A copy of `codes` in storage type `dtype`, made in blocks."""
    out = torch.empty_like(codes, dtype=dtype)
    for start in range(0, len(codes), _BLOCK):
        out[start : start + _BLOCK] = pack(widen(codes[start : start + _BLOCK]), dtype)
    return out


def no_seen_ids(count: int, device: torch.device) -> torch.Tensor:
    """Bits of `count` ids, none set: uint8 [count // 8 + 2], in memory of whole words."""
    return in_whole_words(torch.zeros(count // 8 + 2, dtype=torch.uint8, device=device))


def in_whole_words(bits: torch.Tensor) -> torch.Tensor:
    """`bits`, or a copy of them, in memory of whole words of 4 bytes, the first at its start.

    A GPU has no atomic operation on bytes: the kernel that marks ids reads and writes words.
    """
    padding = -len(bits) % 4
    room = bits.untyped_storage().nbytes() - bits.storage_offset()
    aligned = bits.storage_offset() % 4 == 0  # storages begin at whole words
    if bits.device.type == "meta" or (aligned and room >= len(bits) + padding):
        return bits
    return torch.nn.functional.pad(bits, (0, padding))[: len(bits)]


def mark_seen(seen: torch.Tensor, ids: torch.Tensor) -> None:
    """Sets the bits of `ids` (int64, in range) in `seen`, uint8 [N // 8 + 2]."""
    # One pass per bit: ids that share a byte then write the same value. The last byte takes what
    # belongs to other passes: to select the ids of a pass would wait for the device.
    byte, bit, spare = ids >> 3, ids & 7, seen.numel() - 1
    for value in range(8):
        at = torch.where(bit == value, byte, spare)
        seen[at] = seen[at] | (1 << value)


def seen_ids(seen: torch.Tensor, num_embeddings: int) -> torch.Tensor:
    """1 for every id whose bit is set, else 0; uint8 [N]."""
    bits = torch.arange(8, dtype=torch.uint8, device=seen.device)
    return ((seen[:, None] >> bits) & 1).view(-1)[:num_embeddings]
