"""Reports of finished runs, made from their folders alone: `report.html`, which needs nothing else, and `report.md`."""
