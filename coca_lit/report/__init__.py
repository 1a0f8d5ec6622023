"""Reports of finished runs, made from their folders alone: `report.html`, which needs nothing else, and `report.md`."""

from coca_lit.report.write import write_comparison, write_report

__all__ = ["write_comparison", "write_report"]
