"""What one batch carries from its input distribution to its output."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torchrec.distributed.embedding_sharding import EmbeddingShardingContext
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionContext

from cce_torchrec.distributed.batch_form import BatchRefusedError
from cce_torchrec.distributed.batch_in_flight import BatchInFlight


@dataclass
class CCEContext(EmbeddingBagCollectionContext):
    """TorchRec's context, and what was computed from codes that may change meanwhile."""

    sharding_contexts: list[EmbeddingShardingContext] = field(  # type: ignore[assignment]  # as said
        default_factory=list
    )
    """One per lookup; TorchRec's type allows None, which no input distribution here puts in."""
    in_flight: BatchInFlight = field(kw_only=True)
    refusals: list[BatchRefusedError] = field(default_factory=list, kw_only=True)
    """Why this rank has refused the batch; raised where the others hear of it."""

    def record_stream(self, stream: torch.Stream) -> None:
        """Keeps the tensors alive for the work that `stream` has been given."""
        super().record_stream(stream)
        self.in_flight.record_stream(stream)
