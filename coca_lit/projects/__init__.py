"""Ideas upon the nucleus and the tools, a folder each, that nothing else names: see `coca_lit.extensions`."""
