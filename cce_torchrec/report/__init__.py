"""Pages in HTML about runs of the training program."""

from cce_torchrec.report.page import write_report

__all__ = ["write_report"]
