"""How far two tables, checkpoints or models agree: vectors, neighbours and codes."""

from cce_torchrec.alignment.activations import align_activations
from cce_torchrec.alignment.agreement import CodeCounts, adjusted_mutual_information
from cce_torchrec.alignment.interval import Interval
from cce_torchrec.alignment.linear import (
    debiased_cka,
    linear_cka,
    mean_cca,
    procrustes_distance,
    svcca,
)
from cce_torchrec.alignment.live import LiveTable
from cce_torchrec.alignment.measures import Alignment
from cce_torchrec.alignment.moments import Moments, moments
from cce_torchrec.alignment.neighbours import Neighbourhoods, neighbourhoods
from cce_torchrec.alignment.saved import align_checkpoints
from cce_torchrec.alignment.tables import Weight, align

__all__ = [
    "Alignment",
    "CodeCounts",
    "Interval",
    "LiveTable",
    "Moments",
    "Neighbourhoods",
    "Weight",
    "adjusted_mutual_information",
    "align",
    "align_activations",
    "align_checkpoints",
    "debiased_cka",
    "linear_cka",
    "mean_cca",
    "moments",
    "neighbourhoods",
    "procrustes_distance",
    "svcca",
]
