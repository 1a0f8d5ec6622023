"""CLIP_benchmark's data sets in its layout of shards, and its command line with models of coca_lit."""
