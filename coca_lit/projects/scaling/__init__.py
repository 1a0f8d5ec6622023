"""A grid of sizes and lengths, and a saturating power law through its runs."""
