"""CCE (Clustered Compositional Embeddings) for TorchRec."""

from cce_torchrec.versions import check_fbgemm, check_versions

check_versions()
check_fbgemm()

from cce_torchrec.config import CCEEmbeddingBagConfig  # noqa: E402
from cce_torchrec.modules.compress import compress_model  # noqa: E402
from cce_torchrec.modules.embedding_bag_collection import CCEEmbeddingBagCollection  # noqa: E402
from cce_torchrec.modules.embedding_collection import CCEEmbeddingCollection  # noqa: E402
from cce_torchrec.modules.managed_collision import refuse as _refuse  # noqa: E402, F401

__all__ = [
    "CCEEmbeddingBagCollection",
    "CCEEmbeddingBagConfig",
    "CCEEmbeddingCollection",
    "compress_model",
]
