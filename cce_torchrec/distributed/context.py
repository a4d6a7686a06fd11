"""What one batch carries from its input distribution to its output."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torchrec.distributed.embedding_types import KJTList
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionContext
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from cce_torchrec.distributed.code_fetch import Answered


@dataclass
class CCEContext(EmbeddingBagCollectionContext):
    """TorchRec's context, and what was done with codes that may be rewritten meanwhile."""

    fetched_for: KeyedJaggedTensor | None = None
    """The rank's own features, where codes were fetched and may have to be once more."""
    generation: int = 0
    """Of the collection, when codes were fetched."""
    answered: Answered = field(default_factory=list)
    """Ids of this rank's blocks that any rank looks up by this batch."""
    expanded: KJTList | None = None
    """Codebook rows, where a pipeline prefetches before it looks up."""
    expanded_at: int = 0
    """Generation of the collection, when the rows were found."""

    def record_stream(self, stream: torch.Stream) -> None:
        """Keeps the tensors alive for the work that `stream` has been given."""
        super().record_stream(stream)
        for held in (self.fetched_for, self.expanded):
            if held is not None:
                held.record_stream(stream)
        for _, ids in self.answered:
            ids.record_stream(stream)
