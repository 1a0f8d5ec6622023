"""Reports of finished runs, made from their folders alone, by `page.write_report` and `page.write_comparison`."""
