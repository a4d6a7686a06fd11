"""The clustering step: relearn codes, codebooks and hashes of all CCE tables of a model."""

from cce_torchrec.versions import check_installation

check_installation()  # before TorchRec is loaded, whose errors do not say what to do

from cce_torchrec.clustering.finalizing import finalize  # noqa: E402
from cce_torchrec.clustering.imported import (  # noqa: E402
    ImportReport,
    import_curve,
    import_table,
)
from cce_torchrec.clustering.report import ChunkReport, ClusteringReport  # noqa: E402
from cce_torchrec.clustering.schedule import ClusteringSchedule  # noqa: E402
from cce_torchrec.clustering.step import cluster  # noqa: E402

__all__ = [
    "ChunkReport",
    "ClusteringReport",
    "ClusteringSchedule",
    "ImportReport",
    "cluster",
    "finalize",
    "import_curve",
    "import_table",
]
