"""Studies: what was learned from running the experiments. They use the package; nothing of it uses them."""
