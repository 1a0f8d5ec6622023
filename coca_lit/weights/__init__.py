"""Weights in and out of a model: names, our files, OpenCLIP's, CLIP towers, interpolation, LoRA."""

CLASSIFIERS_KEY = "coca_lit_classifiers"  # of what describes the classifiers in our checkpoints, by name
MODEL_KEY = "coca_lit_model"  # of the arguments of `CoCa` in our checkpoints and exports
