"""Weights in and out of a model: names, our files, OpenCLIP's, CLIP towers, interpolation, LoRA."""

MODEL_KEY = "coca_lit_model"  # of the arguments of `CoCa` in our checkpoints and exports
OBJECTIVES_KEY = "coca_lit_classifiers"  # of what describes the objectives that are kept with it, by name
