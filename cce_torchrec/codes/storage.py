"""Packed codes of a table's chunks, made and converted; the bits of seen ids."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from cce_torchrec.codes.hashing import code_hash, mix
from cce_torchrec.config import CCEEmbeddingBagConfig
from cce_torchrec.packing import CodePacking

# Ids at a time, as int64 mixes and rows of all ids take several times what their codes do.
_BLOCK = 1 << 20
_WORD = 8


def empty_codes(
    packing: CodePacking, ids: int, chunks: int, device: torch.device | None
) -> torch.Tensor:
    """Room for packed codes, in memory of whole words."""
    rows, width = packing.shape(ids, chunks)
    room = -(-rows * width // _WORD) * _WORD
    return torch.zeros(room, dtype=torch.uint8, device=device)[: rows * width].view(rows, width)


def hashed_codes(
    config: CCEEmbeddingBagConfig,
    chunks: Sequence[int],
    device: torch.device,
    ids: range | None = None,
) -> torch.Tensor:
    """Initial codes of `ids` (all N), packed uint8 (see packing.py), made in blocks."""
    ids = range(config.num_embeddings) if ids is None else ids
    codes = empty_codes(config.packing, len(ids), len(chunks), device)
    if codes.device.type != "meta":
        fill_hashed(codes, config, chunks, ids)
    return codes


def fill_hashed(
    codes: torch.Tensor,
    config: CCEEmbeddingBagConfig,
    chunks: Sequence[int],
    ids: range,
    first: int = 0,
) -> None:
    """Writes the initial codes of `ids[first:]` into `codes`, the packed codes of `ids`."""
    packing = config.packing
    # Blocks begin at groups; of the first one the ids before `first` keep theirs.
    begin = first // packing.group * packing.group
    for start in range(begin, len(ids), _BLOCK):
        own = ids[start : start + _BLOCK]
        mixed = mix(torch.arange(own.start, own.stop, device=codes.device))
        for column, chunk in enumerate(chunks):
            rows = code_hash(config.seed, config.name, chunk).of_mixed(mixed, config.num_rows)
            if start < first:
                kept = column_of(codes, packing, column, start, first)
                rows[: first - start] = kept
            packing.write(codes, column, start, rows)


def column_of(
    codes: torch.Tensor, packing: CodePacking, column: int, first: int, last: int
) -> torch.Tensor:
    """Codes of ids [first, last) of one chunk, int64; counted from the first id of `codes`."""
    # A tensor without columns does not say how many ids it has.
    if not packing.bits:
        return torch.zeros(last - first, dtype=torch.int64, device=codes.device)
    begin, width = first // packing.group, packing.width
    rows = codes[begin : packing.rows(last), column * width : (column + 1) * width]
    return packing.unpack(rows, last - first, first % packing.group).view(-1)


def in_whole_words(packed: torch.Tensor) -> torch.Tensor:
    """`packed`, or a copy, in a row, in memory of whole words of 8 bytes, the first at its start.

    Compiled kernels read codes of any bits, and write bits of seen ids, by words.
    """
    padding = -packed.numel() % _WORD
    room = packed.untyped_storage().nbytes() - packed.storage_offset()
    aligned = packed.storage_offset() % _WORD == 0  # storages begin at whole words
    if packed.device.type == "meta" or (
        packed.is_contiguous() and aligned and room >= packed.numel() + padding
    ):
        return packed
    flat = torch.nn.functional.pad(packed.reshape(-1), (0, padding))
    return flat[: packed.numel()].view(packed.shape)


def converted(
    codes: torch.Tensor, before: CodePacking, after: CodePacking, ids: int, chunks: int
) -> torch.Tensor:
    """A copy of `codes`, of so many ids and chunks, packed in another way, made in blocks."""
    out = empty_codes(after, ids, chunks, codes.device)
    if not before.bits or codes.is_meta:  # all codes are 0
        return out
    for start in range(0, ids, _BLOCK):
        stop = min(start + _BLOCK, ids)
        part = before.unpack(codes[start // before.group : before.rows(stop)], stop - start)
        out[start // after.group : after.rows(stop)] = after.pack(part)
    return out


def no_seen_ids(count: int, device: torch.device) -> torch.Tensor:
    """Bits of `count` ids, none set: uint8 [count // 8 + 2], in memory of whole words."""
    return in_whole_words(torch.zeros(count // 8 + 2, dtype=torch.uint8, device=device))


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
