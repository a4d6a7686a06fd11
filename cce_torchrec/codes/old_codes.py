"""Codes as checkpoints of formats 2 and 3 have them: [N, c] of uint8, int16 (unsigned) or int32."""

from __future__ import annotations

from typing import Any

import torch

from cce_torchrec.codes.storage import converted
from cce_torchrec.codes.whole_codes import whole_dtype
from cce_torchrec.config import CCEEmbeddingBagConfig
from cce_torchrec.packing import CodePacking


def packed_codes(codes: torch.Tensor, packing: CodePacking) -> torch.Tensor:
    """Packed `codes` [ids, c] of an old type; where they lay so before, the same memory."""
    whole = CodePacking(8 * codes.element_size())
    found = codes.contiguous().view(torch.uint8)
    if whole == packing:
        return found
    return converted(found, whole, packing, *codes.shape)


def take_old_codes(
    config: CCEEmbeddingBagConfig, state: dict[str, Any], key: str, ids: int, chunks: int
) -> None:
    """Packs the codes `key` of `state`, which is about to be loaded, if they are of the old form.

    Args:
        config: of the table.
        state: of which other entries are left alone.
        key: name of the codes of `ids` ids and `chunks` chunks.
    """
    found = state.get(key)
    if not isinstance(found, torch.Tensor) or list(found.size()) != [ids, chunks]:
        return
    if found.dtype != whole_dtype(config.code_bits) or not config.learned_codes:
        return
    if not config.code_bits:
        del state[key]  # all were 0
    elif list(found.size()) != config.packing.shape(ids, chunks) or found.dtype != torch.uint8:
        state[key] = packed_codes(found, config.packing)
