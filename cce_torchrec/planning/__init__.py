"""Plans of logical tables: by TorchRec's planner, in bytes, and to fit a memory budget."""

from cce_torchrec.versions import check_installation

check_installation()  # before TorchRec is loaded, whose errors do not say what to do

from cce_torchrec.planning.advice import Advice, TableAdvice, advise, id_counts  # noqa: E402
from cce_torchrec.planning.fit_to_memory import tables_for_memory  # noqa: E402
from cce_torchrec.planning.planner import make_plan, make_planner  # noqa: E402
from cce_torchrec.planning.report import PlannedTable, PlanReport, plan_report  # noqa: E402

__all__ = [
    "Advice",
    "PlanReport",
    "PlannedTable",
    "TableAdvice",
    "advise",
    "id_counts",
    "make_plan",
    "make_planner",
    "plan_report",
    "tables_for_memory",
]
