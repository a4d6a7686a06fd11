"""How codes lie in memory and in checkpoints: packed to the bits that their rows need.

A row of packed codes is that of a *group* of neighbouring ids, the fewest whose codes fill whole
bytes: 1, 2, 4 or 8. In it are the chunks side by side, `width` bytes each, and in these the codes
of the group, id r from bit `r * bits` on, the lowest bit of a byte first. So all codes of an id are
in one place of memory, one word for most tables; a chunk is a column of bytes and a block of ids a
run of rows, and any plan reads what another one has written. Codes of 8, 16 and 32 bits lie as an
array [N, c] of these integers does. FAISS packs blocks of codes chunk by chunk for the same reason
(its "fast scan" layout); hashing.h and gpu/triton_functions.py read the same form.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

GROUP = 8
"""Ids at whose multiples codes of any number of bits begin a byte: where tables are cut by ids."""
_WORDS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class CodePacking:
    """Codes of `bits` bits: 0 to 32. Those of 0 bits take no memory."""

    bits: int

    @classmethod
    def of_rows(cls, num_rows: int) -> CodePacking:
        """Of codes that address `num_rows` rows: the fewest bits, with few ids in a row.

        Above 4 bits an even number, above 16 a multiple of 4.
        """
        bits = (num_rows - 1).bit_length()
        # So the bytes of a chunk fit a word of 64 bits, and lookups read them at once; rows of
        # eight ids of 9 bits or more were read up to twice as slowly.
        unit = 1 if bits <= 4 else 2 if bits <= 16 else 4
        return cls(-(-bits // unit) * unit)

    @property
    def group(self) -> int:
        """Ids of a row."""
        return GROUP // math.gcd(self.bits, GROUP)

    @property
    def width(self) -> int:
        """Bytes of a chunk in a row."""
        return self.bits // math.gcd(self.bits, GROUP)

    @property
    def _mask(self) -> int:
        return (1 << self.bits) - 1

    def rows(self, ids: int) -> int:
        """Rows of so many ids."""
        return -(-ids // self.group)

    def shape(self, ids: int, chunks: int) -> list[int]:
        """Of the packed codes of so many ids and chunks."""
        return [self.rows(ids), chunks * self.width]

    def nbytes(self, ids: int, chunks: int) -> int:
        """Bytes of the codes of so many ids and chunks."""
        return math.prod(self.shape(ids, chunks))

    def bytes_of(self, chunks: Sequence[int]) -> list[int]:
        """The columns of bytes in which `chunks` are, in their order."""
        return [chunk * self.width + byte for chunk in chunks for byte in range(self.width)]

    def pack(self, codes: torch.Tensor) -> torch.Tensor:
        """Packed `codes` [n, c] of any integer type, uint8 [rows of n, c * width].

        Bits of ids beyond the last are 0.
        """
        ids, chunks = codes.shape
        # int32 holds every code, and moves half of what int64 would.
        groups = codes.new_zeros(self.rows(ids) * self.group, chunks, dtype=torch.int32)
        groups[:ids] = codes
        groups = groups.view(-1, self.group, chunks)
        out = groups.new_zeros(len(groups), chunks, self.width, dtype=torch.uint8)
        for byte in range(self.width):
            for member in range(self.group):
                shift = member * self.bits - 8 * byte
                # Only members of which some bits are in this byte.
                if -self.bits < shift < 8:
                    part = groups[:, member]
                    part = part << shift if shift >= 0 else part >> -shift
                    out[:, :, byte] |= part.to(torch.uint8)
        return out.view(len(out), chunks * self.width)

    def unpack(self, packed: torch.Tensor, ids: int, first: int = 0) -> torch.Tensor:
        """Codes int64 [ids, c] of the ids from `first` of the first row of `packed` on."""
        rows, chunks = packed.shape[0], packed.shape[1] // max(1, self.width)
        if not self.bits:
            return packed.new_zeros(ids, chunks, dtype=torch.int64)
        grouped = packed.reshape(rows, chunks, self.width)
        out = packed.new_empty(rows, self.group, chunks, dtype=torch.int64)
        for member in range(self.group):
            at, shift = divmod(member * self.bits, 8)
            out[:, member] = self._gathered(grouped[:, :, at:], shift) >> shift
        out = out.bitwise_and_(self._mask).view(rows * self.group, chunks)
        return out[first : first + ids]

    def read(self, packed: torch.Tensor, ids: torch.Tensor, chunks: int) -> torch.Tensor:
        """Codes of `ids` [V] among `packed` ones of `chunks` chunks, int64 [V, chunks].

        Recorded by torch.fx, by which `packed` and `ids` may stand for tensors.
        """
        if not self.bits:
            return torch.zeros(len(ids), chunks, dtype=torch.int64, device=ids.device)
        row, member = ids, None
        if self.group > 1:
            row, member = ids // self.group, ids % self.group
        found = torch.index_select(packed, 0, row).view(-1, chunks, self.width)
        if member is None:
            return self._gathered(found, 0) & self._mask
        bit = (member * self.bits).view(-1, 1)
        # A chunk of a group in one byte needs no second index.
        if self.width == 1:
            return (found.view(-1, chunks).long() >> bit) & self._mask
        out: torch.Tensor | None = None
        for byte in range(self._most_bytes()):
            # Beyond the last byte is nothing of the code: what is read there is masked out.
            at = (bit // 8 + byte).clamp(max=self.width - 1).unsqueeze(2).expand(-1, chunks, 1)
            part = found.gather(2, at).squeeze(2).long() << 8 * byte
            out = part if out is None else out | part
        assert out is not None
        return (out >> bit % 8) & self._mask

    def read_words(self, packed: torch.Tensor, ids: torch.Tensor, chunks: int) -> torch.Tensor:
        """The same, by rows that are gathered as one word each where there is one of their size."""
        # 0.26 ms against 1.0 for rows of four codes of two bytes.
        word = _WORDS.get(chunks * self.width)
        if word is None or not packed.is_contiguous() or packed.storage_offset() % word.itemsize:
            return self.read(packed, ids, chunks)
        words = packed.view(word).view(-1).index_select(0, ids // self.group).long()
        first = torch.arange(chunks, device=ids.device) * (8 * self.width)
        return (words[:, None] >> (first + (ids % self.group * self.bits)[:, None])) & self._mask

    def write(self, packed: torch.Tensor, column: int, first: int, codes: torch.Tensor) -> None:
        """Writes `codes` [n] of a chunk, for the ids from `first` on, into `packed` in place.

        `first` is one of a group's first ids, and the last id is the last of its group or of all.
        """
        assert first % self.group == 0
        start = first // self.group
        part = self.pack(codes.view(-1, 1))
        packed[start : start + len(part), column * self.width : (column + 1) * self.width] = part

    def _gathered(self, found: torch.Tensor, shift: int) -> torch.Tensor:
        """The bytes [..., b] that hold a code from bit `shift` of the first on, as one integer."""
        out = found.select(-1, 0).long()
        for byte in range(1, -(-(shift + self.bits) // 8)):
            out = out | (found.select(-1, byte).long() << 8 * byte)
        return out

    def _most_bytes(self) -> int:
        """That any code of a group lies in."""
        return max(-(-(m * self.bits % 8 + self.bits) // 8) for m in range(self.group))
